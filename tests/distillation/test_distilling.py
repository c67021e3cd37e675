"""Whole runs with +distill: the file is what was trained, it is never worse, a stopped run makes the same bytes."""

from __future__ import annotations

import json
import math

import pytest
import torch

import lowbit
from calibrate.calibrated import calibrated, files_of, write_text
from lowbit.architecture.loading import load_model, load_tokenizer
from lowbit.calibrate.loop import read_windows
from lowbit.calibrate.store import BlockStore
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.distillation import descent
from lowbit.distillation.descent import Split, State, outcome
from lowbit.distillation.divergence import TokenDivergence
from lowbit.distillation.memory import DistillMemory, MemoryShare, distillation_dtype
from lowbit.errors import NonFiniteError, UsageError
from lowbit.evaluation.activations import simulation_of
from lowbit.settings import RunOptions, Settings
from models import make_model

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64}  # fmt: skip
GIVEN = {"scheme": "W2A16", "samples": 12, "seqlen": 32, "compute": "float32", "distill_steps": 8, "distill_rate": 2e-3}
# GPTQ as published: shrunk Hessians leave nothing to gain on so small a model and text.
# Of W2A16, and of windows that GPTQ has seen: a start that leaves something to learn on so little text.
PLAIN_GPTQ = {"expert_tokens": 8, "shrinkage": 0, "stream_correction": 0, "positive_scales": True, "distill_samples": 0}


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Of four windows, so that there is more than one in a pass."""
    monkeypatch.setattr(descent, "STEP_TOKENS", 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("distilling") / "model", **SMALL)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("distilling-wide") / "model", **WIDE, num_hidden_layers=1)


@pytest.fixture(scope="module")
def text(model):
    return write_text(model.parent)


def held_out_divergence(source, output, text, method="distill") -> float:
    """Of a finished output from its source, on the windows that a run with GIVEN holds out."""
    checkpoint = open_checkpoint(str(source))
    settings = Settings(calib=str(text), method=method, samples=GIVEN["samples"], seqlen=GIVEN["seqlen"],
                        distill_samples=PLAIN_GPTQ["distill_samples"] if "gptq" in method else None)  # fmt: skip
    further = settings.further_windows
    windows = read_windows(checkpoint, settings, OpenOptions(), RunOptions(), further=further)
    ids = windows.ids[settings.samples :] if further else windows.ids
    ids = ids[Split.of(len(ids)).held_out]
    written = open_checkpoint(str(output))
    student = load_model(written)
    with torch.no_grad(), simulation_of(written)(student):
        log_p = load_model(checkpoint)(ids).logits.log_softmax(-1)
        log_q = student(ids).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.sampled(2, keep=("W2A16",))
@pytest.mark.parametrize(
    ("scheme", "method"),
    [("W3A16", "distill"), ("W2A16", "gptq+distill"), ("W4A16_ASYM", "distill"), ("W8A8", "distill"),
     ("NVFP4A16", "distill"), ("MXFP4A16", "distill"), ("NF4", "distill"), ("FP8_BLOCK", "distill"),
     ("W2A16", "awq+distill"), ("W2A16", "hadamard+gptq+distill"), ("W4A4", "distill"),
     ("W4A4", "hadamard+hadamard-down+distill")],
)  # fmt: skip
def test_a_folder_is_what_was_trained(model, wide, text, tmp_path, scheme, method):
    """The divergence of the file, decoded by its reader and with inputs rounded as the engine does, is the one that the
    run ended with."""
    model = wide if scheme == "FP8_BLOCK" else model  # whose blocks are of 128
    group = {} if scheme in ("W8A8", "FP8_BLOCK", "NF4", "NVFP4A16", "MXFP4A16") else {"group_size": 32}
    given = GIVEN | {"scheme": scheme} | group | (PLAIN_GPTQ if "gptq" in method else {})
    report = lowbit.quantize(model, tmp_path / "out", method=method, calib=str(text), **given).report
    done = report.distillation
    assert done is not None
    learned = done.kld_end < done.kld_start
    assert learned or scheme == "FP8_BLOCK", "its inputs lose more than its scales"
    assert (done.windows, done.held_out) == (10, 2)
    assert held_out_divergence(model, tmp_path / "out", text, method) == pytest.approx(done.kld_end, rel=2e-3)
    assert all(entry.method.endswith("+distill") == learned for entry in report.tensors if entry.scheme is not None)
    assert any(
        note.startswith("distillation of " if learned else "distillation: nothing") for note in report.source.notes
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scheme", ["Q2_K", "Q4_0", "IQ3_S", "IQ2_XS", "IQ4_XS", "Q4_K_M"])
def test_a_gguf_file_is_what_was_trained(wide, text, tmp_path, scheme):
    """Its embedding is rounded too, which the student sees."""
    out = tmp_path / "out.gguf"
    given = GIVEN | {"scheme": scheme}
    done = lowbit.quantize(wide, out, method="distill", calib=str(text), **given).report.distillation
    assert done is not None
    assert done.kld_end < done.kld_start
    assert held_out_divergence(wide, out, text) == pytest.approx(done.kld_end, rel=2e-3)


def test_norms_and_biases_are_learned_where_they_are(tmp_path, text):
    source = make_model(tmp_path / "model", "qwen2", **SMALL)
    lowbit.quantize(source, tmp_path / "out", group_size=32, method="distill", calib=str(text), **GIVEN)
    before, after = (open_checkpoint(str(path)) for path in (source, tmp_path / "out"))
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"):
        assert after.tensors[name].dtype == before.tensors[name].dtype
        assert not torch.equal(after.read(name), before.read(name)), name
    assert torch.equal(after.read("model.embed_tokens.weight"), before.read("model.embed_tokens.weight"))


def test_without_room_for_all_blocks_the_bytes_are_the_same(model, text, tmp_path, monkeypatch):
    """Blocks that are dropped and decoded again compute what blocks that stay do."""
    given = GIVEN | {"distill_steps": 3}
    for name, resident, graphs in (("graphs", True, True), ("resident", True, False), ("dropped", False, False)):
        monkeypatch.setattr(DistillMemory, "share", lambda *_, ways=(resident, graphs): MemoryShare(1 << 20, *ways))
        calibrated(model, tmp_path / name, text, "distill", **given)
    assert files_of(tmp_path / "dropped") == files_of(tmp_path / "resident") == files_of(tmp_path / "graphs")


@pytest.mark.parametrize("stop_at", [3, 8])
def test_a_stopped_run_goes_on_to_the_same_bytes(model, text, tmp_path, monkeypatch, stop_at):
    """In the middle of the descent, and behind its last step."""
    monkeypatch.setattr(descent, "KEEP_EVERY", 0.0)
    calibrated(model, tmp_path / "whole", text, "gptq+distill", **GIVEN, **PLAIN_GPTQ)
    save, steps = BlockStore.save_learning, []

    def save_and_stop(self, tensors, facts):
        save(self, tensors, facts)
        if facts["step"] == stop_at:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save_learning", save_and_stop)
        with pytest.raises(Stopped):
            calibrated(model, tmp_path / "out", text, "gptq+distill", **GIVEN, **PLAIN_GPTQ)

    def save_and_note(self, tensors, facts):
        save(self, tensors, facts)
        steps.append(facts["step"])

    monkeypatch.setattr(BlockStore, "save_learning", save_and_note)
    calibrated(model, tmp_path / "out", text, "gptq+distill", run=RunOptions(resume=True), **GIVEN, **PLAIN_GPTQ)
    assert steps[:1] == ([stop_at + 1] if stop_at < 8 else [8])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_a_run_stopped_while_blocks_are_written_goes_on(model, text, tmp_path, monkeypatch):
    """Not a step is done again, and no block gets its changes twice."""
    calibrated(model, tmp_path / "whole", text, "gptq+distill", **GIVEN, **PLAIN_GPTQ)
    save = BlockStore.save_distilled

    def save_and_stop(self, index, *arguments):
        save(self, index, *arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save_distilled", save_and_stop)
        with pytest.raises(Stopped):
            calibrated(model, tmp_path / "out", text, "gptq+distill", **GIVEN, **PLAIN_GPTQ)
    monkeypatch.setattr(TokenDivergence, "gradients", None)
    report = calibrated(
        model, tmp_path / "out", text, "gptq+distill", run=RunOptions(resume=True), **GIVEN, **PLAIN_GPTQ
    )
    assert report.distillation is not None
    assert report.distillation.steps == 8
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_seed_decides_the_order_of_windows(model, text, tmp_path):
    ends = {seed: calibrated(model, tmp_path / str(seed), text, "distill", seed=seed, **GIVEN).distillation.kld_end
            for seed in (0, 1)}  # fmt: skip
    assert ends[0] != ends[1]


def test_what_makes_it_worse_is_thrown_away(model, text, tmp_path):
    """A rate that destroys the model: the output is that of the rounding alone, and says so."""
    given = GIVEN | {"distill_rate": 0.1, "distill_steps": 4, "scheme": "W8A16"}
    report = calibrated(model, tmp_path / "out", text, "gptq+distill", **given)
    done = report.distillation
    assert done is not None
    assert done.kld_end == done.kld_start
    assert done.best_step == 0
    assert any("nothing that was learned is kept" in note for note in report.source.notes)
    assert any("no better on the held-out windows" in note for note in report.source.notes)
    plain = {key: value for key, value in given.items() if not key.startswith("distill")}
    calibrated(model, tmp_path / "plain", text, "gptq", **plain)
    weights = "model.safetensors"
    assert files_of(tmp_path / "out")[weights] == files_of(tmp_path / "plain")[weights]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(model, text, tmp_path, monkeypatch):
    gradients, calls = TokenDivergence.gradients, []

    def broken(self, *arguments):
        calls.append(1)
        loss = gradients(self, *arguments)
        return math.nan if len(calls) == 4 else loss

    monkeypatch.setattr(TokenDivergence, "gradients", broken)
    report = calibrated(model, tmp_path / "out", text, "distill", **GIVEN)
    done = report.distillation
    assert done is not None
    assert (done.steps, done.best_step) == (3, 3)
    assert done.kld_end < done.kld_start
    assert held_out_divergence(model, tmp_path / "out", text) == pytest.approx(done.kld_end, rel=2e-3)
    assert any("the divergence was not finite in step 4" in note for note in report.source.notes)


def test_a_divergence_that_is_not_finite_at_the_start_is_refused(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenDivergence, "mean", lambda *_: math.nan)
    with pytest.raises(NonFiniteError, match="before a step is taken"):
        calibrated(model, tmp_path / "out", text, "distill", **GIVEN)


def test_too_few_windows_are_refused_before_anything_is_done(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(BlockStore, "save", None)
    with pytest.raises(UsageError, match="distill needs 4 windows of text, some of which only judge; there are 3"):
        calibrated(model, tmp_path / "out", text, "gptq+distill", **GIVEN | {"samples": 3})


def test_a_text_shorter_than_asked_for_is_refused(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words, and no more than that.")
    with pytest.raises(UsageError, match=r"(?m)there (is|are) [123]$"):
        calibrated(model, tmp_path / "out", short, "gptq+distill", **GIVEN | {"seqlen": 16})


@pytest.mark.parametrize(
    ("given", "further"),
    [({}, 0), ({"method": "gptq"}, 0), ({"method": "distill"}, 0), ({"method": "gptq+distill"}, 12),
     ({"method": "awq+distill"}, 12), ({"method": "distill", "method_overrides": {"down_proj": "gptq"}}, 12),
     ({"method": "gptq+distill", "distill_samples": 0}, 0), ({"method": "distill", "distill_samples": 5}, 5)],
)  # fmt: skip
def test_distillation_has_windows_of_its_own_behind_what_was_fitted(given, further):
    assert Settings(samples=12, **given).further_windows == further


def beginning(model, text, windows):
    """So many windows of the text, and a few tokens more."""
    tokenizer = load_tokenizer(open_checkpoint(str(model)), OpenOptions())
    return tokenizer.decode(tokenizer(text.read_text(), add_special_tokens=False).input_ids[: windows * 32 + 8])


def test_a_text_without_further_windows_is_learned_from_whole(model, text, tmp_path):
    """The first windows are the calibration's, whatever follows."""
    for name, windows, further in (("much", 24, True), ("little", 14, False)):
        (tmp_path / name).write_text(beginning(model, text, windows))
        given = GIVEN | PLAIN_GPTQ | {"distill_steps": 1, "distill_samples": None}
        report = calibrated(model, tmp_path / f"{name}-out", tmp_path / name, "gptq+distill", **given)
        assert report.settings.calibration.samples == 12, name
        assert report.distillation.windows + report.distillation.held_out == (12 if further else 14), name
        notes = "\n".join(report.source.notes)
        assert bool(report.settings.calibration.notes) is not further, "a text that is long enough has no notes"
        assert ("the text has 2 further windows for distillation, not the 12 asked for" in notes) is not further


