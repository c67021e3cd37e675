"""gpt-oss with experts in MXFP4, written: golden bytes, any slabs, transformers' reading, the way there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import pipeline
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import FormatError, NonFiniteError, OutputError
from lowbit.export import Piece
from lowbit.export.safetensors_writer import SafetensorsWriter
from lowbit.formats.mxfp4 import write as exporter
from lowbit.numerics import grid_for
from lowbit.schemes import SCHEMES
from lowbit.tensors import Granularity, QuantizedTensor
from models import make_model

SCHEME = SCHEMES["MXFP4A16"]
HIDDEN, SIZE, EXPERTS = 64, 96, 4
P = "model.layers.1.mlp.experts"
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Hidden and expert size differ, so that a transposition shows."""
    return make_model(tmp_path_factory.mktemp("gpt_oss") / "source", "gpt_oss", hidden_size=HIDDEN, head_dim=16,
                      intermediate_size=SIZE)  # fmt: skip


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4") / "out"
    lowbit.quantize(source, folder, scheme="MXFP4A16", format="mxfp4")
    return folder


@pytest.fixture(scope="module")
def decoded(quantized, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "out"
    lowbit.convert(quantized, folder, format="float")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def weights_of(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """`name`_blocks and _scales decoded by the definition of MX: [E, rows, columns]."""
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = VALUES[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(20)[None]).logits


def test_golden_bytes():
    """Codes 0..15 twice over: the even column in the low nibble; 2^-3 is 124."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    grid = grid_for(SCHEME.weight, "float32")
    weight = QuantizedTensor(codes, torch.tensor([[0.125]]), grid, Granularity.GROUP, 32)
    blocks, scales = exporter.pack("L", weight, SCHEME, 5, (6, 32), torch.bfloat16)
    assert (blocks.name, blocks.row, scales.name, scales.row) == ("L.weight_blocks", 5, "L.weight_scales", 5)
    assert blocks.values.tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]]
    assert scales.values.tolist() == [[124]]
    planned = exporter.stored_tensors("L", (1, 32), SCHEME, torch.bfloat16)
    assert [(t.name, t.shape) for t in planned] == [(p.name, tuple(p.values.shape)) for p in (blocks, scales)]


def test_what_is_stored(source, quantized):
    """The names and shapes of the released models; what is no expert is the source's, biases included."""
    stored, given = tensors(quantized), tensors(source)
    assert list(stored[f"{P}.gate_up_proj_blocks"].shape) == [EXPERTS, 2 * SIZE, HIDDEN // 32, 16]
    assert list(stored[f"{P}.gate_up_proj_scales"].shape) == [EXPERTS, 2 * SIZE, HIDDEN // 32]
    assert list(stored[f"{P}.down_proj_blocks"].shape) == [EXPERTS, HIDDEN, SIZE // 32, 16]
    assert list(stored[f"{P}.down_proj_scales"].shape) == [EXPERTS, HIDDEN, SIZE // 32]
    packed = {name for name in given if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert stored.keys() == given.keys() - packed | {f"{n}_{leaf}" for n in packed for leaf in ("blocks", "scales")}
    assert all(torch.equal(stored[name], given[name]) for name in given.keys() - packed)


def test_config_says_what_the_released_one_says(quantized):
    assert json.loads((quantized / "config.json").read_text())["quantization_config"] == {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
        "quant_method": "mxfp4",
    }  # fmt: skip


def test_every_row_is_where_it_came_from(source, quantized):
    """Row r of the fused blocks is column r of the fused floats, rounded."""
    stored, given = tensors(quantized), tensors(source)
    for name in ("gate_up_proj", "down_proj"):
        ours, theirs = weights_of(stored, f"{P}.{name}"), given[f"{P}.{name}"].float().transpose(1, 2)
        error = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
        assert float(error.max()) < 0.05


def test_the_report_counts_each_expert_once(source, quantized):
    report = json.loads((quantized / "lowbit-report.json").read_text())
    experts = [tensor for tensor in report["tensors"] if tensor["scheme"]]
    assert len(experts) == 2 * EXPERTS * 3
    assert {tensor["bits_per_weight"] for tensor in experts} == {4.25}
    written = sum(values.nbytes for values in tensors(quantized).values())
    assert sum(tensor["bytes"] for tensor in report["tensors"]) == written
    attention = next(tensor for tensor in report["tensors"] if "q_proj.weight" in tensor["name"])
    assert "experts only" in attention["reason"]


@pytest.mark.parametrize("slab_weights", [200, 64 * 7, 10**9])
def test_slabs_of_any_size_give_the_same_bytes(source, quantized, decoded, tmp_path, slab_weights, monkeypatch):
    """200: slabs of 3 rows of 64 weights, the last of one, and of 2 rows of 96."""
    monkeypatch.setattr(pipeline, "SLAB_WEIGHTS", slab_weights)
    lowbit.quantize(source, tmp_path / "q", scheme="MXFP4A16", format="mxfp4", threads=3)
    lowbit.convert(quantized, tmp_path / "f", format="float", threads=3)
    for made, first in ((tmp_path / "q", quantized), (tmp_path / "f", decoded)):
        assert (made / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_back_to_mxfp4_byte_for_byte(quantized, tmp_path):
    report = lowbit.convert(quantized, tmp_path / "out", format="mxfp4").report
    assert all(tensor.repacked for tensor in report.tensors if tensor.scheme)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (quantized / name).read_bytes()


def test_every_byte_that_others_may_have_stored_comes_back(quantized, tmp_path):
    """Negative zeros, and exponents from the least to the largest."""
    stored = tensors(quantized)
    torch.manual_seed(0)
    for name in [name for name in stored if name.endswith("_blocks")]:
        stored[name] = torch.randint(0, 256, stored[name].shape, dtype=torch.uint8)
        scales = stored[f"{name.removesuffix('_blocks')}_scales"]
        scales.copy_(torch.arange(scales.numel()).remainder(250).reshape(scales.shape))
    shutil.copytree(quantized, tmp_path / "theirs")
    save_file(stored, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    lowbit.convert(tmp_path / "theirs", tmp_path / "out", format="mxfp4")
    written = tensors(tmp_path / "out")
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_float_gives_the_tensors_that_transformers_keeps(source, quantized, decoded):
    stored, given = tensors(decoded), tensors(source)
    assert {name: (v.dtype, v.shape) for name, v in stored.items()} == {
        name: (v.dtype, v.shape) for name, v in given.items()
    }
    for name in ("gate_up_proj", "down_proj"):
        expected = weights_of(tensors(quantized), f"{P}.{name}").transpose(1, 2)
        assert torch.equal(stored[f"{P}.{name}"].float(), expected)


def test_float_of_16_bit_experts_is_fused_too(source, decoded, tmp_path):
    """What rounding does to every linear, experts included."""
    lowbit.quantize(source, tmp_path / "out", scheme="MXFP4A16", format="float")
    stored, expected = tensors(tmp_path / "out"), tensors(decoded)
    assert torch.equal(stored[f"{P}.gate_up_proj"], expected[f"{P}.gate_up_proj"])
    assert stored.keys() == expected.keys()


def test_experts_one_by_one_are_fused_as_well(source, quantized, decoded, tmp_path):
    """A folder with single 16-bit experts, which lowbit reads and other loaders do not."""
    single = tmp_path / "single"
    shutil.copytree(source, single)
    stored = {}
    for name, values in tensors(source).items():
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        path, _, leaf = name.rpartition(".")
        fused, is_bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
        if not path.endswith(".experts"):
            stored[name] = values
            continue
        for expert in range(EXPERTS):
            for index, part in enumerate(parts[fused]):
                rows = (values[expert] if is_bias else values[expert].t())[index :: len(parts[fused])]
                stored[f"{path}.{expert}.{part}.{'bias' if is_bias else 'weight'}"] = rows.contiguous()
    save_file(stored, single / "model.safetensors", {"format": "pt"})
    lowbit.quantize(single, tmp_path / "out", scheme="MXFP4A16", format="mxfp4")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_engines_rules_pass(source, quantized, engine):
    assert lowbit.verify(quantized, engine=engine, source=open_checkpoint(source)).failed == []


def test_transformers_gives_the_same_logits(quantized, decoded):
    transformers = pytest.importorskip("transformers")
    theirs, floats = (
        logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        for folder in (quantized, decoded)
    )
    ours = logits(lowbit.load(quantized, dtype=torch.float32)[0])
    assert torch.equal(ours, theirs)
    assert torch.equal(floats, theirs)


def test_other_models_are_refused(tmp_path):
    for architecture in ("llama", "qwen3_moe"):
        model = make_model(tmp_path / architecture, architecture)
        with pytest.raises(FormatError, match="format of gpt-oss alone"):
            lowbit.quantize(model, tmp_path / "out", scheme="MXFP4A16", format="mxfp4")
    lowbit.quantize(tmp_path / "llama", tmp_path / "ct", scheme="MXFP4A16", threads=1)
    with pytest.raises(FormatError, match="model type 'llama'"):
        lowbit.convert(tmp_path / "ct", tmp_path / "out", format="mxfp4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "W4A16"}, "mxfp4 holds MXFP4A16 only, not W4A16"),
        ({"scheme": "MXFP4"}, "mxfp4 holds MXFP4A16 only, not MXFP4"),
        ({"scheme": "MXFP4A16", "ignore": [r"layers\.0\.mlp\.experts"]}, "would stay in 16 bits"),
        ({"scheme": "MXFP4A16", "overrides": {"[qkv]_proj$": "MXFP4A16"}}, "holds experts only"),
    ],
)
def test_what_the_format_cannot_say_is_refused(source, tmp_path, settings, said):
    with pytest.raises(FormatError, match=said):
        lowbit.quantize(source, tmp_path / "out", format="mxfp4", **settings)
    assert not (tmp_path / "out").exists()


def test_nan_for_a_scale_is_refused(quantized, tmp_path):
    stored = tensors(quantized)
    stored[f"{P}.down_proj_scales"][1, 2, 0] = 255
    shutil.copytree(quantized, tmp_path / "theirs")
    save_file(stored, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"experts\.1\.down_proj"):
        lowbit.convert(tmp_path / "theirs", tmp_path / "out", format="mxfp4")


def test_a_row_that_is_never_written_is_noticed(tmp_path):
    planned = exporter.stored_tensors("L", (4, 64), SCHEME, torch.bfloat16)
    writer = SafetensorsWriter(tmp_path, planned, 10**9)
    blocks = torch.arange(32, dtype=torch.uint8).reshape(2, 16)
    for row in range(4):
        writer.write(Piece("L.weight_blocks", blocks, index=(row,)))
    writer.write(Piece("L.weight_scales", torch.ones(1, dtype=torch.uint8), index=(2, slice(1, 2))))
    with pytest.raises(OutputError, match="weight_scales"):
        writer.close()
    writer.abandon()
    assert all(torch.equal(row, blocks) for row in tensors(tmp_path)["L.weight_blocks"])
