"""Values that a number format cannot hold are said, with their place and what became of them."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.calibrate.linear import round_linear
from lowbit.errors import VerificationError
from lowbit.methods import ROUNDINGS
from lowbit.numerics import grid_for
from lowbit.rounding.extremes import find_extreme, tells_of_extremes
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import GgmlTarget, GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import RangeSearch
from models import SHORT_TEXT


def found(values: torch.Tensor, type_name: str) -> str | None:
    target = GgmlTarget(type_name)
    rows, sums = target.encode(values)
    return find_extreme(values, rows, sums, target, type_name, 10)


@pytest.mark.parametrize(("type_name", "largest"), [("Q4_0", "524032"), ("TQ1_0", "65504"), ("Q8_0", "8.31901e+06")])
def test_a_clipped_value(type_name, largest):
    values = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    values[1, 3] = 1e7
    assert tells_of_extremes(found(values, type_name) or "")
    said = f"1e+07 at [11, 3] became {largest}, the largest that {type_name} holds there"
    others = 255 if type_name == "TQ1_0" else 31
    assert found(values, type_name) == f"{said}; it shares its scale with {others} other weights, which became zero"
    values[0, :3] = -1e7
    assert ", and 3 more weights are cut like it" in (found(values, type_name) or "")


@pytest.mark.parametrize("type_name", ["Q4_K", "Q2_K", "Q6_K"])
def test_a_value_that_leaves_nothing_of_its_super_block(type_name):
    """In types with minimums its neighbours become one number, which is not zero."""
    values = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    values[1, 300] = 1e6
    said = found(values, type_name) or ""
    assert re.search(r"at \[11, 300\] .*shares.* with 255 other weights", said), said
    assert tells_of_extremes(said)


def test_a_value_that_crowds_out_all_others_of_its_group():
    """3e38 fits a bfloat16 scale; its 31 neighbours do not fit beside it."""
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    values[1, 40] = 3e38
    spec = SCHEMES["W4A16"].with_group_size(32).weight
    target = GridTarget(spec, grid_for(spec, "bfloat16"), RangeSearch())
    rows, sums = target.encode(values)
    said = find_extreme(values, rows, sums, target, "W4A16", 10) or ""
    assert said.startswith("3e+38 at [11, 40] sets the scale that it shares with 31 other weights, which became zero")
    assert tells_of_extremes(said)
    spec = SCHEMES["NF4"].weight  # which has a code for the largest value itself, so that it is not off
    exact = GridTarget(spec, grid_for(spec, "float32"), RangeSearch())
    assert "63 other weights" in (find_extreme(values, *exact.encode(values), exact, "NF4", 10) or "")
    values[1, 40] = 3.0
    assert find_extreme(values, *target.encode(values), target, "W4A16", 10) is None


def test_values_below_the_smallest_step():
    assert "rows 10..12 (512 weights), at most 1e-10, are below half" in (
        found(torch.full((2, 256), 1e-10), "Q8_0") or ""
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_ordinary_values(scale):
    values = scale * torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    assert all(found(values, name) is None for name in ("Q4_0", "Q8_0", "Q4_K", "F16"))


@pytest.mark.parametrize(("type_name", "rounding"), [("Q4_0", "gptq"), ("TQ1_0", "rtn")])
def test_what_a_type_cannot_hold_is_noted_by_methods_that_calibrate(type_name, rounding):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight[2, 9] = 1e7
    target = GgmlTarget(type_name)
    rounded, result = round_linear(weight, target, ROUNDINGS[rounding], InputData(), None, 0)
    assert any("1e+07 at [2, 9] became" in note for note in result.notes), (rounded.fell_back, result.notes)


@pytest.mark.parametrize(
    "how", [{"format": "gptq"}, {"method": "gptq", "samples": 4, "seqlen": 48, "calib": SHORT_TEXT, "format": "gptq"}]
)
def test_weights_beyond_all_scales_of_a_format_are_the_input_s_fault(tiny_llama, tmp_path, how):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 3e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"W4A16 of gptq cannot hold .*down_proj.weight: 3.*e.38 at") as caught:
        lowbit.quantize(model, tmp_path / "out", scheme="W4A16", group_size=32, **how)
    assert "--ignore 'model.layers.1.mlp.down_proj' keeps it" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scheme", "option"), [("W4A16", "ignore"), ("Q8_0", "overrides")])
def test_the_remedy_of_a_note_is_one_that_works(tiny_llama, tmp_path, scheme, option):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 3e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    out = tmp_path / ("out.gguf" if scheme == "Q8_0" else "out")
    (said,) = (note for note in lowbit.quantize(model, out, scheme=scheme).report.source.notes if "e+38 at" in note)
    given = re.findall(r"--(?:ignore|override) '([^']+)'", said)
    assert len(given) == (2 if option == "ignore" else 1)  # gate_proj and up_proj, which engines load as one
    how = {option: given if option == "ignore" else dict(each.split("=") for each in given)}
    notes = lowbit.quantize(model, out, scheme=scheme, overwrite=True, **how).report.source.notes
    (kept,) = (note for note in notes if re.search(r"e\+38 at", note))  # as it was, and still as large
    assert kept.endswith("[0, 0] is so large that products with it overflow")


def test_a_slab_of_zeros_is_named():
    """Which no error shows: zeros are what they become."""
    values = torch.zeros(2, 256)
    assert found(values, "Q4_0") == "the weights of rows 10..12 are all zero in the source"
    values[1, 3] = 0.1
    assert found(values, "Q4_0") is None


@pytest.mark.parametrize(
    "how",
    [
        {"scheme": "W4A16"}, {"scheme": "W4A16", "ignore": ["(gate|up)_proj"]}, {"scheme": "NF4"}, {"scheme": "W8A8"},
        {"scheme": "BF16"}, {"scheme": "Q8_0"}, {"scheme": "W4A16", "format": "float"},
        {"scheme": "W4A16", "method": "gptq", "samples": 4, "seqlen": 48, "calib": SHORT_TEXT},
        {"scheme": "Q4_0", "method": "gptq", "samples": 4, "seqlen": 48, "calib": SHORT_TEXT},
    ],
)  # fmt: skip
def test_a_matrix_of_zeros_is_said_of_every_output(empty_up, tmp_path, how):
    output = tmp_path / ("out.gguf" if how["scheme"] in ("BF16", "Q8_0", "Q4_0") else "out")
    said = lowbit.quantize(empty_up, output, **how).report.source.notes
    assert any(EMPTY_UP.match(note) for note in said), said


@pytest.mark.parametrize("how", [{"format": "gptq"}, {"format": "float"}, {"format": "gguf", "scheme": "Q8_0"}])
def test_a_matrix_of_zeros_is_said_of_every_conversion(empty_up, tmp_path, how):
    quantized = lowbit.quantize(empty_up, tmp_path / "W4A16", scheme="W4A16", group_size=32).path
    output = tmp_path / ("out.gguf" if how["format"] == "gguf" else "out")
    said = lowbit.convert(quantized, output, **how).report.source.notes
    assert any(EMPTY_UP.match(note) for note in said), said


@pytest.mark.parametrize(
    "how", [{"scheme": "W4A16", "group_size": 32}, {"scheme": "Q8_0"}, {"scheme": "W8A16", "format": "float"}]
)
def test_a_norm_with_which_everything_overflows_is_said(tiny_llama, tmp_path, how):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][5] = 3e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    output = tmp_path / ("out.gguf" if how["scheme"] == "Q8_0" else "out")
    said = lowbit.quantize(model, output, **how).report.source.notes
    assert any(HUGE_NORM.match(note) for note in said), said
    assert not any("all zero" in note for note in said)


HUGE_NORM = re.compile(
    r"(model\.norm|output_norm)\.weight: 3\.00406e\+38 at \[5\] is so large that products with it overflow$"
)
EMPTY_UP = re.compile(
    r"(model\.layers\.0\.mlp\.up_proj|blk\.0\.ffn_up)\.weight: the weights of rows 0\.\.192 are all zero"
)


@pytest.fixture(scope="module")
def empty_up(tiny_llama, tmp_path_factory):
    """A model one of whose matrices holds zeros."""
    model = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("empty") / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model
