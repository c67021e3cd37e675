"""`lowbit finetune`: a plain loop under fake quantization, from 16 bits or from a quantized model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import CheckpointError, LowbitError, NonFiniteError, UsageError
from lowbit.train import Course, LoRA, finetuning, opening
from lowbit.train.loop import Lesson, train
from models import SHORT_TEXT, make_model

SIZE = {"windows": 12, "window_tokens": 32, "batch": 4}


def small(**course):
    """A course of a few short windows, and its text."""
    return {"data": SHORT_TEXT, "course": Course(**(SIZE | course))}


def test_distillation_lowers_the_divergence_on_windows_it_did_not_see(tiny_llama, tmp_path):
    done = lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W2A16", group_size=32,
                           **small(distill=True, steps=12, learning_rate=1e-3))  # fmt: skip
    assert done.report.settings.method == "qat"
    assert done.report.settings.calibration.name == SHORT_TEXT
    assert done.report.source.model == str(tiny_llama)
    assert done.report.output.dtype == "bfloat16"
    nearest = lowbit.quantize(tiny_llama, tmp_path / "nearest", scheme="W2A16", group_size=32)
    assert done.report.totals.bytes_out == nearest.report.totals.bytes_out
    how = {"reference": tiny_llama, "text": SHORT_TEXT, "windows": 8, "window_tokens": 32}
    trained, start = (lowbit.evaluate(path, **how)[0].kld_mean for path in (done.path, nearest.path))
    assert trained < 0.7 * start
    (note,) = (note for note in done.report.source.notes if note.startswith("trained 12 steps"))
    before, after = (float(word) for word in note.split(" float model ")[1].split(" → "))
    assert after < before


def test_training_goes_on_from_a_quantized_model(tiny_llama, tmp_path):
    start = lowbit.quantize(tiny_llama, tmp_path / "start", scheme="W4A16", group_size=32).path
    done = lowbit.finetune(start, tmp_path / "out", scheme="W4A16", group_size=32,
                           reference=tiny_llama, **small(steps=2, distill=True))  # fmt: skip
    assert lowbit.verify(done.path).ok
    with pytest.raises(UsageError, match="it cannot be its own reference"):
        lowbit.finetune(start, tmp_path / "other", scheme="W4A16", **small(distill=True))


@pytest.mark.parametrize(("scheme", "method"), [("W2A16", "gptq"), ("W4A16_ASYM", "rtn"), ("NVFP4A16", "rtn")])
def test_training_begins_with_the_codes_and_scales_of_a_quantized_model(tiny_llama, tmp_path, scheme, method):
    """Scales fitted to decoded weights are others: at 2 bits all of the start was lost."""
    text = {"calib": SHORT_TEXT, "samples": 8, "seqlen": 32} if method == "gptq" else {}
    start = lowbit.quantize(tiny_llama, tmp_path / "start", scheme=scheme, method=method, **text).path
    done = lowbit.finetune(start, tmp_path / "out", scheme=scheme, **small(steps=1, learning_rate=1e-12))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (done.path, start))
    kept = [name for name in theirs if name.endswith(("weight_scale", "weight_zero_point"))]
    assert len(kept) >= 14
    assert [name for name in kept if not torch.equal(ours[name], theirs[name])] == []
    trained, quantized = lowbit.inspect(done.path), lowbit.inspect(start)
    linears = [name.replace("weight_scale", "weight") for name in kept if name.endswith("weight_scale")]
    assert [name for name in linears if not torch.equal(trained.read(name), quantized.read(name))] == []


def test_scales_of_another_grid_are_fitted_anew(tiny_llama, tmp_path):
    start = lowbit.quantize(tiny_llama, tmp_path / "start", scheme="W4A16", group_size=32).path
    done = lowbit.finetune(start, tmp_path / "out", scheme="W8A16", group_size=64, **small(steps=1))
    assert lowbit.verify(done.path).ok


def test_the_same_seed_makes_the_same_bytes(tiny_llama, tmp_path):
    paths = [lowbit.finetune(tiny_llama, tmp_path / name, scheme="Q4_0", **small(steps=1, seed=seed)).path
             for name, seed in (("a.gguf", 0), ("b.gguf", 0))]  # fmt: skip
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_command(tiny_llama, tmp_path):
    line = f"finetune {tiny_llama} -o {tmp_path}/out --scheme W8A8 --data {SHORT_TEXT} --windows 8 --window-tokens 32"
    done = CliRunner().invoke(app, [*line.split(), "--steps", "1"])
    assert done.exit_code == 0, done.output
    assert "trained 1 steps" in " ".join(done.output.split())


@pytest.mark.parametrize("scheme", ["W8A8_STATIC_ASYM", "W4AFP8_STATIC"])
def test_static_scales_are_measured_on_the_windows_of_the_training(tmp_path, scheme):
    source = make_model(tmp_path / "model", max_position_embeddings=64)  # shorter than calibration's usual windows
    done = lowbit.finetune(source, tmp_path / "out", scheme=scheme, **small(steps=1))
    text = done.report.settings.calibration
    assert (text.name, text.samples, text.sequence_length) == (SHORT_TEXT, 12, 32)
    stored = load_file(done.path / "model.safetensors")
    ranges = [scale.item() for name, scale in stored.items() if name.endswith("input_scale")]
    assert len(ranges) == 14
    assert len(set(ranges)) > 4
    assert lowbit.evaluate(done.path, reference=source, text=SHORT_TEXT, windows=4, window_tokens=32)[-1].kld_mean < 0.5


def test_static_scales_of_an_adapters_base(tmp_path):
    source = make_model(tmp_path / "model", max_position_embeddings=64)
    done = lowbit.finetune(source, tmp_path / "out", scheme="W8A8_STATIC_ASYM", lora=LoRA(2), **small(steps=1))
    assert done.report.settings.calibration.sequence_length == 32
    assert lowbit.verify(done.base).ok


def test_experts_of_a_scheme_that_rounds_inputs(tmp_path):
    source = make_model(tmp_path / "model", "qwen3_moe")
    with pytest.raises(UsageError, match="runs inside a fused operation") as caught:
        lowbit.finetune(source, tmp_path / "out", scheme="TERNARY", **small(steps=1))
    assert "a scheme that rounds weights only" in caught.value.hint


def test_the_command_on_conversations(tiny_llama, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}, of course"}]}
            for n in range(40)]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    line = f"finetune {tiny_llama} -o {tmp_path}/out --scheme W8A8 --data {tmp_path}/chat.jsonl --windows 8 --steps 1"
    more = ["--window-tokens=32", "--loss-on=answers", "--save-every=1", "--resume"]  # there is nothing to go on from
    done = CliRunner().invoke(app, [*line.split(), *more])
    assert done.exit_code == 0, done.output
    assert "trained 1 steps on answers" in " ".join(done.output.split())


def test_data_in_memory(tiny_llama, tmp_path):
    rows = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(0))
    done = lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W4A16", data=list(rows),
                           course=Course(windows=6, window_tokens=24))  # fmt: skip
    assert done.report.settings.calibration.samples == 6


def test_embeddings_and_the_output_layer_stay(tiny_llama, tmp_path):
    done = lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W4A16", **small(steps=2, learning_rate=1e-2))
    before, after = lowbit.inspect(tiny_llama), lowbit.inspect(done.path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before.read(name), after.read(name))
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(before.read(name), after.read(name))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_what_is_trained(tmp_path, kind):
    """The linears that are rounded, and the vectors of their blocks, whatever the class calls them."""
    model, _ = lowbit.load(make_model(tmp_path / "model", kind, num_hidden_layers=1))
    lowbit.train.prepare(model.requires_grad_(True), "W8A16", group_size=32)
    finetuning._freeze_outside(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    rounded = {name for name in trained if ".parametrizations." in name}
    assert {name for name, _ in model.named_parameters() if ".parametrizations." in name} == rounded
    assert all(".0." in name and model.get_parameter(name).dim() == 1 for name in trained - rounded)
    assert any("norm" in name or "ln_" in name for name in trained)
    assert all(".0." not in name or "gate" in name for name in frozen)  # of a block, only the router of experts


class Spoiling(torch.nn.Module):
    """A model whose logits become NaN in the given call."""

    def __init__(self, call: int):
        super().__init__()
        self.weight, self.calls, self.bad = torch.nn.Parameter(torch.ones(4, 8)), 0, call

    def forward(self, ids, use_cache):
        self.calls += self.training
        spoilt = torch.nan if self.training and self.calls == self.bad else 1.0
        return type("Output", (), {"logits": self.weight[ids % 4] * spoilt})


def test_a_loss_that_is_not_finite_ends_the_training_before_it_spoils_the_weights():
    ids = torch.arange(64).reshape(8, 8) % 8
    model = Spoiling(3)
    found = train(model, Lesson(ids), Course(steps=5, batch=2, learning_rate=1e-2))
    assert found.steps == 2
    assert found.stopped == "the loss of step 3 is not finite"
    assert model.weight.isfinite().all()
    assert "stopped: the loss of step 3" in found.sentence("loss")
    with pytest.raises(NonFiniteError, match="the loss of step 1 is not finite"):
        train(Spoiling(1), Lesson(ids), Course(steps=5, batch=2, learning_rate=1e-2))


def test_too_little_to_learn_from():
    with pytest.raises(CheckpointError, match="nothing is left to learn from"):
        train(Spoiling(9), Lesson(torch.zeros(1, 8, dtype=torch.long)), Course())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"reference": "x"}, "--reference is read only with --distill"),
        ({"learning_rate": 0.0}, "at rate 0.0"),
        ({"batch": 0}, "of 0 windows"),
        ({"loss_on": "questions"}, "not taken on 'questions'"),
        ({"loss_on": "answers"}, "there are no answers in it"),
        ({"save_every": -1}, "every -1 steps"),
        ({"method": "gptq"}, "method is not read by a training"),
        ({"data": []}, "it is empty"),
        ({"scheme": "Q4_0"}, "written as one GGUF file"),
        ({"window_tokens": 9999}, r"\(--window-tokens\) are longer than the model's context"),
        ({"nonsense": 1}, "no setting nonsense"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_llama, tmp_path, asked, said):
    course = {name: asked.pop(name) for name in list(asked) if name in Course.__dataclass_fields__}
    with pytest.raises(LowbitError, match=said):
        lowbit.finetune(tiny_llama, tmp_path / "out", **({"scheme": "W4A16"} | small(**course) | asked))
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_no_gguf_has_is_refused_before_the_training(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="there is no GGUF file type 'W4A16'"):
        lowbit.finetune(tiny_llama, tmp_path / "out.gguf", scheme="W4A16", progress=pytest.fail, **small())
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_refused(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "available_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"training .* weights takes"):
        lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W4A16", **small())


def test_a_reference_of_another_vocabulary(tiny_llama, tmp_path):
    other = make_model(tmp_path / "other", vocab_size=512)
    with pytest.raises(UsageError, match="vocabulary of 512"):
        lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W4A16", reference=other, **small(distill=True))


def test_an_output_that_is_there_is_not_touched(tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(LowbitError, match="exists already"):
        lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W4A16", **small())
