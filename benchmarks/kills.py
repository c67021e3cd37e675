"""Kills at any moment of a calibrated run: what is resumed has the bytes of a run that nobody killed.

    python benchmarks/kills.py --kills 100

The events of a GPTQ run are counted once, folder and GGUF: every file that is opened, renamed or removed at the output,
and every step of progress. Then runs kill themselves (SIGKILL) at events spread evenly over them, and are resumed
until one ends. The files must then be byte for byte those of the undisturbed run, and no hidden folder may be left. One
run in three is killed twice. Prints what the kills met and how it went; exits with 1 where a round broke a rule.
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

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]


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


def quantize(model: Path, output: Path, scheme: str, text: Path, resume: bool, kill_at: int, count: Any) -> None:
    """A GPTQ run with few short windows, in a process that kills itself at an event; without one it answers how many
    events there are."""
    import torch

    import lowbit
    from lowbit.calibrate import loop
    from lowbit.settings import RunOptions

    events = 0

    def event(*_: object) -> None:
        nonlocal events
        events += 1
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(name: str, arguments: tuple[object, ...]) -> None:
        if name in _FILE_EVENTS and (name.startswith("ctypes") or str(output.parent) in str(arguments[0])):
            event()

    torch.set_num_threads(1)
    loop.KEEP_STATES_EVERY = 0.0  # states after every block, so that kills meet their writing too
    group = {} if output.suffix == ".gguf" else {"group_size": 32}
    sys.addaudithook(audited)
    lowbit.quantize(model, output, scheme=scheme, method="gptq", calib=str(text), samples=12, seqlen=48,
                    expert_tokens=8, threads=1, run=RunOptions(resume=resume), progress=event, **group)  # fmt: skip
    if count is not None:
        count.put(events)


def start(context: multiprocessing.context.BaseContext, *arguments: object) -> multiprocessing.process.BaseProcess:
    process = context.Process(target=quantize, args=arguments)
    process.start()
    return process


def weights_of(output: Path) -> dict[str, str]:
    """Name → SHA-256 of the files of an output, without reports, which hold times."""
    files = [output] if output.suffix == ".gguf" else sorted(output.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if "report" not in path.name}


def phase(folder: Path, output: Path) -> str:
    """What a killed run was doing, by what it left."""
    work = folder / f".{output.name}.lowbit-work"
    partial = list(folder.glob(f".{output.name}.partial-*"))
    if output.exists():
        return "after the output had its name"
    if partial:
        return "writing the output"
    blocks = len(list(work.glob("block-*.safetensors")))
    return f"calibrating block {blocks}" if work.is_dir() else "before anything was written"


def one_round(context: Any, folder: Path, arguments: tuple, moments: list[int], expected: dict[str, str]) -> list[str]:
    """Kill at each event, resume to the end, compare; what happened."""
    model, name, scheme, text = arguments
    output, met = folder / name, []
    for moment in moments:
        if output.exists():
            break
        run = start(context, model, output, scheme, text, bool(met), moment, None)
        run.join()
        killed = run.exitcode == -signal.SIGKILL
        met.append(f"killed {phase(folder, output)}" if killed else f"ended with {run.exitcode} before its kill")
    if not output.exists() or list(folder.glob(".*")):
        run = start(context, model, output, scheme, text, True, -1, None) if not output.exists() else None
        if run is not None:
            run.join()
            if run.exitcode != 0:
                met.append(f"BROKE: the resumed run ended with {run.exitcode}")
        else:  # complete, and killed before the blocks were removed: what `lowbit clean --yes` is for
            from lowbit.calibrate.leftovers import find_leftovers, remove_leftover

            met.append("cleaned up by lowbit clean")
            for leftover in find_leftovers(folder):
                remove_leftover(leftover)
    if weights_of(output) != expected:
        met.append("BROKE: other bytes than those of an undisturbed run")
    if list(folder.glob(".*")):
        met.append(f"BROKE: left {[path.name for path in folder.glob('.*')]}")
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lowbit.api", "lowbit.calibrate.loop", "safetensors.torch",
                                    "transformers.models.llama.modeling_llama"])  # fmt: skip
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        from calibrate.calibrated import write_text
        from models import make_model

        root = Path(scratch)
        model, text = make_model(root / "model", num_hidden_layers=4), write_text(root)
        kinds = (("out", "W4A16"), ("out.gguf", "Q4_0"))
        for name, scheme in kinds:
            whole, answer = root / f"whole-{scheme}", context.SimpleQueue()
            whole.mkdir()
            start(context, model, whole / name, scheme, text, False, -1, answer).join()
            events, expected = answer.get(), weights_of(whole / name)
            print(f"{events} events in a run to {name}", file=sys.stderr)
            for number in range(arguments.kills // len(kinds)):
                folder = root / f"round-{number}-{name}"
                folder.mkdir()
                moment = 1 + (events - 1) * number * len(kinds) // arguments.kills
                moments = [moment, 1 + (events - moment) // 2] if number % 3 == 2 else [moment]
                counts.update(one_round(context, folder, (model, name, scheme, text), moments, expected))
    for what, count in sorted(counts.items()):
        print(f"{count:5}  {what}")
    sys.exit(any(what.startswith("BROKE") for what in counts))


if __name__ == "__main__":
    main()
