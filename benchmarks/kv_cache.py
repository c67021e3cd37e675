"""What each KV-cache type costs a model: mean KLD against the 16-bit cache at several context lengths, beside memory.

usage: kv_cache.py MODEL [--types T,…] [--contexts 512,2k,8k] [--windows N] [--text T] [--json F] [--write F] [--data F]

    --windows  of the shortest context; longer ones hold as many tokens, at least one window
    --json     keep every row there, and measure only what it lacks: the run may be stopped and continued
    --write    put the table into a document, between its lines <!-- kv-cache table --> and <!-- end -->
    --data     write the figures that `lowbit advise` and `lowbit estimate` read

The second half of each window is scored, so that every figure is of tokens with half of the context before them. The
reference's pass over a window is made once for all types that a context lacks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lowbit
from lowbit.evaluation.cache_result import context_label
from lowbit.evaluation.kv_cache import parse_contexts
from lowbit.kv import CACHE_TYPES, find_cache_types

TYPES = (
    "fp8_e4m3,fp8_calibrated,fp8_e5m2,int8_per_token_head,int4_per_token_head,nvfp4,turboquant_4bit_nc,q8_0,q5_1,q4_0,"
    "lmdeploy_int4,quanto_int4,kivi4,kivi2,kvquant4,quarot4,int4,int2"
)
KEPT = ("type", "context", "windows", "scored_tokens", "bits_per_value", "bytes_per_token", "scales", "kld_mean",
        "kld_se", "ppl_ratio", "ppl_ratio_se", "same_top1")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--contexts", default="512,2k,8k")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    table = markdown(rows)
    print(table)
    if args.write is not None:
        put(args.write, table)
    if args.data is not None:
        args.data.write_text(json.dumps(figures(args, rows), indent=1) + "\n")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    known = json.loads(args.json.read_text()) if args.json is not None and args.json.is_file() else []
    shortest = min(parse_contexts(args.contexts))
    for context in sorted(parse_contexts(args.contexts)):
        done = {row["type"] for row in known if row["context"] == context}
        missing = [each.name for each in find_cache_types(args.types) if each.name not in done]
        if not missing:
            continue
        found = lowbit.evaluate_kv_cache(
            args.model, missing, contexts=(context,), windows=max(1, args.windows * shortest // context),
            text=args.text, protocol="second-half",
        )  # fmt: skip
        known += [{**{name: getattr(row, name) for name in KEPT}, "text": row.text.name} for row in found]
        if args.json is not None:
            args.json.write_text(json.dumps(known, indent=1))
    names = [each.name for each in find_cache_types(args.types)]
    wanted = parse_contexts(args.contexts)
    asked = [row for row in known if row["type"] in names and row["context"] in wanted]
    return sorted(asked, key=lambda row: (names.index(row["type"]), row["context"]))


def markdown(rows: list[dict[str, Any]]) -> str:
    contexts = sorted({row["context"] for row in rows})
    head = " | ".join(f"KLD, {context_label(each)}" for each in contexts)
    lines = [f"| type | bits | bytes per token | {head} |", f"|---|---:|---:|{'---:|' * len(contexts)}"]
    for name in dict.fromkeys(row["type"] for row in rows):
        mine = {row["context"]: row for row in rows if row["type"] == name}
        first = next(iter(mine.values()))
        cells = " | ".join(shown(mine.get(context)) for context in contexts)
        lines.append(f"| `{name}` | {first['bits_per_value']:.2f} | {first['bytes_per_token']:,.0f} | {cells} |")
    return "\n".join(lines)


def shown(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['kld_mean']:.5f} ± {row['kld_se']:.5f}"


def put(document: Path, table: str) -> None:
    before, _, rest = document.read_text().partition("<!-- kv-cache table -->\n")
    _, end, after = rest.partition("<!-- end -->")
    document.write_text(f"{before}<!-- kv-cache table -->\n{table}\n{end}{after}")


def figures(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    command = f"python benchmarks/kv_cache.py {args.model} --contexts {args.contexts} --windows {args.windows}"
    command += "" if args.types == TYPES else f" --types {args.types}"
    losses = [{name: row[name] for name in ("type", "context", "scored_tokens", "kld_mean", "kld_se", "ppl_ratio")}
              for row in rows if row["type"] in CACHE_TYPES]  # fmt: skip
    return {"model": args.model, "text": rows[0]["text"], "command": command, "rows": losses}


if __name__ == "__main__":
    main()