def test_a_run_does_not_go_on_with_another_text_of_the_distillation(model, text, tmp_path, monkeypatch):
    given = GIVEN | PLAIN_GPTQ | {"distill_samples": 12}
    begun, changed = beginning(model, text, 16), tmp_path / "text.txt"
    changed.write_text(text.read_text())

    def stop(self, *_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save_learning", stop)
        with pytest.raises(Stopped):
            calibrated(model, tmp_path / "out", changed, "gptq+distill", **given)
    changed.write_text(begun + begun)
    with pytest.raises(UsageError, match="the text of the distillation is not what it was"):
        calibrated(model, tmp_path / "out", changed, "gptq+distill", run=RunOptions(resume=True), **given)


def test_too_little_memory_is_refused_with_what_is_needed(model, text, tmp_path):
    with pytest.raises(
        UsageError, match=r"distill needs .* [MG]B \(the program .*what is learned.*--max-memory allows 100 MB"
    ):
        calibrated(model, tmp_path / "out", text, "gptq+distill", run=RunOptions(max_memory="100MB"), **GIVEN)


def test_arguments_that_depend_on_tokens_are_refused(tmp_path, text):
    """Zamba 2 passes its embeddings to every block."""
    from tiny_types import make_tiny

    source = make_tiny(tmp_path / "model", "zamba2")
    with pytest.raises(lowbit.errors.LowbitError, match="cannot follow"):
        calibrated(source, tmp_path / "out", text, "distill", **GIVEN)


@pytest.mark.parametrize(
    ("windows", "train", "held_out"), [(4, [0, 2], [1, 3]), (64, None, [4, 12, 20, 28, 36, 44, 52, 60])]
)
def test_held_out_windows_are_spread_over_the_text(windows, train, held_out):
    split = Split.of(windows)
    assert split.held_out.tolist() == held_out
    assert sorted([*split.train.tolist(), *held_out]) == list(range(windows))
    if train is not None:
        assert split.train.tolist() == train


@pytest.mark.parametrize(
    ("compute", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_computes_in_float32_unless_told_otherwise(compute, dtype):
    """Whatever the processor is fast at: the calibrated loop alone takes bfloat16 where that is quick."""
    assert distillation_dtype(Settings(method="gptq+distill", compute=compute)) is dtype


@pytest.mark.parametrize(
    ("method", "complaint"),
    [("distill+gptq", "distill works on the rounded model"), ("gptq+distill+distill", "distill works on the rounded"),
     ("gptq+distil", "there is no method 'distil'"), ("gptq+hqq+distill", "rounds twice")],
)  # fmt: skip
def test_distill_comes_last_and_once(method, complaint):
    with pytest.raises(UsageError, match=complaint):
        Settings(method=method)


@pytest.mark.parametrize(
    ("typed", "name"),
    [("distill", "rtn+distill"), ("RTN+distill", "rtn+distill"), ("awq+distill", "awq+distill"),
     ("smooth+gptq+distill", "smoothquant+gptq+distill"), ("gptq+sign-sgd+distill", "gptq+sign-sgd+distill")],
)  # fmt: skip
def test_distill_stands_behind_every_method(typed, name):
    assert Settings(method=typed).method == name
    assert Settings(method=name).is_blockwise


def test_a_linear_alone_cannot_be_distilled():
    with pytest.raises(UsageError, match="works on whole blocks"):
        Settings(method_overrides={"down_proj": "gptq+distill"})


def test_what_the_student_leaves_out_is_said_of_a_run_that_goes_on_too():
    state = State({}, {}, {}, {}, step=3, start=0.2, lowest=0.1, finished=True, notes=["inputs stay"])
    kept = State.of(state.tensors(), json.loads(json.dumps(state.facts())))
    assert outcome(kept, 8, descent.DistillOptions()).notes[-1] == "inputs stay"


def test_inputs_of_fused_experts_stay_and_are_named(tmp_path):
    source, text = make_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=1), write_text(tmp_path)
    given = GIVEN | {"scheme": "W8A8", "distill_steps": 1}
    report = lowbit.quantize(source, tmp_path / "out", method="distill", calib=str(text), **given).report
    (note,) = [note for note in report.source.notes if "were not rounded while learning" in note]
    assert "since they are no nn.Linear of their own" in note
    assert ".experts.0." in note
