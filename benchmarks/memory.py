"""Does peak memory grow with the model? Llama-shaped checkpoints of 0.5, 1 and 2 billion weights, quantized to W4A16.

usage: memory.py FOLDER [--scheme W4A16] [--weights 0.5e9 1e9 2e9]

FOLDER receives the random checkpoints (make_random_llama.py; 2 bytes a weight) and keeps them for the next time. Each
figure is ru_maxrss of a process of its own that runs the whole command: quantize, verify against the source, report.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from throughput import run, warm


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--scheme", default="W4A16")
    arguments.add_argument("--weights", nargs="+", default=["0.5e9", "1e9", "2e9"])
    args = arguments.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    peaks = []
    for weights in args.weights:
        model = args.folder / f"llama-{weights}"
        if not model.exists():
            maker = str(Path(__file__).parent / "make_random_llama.py")
            subprocess.run([sys.executable, maker, str(model), "--weights", weights], check=True)
        files = sorted(model.glob("*.safetensors"))
        warm(files)
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            lowbit = str(Path(sys.executable).parent / "lowbit")
            command = [lowbit, "quantize", str(model), "-o", f"{scratch}/out", "--scheme", args.scheme, "--json"]
            seconds, peak, _ = run(command)
        peaks.append(peak)
        read = sum(file.stat().st_size for file in files)
        print(f"{weights:>6s} weights  {read / 1e9:5.2f} GB  {seconds:6.2f} s  {peak / 1e6:6.0f} MB peak", flush=True)
    print(f"largest / smallest peak: {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    main()
