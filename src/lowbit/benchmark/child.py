"""The process of an engine: `python -m lowbit.benchmark.child`, a `BenchJob` as JSON on stdin, events on stdout.

    {"ready": {"through": …, "device": …, "seconds": of loading}}
    {"row": {"context": …, "batch": …, "prefill": [seconds of each run], "decode": [seconds]}}
    {"done": {"peak_memory_bytes": …}}        or        {"failed": message, "memory": true where it ran out}

The clock is the wall's, and the same for every engine:

    prefill  = batch · context tokens in the time of a run that makes one token
    decode   = batch · tokens in the time of a run that makes 1 + tokens, less the median of the former

An engine of its own process cannot take the caller's memory down with it, and its peak is its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import time
from typing import Any, TextIO

from lowbit.benchmark.drivers import DRIVERS, BenchJob, EngineError, LlamaBench
from lowbit.measure import peak_memory

_OUT_OF_MEMORY = (
    "out of memory", "outofmemory", "failed to allocate", "unable to allocate", "cannot allocate", "std::bad_alloc",
    "no available memory for the cache", "larger than the available kv cache",
)  # fmt: skip


def main() -> None:
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what engines print goes to stderr
    given = json.load(sys.stdin)
    job = BenchJob(**{**given, "loads": tuple(tuple(load) for load in given["loads"])})
    code = 1
    try:
        _measure(job, events)
        code = 0
    except BaseException as error:  # whatever an engine raises goes to the caller in words
        words = "" if isinstance(error, EngineError) else f"{type(error).__name__}: "
        text = f"{words}{error}" if str(error) else type(error).__name__
        _emit(events, failed=text, memory=_is_memory(error))
    for stream in (events, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # engines keep threads that do not end


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    text = f"{type(error).__name__} {error}".lower()
    return any(words in text for words in _OUT_OF_MEMORY)


def _measure(job: BenchJob, events: TextIO) -> None:
    began = time.perf_counter()
    driver: Any = DRIVERS[job.driver](job)
    _emit(events, ready={"through": driver.through, "device": driver.device, "seconds": time.perf_counter() - began})
    numbers = random.Random(job.seed)
    for context, batch in job.loads:
        row = _of_llama_bench(driver, job, context) if isinstance(driver, LlamaBench) else (
            _timed(driver, job, numbers, context, batch))  # fmt: skip
        _emit(events, row={"context": context, "batch": batch, **row})
    used = 0 if isinstance(driver, LlamaBench) else driver.device_bytes()
    _emit(events, done={"peak_memory_bytes": peak_memory() + used, "through": driver.through, "device": driver.device})


def _timed(driver: Any, job: BenchJob, numbers: random.Random, context: int, batch: int) -> dict[str, list[float]]:
    def run(tokens: int) -> float:
        prompts = [[numbers.randrange(job.low, job.high) for _ in range(context)] for _ in range(batch)]
        began = time.perf_counter()
        driver.generate(prompts, tokens)
        return time.perf_counter() - began

    for _ in range(job.warmups):
        run(2)
    first = [run(1) for _ in range(job.repeats)]
    whole = [run(1 + job.tokens) for _ in range(job.repeats)]
    return {"prefill": first, "decode": [each - statistics.median(first) for each in whole]}


def _of_llama_bench(driver: LlamaBench, job: BenchJob, context: int) -> dict[str, list[float]]:
    speeds = driver.measure(context)
    return {"prefill": [context / each for each in speeds["prefill"]],
            "decode": [job.tokens / each for each in speeds["decode"]]}  # fmt: skip


def _emit(events: TextIO, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


if __name__ == "__main__":
    main()
