"""`lowbit.bench`: prefill and decode speed of a model in its engine, by context and batch, with the spread of the runs.

Refused before anything is started: an engine that is not installed (with what to install), files that it cannot load
(the rules of `lowbit verify` on formats), contexts beyond the model's own. After: an engine that fails, runs out of
memory or dies, in its own words.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit.benchmark.drivers import BenchJob
from lowbit.benchmark.result import Bench, BenchRow
from lowbit.checkpoint import open_safetensors
from lowbit.checkpoint.base import first_part, is_gguf, read_config
from lowbit.checkpoint.companions import refuse_lone_adapter
from lowbit.checkpoint.stated import hub_kernels, refuse_absurd
from lowbit.engines import find_engine
from lowbit.errors import DependencyError, EngineFailure, UnsafeError, UsageError
from lowbit.formats.gguf.raw import RawGGUF
from lowbit.formats.gguf.tokenizer import NO_TOKENIZER
from lowbit.hardware import this_processor
from lowbit.verification.result import loading_of

CONTEXTS, BATCHES = (512,), (1,)
# engine → drivers in order of preference: (driver, module or program, what to install)
_DRIVERS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "llama.cpp": (
        ("xllamacpp", "xllamacpp", "pip install xllamacpp"),
        ("llama-cpp-python", "llama_cpp", "pip install llama-cpp-python"),
        ("llama-bench", "", "put llama.cpp's llama-bench on PATH"),
    ),
    "transformers": (("transformers", "transformers", "pip install transformers"),),
    "vllm": (("vllm", "vllm", "pip install vllm"),),
}
_LEAST_SECONDS = 0.002  # of a decode that can be told from the noise of a prefill
Progress = Callable[[int, int], None]


def bench(
    model: str | Path,
    *,
    engine: str | None = None,
    url: str | None = None,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    tokens: int = 64,
    repeats: int = 3,
    warmups: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Measure a folder or a .gguf file.

    engine    llama.cpp, transformers, vllm; None: llama.cpp for GGUF files, else vLLM if it is installed, else
              transformers
    url       of a running server that serves this model; no engine is started
    contexts  tokens of the prompts; batches: sequences at once; every pair is measured
    tokens    generated after each prompt
    repeats   counted runs of each pair, after `warmups` that are not
    threads, device, dtype   for engines that ask; device and dtype: transformers
    progress  called with (pairs done, pairs in all)

    UsageError for what cannot be measured, EngineFailure for an engine that fails.
    """
    path = first_part(Path(model))
    if not path.exists():
        raise UsageError(f"{model}: there is no such folder or file", "give the output of lowbit quantize")
    _check_numbers(contexts, batches, tokens, repeats, warmups, threads, seed)
    name = _engine_of(path, engine, url)
    driver = "server" if url is not None else _driver_of(name, max(batches))
    if url is None:
        _refuse_format(path, name)
        _refuse_damaged(path, trust_remote_code)
    vocabulary, longest = _sizes(path)
    if longest is not None and max(contexts) + tokens > longest:
        raise UsageError(f"{max(contexts)} tokens and {tokens} more are beyond the {longest} that the model was made "
                         f"for", "give a shorter --context")  # fmt: skip
    loads = tuple((context, batch) for context in dict.fromkeys(contexts) for batch in dict.fromkeys(batches))
    job = BenchJob(
        driver, str(path.absolute()), loads, tokens, repeats, warmups, seed, vocabulary // 8,
        max(vocabulary // 8 + 1, 7 * vocabulary // 8), threads, device, dtype, url, trust_remote_code,
    )  # fmt: skip
    ready, rows, done = _run(job, name, progress)
    return Bench(
        model=str(model), engine=name, through=done.get("through", ready["through"]),
        device=_device_name(done.get("device", ready["device"])),
        threads=threads, file_bytes=_weight_bytes(path), rows=tuple(_row(each, job) for each in rows), warmups=warmups,
        repeats=repeats, seed=seed, peak_memory_bytes=None if url is not None else done["peak_memory_bytes"],
        load_seconds=None if url is not None else ready["seconds"],
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0), notes=_notes(rows, job),
    )  # fmt: skip


