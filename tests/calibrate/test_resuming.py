"""A run that is stopped goes on behind its last finished block, and writes the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch

import lowbit
from calibrate.calibrated import calibrated, files_of, write_text
from commands import process
from lowbit.calibrate import loop
from lowbit.calibrate.identity import differences
from lowbit.calibrate.store import BlockStore
from lowbit.errors import OutputError, UsageError
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


@pytest.fixture(scope="module")
def whole_gptq(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole-gptq") / "out"
    calibrated(model, out, text, "gptq")
    return files_of(out)


@pytest.mark.sampled(3)
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


@pytest.mark.parametrize(
    "seconds", [pytest.param(0.0, marks=pytest.mark.slow), 0.05, pytest.param(0.2, marks=pytest.mark.slow)]
)
def test_killed_at_some_moment(model, text, whole, tmp_path, seconds):
    run = process(in_threads, torch.get_num_threads(), model, tmp_path / "out", text)
    while run.is_alive() and not list(tmp_path.glob(".out.lowbit-work/block-00000*")):
        time.sleep(0.005)
    time.sleep(seconds)
    run.kill()
    run.join()
    if not (tmp_path / "out").exists():
        assert list(tmp_path.glob(".out.lowbit-work/block-00000*"))
        calibrated(model, tmp_path / "out", text, "awq+gptq", run=RunOptions(resume=True))
    assert files_of(tmp_path / "out") == whole


def in_threads(count, model, out, text):
    """A run with another number of threads is not gone on with."""
    torch.set_num_threads(count)
    calibrated(model, out, text, "awq+gptq")


@pytest.mark.parametrize("method", ["hadamard+gptq", "gptq+sign-sgd", "smoothquant+gptq"])
def test_blocks_that_are_run_again_are_those_of_the_method(model, text, tmp_path, monkeypatch, method):
    """Without kept hidden states, what an earlier run rotated, learned or scaled must come back from its files."""
    monkeypatch.setattr(loop, "KEEP_STATES_EVERY", 1e9)
    source = make_model(tmp_path / "model", num_hidden_layers=3, **SMALL, tie_word_embeddings=False)
    settings = {"iterations": 6} if "sign" in method else {}
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
    with pytest.raises(UsageError, match=r"(?m)holds another run: damping was None, is 0\.02$"):
        calibrated(model, tmp_path / "out", text, damping=0.02, run=RunOptions(resume=True))


def stopped_after(blocks, model, out, text, monkeypatch, **settings):
    """A run that ends after so many blocks, with states saved before the last of them."""
    save = BlockStore.save

    def save_and_stop(self, index, *arguments):
        save(self, index, *arguments)
        if index == blocks - 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "KEEP_STATES_EVERY", 0.0)
        patch.setattr(BlockStore, "save", save_and_stop)
        with pytest.raises(Stopped):
            calibrated(model, out, text, **settings)
    return out.with_name(f".{out.name}.lowbit-work")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _swap(path):
    beside = path.with_name(path.name.replace("00001", "00000"))
    path.rename(path.with_name("aside"))
    beside.rename(path)
    path.with_name("aside").rename(beside)


@pytest.mark.parametrize(
    ("damage", "which", "again_from"),
    [
        (_flip, "block-00001.safetensors", 1),
        (_truncate, "block-00001.safetensors", 1),
        (lambda path: path.write_bytes(b""), "block-00000.safetensors", 0),
        (lambda path: path.unlink(), "block-00001.safetensors", 1),
        (_swap, "block-00001.safetensors", 0),
        (_flip, "states-00002", 3),
        (_truncate, "states-00002", 3),
        (lambda path: path.write_bytes(b"[]"), "blocks.json", 0),
    ],
)
def test_damaged_files_of_the_store_are_done_again(
    model, text, whole_gptq, tmp_path, monkeypatch, caplog, damage, which, again_from
):
    """Whatever became of a file, the output is that of an undisturbed run."""
    store = stopped_after(3, model, tmp_path / "out", text, monkeypatch, method="gptq")
    damage(store / which)
    finished, save = [], BlockStore.save
    monkeypatch.setattr(
        BlockStore, "save", lambda self, index, *rest: (finished.append(index), save(self, index, *rest))
    )
    calibrated(model, tmp_path / "out", text, "gptq", run=RunOptions(resume=True))
    assert finished == list(range(again_from, BLOCKS))
    assert which.startswith("block-") or "damaged" in caplog.text or which == "blocks.json"
    assert files_of(tmp_path / "out") == whole_gptq
    assert not store.exists()


@pytest.mark.parametrize("change", ["weights", "config"])
def test_resuming_with_another_source_is_refused(model, text, tmp_path, monkeypatch, change):
    source = tmp_path / "model"
    shutil.copytree(model, source)
    stopped_after(1, source, tmp_path / "out", text, monkeypatch, method="gptq")
    weights, config = source / "model.safetensors", source / "config.json"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    if change == "weights":
        _flip(weights)
        os.utime(weights, ns=times)  # of the same size and time
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    says = {
        "weights": "(?m)model.safetensors of .* is not what it was$",
        "config": "(?m)rms_norm_eps was .*, is 0.001$",
    }
    with pytest.raises(UsageError, match=says[change]):
        calibrated(source, tmp_path / "out", text, "gptq", run=RunOptions(resume=True))


def test_resuming_with_another_text_is_refused(model, text, tmp_path, monkeypatch):
    mine = tmp_path / "text.txt"
    shutil.copy(text, mine)
    stopped_after(1, model, tmp_path / "out", mine, monkeypatch, method="gptq")
    mine.write_text(mine.read_text()[::-1])
    with pytest.raises(UsageError, match="the calibration text is not what it was"):
        calibrated(model, tmp_path / "out", mine, "gptq", run=RunOptions(resume=True))


IDENTITY = {
    "lowbit": {"version": "0.1.0", "store": 3}, "settings": {"sweeps": None, "damping": 0.01}, "model": "m",
    "files": {"a": "1"}, "beside": {"q.gguf, which is refined,": "1", "a.safetensors of the adapter": "1"},
    "config": {"rope_parameters": {"rope_theta": 1.0, "rope_type": "default", "far": list(range(99))}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("topic", "changed", "says"),
    [
        ("settings", {"damping": 0.01}, "it was begun by a lowbit with other settings: sweeps"),
        ("settings", {"sweeps": 2, "damping": 0.01}, "sweeps was 2, is None"),
        ("lowbit", {"version": "0.1.0", "training": 2}, "it is a training"),
        ("lowbit", {"version": "0.0.9", "store": 3}, "it was begun by another version of lowbit"),
        ("lowbit", {}, "it was begun by another version of lowbit"),
        ("beside", {"q.gguf, which is refined,": "2", "a.safetensors of the adapter": "1"},
         "q.gguf, which is refined, is not what it was"),
        ("beside", {"q.gguf, which is refined,": "1"}, "a.safetensors of the adapter is read, and was not"),
        ("config", {"rope_parameters": IDENTITY["config"]["rope_parameters"] | {"rope_theta": 2.0}},
         "config.json: rope_parameters.rope_theta was 2.0, is 1.0"),
        ("config", {"rope_parameters": IDENTITY["config"]["rope_parameters"] | {"far": [*range(98), 0]}},
         "config.json: rope_parameters.far is not what it was"),
        ("config", {}, "config.json: rope_parameters was absent, is"),
    ],
)  # fmt: skip
def test_what_changed_is_named(topic, changed, says):
    (found,) = differences(IDENTITY | {topic: changed}, IDENTITY)
    assert found == says or (says.endswith(" is") and found.startswith(says))


def test_what_others_put_into_the_work_folder_is_kept(model, text, tmp_path):
    work = tmp_path / ".out.lowbit-work"
    work.mkdir()
    (work / "thesis").write_text("mine")
    with pytest.raises(OutputError, match="did not write: thesis"):
        calibrated(model, tmp_path / "out", text, "gptq")
    assert [path.name for path in work.iterdir()] == ["thesis"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run.json", "[" * 100_000, "cannot be read"),
        ("run.json", None, "1 finished block of an earlier run is removed: run.json, which says"),
        ("blocks.json", "[" * 100_000, "blocks.json is damaged: all blocks are done again"),
        ("owner.json", "[" * 100_000, ""),
        ("owner.json", '{"pid": "x", "host": 5, "machine": 5, "since": "x"}', ""),
        ("owner.json", '{"pid": 1, "host": "", "machine": "", "since": 1e99, "placing": []}', ""),
    ],
)
def test_damaged_records_are_said_or_refused(model, text, whole, tmp_path, monkeypatch, caplog, name, content, says):
    work = stopped_after(1, model, tmp_path / "out", text, monkeypatch, method="awq+gptq")
    (work / name).unlink(missing_ok=True)
    if content is not None:
        (work / name).write_text(content)
    if says == "cannot be read":
        caplog.clear()
        with pytest.raises(UsageError, match=says):
            calibrated(model, tmp_path / "out", text, "awq+gptq", run=RunOptions(resume=True))
        assert "goes on from" not in caplog.text
        return
    calibrated(model, tmp_path / "out", text, "awq+gptq", run=RunOptions(resume=True))
    assert says in caplog.text
    assert files_of(tmp_path / "out") == whole


def test_a_refused_run_is_not_told_to_be_repeated(model, text, tmp_path, monkeypatch, caplog):
    stopped_after(1, model, tmp_path / "out", text, monkeypatch, method="gptq")
    assert "1 finished block is kept" in caplog.text
    caplog.clear()
    with pytest.raises(UsageError, match="damping was None"):
        calibrated(model, tmp_path / "out", text, "gptq", damping=0.02, run=RunOptions(resume=True))
    assert "goes on from" not in caplog.text


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
