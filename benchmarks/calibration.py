"""What calibrated methods cost and what they give: `lowbit quantize --method …` beside llm-compressor, same text.

usage: calibration.py MODEL --calib TEXT [--run "W4A16 gptq --group-size 64"]… [--samples 128] [--seqlen 512]
                      [--peer PYTHON [--peer-run "--scheme W4A16 --group-size 64"]…]
                      [--judge "python kld.py {model} {out} --text T --windows 10"] [--work FOLDER] [--json FILE]

    --run       SCHEME METHOD and more flags of `lowbit quantize`; repeatable; the runs of RUNS unless given
    --peer      the python of an environment with llm-compressor (peers/README.md), for peers/llmcompressor_gptq.py
    --peer-run  its flags; repeatable; those of PEER_RUNS unless given
    --judge     a command that prints "KLD x±y" and "PPL x" of {out}; the last of each is taken
    --work      where outputs go and stay; a name that exists is refused. A temporary folder unless given

Each run is a process of its own, one after another, in the order given; the weight files are read once before, so that
the page cache is warm for all. Columns:

    wall      seconds from start to end of the process: imports, verification and report of ours, loading of the peer
    cpu       user and system seconds of the process and of the children it waited for (getrusage)
    peak      the process's own account where it gives one, and ru_maxrss: both count mapped file pages
    size      bytes of the weight files

A busy machine inflates CPU seconds too, where threads wait for each other by spinning: measure on a quiet one, or
with OMP_NUM_THREADS=1 for all. The load average before each run is in the table for that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from throughput import warm

from lowbit.schemes import is_gguf_name

RUNS = (
    "W4A16 rtn --group-size 64",
    "W4A16 gptq --group-size 64",
    "W4A16 awq --group-size 64",
    "W4A16_ASYM gptq --group-size 64",
    "W3A16 gptq --group-size 64",
)
STRONGEST = "--group-size 64 --observer mse --actorder static"
PEER_RUNS = (
    "--scheme W4A16 --group-size 64",
    f"--scheme W4A16 {STRONGEST}",
    "--scheme W4A16 --group-size 64 --observer mse --awq",
    f"--scheme W4A16_ASYM {STRONGEST}",
    f"--scheme W3A16 {STRONGEST}",
)
PEER_SCRIPT = Path(__file__).parent / "peers" / "llmcompressor_gptq.py"
DATA_FREE = ("rtn", "hqq")
KLD = re.compile(r"KLD (-?[\d.]+(?:e-?\d+)?)\s*±\s*([\d.]+(?:e-?\d+)?)")
PPL = re.compile(r"PPL ([\d.]+(?:e\+?\d+)?)")


@dataclass
class Row:
    """One run. peak_said is None where the process reports none; kld, kld_se and ppl are None without a judge."""

    name: str
    wall: float
    cpu: float
    peak_said: int | None
    peak: int
    size: int
    load: float
    command: str
    kld: float | None = None
    kld_se: float | None = None
    ppl: float | None = None


def measure(command: list[str]) -> tuple[float, float, int, str]:
    """(wall seconds, CPU seconds, peak resident bytes, stdout) of a process."""
    before, began = _children_cpu(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:  # a file, not a pipe: long progress must not block the process
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        if status != 0:
            errors.seek(0)
            raise SystemExit(f"error: {shlex.join(command)} failed:\n{output}{errors.read()[-4000:]}")
    return wall, _children_cpu() - before, usage.ru_maxrss * 1024, output


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_ours(args: argparse.Namespace, job: str, work: Path) -> tuple[Row, Path]:
    scheme, method, *flags = shlex.split(job)
    suffix = ".gguf" if is_gguf_name(scheme) else ""
    out = free_path(work, f"lowbit-{job}", suffix)
    command = [sys.executable, "-m", "lowbit", "quantize", str(args.model), "-o", str(out), "--scheme", scheme,
               "--method", method, *flags, "--json"]  # fmt: skip
    if method not in DATA_FREE:
        command += ["--calib", str(args.calib), "--samples", str(args.samples), "--seqlen", str(args.seqlen)]
    load = os.getloadavg()[0]
    wall, cpu, peak, said = measure(command)
    told = json.loads(said)["totals"].get("peak_memory_bytes")
    return Row(f"lowbit {job}", wall, cpu, told, peak, weight_bytes(out), load, shlex.join(command)), out


def run_peer(args: argparse.Namespace, flags: str, work: Path) -> tuple[Row, Path]:
    out = free_path(work, f"peer-{flags}", "")
    command = [args.peer, str(PEER_SCRIPT), str(args.model), str(args.calib), str(out), *shlex.split(flags),
               "--samples", str(args.samples), "--seqlen", str(args.seqlen)]  # fmt: skip
    load = os.getloadavg()[0]
    wall, cpu, peak, said = measure(command)
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    name = f"llm-compressor {told['versions']['llmcompressor']} {told['method']} {flags}"
    return Row(name, wall, cpu, told["peak_rss_bytes"], peak, weight_bytes(out), load, shlex.join(command)), out


def free_path(work: Path, name: str, suffix: str) -> Path:
    """A path in `work` named after the run, that does not exist yet."""
    out = work / (re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-") + suffix)
    if out.exists():
        raise SystemExit(f"error: {out} exists\n\nhint: delete it or name another --work")
    return out


def weight_bytes(out: Path) -> int:
    if out.is_file():
        return out.stat().st_size
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def judge(template: str, model: Path, out: Path, row: Row) -> None:
    """Run the judge and read its figures into the row."""
    command = [word.format(model=model, out=out) for word in shlex.split(template)]
    said = subprocess.run(command, capture_output=True, text=True)
    klds, ppls = KLD.findall(said.stdout), PPL.findall(said.stdout)
    if said.returncode or not klds or not ppls:
        raise SystemExit(f"error: {shlex.join(command)} gave no KLD and PPL:\n{said.stdout}{said.stderr[-4000:]}")
    row.kld, row.kld_se = (float(text) for text in klds[-1])
    row.ppl = float(ppls[-1])


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| run | wall s | CPU s | peak MB (said / maxrss) | weights MB | KLD | PPL | load |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        said = "–" if row.peak_said is None else f"{row.peak_said / 1e6:.0f}"
        kld = "–" if row.kld is None else f"{row.kld:.4f} ± {row.kld_se:.4f}"
        ppl = "–" if row.ppl is None else f"{row.ppl:.2f}"
        lines.append(
            f"| {row.name} | {row.wall:.1f} | {row.cpu:.1f} | {said} / {row.peak / 1e6:.0f} | {row.size / 1e6:.1f} "
            f"| {kld} | {ppl} | {row.load:.1f} |"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--run", action="append", dest="runs", metavar="'SCHEME METHOD FLAGS'")
    parser.add_argument("--no-ours", action="store_true", help="only the peer")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--peer-run", action="append", dest="peer_runs", metavar="'FLAGS'")
    parser.add_argument("--judge", metavar="COMMAND", help="with {model} and {out}")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path, help="also write every figure and command here")
    args = parser.parse_args()
    if args.judge and "{out}" not in args.judge:
        parser.error("--judge has no {out}: it would judge the same thing every time")
    for job in args.runs or ():
        if len(shlex.split(job)) < 2:
            parser.error(f"--run {job!r} is not SCHEME METHOD [FLAGS]")
    return args


def main() -> None:
    args = parse_arguments()
    jobs = [] if args.no_ours else [(run_ours, job) for job in args.runs or RUNS]
    jobs += [(run_peer, flags) for flags in args.peer_runs or PEER_RUNS] if args.peer else []
    warm(sorted(args.model.glob("*.safetensors")))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.model.parent) as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for start, job in jobs:
            row, out = start(args, job, work)
            if args.judge:
                judge(args.judge, args.model, out, row)
            rows.append(row)
            print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, OMP threads {threads}"
    print(f"{machine}; {args.model.name}, {args.samples} x {args.seqlen} tokens\n\n{table(rows)}")


if __name__ == "__main__":
    main()
