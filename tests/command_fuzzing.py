"""Fuzzing of whole commands: models, files and recipes as they might arrive, damaged, through `lowbit COMMAND`.

Each try changes one or two files of a valid input (a value of a JSON file, bytes of weights, a file that is gone or is
a folder), runs a command on it, and judges what came out. Clean: exit code 0, or 1 or 2 with a message. Wrong: a
traceback, a message that blames lowbit, a hang, a death, an output or a hidden file that a refusal leaves. Tries run
in forks of one process, many in each, so that a death or a leak ends with it. A try has a number and can be repeated
alone: `Fuzzed(folder).run(seed, number)`.

    python tests/command_fuzzing.py --tries 50000 [--seed 0] [--workers 2]
    python tests/command_fuzzing.py --light --tries 2000      only commands that plan and look, on models of one block
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzed_changes import KINDS, change
from fuzzed_inputs import Inputs, commands
from fuzzing import TooSlowError, bounded_memory, bounded_time, gguf_sample

CPU_SECONDS = 20.0  # of one command; the slowest clean one takes two
LIGHT_SECONDS = 5.0
SPARE_BYTES = 4 << 30
BATCH, LIGHT_BATCH = 40, 200
BLAME = re.compile(r"Traceback \(most recent|bug of lowbit")


@dataclass(frozen=True)
class Judged:
    """One try.

    verdict  "ok", "refused", or what is wrong
    kinds    of its changes (`fuzzed_changes.KINDS`)
    """

    number: int
    command: str
    changes: str
    verdict: str
    message: str
    kinds: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        return self.verdict in ("ok", "refused")


class Fuzzed:
    """Valid inputs, made once in `folder`, and their tries."""

    def __init__(self, folder: Path, light: bool = False):
        self.folder, self.light = folder, light
        self.inputs = Inputs(folder, light)
        files = [path for _, path in self.inputs.all if path.is_file() and path.suffix == ".gguf"]
        self.samples = {path.name: gguf_sample(path.name, path.read_bytes(), folder) for path in files}

    def run(self, seed: int, number: int) -> Judged:
        """One try, in this process: its streams, its signals and its working files are taken."""
        rng = random.Random(f"{seed}/{number}")
        kind, original = rng.choice(self.inputs.all)
        command = rng.choice(commands(kind, self.light))
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            place = Path(scratch)
            damaged = place / original.name
            if original.is_dir():
                shutil.copytree(original, damaged)
            else:
                shutil.copy(original, damaged)
            changes = [change(damaged, self.samples, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
            verdict, message = self._judged(command, damaged, place)
        words, kinds = "; ".join(each.words for each in changes), tuple(each.kind for each in changes)
        return Judged(number, command, words, verdict, message, kinds)

    def run_undamaged(self) -> Iterator[Judged]:
        """Every command on its valid inputs."""
        for kind, original in self.inputs.all:
            for command in commands(kind, self.light):
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    verdict, message = self._judged(command, original, Path(scratch))
                yield Judged(-1, command, original.name, verdict, message)

    def _judged(self, command: str, damaged: Path, place: Path) -> tuple[str, str]:
        words = self._words(command, damaged, place)
        verdict, message = _judged(words, place, LIGHT_SECONDS if self.light else CPU_SECONDS)
        left = sorted(path.name for path in place.glob(".*") if ".lowbit-work" not in path.name)
        if verdict == "refused":  # finished blocks stay, for --resume
            left += [path.name for path in place.glob("out*")]
        return (f"leaves {', '.join(left)}", message) if left and verdict in ("ok", "refused") else (verdict, message)

    def _words(self, command: str, damaged: Path, place: Path) -> list[str]:
        names = {**self.inputs.names, "in": damaged, "out": place / "out"}
        return [word.format(**names).strip("'") for word in re.findall(r"'[^']*'|\S+", command)]


def _judged(words: list[str], place: Path, seconds: float) -> tuple[str, str]:
    """(verdict, the last lines on stderr) of a command in this process, which takes at most so many seconds of CPU."""
    from lowbit.cli.main import run

    out, err = place / "stdout", place / "stderr"
    for stream, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, stream)
        os.close(opened)
    sys.argv = ["lowbit", *words]
    code: Any = None
    try:
        with bounded_time(seconds):
            run()
    except SystemExit as exit_request:
        code = exit_request.code
    except TooSlowError:
        return f"more than {seconds:.0f} s", ""
    except BaseException as error:
        return f"{type(error).__name__} came through", str(error)[:300]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    printed = err.read_text(encoding="utf-8", errors="replace")
    if BLAME.search(printed) or BLAME.search(out.read_text(encoding="utf-8", errors="replace")):
        return "blames lowbit", printed[-600:]
    code = code or 0
    if code in (1, 2) and not printed.strip() and "verify" not in words[0]:
        return "says nothing", ""
    if code not in (0, 1, 2):
        return f"exit code {code}", printed[-300:]
    return ("refused" if code else "ok"), printed[-200:]


def tries(fuzzed: Fuzzed, seed: int, first: int, last: int, workers: int = 2,
          until: Callable[[], bool] = lambda: False) -> Iterator[Judged]:  # fmt: skip
    """All tries first..last, in forks; a fork that dies gives the try that it was at."""
    size = LIGHT_BATCH if fuzzed.light else BATCH
    batches = [(start, min(start + size, last)) for start in range(first, last, size)]
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(lambda batch: [] if until() else _batch(fuzzed, seed, *batch), batches):
            yield from found


def _batch(fuzzed: Fuzzed, seed: int, first: int, last: int) -> list[Judged]:
    context = multiprocessing.get_context("fork")
    found: list[Judged] = []
    while first < last:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(fuzzed, seed, first, last, writer))
        process.start()
        writer.close()
        try:
            while reader.poll(CPU_SECONDS * 10):
                found.append(reader.recv())
                first += 1
        except EOFError:
            pass
        process.kill()
        process.join()
        if first < last:
            found.append(Judged(first, "?", "?", f"died with {process.exitcode}, or hung", ""))
            first += 1
    return found


def _child(fuzzed: Fuzzed, seed: int, first: int, last: int, writer: Any) -> None:
    with bounded_memory(SPARE_BYTES):
        for number in range(first, last):
            writer.send(fuzzed.run(seed, number))
    writer.close()
    os._exit(0)


def _all_work(fuzzed: Fuzzed) -> None:
    stream = os.fdopen(os.dup(1), "w")
    wrong = [judged for judged in fuzzed.run_undamaged() if not judged.is_clean or "error:" in judged.message]
    for judged in wrong:
        print(json.dumps(judged.__dict__), file=stream, flush=True)
    os._exit(int(bool(wrong)))


def prepare() -> None:
    """What every command imports is imported before the forks."""
    import torch
    import transformers
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    import lowbit.cli.main  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _cpu_seconds() -> float:
    """Of this process and its forks."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--light", action="store_true", help="only commands that plan and look, on models of one block")
    parser.add_argument("--undamaged", action="store_true", help="first see that every command works on a good input")
    parser.add_argument("--table", action="store_true", help="also count by what is damaged, as a table in Markdown")
    args = parser.parse_args()
    prepare()
    verdicts: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LOWBIT_CACHE"] = f"{scratch}/cache"
        fuzzed = Fuzzed(Path(scratch) / "inputs", args.light)
        if args.undamaged:
            context = multiprocessing.get_context("fork")
            good = context.Process(target=_all_work, args=(fuzzed,))
            good.start()
            good.join()
            if good.exitcode:
                return 1
        over = (lambda: time.monotonic() - began > args.seconds) if args.seconds else (lambda: False)
        for judged in tries(fuzzed, args.seed, args.first, args.first + args.tries, args.workers, over):
            verdicts["clean: " + judged.verdict if judged.is_clean else judged.verdict] += 1
            for kind in judged.kinds:
                by_kind[kind][judged.verdict if judged.is_clean else "wrong"] += 1
            if not judged.is_clean:
                print(json.dumps(judged.__dict__), flush=True)
    if args.table:
        print("| what is damaged | changes | a result | a message | wrong |\n|---|---:|---:|---:|---:|")
        for kind, counts in by_kind.items():
            row = (sum(counts.values()), counts["ok"], counts["refused"], counts["wrong"])
            print(f"| {kind} |", " | ".join(f"{count:,}" for count in row), "|")
    took = f"{time.monotonic() - began:.0f} s, {_cpu_seconds():.0f} s of CPU"
    print(f"{sum(verdicts.values())} tries from seed {args.seed}, {took}: {dict(verdicts)}")
    return int(any(not verdict.startswith("clean") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
