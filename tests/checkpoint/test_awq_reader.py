"""AWQ folders are read back as they were written; every way one can be wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError
from lowbit.formats.awq import write as exporter
from lowbit.numerics import grid_for
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import QuantizedTensor

LINEAR = "model.layers.0.self_attn.q_proj"
SHAPE = (72, 128)
ASYM, SYM = SCHEMES["W4A16_ASYM"].with_group_size(32), SCHEMES["W4A16"].with_group_size(32)


def random_codes(scheme: Scheme, shape=SHAPE, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    spec = scheme.weight
    group_size = spec.columns_per_scale(shape[1])
    groups = -(-shape[1] // group_size)
    codes = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    scale = (torch.rand(shape[0], groups, generator=generator) * 0.02 + 0.001).half().float()
    zeros = torch.randint(-8, 8, (shape[0], groups), generator=generator).to(torch.int32)
    zero_point = None if spec.symmetric else zeros
    return QuantizedTensor(codes, scale, grid_for(spec, "float32"), spec.granularity, group_size, zero_point)


def stored(quantized: QuantizedTensor, scheme: Scheme, linear: str = LINEAR) -> dict[str, torch.Tensor]:
    pieces = exporter.pack(linear, quantized, scheme, 0, quantized.shape, torch.float16)
    return {piece.name: piece.values.contiguous() for piece in pieces}


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict | None, **companion: dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"model.norm.weight": torch.ones(4), **tensors}, folder / "model.safetensors")
    config = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in companion.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def good(folder: Path, scheme: Scheme = ASYM, change=None, **more) -> Path:
    """A folder of one linear; `change` edits its tensors, `more` its config."""
    tensors = stored(random_codes(scheme), scheme)
    if change is not None:
        change(tensors)
    config = exporter.quantization_config({LINEAR: scheme}, ["lm_head"]) | more
    return write(folder, tensors, {key: value for key, value in config.items() if value is not None})


def read(folder: Path) -> QuantizedTensor:
    return open_checkpoint(folder).read_quantized(f"{LINEAR}.weight")  # type: ignore[attr-defined]


def refused(folder: Path, *said: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        read(folder)
    for part in said:
        assert part in f"{error.value}", f"{error.value}"
    return error.value


@pytest.mark.parametrize("scheme", [ASYM, SYM], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_what_is_written_is_read_and_written_again_the_same(tmp_path, scheme, group_size):
    scheme = scheme.with_group_size(group_size)
    quantized = random_codes(scheme)
    tensors = stored(quantized, scheme)
    folder = write(tmp_path / "m", tensors, exporter.quantization_config({LINEAR: scheme}, ["lm_head"]))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors[f"{LINEAR}.weight"].shape == SHAPE
    assert checkpoint.schemes[f"{LINEAR}.weight"] == scheme  # type: ignore[attr-defined]
    found = read(folder)
    assert torch.equal(found.codes, quantized.codes)
    assert torch.equal(found.scale, quantized.scale)
    assert (found.zero_point is None) == scheme.weight.symmetric
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight"), quantized.decode())
    again = stored(found, scheme)
    assert all(torch.equal(again[name], values) for name, values in tensors.items())


def test_slabs_equal_the_whole(tmp_path):
    folder = good(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    whole = checkpoint.read(f"{LINEAR}.weight")
    for first in range(0, 72, 8):
        slab = checkpoint.read_quantized(f"{LINEAR}.weight", first, first + 8)  # type: ignore[attr-defined]
        assert torch.equal(slab.decode(), whole[first : first + 8])
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight", 5, 13), whole[5:13])


def test_golden_words(tmp_path):
    """Nibbles 8 A C E 9 B D F from the lowest up are the rows 0 2 4 6 1 3 5 7: u = 8..15; zeros of 8; (u − 8) · 0.5."""
    word = 0xFDB9ECA8 - (1 << 32)
    tensors = {
        f"{LINEAR}.qweight": torch.full((2, 1), word, dtype=torch.int32),
        f"{LINEAR}.qzeros": torch.full((1, 1), 0x88888888 - (1 << 32), dtype=torch.int32),
        f"{LINEAR}.scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    folder = write(tmp_path / "m", tensors, {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True})
    weight = open_checkpoint(folder).read(f"{LINEAR}.weight")
    assert weight.tolist() == [[row * 0.5] * 2 for row in range(8)]


def test_the_old_keys(tmp_path):
    tensors = stored(random_codes(ASYM), ASYM)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    folder = write(tmp_path / "m", tensors, config)
    assert torch.equal(read(folder).codes, random_codes(ASYM).codes)


def test_quant_config_json_alone_is_enough(tmp_path):
    tensors = stored(random_codes(ASYM), ASYM)
    companion = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    folder = write(tmp_path / "m", tensors, None, quant_config=companion)
    assert torch.equal(read(folder).codes, random_codes(ASYM).codes)


@pytest.mark.parametrize("has_zeros", [True, False])
def test_zero_point_false_is_symmetric(tmp_path, has_zeros):
    def change(tensors):
        if not has_zeros:
            del tensors[f"{LINEAR}.qzeros"]

    folder = good(tmp_path / "m", SYM, change, zero_point=False, sym=None, meta=None)
    assert open_checkpoint(folder).schemes[f"{LINEAR}.weight"] == SYM  # type: ignore[attr-defined]
    assert torch.equal(open_checkpoint(folder).read(f"{LINEAR}.weight"), random_codes(SYM).decode())


def test_zero_point_false_with_other_zero_points_is_refused(tmp_path):
    error = refused(good(tmp_path / "m", ASYM, zero_point=False), "config.json says zero_point false, which needs 8")
    assert '"zero_point": true' in error.hint


def test_sym_of_other_tools_means_nothing(tmp_path):
    """transformers saves `sym: true` with every AWQ model."""
    folder = good(tmp_path / "m", ASYM, sym=True, meta=None)
    assert torch.equal(read(folder).decode(), random_codes(ASYM).decode())


def test_our_own_sym_with_other_zero_points_is_refused(tmp_path):
    refused(good(tmp_path / "m", ASYM, sym=True), "config.json says sym, which needs 8")


def test_modules_to_not_convert_is_a_substring(tmp_path):
    checkpoint = open_checkpoint(good(tmp_path / "m", modules_to_not_convert=["visual"]))
    assert not checkpoint.says_quantized("model.visual.blocks.0.attn.qkv")  # type: ignore[attr-defined]
    assert checkpoint.says_quantized("model.layers.1.mlp.up_proj")  # type: ignore[attr-defined]


def test_a_linear_that_config_json_leaves_alone_but_the_files_hold_quantized(tmp_path):
    refused(good(tmp_path / "m", modules_to_not_convert=["self_attn"]), f"{LINEAR}.qweight", "does not say how")


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "exllama", "ipex", "llm-awq"])
def test_other_versions_are_refused_by_name(tmp_path, version):
    refused(good(tmp_path / "m", version=version), f"version is {version!r}")


@pytest.mark.parametrize("bits", [8, 3, "4", True])
def test_other_bits_are_refused(tmp_path, bits):
    refused(good(tmp_path / "m", bits=bits), f"bits is {bits!r}")


@pytest.mark.parametrize("group_size", [0, -2, "128", True])
def test_group_sizes_that_are_none(tmp_path, group_size):
    refused(good(tmp_path / "m", group_size=group_size), f"group_size is {group_size!r}")


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_an_absent_key(tmp_path, key):
    refused(good(tmp_path / "m", **{key: None}), f"has no {key}")


def test_zero_point_that_is_no_bool(tmp_path):
    refused(good(tmp_path / "m", zero_point="yes"), "zero_point is 'yes'")


@pytest.mark.parametrize("names", ["lm_head", [1], [""]])
def test_modules_to_not_convert_that_is_no_list_of_names(tmp_path, names):
    refused(good(tmp_path / "m", modules_to_not_convert=names), "modules_to_not_convert is")


@pytest.mark.parametrize("leaf", ["qzeros", "scales"])
def test_an_absent_tensor(tmp_path, leaf):
    refused(good(tmp_path / "m", change=lambda tensors: tensors.pop(f"{LINEAR}.{leaf}")), f"{LINEAR}.{leaf}", "absent")


@pytest.mark.parametrize("leaf", ["qweight", "qzeros"])
def test_a_tensor_of_another_dtype(tmp_path, leaf):
    def change(tensors):
        tensors[f"{LINEAR}.{leaf}"] = tensors[f"{LINEAR}.{leaf}"].to(torch.float32)

    refused(good(tmp_path / "m", change=change), f"{LINEAR}.{leaf} is float32; int32 is needed")


@pytest.mark.parametrize("leaf", ["qzeros", "scales"])
def test_a_tensor_of_another_shape(tmp_path, leaf):
    def change(tensors):
        tensors[f"{LINEAR}.{leaf}"] = tensors[f"{LINEAR}.{leaf}"][1:].clone()

    refused(good(tmp_path / "m", change=change), f"{LINEAR}.{leaf} has shape")


def test_a_qweight_that_is_no_matrix(tmp_path):
    refused(good(tmp_path / "m", change=lambda t: t.update({f"{LINEAR}.qweight": t[f"{LINEAR}.qweight"].flatten()})),
            "a matrix is needed")  # fmt: skip


@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_tensors_that_do_not_fit_the_group_size(tmp_path, group_size):
    refused(good(tmp_path / "m", group_size=group_size), "is needed; config.json says awq")


def test_a_gptq_file_that_claims_to_be_awq(tmp_path):
    """GPTQ's qweight is packed along K: its shape gives other scales."""
    from lowbit.formats.gptq.write import GPTQ_V1

    pieces = GPTQ_V1.pack(LINEAR, random_codes(SYM, (64, 128)), SYM, 0, (64, 128), torch.float16)
    tensors = {piece.name: piece.values.contiguous() for piece in pieces}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    refused(write(tmp_path / "m", tensors, config), "is needed; config.json says awq")
