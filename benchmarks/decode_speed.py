"""The roofline against llama.cpp on this processor: tokens per second of decoding, predicted and measured.

usage: decode_speed.py [MODEL …] [--types F16,Q8_0,Q4_0] [--tokens 128] [--repeat 3] [--threads N]

    MODEL  what `lowbit quantize` takes: demo:smollm2 (default), folders; each is written as GGUF of every type

llama.cpp is the wheel xllamacpp (the interop extra). Predicted: `lowbit.advice.roofline` on the processor as
`lowbit.hardware` measures it just before; measured: the own timing of the server for the generated tokens, best of the
repeats. The machine must be quiet.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import lowbit
from lowbit.advice.roofline import Load, speed
from lowbit.architecture.shape import shape_of
from lowbit.checkpoint.base import OpenOptions
from lowbit.engines import find_engine
from lowbit.engines.engine import SIXTEEN
from lowbit.estimation.footprint import footprint
from lowbit.estimation.serving import cache_of
from lowbit.estimation.weights import open_headers
from lowbit.hardware import Device, find_device

_PROMPT = "Tell me a long story about the sea, the wind and a lighthouse."
_FLOATS = ("F32", "F16", "BF16")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("models", nargs="*", default=["demo:smollm2"])
    arguments.add_argument("--types", default="F16,Q8_0,Q4_0")
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = arguments.parse_args()
    device = find_device("cpu")
    print(f"{device.label}, {device.bandwidth / 1e9:.1f} GB/s read, load {os.getloadavg()[0]:.2f}\n")
    print("| model | type | bytes read per token | predicted tok/s | measured tok/s | measured ÷ predicted |")
    print("|---|---|---:|---:|---:|---:|")
    for model in args.models:
        for name in args.types.split(","):
            print(row(args, model, name, device), flush=True)


def row(args: argparse.Namespace, model: str, name: str, device: Device) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{name}.gguf"
        lowbit.quantize(model, path, scheme=name, format="gguf")
        read, predicted = predict(model, name, path.stat().st_size, device, args.tokens)
        measured = max(measure(path, args.tokens, args.threads) for _ in range(args.repeat))
    return (
        f"| {Path(model).name} | {name} | {read / 1e6:.1f} MB | {predicted:.1f} | {measured:.1f} | "
        f"{measured / predicted:.2f} |"
    )


def predict(model: str, name: str, size: int, device: Device, tokens: int) -> tuple[float, float]:
    """(bytes of weights that a token reads, tokens/s)."""
    engine = find_engine("llama.cpp")
    with open_headers(model, OpenOptions()) as headers:
        shape = shape_of(headers.config)
    how = None if name in _FLOATS else engine.supported(device)[name]
    weights = footprint(shape, name).scaled(size)
    load = Load(1, max(1, tokens // 2), 1)
    cache = cache_of(shape, engine).sequence_bytes(load.context)
    found = speed(shape, weights, footprint(shape, SIXTEEN), cache, how, device, load)
    return weights.read_by_a_step(1), found.decode


def measure(path: Path, tokens: int, threads: int) -> float:
    """tokens/s of llama.cpp, by its own clock, prompt apart."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 1024
    params.n_parallel = 1
    params.warmup = True
    params.verbosity = 0
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    asked = {"prompt": _PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "timings_per_token": True}
    answer = server.handle_completions(asked)
    timings = answer["timings"]
    if timings["predicted_n"] < tokens:
        raise SystemExit(
            f"{path.name}: {timings['predicted_n']} tokens instead of {tokens}; the timing would be another"
        )
    return float(timings["predicted_per_second"])


if __name__ == "__main__":
    main()
