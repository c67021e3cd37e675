"""Time and memory of `lowbit quantize`, beside a plain copy of the same bytes and beside llm-compressor.

usage: throughput.py MODEL [--scheme W4A16] [--format F] [--group-size 128] [--peer PYTHON] [--repeat 3]

    MODEL    a folder; make_random_llama.py makes one of any size
    --peer   the python of an environment with llm-compressor (peers/README.md)

Every figure is of a process of its own, page cache warm, the best of --repeat runs:

    lowbit                the command as a user types it: Python's start, imports, quantizing, verification against the
                          source, report
    lowbit, engine only   the seconds between reading the first weight and the last fsync, without verification
    plain copy            the weight files read and written once, through one 16 MiB buffer, fsynced; and beside it the
                          copy of exactly the bytes that quantizing moves: all of the input read, the output's size
                          written
    llm-compressor        peers/llmcompressor_rtn.py, both entry points

Peak memory is the largest resident set of the process (ru_maxrss), mapped file pages included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINE = """
import json, sys, time
from pathlib import Path
from lowbit.pipeline import write_checkpoint
from lowbit.plan.plan import Request, prepare
from lowbit.settings import make_settings
prepared = prepare(Request(sys.argv[1], make_settings(**json.loads(sys.argv[3]))))
began = time.perf_counter()
write_checkpoint(prepared, Path(sys.argv[2]))
print(json.dumps({"seconds": time.perf_counter() - began}))
"""


def run(command: list[str]) -> tuple[float, int, str]:
    """(wall seconds, peak resident bytes, stdout) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}{errors}")
    return seconds, usage.ru_maxrss * 1024, output


def best(command: list[str], output: Path, repeat: int) -> tuple[float, int, str]:
    """The run of least wall time; the output is removed before each."""
    runs = []
    for _ in range(repeat):
        shutil.rmtree(output, ignore_errors=True)
        runs.append(run(command))
    return min(runs)


def warm(files: list[Path]) -> None:
    """Bring files into the page cache. In pieces: a child's ru_maxrss begins at its parent's size."""
    buffer = bytearray(1 << 24)
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def copy_bytes(files: list[Path], target: Path, write_at_most: int | None) -> float:
    """Seconds to read all files and write the first `write_at_most` bytes of them (all for None), fsynced."""
    left = sum(file.stat().st_size for file in files) if write_at_most is None else write_at_most
    began = time.perf_counter()
    buffer = bytearray(1 << 24)
    view = memoryview(buffer)
    with target.open("wb", buffering=0) as sink:
        for file in files:
            with file.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    sink.write(view[: min(count, left)])
                    left -= min(count, left)
        os.fsync(sink.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--scheme", default="W4A16")
    arguments.add_argument("--format", default="auto")
    arguments.add_argument("--group-size", type=int, help="the scheme's own unless given")
    arguments.add_argument("--range", default="absmax")
    arguments.add_argument("--peer", type=Path)
    arguments.add_argument("--repeat", type=int, default=3)
    args = arguments.parse_args()
    files = sorted(args.model.glob("*.safetensors"))
    read = sum(file.stat().st_size for file in files)
    warm(files)
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        output = Path(scratch) / "out"
        rows = measure(args, files, output, Path(scratch) / "copy")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    job = f"{args.scheme}, format {args.format}, range {args.range}, best of {args.repeat}"
    print(f"{machine}; {args.model.name}: {read / 1e9:.2f} GB; {job}")
    for name, seconds, peak in rows:
        print(f"{name:44s} {seconds:8.2f} s   {'' if peak is None else f'{peak / 1e6:8.0f} MB peak'}")


def measure(
    args: argparse.Namespace, files: list[Path], output: Path, copy: Path
) -> list[tuple[str, float, int | None]]:
    settings = {"scheme": args.scheme, "format": args.format, "range": args.range}
    if args.group_size is not None:
        settings["group_size"] = args.group_size
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(Path(sys.executable).parent / "lowbit"), "quantize", str(args.model), "-o", str(output), *options]
    seconds, peak, _ = best([*command, "--json"], output, args.repeat)
    rows: list[tuple[str, float, int | None]] = [("lowbit quantize (verified, reported)", seconds, peak)]
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    engine = [sys.executable, "-c", ENGINE, str(args.model), str(output), json.dumps(settings)]
    runs = []
    for _ in range(args.repeat):
        shutil.rmtree(output, ignore_errors=True)
        _, peak, said = run(engine)
        runs.append((json.loads(said)["seconds"], peak))
    rows.append(("lowbit, engine only", *min(runs)))
    shutil.rmtree(output, ignore_errors=True)
    rows.append(
        ("plain copy, read and write all bytes", min(copy_bytes(files, copy, None) for _ in range(args.repeat)), None)
    )
    moved = min(copy_bytes(files, copy, written) for _ in range(args.repeat))
    rows.append((f"plain copy, read all, write {written / 1e9:.2f} GB", moved, None))
    if args.peer:
        script = str(Path(__file__).parent / "peers" / "llmcompressor_rtn.py")
        shared = ["--scheme", args.scheme, "--group-size", str(args.group_size or 128)]
        for entry in ("oneshot", "model_free"):
            peer = [str(args.peer), script, str(args.model), str(output), *shared, "--entry", entry]
            rows.append((f"llm-compressor, {entry}", *best(peer, output, args.repeat)[:2]))
    return rows


if __name__ == "__main__":
    main()
