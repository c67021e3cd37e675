"""AutoRound's folders and FBGEMM's FP8: read as what their tensors are, and a test for each way to be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError
from lowbit.formats.awq import write as awq
from lowbit.formats.gptq.write import GPTQ_V1, GPTQ_V2
from lowbit.numerics import grid_for
from lowbit.rounding.rtn import round_to_nearest
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import QuantizedTensor, RangeSearch

SHAPE = (64, 256)
DTYPE = torch.bfloat16
PACKERS = {
    "auto_round:auto_gptq": GPTQ_V1, "auto_round": GPTQ_V2, "auto_round:gptqmodel": GPTQ_V2, "auto_round:auto_awq": awq,
}  # fmt: skip


def rounded(scheme: Scheme, exporter, seed: int = 0) -> QuantizedTensor:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.05
    grid = grid_for(scheme.weight, exporter.scale_format(scheme, DTYPE), exporter.lowest_zero_point(scheme))
    return round_to_nearest(weight, scheme.weight, grid, RangeSearch())


def stated(scheme: Scheme, packing: str, **changes) -> dict:
    weight = scheme.weight
    return {
        "quant_method": "auto-round", "packing_format": packing, "bits": weight.bits, "group_size": weight.group_size,
        "sym": weight.symmetric, "data_type": "int", "block_name_to_quantize": "model.layers",
        "autoround_version": "0.15.0", **changes,
    }  # fmt: skip


def write(folder: Path, packed: dict[str, tuple[QuantizedTensor, Scheme]], packing: str, config: dict) -> Path:
    exporter, tensors = PACKERS[packing], {"norm.weight": torch.ones(4)}
    for name, (quantized, scheme) in packed.items():
        for piece in exporter.pack(name, quantized, scheme, 0, SHAPE, DTYPE):
            if not piece.name.endswith("g_idx") or packing == "auto_round:gptqmodel":
                tensors[piece.name] = piece.values.contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_weights_are_those_that_were_packed(tmp_path, packing, name):
    scheme = SCHEMES[name]
    quantized = rounded(scheme, PACKERS[packing])
    folder = write(tmp_path / "m", {"a.l": (quantized, scheme)}, packing, stated(scheme, packing))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "auto-round"
    assert checkpoint.schemes == {"a.l.weight": scheme}  # type: ignore[attr-defined]
    assert torch.equal(checkpoint.read("a.l.weight", 8, 40), quantized.decode()[8:40])


@pytest.mark.parametrize("spelling", ["auto_round", "intel/auto-round"])
def test_other_spellings_of_the_method(tmp_path, spelling):
    scheme, packing = SCHEMES["W4A16"], "auto_round:auto_gptq"
    config = stated(scheme, packing, quant_method=spelling)
    folder = write(tmp_path / "m", {"a.l": (rounded(scheme, GPTQ_V1), scheme)}, packing, config)
    assert open_checkpoint(folder).kind == "auto-round"


def test_linears_that_differ_by_name_and_by_regex(tmp_path):
    four, eight, three = SCHEMES["W4A16"], SCHEMES["W8A16"], SCHEMES["W4A16"].with_group_size(32)
    linears = {"a.0.up": (rounded(four, GPTQ_V1), four), "a.0.down": (rounded(eight, GPTQ_V1), eight),
               "a.1.gate": (rounded(three, GPTQ_V1), three), "lm_head": (rounded(eight, GPTQ_V1), eight)}  # fmt: skip
    extra = {
        "a.0.down": {"bits": 8},
        r"a\.\d+\.gate": {"group_size": 32},
        "lm_head": {"bits": 8},
        "a.9.up": {"bits": 16},
    }
    packing = "auto_round:auto_gptq"
    checkpoint = open_checkpoint(write(tmp_path / "m", linears, packing, stated(four, packing, extra_config=extra)))
    for name, (quantized, scheme) in linears.items():
        assert checkpoint.schemes[f"{name}.weight"] == scheme, name  # type: ignore[attr-defined]
        assert torch.equal(checkpoint.read(f"{name}.weight"), quantized.decode()), name


def test_a_zero_point_of_0_borrows_within_its_word(tmp_path):
    """AutoRound takes 1 from all fields of a word at once: a 0 takes from its neighbour, and is repaired."""
    scheme, packing = SCHEMES["W4A16_ASYM"], "auto_round:auto_gptq"
    quantized = rounded(scheme, GPTQ_V2)
    assert quantized.zero_point is not None
    quantized.zero_point[:, 0] = -8  # the lowest code
    folder = write(tmp_path / "m", {"l": (quantized, scheme)}, "auto_round", stated(scheme, packing))
    tensors = {**_tensors(folder)}
    one = sum(1 << shift for shift in range(0, 32, 4))
    less = (tensors["l.qzeros"].long() & 0xFFFFFFFF) - one
    tensors["l.qzeros"] = torch.where(less % (1 << 32) >= 1 << 31, less % (1 << 32) - (1 << 32), less % (1 << 32)).int()
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(open_checkpoint(folder).read("l.weight"), quantized.decode())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_awq_leaves_alone_what_has_16_bits(tmp_path):
    scheme, packing = SCHEMES["W4A16_ASYM"], "auto_round:auto_awq"
    config = stated(scheme, packing, extra_config={"a.gate": {"bits": 16, "data_type": "float"}})
    folder = write(tmp_path / "m", {"a.l": (rounded(scheme, awq), scheme)}, packing, config)
    tensors = _tensors(folder) | {"a.gate.weight": torch.ones(8, 8)}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.schemes) == ["a.l.weight"]  # type: ignore[attr-defined]
    assert checkpoint.tensors["a.gate.weight"].shape == (8, 8)


@pytest.mark.parametrize(("packing", "changes", "said"), [
    ("auto_round:auto_gptq", {"data_type": "mx_fp"}, "data_type 'mx_fp'"),
    ("auto_round:auto_gptq", {"act_bits": 8}, "act_bits 8"),
    ("auto_round:auto_gptq", {"packing_format": "auto_round:llm_compressor"}, "llm_compressor"),
    ("auto_round:auto_gptq", {"packing_format": "auto_round:fp8_static"}, "fp8_static"),
    ("auto_round:auto_gptq", {"rotation_config": {"type": "hadamard"}}, "rotation_config"),
    ("auto_round:auto_gptq", {"extra_config": ["a.l"]}, "extra_config"),
    ("auto_round:auto_gptq", {"extra_config": {"a.l": {"bits": "8"}}}, "extra_config"),
    ("auto_round:auto_gptq", {"bits": 5}, "bits 5"),
    ("auto_round:auto_awq", {"extra_config": {"a.l": {"bits": 8}}}, "extra_config for a.l"),
])  # fmt: skip
def test_what_cannot_be_read(tmp_path, packing, changes, said):
    scheme = SCHEMES["W4A16"]
    config = stated(scheme, packing, **changes)
    folder = write(tmp_path / "m", {"a.l": (rounded(scheme, PACKERS[packing]), scheme)}, packing, config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert said in str(caught.value)
    assert caught.value.hint


def test_fbgemm_fp8(tmp_path):
    codes = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(SHAPE[0], 1, generator=torch.Generator().manual_seed(1)) + 0.5
    tensors = {"a.l.weight": codes, "a.l.weight_scale": scale, "lm_head.weight": torch.ones(4, 8, dtype=DTYPE)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.schemes == {"a.l.weight": SCHEMES["FP8_DYNAMIC"]}  # type: ignore[attr-defined]
    assert torch.equal(checkpoint.read("a.l.weight"), codes.float() * scale)
    assert any("activation_scale_ub 1200.0" in note for note in checkpoint.notes)


def test_fbgemm_fp8_without_its_scales(tmp_path):
    save_file({"a.l.weight": torch.ones(SHAPE).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    config = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": None}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(CheckpointError, match=r"a\.l\.weight_scale .* is absent"):
        open_checkpoint(tmp_path)
