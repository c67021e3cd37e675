"""How long the structure of a model takes to be found, and how much memory.

    python benchmarks/discovery.py [MODEL_TYPE | config.json ...]

Without arguments DeepSeek-V3, whose default config in transformers is that of the released model. Every model in a
process of its own, uncached; seconds of wall clock and of the processor with imports, and peak memory of the process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    for name in sys.argv[1:] or ["deepseek_v3"]:
        began = time.perf_counter()
        found = subprocess.run([sys.executable, __file__, "--one", name], check=True, capture_output=True, text=True)
        facts = json.loads(found.stdout.splitlines()[-1])
        spent, memory = time.perf_counter() - began, facts["bytes"] / 1e9
        print(f"{name}: {spent:.1f} s, {facts['cpu']:.1f} s of the processor, {memory:.2f} GB")
        print(f"  {facts['linears']:,} linears, {facts['fed']:,} with what feeds them")


def one(name: str) -> None:
    from transformers import AutoConfig

    from lowbit.architecture import discover

    config = json.loads(Path(name).read_text()) if name.endswith(".json") else AutoConfig.for_model(name).to_dict()
    linears = discover(config, name, split_experts=True).linears.values()
    used = resource.getrusage(resource.RUSAGE_SELF)
    fed = sum(linear.fed_by is not None for linear in linears)
    print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * 1024,
                      "linears": len(linears), "fed": fed}))  # fmt: skip


if __name__ == "__main__":
    one(sys.argv[2]) if sys.argv[1:2] == ["--one"] else main()
