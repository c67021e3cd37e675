"""A training that was killed goes on, and ends in the same bytes; another training does not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit.calibrate.leftovers import find_leftovers
from lowbit.errors import LowbitError, UsageError
from lowbit.settings import RunOptions
from lowbit.train import Course, LoRA
from models import SHORT_TEXT

COURSE = Course(steps=6, batch=2, windows=10, window_tokens=24, learning_rate=1e-3)


class Killed(BaseException):
    """What no handler of errors catches."""


def kill_at(step: int):
    """A progress callback that ends the run after a step of two windows."""

    def progress(done: int, of: int) -> None:
        if done == 2 * step:
            raise Killed

    return progress


def weights(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def run(model, output, **more):
    how = {"data": SHORT_TEXT, "course": COURSE, "save_every": 2} | more
    return lowbit.finetune(model, output, **({"scheme": "W4A16", "group_size": 32} | how))


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_the_bytes_are_those_of_an_uninterrupted_training(tiny_llama, tmp_path, killed_at):
    whole = run(tiny_llama, tmp_path / "whole")
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(killed_at))
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.lowbit-work" / "learning.safetensors"
    assert kept.exists() == (killed_at > 2)  # a state is kept after steps 2 and 4
    steps = []
    done = run(tiny_llama, tmp_path / "out", resume=True, progress=lambda now, of: steps.append(now // 2))
    assert steps[0] == 2 * ((killed_at - 1) // 2) + 1
    assert weights(done.path) == weights(whole.path)
    assert done.report.source.notes == whole.report.source.notes
    assert not (tmp_path / ".out.lowbit-work").exists()


def test_adapters_and_dropout_go_on_too(tmp_path):
    from models import make_model

    model = make_model(tmp_path / "model", attention_dropout=0.2)
    lora = LoRA(4, init="loftq")
    whole = run(model, tmp_path / "whole", lora=lora)
    with pytest.raises(Killed):
        run(model, tmp_path / "out", lora=lora, progress=kill_at(4))
    done = run(model, tmp_path / "out", lora=lora, resume=True)
    assert weights(done.path) == weights(whole.path)
    assert weights(tmp_path / "out-base") == weights(tmp_path / "whole-base")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"course": Course(steps=6, batch=2, windows=10, window_tokens=24)}, "learning_rate was 0.001"),
        ({"scheme": "W8A16"}, "scheme was W4A16"),
        ({"data": [list(range(24))] * 10}, "training text is not what it was"),
        ({"lora": LoRA(4)}, "learning_rate was 0.001|lora rank was None, is 4"),
    ],
)
def test_another_training_is_refused(tiny_llama, tmp_path, changed, said):
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(3))
    if "data" in changed:
        changed["data"] = [torch.tensor(row) for row in changed["data"]]
    with pytest.raises(UsageError, match=said):
        run(tiny_llama, tmp_path / "out", resume=True, **changed)


def test_another_model_is_refused(tiny_llama, tmp_path):
    from models import make_model

    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(3))
    with pytest.raises(UsageError, match=r"model.safetensors of .* is not what it was"):
        run(other, tmp_path / "out", resume=True)


def test_another_reference_is_refused_by_its_name(tiny_llama, tmp_path):
    from models import make_model

    reference = make_model(tmp_path / "reference", seed=1)
    how = {"reference": reference, "course": replace(COURSE, distill=True)}
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(3), **how)
    config = json.loads((reference / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(UsageError, match=r"(?m)another run: config.json of the reference is not what it was$"):
        run(tiny_llama, tmp_path / "out", resume=True, **how)
    make_model(reference, seed=2)
    with pytest.raises(UsageError, match=r"(?m)another run: model.safetensors of the reference is not what it was$"):
        run(tiny_llama, tmp_path / "out", resume=True, **how)


def test_a_quantization_does_not_go_on_from_a_training(tiny_llama, tmp_path):
    """Nor does it blame the version of lowbit."""
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(3))
    with pytest.raises(UsageError, match=r"(?m)holds another run: it is a training$"):
        lowbit.quantize(tiny_llama, tmp_path / "out", scheme="W4A16", method="gptq", group_size=32, samples=4,
                        seqlen=32, calib=SHORT_TEXT, run=RunOptions(resume=True))  # fmt: skip


def test_a_damaged_state_is_not_used(tiny_llama, tmp_path, caplog):
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(3))
    assert "--resume goes on from it" in caplog.text
    kept = tmp_path / ".out.lowbit-work" / "learning.safetensors"
    (leftover,) = find_leftovers(tmp_path)
    assert "the state of a training" in leftover.what
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    steps = []
    run(tiny_llama, tmp_path / "out", resume=True, progress=lambda now, of: steps.append(now))
    assert steps[0] == 2
    assert "the learning begins anew" in caplog.text


def test_a_kill_between_checksum_and_name_loses_nothing(tiny_llama, tmp_path):
    """The state of step 4 is complete, and has not its name yet."""
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(5))
    folder = tmp_path / ".out.lowbit-work"
    (folder / "learning.safetensors").rename(folder / "learning.safetensors.partial")
    (folder / "learning.safetensors").write_bytes(b"the state before")
    steps = []
    run(tiny_llama, tmp_path / "out", resume=True, progress=lambda now, of: steps.append(now // 2))
    assert steps[0] == 5


def test_without_resume_it_starts_over_and_says_so(tiny_llama, tmp_path, caplog):
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(3))
    steps = []
    run(tiny_llama, tmp_path / "out", progress=lambda now, of: steps.append(now))
    assert steps[0] == 2
    assert "the state of an earlier training is removed" in caplog.text


def test_no_states_leave_nothing_behind(tiny_llama, tmp_path):
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", save_every=0, progress=kill_at(3))
    assert not list(tmp_path.glob(".out*"))


def test_what_the_identity_holds(tiny_llama, tmp_path):
    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", progress=kill_at(3))
    known = json.loads((tmp_path / ".out.lowbit-work" / "run.json").read_text())
    assert {"settings", "files", "text", "config", "arithmetic", "versions"} <= known.keys()
    assert known["settings"]["steps"] == 6


def test_two_runs_of_one_output(tiny_llama, tmp_path):
    """The second is refused while the first trains."""
    seen = []

    def meddle(done: int, of: int) -> None:
        with pytest.raises(LowbitError, match="being written by another run"):
            run(tiny_llama, tmp_path / "out")
        seen.append(done)

    run(tiny_llama, tmp_path / "out", progress=meddle, course=Course(steps=1, windows=4, window_tokens=16))
    assert seen
