"""Ranges of inputs against the same model run by hand, and what static scales become of them."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.architecture.loading import load_tokenizer
from lowbit.calibrate.blocks import BlockInput
from lowbit.calibrate.input_ranges import InputRanges, measure_ranges
from lowbit.calibrate.range_choice import mse_ends, signed_histogram
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError, NonFiniteError, UsageError
from lowbit.schemes import SCHEMES
from lowbit.tensors import InputRange
from lowbit.text import Text, cut_windows
from lowbit.verification import verify
from models import make_model

TEXT = Text("sample", "Twelve windows of text that says nothing at all, again and again. " * 20)

IDS = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0))


def ranges(folder, linears, windows=3, text=TEXT):
    """(linear → range, number of windows) on the first windows of a text."""
    checkpoint = open_checkpoint(folder)
    ids = cut_windows(text, load_tokenizer(checkpoint), windows, 32).ids
    found = measure_ranges(checkpoint, linears, ids, dtype=torch.float32).inputs
    assert all(each.low == -each.high for each in found.values())  # of a symmetric scale
    return {name: each.absmax for name, each in found.items()}, len(ids)


def test_ranges_are_the_largest_inputs_of_a_run_by_hand(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(TEXT.content, add_special_tokens=False).input_ids[: 3 * 32]).reshape(3, 32)
    with torch.inference_mode():
        hidden = model.model(ids, output_hidden_states=True).hidden_states
        block = model.model.layers[1]
        into_attention = block.input_layernorm(hidden[1])
    found, windows = ranges(tiny_llama, ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"])
    assert windows == 3
    assert found["model.layers.1.self_attn.q_proj"] == pytest.approx(into_attention.abs().max().item(), rel=1e-5)
    assert found["model.layers.1.self_attn.q_proj"] == found["model.layers.1.self_attn.k_proj"]


def test_static_scales_of_the_files_are_the_ranges(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    settings = {"calib": str(tmp_path / "text.txt"), "samples": 3, "seqlen": 32}
    report = lowbit.quantize(tiny_llama, tmp_path / "out", scheme="FP8", **settings).report
    assert report.settings.calibration.tokens == 96
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    found, _ = ranges(tiny_llama, [name])
    assert stored[f"{name}.input_scale"].float().item() == pytest.approx(found[name] / 448, rel=0.02)
    simulated = lowbit.evaluate(tmp_path / "out", tiny_llama, windows=2, window_tokens=64)[-1]
    assert simulated.kld_mean < 0.05


def test_schemes_without_static_scales_read_no_text(tiny_llama, tmp_path):
    report = lowbit.quantize(tiny_llama, tmp_path / "out", scheme="FP8_DYNAMIC").report
    assert report.settings.calibration is None
    with pytest.raises(UsageError, match=r"--calib absent\.txt is read only by runs that calibrate"):
        lowbit.quantize(tiny_llama, tmp_path / "again", scheme="FP8_DYNAMIC", calib="absent.txt")


def test_a_text_shorter_than_a_window_is_refused(tiny_llama):
    with pytest.raises(CheckpointError, match="one window needs 32"):
        ranges(tiny_llama, ["model.layers.0.mlp.down_proj"], text=Text("short", "few words"))


def test_inputs_that_are_not_finite_are_named(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj"):
        ranges(tmp_path / "model", ["model.layers.0.self_attn.q_proj"])


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_experts=4)


GATE = "model.layers.0.mlp.experts.{}.gate_proj"


def test_experts_have_ranges_of_their_own(moe):
    names = [GATE.format(expert) for expert in range(4)]
    found, _ = ranges(moe, names, windows=6)
    assert len(set(found.values())) > 1
    assert min(found.values()) > 0.1


def test_experts_that_no_token_reached_take_the_largest_of_the_others_and_a_note_says_so(moe, tmp_path):
    shutil.copytree(moe, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"].zero_()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "model")
    ids = cut_windows(TEXT, load_tokenizer(checkpoint), 1, 32).ids
    found = measure_ranges(checkpoint, [GATE.format(expert) for expert in range(4)], ids)
    assert any("reached 2 experts of block 0" in note for note in found.notes)
    assert len(set(found.inputs.values())) == 1  # both that were reached saw every token


def test_methods_choose_ranges_below_the_largest(tiny_llama):
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    spec = SCHEMES["W8A8_STATIC"].activation
    checkpoint = open_checkpoint(tiny_llama)
    found = {
        method: measure_ranges(checkpoint, names, IDS, method=method, percentile=99.0,
                               activations=dict.fromkeys(names, spec)).inputs
        for method in ("minmax", "percentile", "mse")
    }  # fmt: skip
    for name in names:
        percentile, minmax, mse = (found[method][name].absmax for method in ("percentile", "minmax", "mse"))
        assert 0 < percentile < minmax
        assert 0.3 * minmax < mse <= minmax


def test_scales_with_a_zero_point_have_both_ends(tiny_llama):
    """The input of down_proj of a gated MLP with SiLU lies on both sides, but not evenly."""
    name, spec = "model.layers.1.mlp.down_proj", SCHEMES["W8A8_STATIC_ASYM"].activation
    checkpoint = open_checkpoint(tiny_llama)
    found = {method: measure_ranges(checkpoint, [name], IDS, method=method, percentile=99.0,
                                    activations={name: spec}).inputs[name]
             for method in ("minmax", "percentile", "mse")}  # fmt: skip
    symmetric = measure_ranges(checkpoint, [name], IDS, activations={name: SCHEMES["W8A8_STATIC"].activation})
    whole = found["minmax"]
    assert whole.low < 0 < whole.high
    assert whole.low != -whole.high
    assert whole.absmax == symmetric.inputs[name].absmax
    for method in ("percentile", "mse"):
        assert whole.low <= found[method].low < 0 < found[method].high <= whole.high
        assert found[method] != whole


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_on_one_side_of_0_ends_at_0(method, sign):
    visitor = InputRanges()
    x = sign * (torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) + 1)
    visitor.look(BlockInput("x", ()), x)
    visitor.finish(0)
    found = visitor.ends_of("x", method)
    assert (found.low if sign == 1 else found.high) == 0
    assert found.absmax == pytest.approx(x.abs().max().item(), rel=0.01)


def test_ends_of_least_error_are_those_of_a_search_by_rounding():
    """Of values with a long tail on one side; `mse_ends` is within 2 % of the best of all pairs."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    x = torch.where(x > 0, x * x * 3, x)
    low, high = mse_ends(signed_histogram(x), x.min().item(), x.max().item(), 4)

    def error(low, high):
        scale, zero_point = InputRange(low, high).affine(4)
        codes = ((x / scale).round() + zero_point).clamp(-8, 7)
        return ((codes - zero_point) * scale - x).square().sum().item()

    kept = [2 ** (-step / 4) for step in range(24)]
    best = min(error(x.min().item() * one, x.max().item() * other) for one in kept for other in kept)
    assert error(low, high) < 1.05 * best
    assert error(low, high) < 0.8 * error(x.min().item(), x.max().item())


