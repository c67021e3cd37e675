"""Adapters on frozen codes: what they compute, the files PEFT reads, LoftQ's start, merging."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint.base import OpenOptions
from lowbit.cli.main import app
from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.train import Adapted, Course, LoRA
from lowbit.train.adapters import best_of_rank
from lowbit.train.finetuning import finetune
from models import SHORT_TEXT, make_model

COURSE = Course(steps=6, batch=4, windows=12, window_tokens=32, learning_rate=5e-3)
SMALL = {"data": SHORT_TEXT, "course": COURSE, "group_size": 32}


def losses(notes) -> list[float]:
    """Held-out losses of a summary: before, after, merged."""
    (note,) = (note for note in notes if note.startswith("trained"))
    words = note.replace(";", "").split()
    arrow = words.index("→")
    merged = [words[index + 1] for index, word in enumerate(words) if word == "again"]
    return [float(word) for word in (words[arrow - 1], words[arrow + 1], *merged)]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def with_adapter(base: str, folder):
    """The independent merge: the decoded base, and W + alpha / r · B·A by the names of the file."""
    model, _ = lowbit.load(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * config["lora_alpha"] / config["r"]
        with torch.no_grad():
            module.weight += update.t() if config["fan_in_fan_out"] else update
    return model


def held_out(model, text_windows):
    total = [model(ids[None], labels=ids[None]).loss.item() for ids in text_windows]
    return sum(total) / len(total)


@pytest.mark.parametrize("init", ["zero", "loftq"])
@pytest.mark.parametrize(("kind", "scheme"), [("llama", "W4A16"), ("gpt2", "W4A16"), ("llama", "W8A8")])
def test_the_files_are_the_model_that_was_trained(tmp_path, kind, scheme, init):
    """The held-out loss of the summary, from the files alone."""
    model = make_model(tmp_path / "model", kind, dtype=torch.float32)
    how = dict(SMALL) if scheme == "W4A16" else {name: SMALL[name] for name in ("data", "course")}
    done = finetune(model, tmp_path / "out", scheme=scheme, lora=LoRA(4, 6.0, init), **how)
    assert isinstance(done, Adapted)
    assert done.base == str(tmp_path / "out-base")
    assert lowbit.verify(done.base).ok
    before, after = losses(done.notes)
    assert after < before
    if scheme != "W4A16":  # its engine rounds inputs, which a plain model does not
        return
    cut = lowbit.text.calibration_windows(SHORT_TEXT, lowbit.load(model)[1], 12, 32)
    assert held_out(with_adapter(done.base, done.path), cut.ids[-1:]) == pytest.approx(after, rel=1e-3)


def test_codes_of_the_base_are_those_of_quantize(tiny_llama, tmp_path):
    done = finetune(tiny_llama, tmp_path / "out", scheme="NF4", lora=LoRA(4), data=SHORT_TEXT, course=COURSE)
    nearest = lowbit.quantize(tiny_llama, tmp_path / "nearest", scheme="NF4").path
    ours, theirs = (load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "out-base", nearest))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert isinstance(done, Adapted)


def test_lowbit_merges_what_it_wrote(tiny_llama, tmp_path):
    """`--adapter` of quantize, on the 16-bit model."""
    done = finetune(tiny_llama, tmp_path / "out", scheme="W8A16", lora=LoRA(4), **SMALL)
    assert isinstance(done, Adapted)
    opened = lowbit.inspect(tiny_llama, OpenOptions(adapter=str(done.path)))
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(done.path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    wanted = lowbit.inspect(tiny_llama).read(f"{name}.weight").double() + 2.0 * b @ a
    torch.testing.assert_close(opened.read(f"{name}.weight").double(), wanted, rtol=0, atol=1e-6)


def test_a_quantized_model_is_the_base_as_it_is(tiny_llama, tmp_path):
    base = lowbit.quantize(tiny_llama, tmp_path / "base", scheme="W4A16_ASYM", group_size=32).path
    kept = {path.name: path.read_bytes() for path in base.iterdir()}
    how = {name: SMALL[name] for name in ("data", "course")}
    done = finetune(base, tmp_path / "out", lora=LoRA(4), **how)
    assert isinstance(done, Adapted)
    assert (done.base, done.report) == (str(base), None)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == kept
    assert not (tmp_path / "out-base").exists()
    before, after = losses(done.notes)
    assert after < before
    with pytest.raises(LowbitError, match="a LoRA adapter of") as caught:
        lowbit.load(done.path)
    assert "its base is quantized" in caught.value.hint  # no command that would refuse it
    assert "lowbit quantize MODEL" in caught.value.hint
    cut = lowbit.text.calibration_windows(SHORT_TEXT, lowbit.load(base)[1], 12, 32)
    assert held_out(with_adapter(done.base, done.path), cut.ids[-1:]) == pytest.approx(after, rel=1e-3)


def test_a_gguf_file_is_a_base(tiny_llama, tmp_path):
    base = lowbit.quantize(tiny_llama, tmp_path / "base.gguf", scheme="Q8_0").path
    done = finetune(base, tmp_path / "out", lora=LoRA(2), **{name: SMALL[name] for name in ("data", "course")})
    assert isinstance(done, Adapted)
    assert "on 14 linears" in done.notes[0]


@pytest.mark.parametrize("quantized", [False, True])
def test_merging_rounds_again_and_says_the_loss_of_each(tiny_llama, tmp_path, quantized):
    model = tiny_llama
    if quantized:
        model = lowbit.quantize(tiny_llama, tmp_path / "base", scheme="W4A16", group_size=32).path
    done = finetune(model, tmp_path / "out", scheme="W4A16", lora=LoRA(8, merge=True), **SMALL)
    assert not isinstance(done, Adapted)
    before, after, merged = losses(done.report.source.notes)
    assert after < before
    assert 0.99 * after < merged < before
    cut = lowbit.text.calibration_windows(SHORT_TEXT, lowbit.load(done.path)[1], 12, 32)
    assert held_out(lowbit.load(done.path)[0], cut.ids[-1:]) == pytest.approx(merged, rel=2e-3)
    assert not (tmp_path / "out-base").exists()


def test_merging_nothing_into_a_quantized_folder_leaves_its_weights(tiny_llama, tmp_path):
    """Its scales are kept; fitted to decoded weights they would be others."""
    base = lowbit.quantize(tiny_llama, tmp_path / "base", scheme="W2A16", group_size=32).path
    course = Course(steps=1, windows=4, window_tokens=16, learning_rate=1e-12)
    done = finetune(base, tmp_path / "out", scheme="W2A16", group_size=32, data=SHORT_TEXT, course=course,
                    lora=LoRA(4, merge=True))  # fmt: skip
    before, after = lowbit.inspect(base), lowbit.inspect(done.path)
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert changed == []


def test_merging_into_a_gguf_file(tiny_llama, tmp_path):
    how = {name: SMALL[name] for name in ("data", "course")}
    done = finetune(tiny_llama, tmp_path / "out.gguf", scheme="Q4_0", lora=LoRA(4, init="loftq", merge=True), **how)
    before, after, merged = losses(done.report.source.notes)
    assert after < before
    assert merged < before
    assert done.report.output.format == "gguf"


def test_merging_after_loftq_takes_its_start_out_again(tiny_llama, tmp_path):
    """Without a step that learns anything, what is merged is the model that it began with, rounded."""
    course = Course(steps=1, windows=4, window_tokens=16, learning_rate=1e-12)
    how = {"scheme": "W4A16", "group_size": 32, "positive_scales": True}  # of two signs a group may take either
    done = finetune(tiny_llama, tmp_path / "out", data=SHORT_TEXT, course=course,
                    lora=LoRA(4, init="loftq", merge=True), **how)  # fmt: skip
    nearest = lowbit.quantize(tiny_llama, tmp_path / "nearest", **how).path
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (done.path, nearest))
    same = [torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("weight_packed")]
    assert sum(same) >= len(same) - 1  # a tie may fall to the other side


def test_loftq_begins_nearer_to_the_float_model(tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    course = Course(steps=1, windows=4, window_tokens=32, learning_rate=1e-9, distill=True)
    start = {}
    for init in ("zero", "loftq"):
        done = finetune(model, tmp_path / init, scheme="W2A16", group_size=32, data=SHORT_TEXT, course=course,
                        lora=LoRA(32, init=init))  # fmt: skip
        assert isinstance(done, Adapted)
        start[init] = losses(done.notes)[0]
    assert start["loftq"] < 0.8 * start["zero"]


def test_the_best_of_a_rank():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 24, generator=generator) @ torch.diag(0.8 ** torch.arange(24.0))
    b, a = best_of_rank(matrix, 6, generator)
    _, values, _ = torch.linalg.svd(matrix)
    error = torch.linalg.matrix_norm(matrix - b @ a)
    assert error <= 1.001 * values[6:].square().sum().sqrt()
    assert (b.shape, a.shape) == ((40, 6), (6, 24))


def test_a_loftq_adapter_merges_with_no_other_base(tiny_llama, tmp_path):
    done = finetune(tiny_llama, tmp_path / "out", scheme="W4A16", lora=LoRA(4, init="loftq"), **SMALL)
    with pytest.raises(CheckpointError, match="LoftQ made its codes up together with it"):
        lowbit.quantize(tiny_llama, tmp_path / "merged", scheme="W4A16", options=OpenOptions(adapter=str(done.path)))


def test_peft_loads_it(tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    done = finetune(tiny_llama, tmp_path / "out", scheme="W4A16", lora=LoRA(4), **SMALL)
    assert isinstance(done, Adapted)
    plain, _ = lowbit.load(done.base)
    ids = torch.arange(20)[None]
    expected = logits(with_adapter(done.base, done.path), ids)
    loaded = peft.PeftModel.from_pretrained(plain, done.path)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-4, atol=1e-4)


def test_experts_inside_one_parameter_get_none(tmp_path):
    model = make_model(tmp_path / "model", "mixtral", num_hidden_layers=1)
    done = finetune(model, tmp_path / "out", scheme="W8A16", lora=LoRA(2), **SMALL)
    assert "on 4 linears" in done.notes[0]
    assert "12 experts inside one parameter have none" in done.notes[0]
    assert json.loads((done.path / "adapter_config.json").read_text())["target_modules"] == [
        "k_proj", "o_proj", "q_proj", "v_proj"
    ]  # fmt: skip


def test_the_command(tiny_llama, tmp_path):
    line = f"finetune {tiny_llama} -o {tmp_path}/out --scheme NF4 --data {SHORT_TEXT} --windows 8 --window-tokens 32"
    done = CliRunner().invoke(app, [*line.split(), "--steps=1", "--lora=4", "--lora-init=loftq", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["base"] == f"{tmp_path}/out-base"
    assert "started by LoftQ" in said["notes"][0]
    again = CliRunner().invoke(app, [*line.split(), "--steps=1", "--lora=4", "--overwrite"])
    assert again.exit_code == 0, again.output
    assert "adapters of rank 4" in again.stderr
    unread = CliRunner().invoke(app, [*line.split(), "--merge"])
    assert "--merge is read only with --lora" in str(unread.exception)


@pytest.mark.parametrize(
    ("lora", "asked", "said"),
    [
        ({"rank": 0}, {}, "rank 0 change nothing"),
        ({"rank": 4, "alpha": -1.0}, {}, "alpha -1.0"),
        ({"rank": 4, "init": "pissa"}, {}, "do not begin as 'pissa'"),
        ({"rank": 4000}, {}, "rank 4000 is more than"),
        ({"rank": 4}, {"scheme": "Q4_0"}, "beside a folder"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_llama, tmp_path, lora, asked, said):
    how = {name: SMALL[name] for name in ("data", "course")} | asked
    with pytest.raises(LowbitError, match=said):
        finetune(tiny_llama, tmp_path / "out", lora=LoRA(**lora), **how)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("lora", "asked", "said"),
    [
        (LoRA(4), {"scheme": "W8A16"}, "scheme would not be read"),
        (LoRA(4, init="loftq"), {}, "a quantized model does not have it"),
    ],
)
def test_what_a_quantized_base_does_not_read(tiny_llama, tmp_path, lora, asked, said):
    base = lowbit.quantize(tiny_llama, tmp_path / "base", scheme="W4A16").path
    with pytest.raises(UsageError, match=said):
        finetune(base, tmp_path / "out", lora=lora, **({name: SMALL[name] for name in ("data", "course")} | asked))


def test_a_base_that_is_there_is_not_touched(tiny_llama, tmp_path):
    (tmp_path / "out-base").mkdir()
    (tmp_path / "out-base" / "mine.txt").write_text("mine")
    with pytest.raises(LowbitError, match="out-base exists already"):
        finetune(tiny_llama, tmp_path / "out", scheme="W4A16", lora=LoRA(4), **SMALL)
