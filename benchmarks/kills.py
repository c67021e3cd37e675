"""Kills at any moment of a run that can be resumed: what is resumed has the bytes of a run that nobody killed.

    python benchmarks/kills.py --kills 100                            gptq, folder and GGUF
    python benchmarks/kills.py --kills 60 --runs refine,finetune,adapters,blind,tasks --blocks 1

The events of a run are counted once: every file that is opened, renamed or removed at the output or among kept answers,
and every step of progress. Then runs kill themselves (SIGKILL) at events spread evenly over them, and are resumed until
one ends. The files must then be byte for byte those of the undisturbed run, and no hidden folder and no kept answer may
be left. One run in three is killed twice. Prints what the kills met and how it went; exits with 1 where a round broke a
rule.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from kill_runs import RUNS, prepare  # noqa: E402

# Of Python's audit events: file operations, and calls into the C library (renameat2).
_FILE_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.truncate",
    "ctypes.call_function",
}


def run(kind: str, root: Path, output: Path, resume: bool, kill_at: int, count: Any) -> None:
    """A run in a process that kills itself at an event; without one it answers how many events there are."""
    import torch

    events = 0

    def event(*_: object) -> None:
        nonlocal events
        events += 1
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    places = str(output.parent), os.environ["LOWBIT_CACHE"]

    def audited(name: str, arguments: tuple[object, ...]) -> None:
        if name in _FILE_EVENTS and (name.startswith("ctypes") or str(arguments[0]).startswith(places)):
            event()

    torch.set_num_threads(1)
    sys.addaudithook(audited)
    RUNS[kind][1](root, output, resume, event)
    if count is not None:
        count.put(events)


def start(context: multiprocessing.context.BaseContext, *arguments: object) -> multiprocessing.process.BaseProcess:
    process = context.Process(target=run, args=arguments)
    process.start()
    return process


def weights_of(output: Path) -> dict[str, str]:
    """Name → SHA-256 of the files of an output and of what lies under its name with an ending (the model of adapters),
    without reports, which hold times, and without the folder's own name, which adapters state."""
    own = str(output.parent).encode()
    files = [path for path in output.parent.rglob("*") if path.is_file() and "report" not in path.name]
    return {
        str(path.relative_to(output.parent)): hashlib.sha256(path.read_bytes().replace(own, b"")).hexdigest()
        for path in files
        if not path.relative_to(output.parent).parts[0].startswith(".")
    }


def phase(folder: Path, output: Path) -> str:
    """What a killed run was doing, by what it left."""
    work = folder / f".{output.name}.lowbit-work"
    partial = list(folder.glob(f".{output.name}.partial-*"))
    if output.exists():
        return "after the output had its name"
    if partial:
        return "writing the output"
    blocks = len(list(work.glob("block-*.safetensors")))
    if (work / "learning.safetensors").exists():
        return "training, after a state was kept"
    if work.is_dir():
        return f"with {blocks} finished blocks"
    return "with kept answers" if kept_answers() else "before anything was written"


def kept_answers() -> list[str]:
    """Of tasks and blind comparisons."""
    return sorted(path.name for path in Path(os.environ["LOWBIT_CACHE"]).glob("*/*.jsonl"))


def one_round(context: Any, root: Path, folder: Path, kind: str, moments: list[int], expected: dict) -> list[str]:
    """Kill at each event, resume to the end, compare; what happened."""
    output, met = folder / RUNS[kind][0], []
    for moment in moments:
        if output.exists():
            break
        killed = start(context, kind, root, output, bool(met), moment, None)
        killed.join()
        was_killed = killed.exitcode == -signal.SIGKILL
        met.append(f"killed {phase(folder, output)}" if was_killed else f"ended with {killed.exitcode} before its kill")
    if not output.exists():
        resumed = start(context, kind, root, output, True, -1, None)
        resumed.join()
        if resumed.exitcode != 0:
            met.append(f"BROKE: the resumed run ended with {resumed.exitcode}")
    elif list(folder.glob(".*")):  # complete, and killed before its blocks were removed: for `lowbit clean`
        from lowbit.calibrate.leftovers import find_leftovers, remove_leftover

        met.append("cleaned up by lowbit clean")
        for leftover in find_leftovers(folder):
            remove_leftover(leftover)
    if not output.exists() or weights_of(output) != expected:
        met.append("BROKE: other bytes than those of an undisturbed run")
    left = [*(path.name for path in folder.glob(".*")), *kept_answers()]
    if left:
        met.append(f"BROKE: left {left}")
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--runs", default="gptq,gptq-gguf", help=", ".join(RUNS))
    parser.add_argument("--blocks", type=int, default=4, help="of the model")
    arguments = parser.parse_args()
    kinds = arguments.runs.split(",")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lowbit.api", "lowbit.calibrate.loop", "safetensors.torch",
                                    "transformers.models.llama.modeling_llama"])  # fmt: skip
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.environ["LOWBIT_CACHE"] = str(root / "cache")
        prepare(root, arguments.blocks)
        rounds = arguments.kills // len(kinds)
        for kind in kinds:
            whole, answer = root / f"whole-{kind}", context.SimpleQueue()
            whole.mkdir()
            undisturbed = start(context, kind, root, whole / RUNS[kind][0], False, -1, answer)
            undisturbed.join()
            if undisturbed.exitcode:
                sys.exit(f"{kind}: the undisturbed run ended with {undisturbed.exitcode}")
            events, expected = answer.get(), weights_of(whole / RUNS[kind][0])
            print(f"{events} events in a run of {kind}", file=sys.stderr)
            for number in range(rounds):
                folder = root / f"round-{number}-{kind}"
                folder.mkdir()
                moment = 1 + (events - 1) * number // rounds
                moments = [moment, 1 + (events - moment) // 2] if number % 3 == 2 else [moment]
                met = one_round(context, root, folder, kind, moments, expected)
                counts.update(f"{kind}: {what}" for what in met)
    for what, count in sorted(counts.items()):
        print(f"{count:5}  {what}")
    sys.exit(any("BROKE" in what for what in counts))


if __name__ == "__main__":
    main()