def _check_numbers(
    contexts: Sequence[int], batches: Sequence[int], tokens: int, repeats: int, warmups: int, threads: int | None,
    seed: int,
) -> None:  # fmt: skip
    from_one = {
        "context": contexts, "batch": batches, "number of tokens": (tokens,), "number of repeats": (repeats,),
        "number of threads": (1 if threads is None else threads,),
    }  # fmt: skip
    from_zero = {"number of warm-ups": (warmups,), "seed": (seed,)}
    for least, given in ((1, from_one), (0, from_zero)):
        for what, values in given.items():
            if not values or min(values) < least:
                raise UsageError(f"a {what} must be {least} or more", "leave it out for the default")


def _engine_of(path: Path, engine: str | None, url: str | None) -> str:
    if engine is not None:
        name = find_engine(engine).name
        if name not in _DRIVERS and url is None:
            raise UsageError(f"lowbit starts no {name} to measure it", "start its server and give --url")
        return name
    if is_gguf(path):
        return "llama.cpp"
    return "vllm" if url is not None or importlib.util.find_spec("vllm") is not None else "transformers"


def _driver_of(engine: str, batch: int) -> str:
    """The first way to run the engine that is installed."""
    several = ""
    for driver, module, _ in _DRIVERS[engine]:
        there = importlib.util.find_spec(module) is not None if module else shutil.which("llama-bench") is not None
        if there and batch > 1 and driver in ("llama-cpp-python", "llama-bench"):
            several = driver  # goes on: another may run several sequences
        elif there:
            return driver
    ways = "; or ".join(install for _, _, install in _DRIVERS[engine])
    if several:
        raise UsageError(f"{several} measures one sequence at a time", f"give --batch 1, or {_DRIVERS[engine][0][2]}")
    raise DependencyError(f"{engine} is not installed here", f"{ways}; or start a server elsewhere and give --url")


def _refuse_format(path: Path, engine: str) -> None:
    loading = loading_of(engine)
    if is_gguf(path) != loading.reads_gguf:
        kind, other = ("a GGUF file", "llama.cpp") if is_gguf(path) else ("a folder", "vllm or transformers")
        inside = [] if is_gguf(path) else sorted(path.glob("*.gguf"))
        raise UsageError(f"{engine} does not load {kind}",
                         f"give the file: {inside[0]}" if inside else f"give --engine {other}")  # fmt: skip
    if is_gguf(path):
        return
    refuse_lone_adapter(path, str(path))
    stated = read_config(path).get("quantization_config")
    format = str(stated.get("quant_method")) if isinstance(stated, dict) else ""
    if (path / "hf_quant_config.json").exists() and not format:
        format = "modelopt"
    if format in loading.no_loader:
        raise UsageError(f"{engine} cannot load {path}: {loading.no_loader[format]}",
                         f"lowbit verify {path} --engine {engine} says more; --engine names another")  # fmt: skip


def _refuse_damaged(path: Path, trust_remote_code: bool) -> None:
    """CheckpointError for numbers of config.json that the files deny: engines build a billion layers one by one.
    UnsafeError for kernels of the Hub, which an engine would download and run."""
    if is_gguf(path):
        return
    config = read_config(path)
    shapes = None
    if any(path.glob("*.safetensors")):
        with closing(open_safetensors(path)) as stored:
            shapes = [info.shape for info in stored.tensors.values()]
    refuse_absurd(config, str(path), shapes)
    kernels = hub_kernels(config)
    if kernels and not trust_remote_code:
        raise UnsafeError(f"{path}: config.json asks for a kernel of the Hub, which the engine would download and run: "
                          f"{', '.join(kernels)}",
                          "take attn_implementation out of config.json, or give --trust-remote-code")  # fmt: skip