def test_an_input_that_is_always_zero_has_a_scale_above_zero():
    visitor = InputRanges()
    visitor.look(BlockInput("zero", ()), torch.zeros(4, 4))
    visitor.finish(0)
    assert visitor.ends_of("zero", "mse").affine(8)[0] > 0


def test_w8a8_static_asym_stores_scale_and_zero_point_and_survives_reading(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    settings = {"calib": str(tmp_path / "text.txt"), "samples": 3, "seqlen": 32}
    lowbit.quantize(tiny_llama, tmp_path / "out", scheme="W8A8_STATIC_ASYM", **settings)
    name = "model.layers.0.mlp.down_proj"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = open_checkpoint(tiny_llama)
    ids = cut_windows(TEXT, load_tokenizer(checkpoint), 3, 32).ids
    [covered] = measure_ranges(checkpoint, [name], ids, dtype=torch.float32,
                               activations={name: SCHEMES["W8A8_STATIC_ASYM"].activation}).inputs.values()  # fmt: skip
    scale, zero_point = stored[f"{name}.input_scale"], stored[f"{name}.input_zero_point"]
    assert (zero_point.dtype, zero_point.shape) == (torch.int8, (1,))
    assert scale.float().item() == pytest.approx((covered.high - covered.low) / 255, rel=0.02)
    assert zero_point.item() == pytest.approx(covered.affine(8)[1], abs=2)
    assert zero_point.item() != 0
    read = open_checkpoint(tmp_path / "out")
    assert read.schemes[f"{name}.weight"] == SCHEMES["W8A8_STATIC_ASYM"]  # type: ignore[attr-defined]
    assert read.input_zero_points[f"{name}.weight"] == zero_point.item()  # type: ignore[attr-defined]
    assert verify(tmp_path / "out", source=checkpoint).ok
    simulated = lowbit.evaluate(tmp_path / "out", tiny_llama, windows=2, window_tokens=64)[-1]
    assert (simulated.activations, simulated.kld_mean < 0.05) == ("simulated", True)
    lowbit.convert(tmp_path / "out", tmp_path / "again", format="compressed-tensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[key], stored[key]) for key in stored if ".input_" in key)


def test_a_missing_zero_point_is_named(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    settings = {"calib": str(tmp_path / "text.txt"), "samples": 3, "seqlen": 32}
    lowbit.quantize(tiny_llama, tmp_path / "out", scheme="W8A8_STATIC_ASYM", **settings)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.input_zero_point"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert any("down_proj.input_zero_point" in check.detail for check in verify(tmp_path / "out").failed)
    with pytest.raises(CheckpointError, match=r"down_proj\.input_zero_point \[1\] is absent"):
        lowbit.evaluate(tmp_path / "out", tiny_llama, windows=2, window_tokens=64)


def test_an_unknown_method_is_refused(tiny_llama):
    with pytest.raises(UsageError, match="unknown method 'average'"):
        measure_ranges(open_checkpoint(tiny_llama), [], IDS, method="average")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="percentile 0"):
        measure_ranges(open_checkpoint(tiny_llama), [], IDS, percentile=0)


def test_the_output_head_has_a_range_too(tiny_llama):
    found, _ = ranges(tiny_llama, ["lm_head"])
    assert found["lm_head"] > 0.1


def test_two_levels_of_scales_are_never_clipped(tiny_llama):
    name = "model.layers.0.mlp.down_proj"
    checkpoint = open_checkpoint(tiny_llama)
    activations = {name: SCHEMES["NVFP4"].activation}
    clipped, whole = (
        measure_ranges(checkpoint, [name], IDS, method=method, activations=activations).inputs[name]
        for method in ("mse", "minmax")
    )
    assert clipped == whole


def test_ranges_are_of_every_look_and_histograms_keep_every_value():
    source = BlockInput("block.input", ())
    visitor = InputRanges()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 8, generator=generator) for _ in range(3)]
    for x in batches:
        visitor.look(source, x)
    visitor.finish(0)
    every = torch.cat(batches)
    assert visitor.absmax("block.input") == every.abs().max().item()
    assert visitor._seen["block.input"].counts.sum().item() == every.numel()
    assert visitor.range_of("block.input", "percentile", 100.0) == visitor.absmax("block.input")


