"""llm-compressor's GPTQ and AWQ, timed: what `lowbit quantize --method gptq` and `--method awq` are compared with.

usage: llmcompressor_gptq.py MODEL TEXT OUT [--scheme W4A16] [--group-size 64] [--observer mse] [--actorder static]
                             [--bits 4] [--asym] [--awq] [--samples 128] [--seqlen 512] [--batch-size 1]

Calibrates on the windows that lowbit takes from the same file: all of TEXT tokenized once, without special tokens, and
cut into consecutive windows (of a tokenizer that adds a BOS by itself, lowbit's windows begin with one: not here).
The sequential pipeline, the quantized prefix propagated, lm_head and the embedding kept: its own defaults.

    --observer   how ranges are found: the scheme's own (memoryless_minmax) unless given; mse is the stronger setting
    --actorder   order of columns in GPTQ: the modifier's own (static in 0.14) unless given; none for the given order
    --awq        AWQModifier (duo scaling "both", its best), then round to nearest, in place of GPTQ
    --bits, --asym   change the scheme's weights

Prints one JSON line on stdout:
    seconds_total                from the start of the process, imports included
    seconds_load                 transformers reading the checkpoint, the tokenizer and the text
    seconds_quantize_and_save    everything after imports and seconds_load
    seconds_cpu                  user and system time of all threads and children; moves less on a busy machine
    peak_rss_bytes               the larger of this process's and its children's ru_maxrss (mapped files count)
    output_bytes, weight_bytes   every file of OUT; its safetensors
    versions, threads, load_average_before
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from llmcompressor_rtn import build_scheme, resources_used

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def cut_windows(tokenizer: Any, text: Path, samples: int, seqlen: int) -> list[list[int]]:
    """The first `samples` consecutive windows of `seqlen` tokens."""
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    if len(ids) < samples * seqlen:
        raise SystemExit(f"error: {text} has {len(ids)} tokens, {samples} windows of {seqlen} need {samples * seqlen}")
    return [ids[start : start + seqlen] for start in range(0, samples * seqlen, seqlen)]


def change_weights(scheme: Any, bits: int | None, asymmetric: bool) -> Any:
    """The scheme with other bits, or with zero points."""
    raw = scheme.model_dump()
    if bits is not None:
        raw["weights"]["num_bits"] = bits
    if asymmetric:
        raw["weights"]["symmetric"] = False
    return type(scheme).model_validate(raw)


def make_recipe(scheme: Any, actorder: str | None, awq: bool) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    quantized: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if awq:
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**quantized)]
    order = {} if actorder is None else {"actorder": None if actorder == "none" else actorder}
    return [GPTQModifier(**quantized, **order)]


def allow_awq_without_accelerator() -> None:
    """0.14 pins cached activations for faster copies to the accelerator and fails where there is none: leave it out."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None


def quantize(args: argparse.Namespace, scheme: Any) -> tuple[float, float]:
    """Write OUT; returns the seconds of loading and of the rest."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.awq:
        allow_awq_without_accelerator()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = cut_windows(tokenizer, args.text, args.samples, args.seqlen)
    loaded = time.perf_counter()
    rows = {"input_ids": windows, "attention_mask": [[1] * args.seqlen] * args.samples}
    oneshot(
        model=model, tokenizer=tokenizer, recipe=make_recipe(scheme, args.actorder, args.awq),
        dataset=Dataset.from_dict(rows), num_calibration_samples=args.samples, max_seq_length=args.seqlen,
        shuffle_calibration_samples=False, batch_size=args.batch_size,
    )  # fmt: skip
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    return loaded - started, time.perf_counter() - loaded


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", default="W4A16", help="a compressed-tensors preset (default W4A16)")
    parser.add_argument("--group-size", type=int, help="the scheme's own unless given")
    parser.add_argument("--observer", help="weight observer, e.g. memoryless_minmax, mse or memoryless_mse")
    parser.add_argument("--actorder", choices=("static", "group", "none"))
    parser.add_argument("--bits", type=int)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--awq", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()
    if args.awq and args.actorder:
        parser.error("--actorder is GPTQ's: leave it or --awq out")
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists\n\nhint: delete it, or its old files are counted")
    return args


def main() -> None:
    args = parse_arguments()
    load_before = os.getloadavg()[0]
    with contextlib.redirect_stdout(sys.stderr):  # llm-compressor logs to whatever stdout is when it is imported
        scheme = change_weights(build_scheme(args.scheme, args.group_size, args.observer), args.bits, args.asym)
        load_seconds, work_seconds = quantize(args, scheme)
    import torch

    cpu_seconds, peak_rss = resources_used()
    files = [path for path in args.out.rglob("*") if path.is_file()]
    weights = scheme.weights
    result = {
        "tool": "llmcompressor",
        "method": "awq" if args.awq else "gptq",
        "scheme": args.scheme,
        "bits": weights.num_bits,
        "symmetric": weights.symmetric,
        "group_size": weights.group_size,
        "observer": weights.observer,
        "actorder": None if args.awq else args.actorder or "its default",
        "samples": args.samples,
        "seqlen": args.seqlen,
        "batch_size": args.batch_size,
        "seconds_total": round(time.time() - psutil.Process().create_time(), 2),
        "seconds_load": round(load_seconds, 2),
        "seconds_quantize_and_save": round(work_seconds, 2),
        "seconds_cpu": round(cpu_seconds, 2),
        "peak_rss_bytes": peak_rss,
        "output_bytes": sum(path.stat().st_size for path in files),
        "weight_bytes": sum(path.stat().st_size for path in files if path.suffix == ".safetensors"),
        "versions": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "load_average_before": round(load_before, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
