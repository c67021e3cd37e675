"""The `lowbit` command as tests call it: a process of its own, with its own streams and exit code.

`command` and `process` fork from a server that has imported torch and transformers once, which saves their start-up
time; `start` runs the installed command, for tests of signals, memory and pipes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["lowbit.cli.main", "lowbit.api", "lowbit.evaluation", "transformers.models.llama.modeling_llama", "rich.progress"]
)
# Seconds after which a process counts as hanging. A guard: what runs here takes seconds, on a busy machine minutes.
GUARD = 1200


@dataclass(frozen=True)
class Outcome:
    code: int | None
    stdout: str
    stderr: str


def command(scratch: Path, *arguments: object, without: str = "", **environment: str) -> Outcome:
    """Run `lowbit ARGUMENTS` to its end, with streams in `scratch`; the package `without` seems not installed."""
    streams = scratch / "stdout", scratch / "stderr"
    run = process(_child, [str(a) for a in arguments], streams, without, environment)
    end([run])
    return Outcome(run.exitcode, *(stream.read_text(encoding="utf-8") for stream in streams))


def process(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """`function(*arguments)` running in a process that has torch and transformers from its start."""
    run = _FORKS.Process(target=function, args=arguments, daemon=True)  # Python waits for others before it ends
    run.start()
    return run


def end(runs: list[BaseProcess], seconds: float = GUARD) -> None:
    """Wait until all have ended; AssertionError if one hangs. Where one fails, the rest waits for it in vain."""
    until = time.monotonic() + seconds
    waiting = {run.sentinel: run for run in runs}
    while waiting and not any(run.exitcode for run in runs) and time.monotonic() < until:
        for sentinel in wait(list(waiting), until - time.monotonic()):
            waiting.pop(sentinel).join()
    for run in waiting.values():
        run.kill()
        run.join()
    assert time.monotonic() < until, f"still running after {seconds:.0f} s: {[run.name for run in waiting.values()]}"


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The real command, running; streams are pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "lowbit", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """What starts in the background of a shell ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _child(arguments: list[str], streams: tuple[Path, Path], without: str, environment: dict[str, str]) -> None:
    for stream, path in zip((1, 2), streams, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    if without:
        sys.modules[without] = None  # type: ignore[assignment]
    sys.argv = ["lowbit", *arguments]
    gc.freeze()  # what the server imported: looking at it would copy its pages into every fork
    from lowbit.cli.main import run

    run()
