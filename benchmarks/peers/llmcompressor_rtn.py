"""llm-compressor's data-free round-to-nearest, timed: what `lowbit quantize --method rtn` is compared with.

usage: llmcompressor_rtn.py MODEL OUT --scheme W4A16 [--group-size 128] [--entry oneshot|model_free] [--observer NAME]

llm-compressor has two roads to the same codes; a fair comparison takes whichever is better at what is being measured.
    oneshot      loads the whole model with transformers, QuantizationModifier without a dataset, save_compressed
    model_free   `model_free_ptq`: shard by shard from safetensors, no model definition; memory follows the shard size
Both keep lm_head and the embedding as they are. --observer picks how scales are found: the scheme's own
(memoryless_minmax) unless given; memoryless_mse is the more accurate and much slower setting.

Prints one JSON line on stdout:
    seconds_total                from the start of the process, imports included
    seconds_load                 oneshot only: transformers reading the checkpoint; model_free reads as it quantizes
    seconds_quantize_and_save    everything after imports and seconds_load
    seconds_cpu                  user and system time of all threads; moves less than the others on a busy machine
    peak_rss_bytes               the larger of this process's and its children's ru_maxrss (mapped files count)
    output_bytes                 every file of OUT
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import psutil


def build_scheme(name: str, group_size: int | None, observer: str | None):
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"]).model_dump()
    if group_size is not None:
        if scheme["weights"]["strategy"] != "group":
            raise SystemExit(f"error: {name} has no groups\n\nhint: leave --group-size out")
        scheme["weights"]["group_size"] = group_size
    if observer is not None:
        scheme["weights"]["observer"] = observer
    return QuantizationScheme.model_validate(scheme)


def run_oneshot(model_dir: str, out: str, scheme) -> tuple[float, float]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    loaded = time.perf_counter()
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, pipeline="datafree")
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    return loaded - started, time.perf_counter() - loaded


def run_model_free(model_dir: str, out: str, scheme) -> tuple[float, float]:
    from llmcompressor import model_free_ptq

    started = time.perf_counter()
    # It knows tensors, not modules: "Linear" there means every 2-D weight, the embedding too.
    model_free_ptq(model_dir, out, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens$"], device="cpu")
    return 0.0, time.perf_counter() - started


def resources_used() -> tuple[float, int]:
    """CPU seconds and peak resident bytes of this process and the children it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(each.ru_utime + each.ru_stime for each in usage)
    return cpu_seconds, max(each.ru_maxrss for each in usage) * 1024  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--scheme", required=True, help="a compressed-tensors preset such as W4A16")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--entry", choices=("oneshot", "model_free"), default="model_free")
    parser.add_argument("--observer", help="weight observer, e.g. memoryless_minmax or memoryless_mse")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise SystemExit(f"error: {args.out} exists\n\nhint: delete it, or its old files are counted")

    load_before = os.getloadavg()[0]
    run = run_oneshot if args.entry == "oneshot" else run_model_free
    with contextlib.redirect_stdout(sys.stderr):  # llm-compressor logs to whatever stdout is when it is imported
        scheme = build_scheme(args.scheme, args.group_size, args.observer)
        load_seconds, work_seconds = run(args.model, args.out, scheme)
    cpu_seconds, peak_rss = resources_used()
    result = {
        "tool": "llmcompressor",
        "entry": args.entry,
        "scheme": args.scheme,
        "group_size": scheme.weights.group_size,
        "observer": scheme.weights.observer,
        "seconds_total": round(time.time() - psutil.Process().create_time(), 2),
        "seconds_load": round(load_seconds, 2),
        "seconds_quantize_and_save": round(work_seconds, 2),
        "seconds_cpu": round(cpu_seconds, 2),
        "peak_rss_bytes": peak_rss,
        "output_bytes": sum(path.stat().st_size for path in Path(args.out).rglob("*") if path.is_file()),
        "load_average_before": round(load_before, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
