"""Seconds of a decoding step with a quantized KV cache beside one in the model's dtype, at some context.

usage: kv_cache_speed.py MODEL [--context 8192] [--steps 8] [--dtype float32] [--types int8,int4,int2,int4_hadamard]

The caches are filled with random states, so that no prompt of that length is computed. Types take turns, step by step,
so that whatever else runs on the machine slows all of them; the median of each is shown, and its ratio. With one thread
(OMP_NUM_THREADS=1) it is the processor's time that counts, which other programs lengthen less than the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

import lowbit
from lowbit.kv.cache import own_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--types", default="int8,int4,int2,int4_hadamard")
    args = parser.parse_args()
    model, _ = lowbit.load(args.model, dtype=getattr(torch, args.dtype))
    config = model.config
    makers: dict[str, Callable] = {"16 bits": lambda: DynamicCache(config=config)}
    makers |= {name: lambda name=name: own_cache(name, config) for name in args.types.split(",")}
    caches = {name: filled(make(), model, args.context) for name, make in makers.items()}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.tensor([[1]])
    with torch.inference_mode():
        for step in range(args.steps + 1):
            for name, cache in caches.items():
                begun = clock()
                model(token, past_key_values=cache, use_cache=True)
                if step:  # the first makes room for the decoded states
                    seconds[name].append(clock() - begun)
    plain = statistics.median(seconds["16 bits"])
    print(f"{args.model}, {args.dtype}, {args.context} tokens, {torch.get_num_threads()} threads")
    print("| cache | ms per step | of the 16-bit cache |\n|---|---:|---:|")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"| {name} | {1000 * median:.0f} | {median / plain:.2f} |")


@torch.inference_mode()
def filled(cache, model, tokens: int):
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    states = torch.randn(1, text.num_key_value_heads, tokens, size, dtype=model.dtype)
    for layer in range(text.num_hidden_layers):
        cache.update(states.clone(), states.clone(), layer)
    return cache


if __name__ == "__main__":
    main()
