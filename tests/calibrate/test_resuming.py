"""A run that is stopped goes on behind its last finished block, and writes the same bytes."""

from __future__ import annotations

import time

import pytest
import torch

import lowbit
from calibrate.calibrated import calibrated, files_of, write_text
from commands import process
from lowbit.calibrate import loop
from lowbit.calibrate.store import BlockStore
from lowbit.errors import UsageError
from lowbit.settings import RunOptions
from models import make_model

BLOCKS = 3
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("resuming") / "model", num_hidden_layers=BLOCKS, **SMALL)


@pytest.fixture(scope="module")
def text(model):
    return write_text(model.parent)


@pytest.fixture(scope="module")
def whole(model, text, tmp_path_factory):
    """What a run makes that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    calibrated(model, out, text, "awq+gptq")
    return files_of(out)


@pytest.mark.parametrize("states_every", [0.0, 1e9], ids=["with states", "without states"])
@pytest.mark.parametrize("stop_at", range(BLOCKS))
def test_stopped_after_a_block(model, text, whole, tmp_path, monkeypatch, stop_at, states_every):
    monkeypatch.setattr(loop, "KEEP_STATES_EVERY", states_every)
    save = BlockStore.save

    def save_and_stop(self, index, *arguments):
        save(self, index, *arguments)
        if index == stop_at:
            raise Stopped

    monkeypatch.setattr(BlockStore, "save", save_and_stop)
    with pytest.raises(Stopped):
        calibrated(model, tmp_path / "out", text, "awq+gptq")
    assert not (tmp_path / "out").exists()
    finished = []
    monkeypatch.setattr(
        BlockStore, "save", lambda self, index, *rest: (finished.append(index), save(self, index, *rest))
    )
    calibrated(model, tmp_path / "out", text, "awq+gptq", run=RunOptions(resume=True))
    assert finished == list(range(stop_at + 1, BLOCKS))
    assert files_of(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2])
def test_killed_at_some_moment(model, text, whole, tmp_path, seconds):
    run = process(one_thread, model, tmp_path / "out", text)
    while run.is_alive() and not list(tmp_path.glob(".out.lowbit-work/block-00000*")):
        time.sleep(0.005)
    time.sleep(seconds)
    run.kill()
    run.join()
    if not (tmp_path / "out").exists():
        assert list(tmp_path.glob(".out.lowbit-work/block-00000*"))
        calibrated(model, tmp_path / "out", text, "awq+gptq", run=RunOptions(resume=True))
    assert files_of(tmp_path / "out") == whole


def one_thread(model, out, text):
    torch.set_num_threads(1)
    calibrated(model, out, text, "awq+gptq")


@pytest.mark.parametrize("method", ["hadamard+gptq", "gptq+sign-sgd", "smoothquant+gptq"])
def test_blocks_that_are_run_again_are_those_of_the_method(model, text, tmp_path, monkeypatch, method):
    """Without kept hidden states, what an earlier run rotated, learned or scaled must come back from its files."""
    monkeypatch.setattr(loop, "KEEP_STATES_EVERY", 1e9)
    source = make_model(tmp_path / "model", num_hidden_layers=3, **SMALL, tie_word_embeddings=False)
    settings = {"iterations": 12} if "sign" in method else {}
    calibrated(source, tmp_path / "whole", text, method, **settings)
    save = BlockStore.save

    def save_and_stop(self, index, *arguments):
        save(self, index, *arguments)
        if index == 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", save_and_stop)
        with pytest.raises(Stopped):
            calibrated(source, tmp_path / "out", text, method, **settings)
    calibrated(source, tmp_path / "out", text, method, run=RunOptions(resume=True), **settings)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_resuming_with_other_settings_is_refused(model, text, tmp_path, monkeypatch):
    def stop(self, index, *arguments):
        raise Stopped

    monkeypatch.setattr(BlockStore, "save", stop)
    with pytest.raises(Stopped):
        calibrated(model, tmp_path / "out", text)
    with pytest.raises(UsageError, match="holds another run: settings"):
        calibrated(model, tmp_path / "out", text, damping=0.02, run=RunOptions(resume=True))


def test_without_resume_a_run_begins_anew(model, text, tmp_path, monkeypatch):
    save = BlockStore.save
    finished = []

    def stop_once(self, index, *arguments):
        save(self, index, *arguments)
        finished.append(index)
        if len(finished) == 2:
            raise Stopped

    monkeypatch.setattr(BlockStore, "save", stop_once)
    with pytest.raises(Stopped):
        calibrated(model, tmp_path / "out", text)
    calibrated(model, tmp_path / "out", text)
    assert finished == [0, 1, *range(BLOCKS)]


def test_resuming_nothing_is_an_ordinary_run(model, text, whole, tmp_path):
    calibrated(model, tmp_path / "out", text, "awq+gptq", run=RunOptions(resume=True))
    assert files_of(tmp_path / "out") == whole
    assert lowbit.verify(tmp_path / "out").ok
