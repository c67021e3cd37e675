"""Methods that run a text through the model, from end to end: every family, every method, folders and GGUF files."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from calibrate.calibrated import TEXT, calibrated, write_text
from lowbit.architecture.loading import load_model, load_tokenizer
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import UsageError
from lowbit.settings import RunOptions
from models import ARCHITECTURES, make_model

METHODS = ("gptq", "awq", "awq+gptq", "smoothquant+gptq", "rotate+gptq", "hqq", "gptq+sign-sgd")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@cache
def rounded(model) -> Path:
    """`model` rounded to nearest, beside it."""
    return lowbit.quantize(model, model.parent / f"{model.name}-rtn", scheme="W4A16", group_size=32).path


@cache
def logits(folder) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    ids = load_tokenizer(checkpoint)(TEXT, add_special_tokens=False).input_ids
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids[: 6 * 48]).reshape(6, 48)).logits


def divergence(folder, reference) -> float:
    p, q = logits(reference).log_softmax(-1), logits(folder).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.sampled(2, keep=("gptq",))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_model_near_its_source(tiny_llama, tmp_path, text, method):
    few = {"iterations": 8} if "sign-sgd" in method else {}
    report = calibrated(tiny_llama, tmp_path / "out", text, method, **few)
    assert report.verification is not None
    assert report.verification.ok
    assert report.settings.method == method
    # HQQ and AWQ on their own are judged by what they minimise in tests of theirs.
    worst = 0.9 if "gptq" in method else 1.3
    assert divergence(tmp_path / "out", tiny_llama) < worst * divergence(rounded(tiny_llama), tiny_llama)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_can_be_calibrated(tmp_path, text, architecture):
    model = make_model(tmp_path / "model", architecture)
    report = calibrated(model, tmp_path / "out", text)
    quantized = [entry for entry in report.tensors if entry.scheme is not None]
    assert quantized
    assert all(entry.method in ("gptq", "rtn") for entry in quantized)
    measured = [entry for entry in quantized if entry.method == "gptq"]
    assert measured
    assert sum(e.layer_error or 0 for e in measured) < sum(e.nearest_error or 0 for e in measured)
    assert math.isfinite(divergence(tmp_path / "out", model))


@pytest.mark.parametrize(
    "scheme", ["W8A8", "W4A16_ASYM", "W3A16", "NVFP4A16", "MXFP4A16", "NF4", "FP8", "W4A8", "W8A8_STATIC"]
)
def test_gptq_works_on_every_kind_of_grid(tiny_llama, tmp_path, text, scheme):
    group = {"group_size": 32} if scheme in ("W4A16_ASYM", "W3A16", "W4A8") else {"group_size": None}
    report = calibrated(tiny_llama, tmp_path / "out", text, scheme=scheme, **group)
    assert report.verification is not None
    assert report.verification.ok
    entries = [entry for entry in report.tensors if entry.scheme is not None]
    assert sum(e.layer_error or 0 for e in entries) <= 1.001 * sum(e.nearest_error or 0 for e in entries)


@pytest.mark.parametrize("file_type", ["Q4_0", "Q8_0", "Q4_1", "IQ4_NL"])
def test_gptq_writes_gguf(tiny_llama, tmp_path, text, file_type):
    out = tmp_path / "out.gguf"
    report = calibrated(tiny_llama, out, text, scheme=file_type, group_size=None)
    assert report.verification is not None
    assert report.verification.ok
    rounded = [entry for entry in report.tensors if entry.method == "gptq"]
    assert len(rounded) == 14
    assert sum(e.layer_error or 0 for e in rounded) < sum(e.nearest_error or 0 for e in rounded)
    lowbit.quantize(tiny_llama, tmp_path / "rtn.gguf", scheme=file_type)
    assert out.stat().st_size == (tmp_path / "rtn.gguf").stat().st_size
    assert divergence(out, tiny_llama) < divergence(tmp_path / "rtn.gguf", tiny_llama)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_gguf_of_experts_and_of_transposed_weights(tmp_path, text, architecture):
    model = make_model(tmp_path / "model", architecture)
    report = calibrated(model, tmp_path / "out.gguf", text, scheme="Q4_0", group_size=None)
    assert any(entry.method and "gptq" in entry.method for entry in report.tensors)
    assert math.isfinite(divergence(tmp_path / "out.gguf", model))


def test_an_expert_that_few_tokens_reach_is_rounded_to_nearest_and_listed(tmp_path, text):
    model = make_model(tmp_path / "model", "qwen3_moe")
    report = calibrated(model, tmp_path / "out", text, expert_tokens=500)
    experts = [entry for entry in report.tensors if ".experts." in entry.name and entry.scheme is not None]
    assert experts
    assert all(entry.method == "rtn" and any("tokens reached it" in note for note in entry.notes) for entry in experts)
    assert any("tokens reached it" in note for note in report.source.notes)


def test_a_text_too_short_for_every_linear_is_refused_before_a_block_is_run(tiny_llama, tmp_path, text):
    with pytest.raises(UsageError, match=r"would round none of 14 linears: the text has 576 tokens, .* 600") as said:
        calibrated(tiny_llama, tmp_path / "out", text, expert_tokens=600)
    assert "--allow-fallback" in said.value.hint
    assert not list(tmp_path.glob("*out*"))
    report = calibrated(tiny_llama, tmp_path / "out", text, expert_tokens=600, allow_fallback=True,
                        run=RunOptions(resume=True))  # fmt: skip
    assert {entry.method for entry in report.tensors if entry.scheme is not None} == {"rtn"}
    assert "--allow-fallback" in report.command


def test_an_override_that_no_linear_could_be_rounded_by_is_an_error_too(tiny_llama, tmp_path, text):
    with pytest.raises(UsageError, match=r"hqq rounded none of the 2 linears it was asked for.* does not work on Q4_0"):
        calibrated(tiny_llama, tmp_path / "out.gguf", text, scheme="Q4_0", group_size=None,
                   method_overrides={"down_proj$": "hqq"})  # fmt: skip


def test_all_experts_can_be_shown_every_token(tmp_path, text):
    model = make_model(tmp_path / "model", "qwen3_moe")
    report = calibrated(model, tmp_path / "out", text, all_experts=True)
    experts = [entry for entry in report.tensors if ".experts." in entry.name and entry.scheme is not None]
    assert {entry.tokens for entry in experts} == {12 * 48}


def test_methods_per_linear(tiny_llama, tmp_path, text):
    report = calibrated(tiny_llama, tmp_path / "out", text, method_overrides={r"down_proj$": "rtn"})
    methods = {entry.role: entry.method for entry in report.tensors if entry.scheme is not None}
    assert methods["down_proj"] == "rtn"
    assert methods["q_proj"] == "gptq"


def test_hqq_rounds_without_a_text_and_not_to_nearest(tiny_llama, tmp_path):
    settings = {"scheme": "W4A16_ASYM", "group_size": 32}
    lowbit.quantize(tiny_llama, tmp_path / "rtn", **settings)
    lowbit.quantize(tiny_llama, tmp_path / "hqq", method="hqq", **settings)
    lowbit.quantize(tiny_llama, tmp_path / "some", method_overrides={"down_proj$": "hqq"}, **settings)
    rtn, hqq, some = (load_file(tmp_path / name / "model.safetensors") for name in ("rtn", "hqq", "some"))
    scales = [name for name in rtn if name.endswith("weight_scale")]
    assert all(not torch.equal(rtn[name], hqq[name]) for name in scales)
    assert [name for name in scales if not torch.equal(rtn[name], some[name])] == [
        name for name in scales if "down_proj" in name
    ]
    with pytest.raises(UsageError, match="--method hqq is read only by quantizations"):
        lowbit.quantize(tiny_llama, tmp_path / "x.gguf", scheme="Q4_0", method="hqq")


def test_a_recipe_equals_the_flags(tiny_llama, tmp_path, text):
    from calibrate.calibrated import files_of

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"scheme: W4A16\nmethod: rotate+gptq\ngroup_size: 32\nsamples: 12\nseqlen: 48\ncalib: {text}\n"
        f"expert_tokens: 8\nmethod_overrides: {{'down_proj$': hqq}}\n"
    )
    lowbit.quantize(tiny_llama, tmp_path / "recipe", recipe=recipe)
    calibrated(tiny_llama, tmp_path / "flags", text, "rotate+gptq", method_overrides={"down_proj$": "hqq"})
    assert files_of(tmp_path / "recipe") == files_of(tmp_path / "flags")


def test_the_report_says_what_transforms_did(tiny_llama, tmp_path, text):
    report = calibrated(tiny_llama, tmp_path / "out", text, "smoothquant+gptq", scheme="W8A8", group_size=None)
    assert report.transforms
    assert {entry.what for entry in report.transforms} == {"smoothquant"}
    assert report.settings.calibration is not None
    assert report.settings.calibration.tokens == 12 * 48


def test_kv_cache_scales_are_measured_and_stored(tiny_llama, tmp_path, text):
    calibrated(tiny_llama, tmp_path / "out", text, kv_cache="fp8")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert (stored["model.layers.1.self_attn.k_scale"] > 0).all()


@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_hadamard_unties_a_head_and_says_so(tmp_path, text, output):
    model = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    stored = load_file(model / "model.safetensors")
    stored["model.norm.weight"] += torch.rand(128)
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    settings = {"scheme": "Q8_0", "group_size": None} if output.endswith("gguf") else {"scheme": "W8A16"}
    report = calibrated(model, tmp_path / output, text, "hadamard+gptq", **settings)
    assert report.verification.ok
    assert any(
        "lm_head.weight becomes a tensor of its own, 49,152 more weights" in each for each in report.source.notes
    )
    assert divergence(tmp_path / output, model) < 1e-3


def test_hadamard_gains_where_rounding_is_coarse(tmp_path, text):
    model = make_model(tmp_path / "untied", "llama", tie_word_embeddings=False)
    calibrated(model, tmp_path / "out", text, "hadamard+gptq")
    lowbit.quantize(model, tmp_path / "rtn", scheme="W4A16", group_size=32)
    assert divergence(tmp_path / "out", model) < 0.9 * divergence(tmp_path / "rtn", model)


def test_too_little_memory_is_said_with_what_it_takes(tiny_llama, tmp_path, text):
    with pytest.raises(UsageError, match=r"(?m)the weights of a block [\d.]+ [kM]B, .*--max-memory allows 1 kB$"):
        lowbit.quantize(tiny_llama, tmp_path / "out", scheme="W4A16", group_size=32, method="gptq", calib=str(text),
                        samples=4, seqlen=48, run=RunOptions(max_memory=1000))  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.txt"]


def test_bias_correction_keeps_mean_outputs(tmp_path, text):
    model = make_model(tmp_path / "model", "opt")
    alone = {"scheme": "W3A16", "stream_correction": 0}  # means that it moves on purpose, bias correction takes back
    calibrated(model, tmp_path / "plain", text, **alone)
    calibrated(model, tmp_path / "out", text, bias_correction=True, **alone)
    plain, moved = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    biases = [name for name in plain if name.endswith("fc1.bias")]
    assert biases
    assert all(not torch.equal(plain[name], moved[name]) for name in biases)
    assert divergence(tmp_path / "out", model) < 1.5 * divergence(tmp_path / "plain", model)  # of a random model


def test_bias_correction_says_where_there_is_no_bias(tiny_llama, tmp_path, text):
    report = calibrated(tiny_llama, tmp_path / "out", text, bias_correction=True)
    assert any("the linear has no bias" in note for note in report.source.notes)


def test_outliers_of_int8_are_reported(tiny_llama, tmp_path, text):
    report = calibrated(tiny_llama, tmp_path / "out", text, scheme="INT8", group_size=None)
    noted = [entry for entry in report.tensors if any("input channels reach 6" in note for note in entry.notes)]
    assert len(noted) == 14


@pytest.mark.parametrize(
    ("method", "options", "measured"),
    [("gptq", {}, True), ("gptq", {"stream_correction": 0.0}, False), ("sign-sgd", {"iterations": 1}, False)],
    ids=["default", "share of 0", "a rounding that learns"],
)
def test_what_the_stream_lost_is_measured_where_it_is_read(
    tiny_llama, text, tmp_path, monkeypatch, method, options, measured
):
    from lowbit.calibrate.statistics import InputStatistics

    known: list[bool] = []
    take = InputStatistics.take

    def noted(self):
        found = take(self)
        known.extend(stats.lost is not None for stats in found.values())
        return found

    monkeypatch.setattr(InputStatistics, "take", noted)
    calibrated(tiny_llama, tmp_path / "out", text, method, **options)
    assert known
    assert any(known) is measured


@pytest.mark.parametrize(
    ("architecture", "share", "unmet"), [("gemma2", 0.4, True), ("gemma2", None, False), ("llama", 0.4, False)]
)
def test_a_given_stream_correction_that_changes_nothing_is_said(tmp_path, text, architecture, share, unmet):
    model = make_model(tmp_path / "model", architecture, num_hidden_layers=1)
    report = calibrated(model, tmp_path / "out", text, **({} if share is None else {"stream_correction": share}))
    assert any("--stream-correction 0.4 changed nothing" in note for note in report.source.notes) is unmet


def test_nothing_of_a_finished_block_stays(tiny_llama):
    """Without waiting for the collector of circles: a block of a large model is gigabytes."""
    import gc
    import weakref

    from lowbit.calibrate.blocks import BlockRunner
    from lowbit.calibrate.passes import BlockPasses, Streams

    runner = BlockRunner(open_checkpoint(tiny_llama))
    ids = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    streams = Streams(runner, ids, len(ids))
    runner.load(0)
    gc.disable()
    try:
        passes = BlockPasses(runner, 0, streams)
        for stage in passes.stages:
            passes.measure(stage, lambda windows: None)
        passes.advance(lambda windows: None, open_checkpoint(tiny_llama).read)
        kept = [weakref.ref(each) for each in passes._kept.values()] + [weakref.ref(passes)]
        assert len(kept) == 4
        del passes
        assert [each() for each in kept] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_a_dry_run_refuses_a_rotation_that_the_model_does_not_allow(tmp_path, architecture):
    model = make_model(tmp_path / "m", architecture)
    with pytest.raises(UsageError, match=r"residual stream of .* cannot be rotated: its|cannot be rotated: .* follows"):
        lowbit.dry_run(str(model), scheme="W4A16", group_size=32, method="hadamard+gptq")