def _sizes(path: Path) -> tuple[int, int | None]:
    """(tokens of the vocabulary, tokens of the longest context if stated)."""
    if is_gguf(path):
        metadata = RawGGUF(path).metadata
        if metadata.get("tokenizer.ggml.model") in NO_TOKENIZER:
            raise UsageError(f"there is no tokenizer in {path}, and llama-server stops without one",
                             "measure a file of the model that has one: the speed is the same")  # fmt: skip
        tokens = metadata.get("tokenizer.ggml.tokens")
        longest = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        count = len(tokens) if isinstance(tokens, Sequence) else 0
    else:
        config = read_config(path)
        text = config.get("text_config")
        config = text if isinstance(text, dict) else config
        count, longest = config.get("vocab_size") or 0, config.get("max_position_embeddings")
    if not count:
        raise UsageError(f"{path} does not say how many tokens it has", "lowbit verify says what is wrong with it")
    return int(count), int(longest) if longest else None


def _weight_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return sum(file.stat().st_size for file in files)


def _device_name(named: str) -> str:
    """The processor as the table of devices calls it; what an engine says of a card stays."""
    import platform

    return this_processor().label if named in (platform.processor(), platform.machine(), "") else named


def _run(
    job: BenchJob, engine: str, progress: Progress | None
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """(ready, rows, done) of the process."""
    ready: dict[str, Any] = {}
    done: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowbit.benchmark.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, env=_environment(job),
        )  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(job)))
            process.stdin.close()
            for line in process.stdout:
                event = json.loads(line)
                if "failed" in event:
                    raise _failure(engine, event["failed"], event["memory"], job.url)
                ready = event.get("ready", ready)
                done = event.get("done", done)
                rows += [event["row"]] if "row" in event else []
                if progress is not None:
                    progress(len(rows), len(job.loads))
            code = process.wait()
            if code or not done:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 400))
                last = log.read().decode(errors="replace").strip().replace("\n", " / ")
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                raise _failure(engine, f"its process {how}. {last}", code == -9, job.url)
        finally:
            process.kill()
            process.wait()
    return ready, rows, done


def _environment(job: BenchJob) -> dict[str, str]:
    threads = {} if job.threads is None else {"OMP_NUM_THREADS": str(job.threads)}
    paths = [path for path in sys.path if path]  # lowbit as it is imported here, installed or not
    return os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)}


def _failure(engine: str, text: str, memory: bool, url: str | None) -> EngineFailure:
    if url is not None:
        return EngineFailure(text, "is the server running at this address, and is it this model's?")
    if memory:
        return EngineFailure(f"{engine} ran out of memory: {text}",
                             "give a smaller --batch or --context; lowbit estimate says what fits")  # fmt: skip
    return EngineFailure(
        f"{engine} failed: {text}", f"lowbit verify OUT --engine {engine} says whether it can load the files"
    )


def _row(measured: dict[str, Any], job: BenchJob) -> BenchRow:
    context, batch = measured["context"], measured["batch"]
    prompt, answer = batch * context, batch * job.tokens
    if statistics.median(measured["decode"]) < _LEAST_SECONDS:
        more = "give more --tokens" + ("" if job.warmups else ", and a warm-up: the first run is slower than the rest")
        raise UsageError(f"{job.tokens} tokens are made too quickly to be timed", more)
    # A single run may be lost in the noise of the prefill; the quickest is then bounded by the least time.
    prefill, decode = measured["prefill"], [max(each, _LEAST_SECONDS) for each in measured["decode"]]
    return BenchRow(
        batch=batch, context=context, tokens=job.tokens, runs=len(prefill),
        prefill=prompt / statistics.median(prefill), prefill_least=prompt / max(prefill),
        prefill_most=prompt / min(prefill), decode=answer / statistics.median(decode),
        decode_least=answer / max(decode), decode_most=answer / min(decode),
    )  # fmt: skip


def _notes(rows: list[dict[str, Any]], job: BenchJob) -> tuple[str, ...]:
    notes = []
    wide = [row for row in rows if max(row["decode"]) > 1.5 * max(min(row["decode"]), _LEAST_SECONDS)]
    if wide:
        notes.append(f"{len(wide)} of {len(rows)} loads spread by more than half: the machine does other things, or "
                     f"--tokens and --repeats are too few")  # fmt: skip
    if job.driver == "llama-bench":
        notes.append("llama-bench decodes behind an empty context, whatever --context says, and clocks itself")
    return tuple(notes)