def test_an_input_that_is_always_zero_gets_a_range_above_zero():
    visitor = InputRanges()
    visitor.look(BlockInput("zero", ()), torch.zeros(4, 4))
    visitor.finish(0)
    assert visitor.range_of("zero", "mse") > 0


def test_w8a8_static_stores_the_ranges_and_survives_reading(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    settings = {"calib": str(tmp_path / "text.txt"), "samples": 3, "seqlen": 32}
    lowbit.quantize(tiny_llama, tmp_path / "out", scheme="W8A8_STATIC", **settings)
    name = "model.layers.0.mlp.down_proj"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    found, _ = ranges(tiny_llama, [name])
    assert stored[f"{name}.weight"].dtype == torch.int8
    assert stored[f"{name}.input_scale"].shape == (1,)
    assert stored[f"{name}.input_scale"].float().item() == pytest.approx(found[name] / 127, rel=0.02)
    read = open_checkpoint(tmp_path / "out")
    assert read.schemes[f"{name}.weight"] == SCHEMES["W8A8_STATIC"]  # type: ignore[attr-defined]
    assert verify(tmp_path / "out", source=open_checkpoint(tiny_llama)).ok
    simulated = lowbit.evaluate(tmp_path / "out", tiny_llama, windows=2, window_tokens=64)[-1]
    assert simulated.kld_mean < 0.05
