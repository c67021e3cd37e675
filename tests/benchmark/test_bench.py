"""`lowbit bench`: the real llama.cpp and transformers, stand-ins for the rest; and every way it can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engines_for_tests import fake_llama_bench, fake_vllm, server
from typer.testing import CliRunner

import lowbit
from local_servers import JsonHandler, listening
from lora import matrices, write_adapter
from lowbit.advice import advise
from lowbit.advice.measured import measured_here
from lowbit.benchmark.drivers import BenchJob
from lowbit.benchmark.result import Bench, rate, spread
from lowbit.benchmark.run import _row, bench
from lowbit.checkpoint.base import HTML_NAME, report_path
from lowbit.cli.main import app
from lowbit.errors import CheckpointError, DependencyError, EngineFailure, UnsafeError, UsageError
from lowbit.report import schema

SHORT = {"contexts": (8,), "tokens": 4, "repeats": 2, "warmups": 1, "threads": 1}


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return lowbit.quantize(tiny_llama, tmp_path_factory.mktemp("bench") / "out", scheme="W8A16").path


@pytest.fixture(scope="module")
def gguf(tiny_llama, tmp_path_factory):
    return lowbit.quantize(tiny_llama, tmp_path_factory.mktemp("bench") / "out.gguf", scheme="Q8_0").path


def test_seconds_become_tokens_per_second():
    """Two runs of 0.5 and 1 s for 4 prompts of 100 tokens; 0.2 and 0.4 s for 10 tokens each."""
    job = BenchJob("vllm", "m", ((100, 4),), 10, 2, 0, 0, 1, 2)
    row = _row({"context": 100, "batch": 4, "prefill": [0.5, 1.0], "decode": [0.2, 0.4]}, job)
    assert (row.prefill_least, row.prefill_most) == (400, 800)
    assert row.prefill == pytest.approx(400 / 0.75)
    assert (row.decode_least, row.decode_most) == (100, 200)
    assert row.decode == pytest.approx(40 / 0.3)
    assert row.decode_each == pytest.approx(10 / 0.3)
    with pytest.raises(UsageError, match="too quickly"):
        _row({"context": 100, "batch": 4, "prefill": [0.5], "decode": [0.0001]}, job)


def test_llama_cpp_itself(gguf):
    pytest.importorskip("xllamacpp")
    found = bench(gguf, batches=(1, 2), **{**SHORT, "tokens": 200})
    assert found.engine == "llama.cpp"
    assert found.through.startswith("xllamacpp")
    assert [(row.batch, row.context) for row in found.rows] == [(1, 8), (2, 8)]
    for row in found.rows:
        assert row.prefill_least <= row.prefill <= row.prefill_most
        assert row.decode_least <= row.decode <= row.decode_most
        assert row.runs == 2
    assert found.peak_memory_bytes > 20e6
    assert found.file_bytes == gguf.stat().st_size


@pytest.mark.interop
def test_transformers_itself(folder):
    found = bench(folder, engine="transformers", contexts=(16,), batches=(1, 2), tokens=32, repeats=2, warmups=1)
    assert (found.engine, [row.batch for row in found.rows]) == ("transformers", [1, 2])
    assert all(row.prefill > 0 and row.decode > 0 for row in found.rows)


def test_vllm_is_asked_through_its_own_calls(folder, tmp_path, monkeypatch):
    """A prompt is never sent twice, prefix caching is off, and 5 ms a token are found again."""
    monkeypatch.syspath_prepend(fake_vllm(tmp_path))
    found = bench(folder, engine="vllm", contexts=(8, 16), batches=(1, 3), tokens=8, repeats=2, warmups=1)
    assert found.through == "vllm 0.32.0"
    assert [(row.context, row.batch) for row in found.rows] == [(8, 1), (8, 3), (16, 1), (16, 3)]
    for row in found.rows:
        assert row.decode_each == pytest.approx(200)
        assert row.decode == pytest.approx(row.batch * row.decode_each)


def test_a_report_keeps_the_latest_of_an_engine_and_shows_it(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_vllm(tmp_path))
    words = ["bench", str(folder), "--engine", "vllm", "--context", "8", "--tokens", "4", "--repeats", "1"]
    for _ in range(2):
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, answer.output
    assert "measured here" in answer.stdout
    report = schema.load(folder)
    assert len(report.bench) == 1
    page = report_path(folder, HTML_NAME).read_text(encoding="utf-8")
    assert "Prefill, tokens/s" in page
    assert "vllm 0.32.0" in page
    made = json.loads(CliRunner().invoke(app, [*words, "--json", "--no-report"]).stdout)
    assert Bench.model_validate_json(json.dumps(made)).engine == "vllm"
    assert schema.load(folder).bench == report.bench


def test_advice_shows_what_was_measured_here(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_vllm(tmp_path))
    source = schema.load(folder).source.model
    CliRunner().invoke(app, ["bench", str(folder), "--engine", "vllm", "--context", "8,32", "--tokens", "4"])
    near = measured_here(source, "vllm", 30, 1, folder.parent)
    assert [(each.scheme, each.row.context) for each in near] == [("W8A16", 32)]
    assert measured_here("another", "vllm", 30, 1, folder.parent) == []
    assert measured_here(source, "llama.cpp", 30, 1, folder.parent) == []
    monkeypatch.chdir(folder.parent)
    answer = advise(source, hardware="cpu", engine="vllm")
    assert [each.scheme for each in answer.measured] == ["W8A16"]
    assert advise(source, hardware="H100", engine="vllm").measured == ()


def test_a_damaged_report_nearby_is_passed_over(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "lowbit-report.json").write_text("{")
    assert measured_here("m", "vllm", 1, 1, tmp_path) == []


def test_llama_bench_measures_by_itself(gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(fake_llama_bench(tmp_path)) + ":/usr/bin:/bin")
    monkeypatch.setattr("lowbit.benchmark.run.importlib.util.find_spec", lambda name: None)
    found = bench(gguf, contexts=(8,), tokens=8)
    row = found.rows[0]
    assert (round(row.prefill), round(row.decode)) == (100, 10)
    assert (row.decode_least, row.decode_most) == (pytest.approx(9), pytest.approx(11))
    assert found.device == "a processor"
    assert any("empty context" in note for note in found.notes)
    with pytest.raises(UsageError, match="one sequence at a time"):
        bench(gguf, contexts=(8,), batches=(2,), tokens=8)


@pytest.mark.parametrize(("text", "code", "says"), [("nothing", 0, "something else"), ("", 3, "llama-bench failed"),
                                                    ("[]", 0, "something else")])  # fmt: skip
def test_a_llama_bench_that_fails(gguf, tmp_path, monkeypatch, text, code, says):
    monkeypatch.setenv("PATH", str(fake_llama_bench(tmp_path, text, code)) + ":/usr/bin:/bin")
    monkeypatch.setattr("lowbit.benchmark.run.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineFailure, match=says):
        bench(gguf, contexts=(8,), tokens=8)


def test_a_running_server(folder):
    with server() as address:
        found = bench(folder, url=address + "/v1", contexts=(8,), batches=(2,), tokens=8, repeats=2)
    assert (found.engine, found.through, found.peak_memory_bytes) == ("vllm", address, None)
    row = found.rows[0]
    assert 0 < row.decode_least <= row.decode <= row.decode_most


@pytest.mark.parametrize(("how", "says"), [({"short": 1}, "ignore_eos"), ({"status": 500}, "answers 500")])
def test_a_server_that_answers_something_else(folder, how, says):
    with server(**how) as address, pytest.raises(EngineFailure, match=says):
        bench(folder, url=address, contexts=(8,), tokens=4)


@pytest.mark.parametrize("listed", [{"a": 1}, ["x"], [{"id": 3}], "abc", [], None])
def test_a_server_that_lists_no_model_is_refused(folder, listed):
    class Handler(JsonHandler):
        def do_GET(self):
            self.send_json({"data": listed})

    with listening(Handler) as address, pytest.raises(EngineFailure, match="lists no model"):
        bench(folder, url=address, contexts=(8,), tokens=4)


def test_no_server(folder):
    with pytest.raises(EngineFailure, match=r"^http://127.0.0.1:9/v1/models cannot be asked: ") as caught:
        bench(folder, url="http://127.0.0.1:9", contexts=(8,), tokens=4)
    assert "server running" in caught.value.hint


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "ran out of memory"),
        ("raise ValueError('The max seq len is larger than the available KV cache')", "ran out of memory"),
        ("raise MemoryError", "ran out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "ran out of memory"),
        ("raise ValueError('unknown quantization')", "unknown quantization"),
        ("import sys; print('last words', file=sys.stderr, flush=True); import os; os._exit(7)", "code 7. last words"),
    ],
)
def test_an_engine_that_fails_says_so_in_its_words(folder, tmp_path, monkeypatch, mode, says):
    monkeypatch.syspath_prepend(fake_vllm(tmp_path, mode))
    with pytest.raises(EngineFailure, match=says) as caught:
        bench(folder, engine="vllm", contexts=(8,), tokens=4)
    assert caught.value.hint


def test_an_engine_that_stops_early_is_not_timed(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_vllm(tmp_path, short=1))
    with pytest.raises(EngineFailure, match="instead of"):
        bench(folder, engine="vllm", contexts=(8,), tokens=4)


@pytest.mark.parametrize(
    ("what", "asked", "error", "says"),
    [
        ("folder", {"engine": "vllm"}, DependencyError, "pip install vllm"),
        ("folder", {"engine": "llama.cpp"}, UsageError, "does not load a folder"),
        ("gguf", {"engine": "transformers"}, UsageError, "does not load a GGUF file"),
        ("folder", {"engine": "tensorrt-llm"}, UsageError, "give --url"),
        ("folder", {"engine": "transformers", "contexts": (10**6,)}, UsageError, "beyond"),
        ("folder", {"contexts": ()}, UsageError, "context"),
        ("folder", {"batches": (0,)}, UsageError, "batch"),
        ("folder", {"tokens": 0}, UsageError, "tokens"),
        ("folder", {"repeats": 0}, UsageError, "repeats"),
        ("folder", {"warmups": -1}, UsageError, "warm-ups must be 0 or more"),
        ("folder", {"threads": 0}, UsageError, "threads"),
        ("folder", {"seed": -1}, UsageError, "a seed must be 0 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_starts(request, what, asked, error, says):
    with pytest.raises(error) as caught:
        bench(request.getfixturevalue(what), **{**SHORT, **asked})
    assert says in f"{caught.value} {caught.value.hint}"


def test_what_a_folder_around_a_gguf_file_or_an_adapter_is(gguf, tmp_path):
    (tmp_path / "model.gguf").symlink_to(gguf)
    with pytest.raises(UsageError, match="does not load a folder") as caught:
        bench(tmp_path, engine="llama.cpp")
    assert caught.value.hint == f"give the file: {tmp_path / 'model.gguf'}"
    adapter = write_adapter(tmp_path / "adapter", matrices({"model.layers.0.self_attn.q_proj": (64, 64)}))
    with pytest.raises(CheckpointError, match="this is a LoRA adapter of org/base, not a model"):
        bench(adapter, engine="transformers")


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="no such"):
        bench(tmp_path / "absent")


def test_a_format_without_a_loader_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt"}
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="cannot load"):
        bench(made, engine="transformers")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"num_hidden_layers": 10**9}, CheckpointError, "num_hidden_layers is 1000000000, and the files hold 49"),
        ({"hidden_size": 10**9}, CheckpointError, "hidden_size is 1000000000, and the largest tensor"),
        ({"attn_implementation": "org/kernel"}, UnsafeError, "a kernel of the Hub.*org/kernel"),
    ],
)
def test_a_config_that_the_files_deny_or_that_asks_for_code_starts_no_engine(folder, tmp_path, changes, error, says):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(error, match=says):
        bench(damaged, engine="transformers", **SHORT)


def test_lists_of_numbers(folder):
    answer = CliRunner().invoke(app, ["bench", str(folder), "--context", "8,x"])
    assert isinstance(answer.exception, UsageError)
    answer = CliRunner().invoke(app, ["bench", str(folder), "--batch", "1.5"])
    assert answer.exception.hint == "write it as --batch 1,8"


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,230"), (99.96, "100.0"), (12.34, "12.3"), (1.234, "1.23")])
def test_rates_have_three_digits(value, text):
    assert rate(value) == text
    assert spread(value, value, value).startswith(text)


def test_the_process_of_an_engine_imports_nothing_heavy():
    text = Path(lowbit.__file__).parent.joinpath("benchmark", "child.py").read_text()
    assert "import torch" not in text
