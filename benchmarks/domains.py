"""What finished models lost in each domain: mean KLD and perplexity ratio, one column per domain. A table in Markdown.

usage: domains.py MODEL OUT… [--prose FILE] [--windows 10] [--domains prose,code,…] [--cache build/domains]
                  [--judge "python kld.py {model} {out} --text {text} --windows 10"] [--json FILE]

    MODEL    the unquantized model: a folder, demo:smollm2
    OUT      a folder or .gguf file made of it, by lowbit or by anything else; NAME=OUT names its row
    --prose  see `domain_texts.py`, which collects the texts
    --judge  a command that prints "KLD x±y" and the ratio or the values of "PPL"; `lowbit evaluate` judges unless given

Figures are mean KLD in nats ± one standard error over tokens, and the ratio of perplexities where the judge says it.
The files of a table should be of the same bytes. Choices are made on the first domains; the others only report, so that
a setting tuned to a text shows.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from domain_texts import CACHE, DomainText, domain_texts

KLD = re.compile(r"KLD (-?[\d.]+(?:e-?\d+)?)\s*±\s*([\d.]+(?:e-?\d+)?)")
RATIO = re.compile(r"\bratio ([\d.]+(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Figure:
    """One output in one domain. ratio: of perplexities, None where the judge does not say it."""

    output: str
    domain: str
    kld: float
    kld_se: float
    ratio: float | None
    bytes: int

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f" ({self.ratio:.3f})"
        return f"{self.kld:.4f} ± {self.kld_se:.4f}{ratio}"


def measure(args: argparse.Namespace, name: str, out: str, text: DomainText) -> Figure:
    """The figures of lowbit's own evaluation, weights alone, or of the judge."""
    if args.judge:
        return _judged(args, name, out, text)
    import lowbit

    (row,) = lowbit.evaluate(out, reference=args.model, text=text.path, windows=args.windows, activations="none")
    if row.windows < args.windows:
        print(f"note: {text.domain} has {row.windows} windows", file=sys.stderr)
    assert row.kld_mean is not None
    assert row.kld_se is not None
    return Figure(name, text.domain, row.kld_mean, row.kld_se, row.ppl_ratio, _bytes(out))


def _judged(args: argparse.Namespace, name: str, out: str, text: DomainText) -> Figure:
    command = [word.format(model=args.model, out=out, text=text.path) for word in shlex.split(args.judge)]
    said = subprocess.run(command, capture_output=True, text=True)
    klds, ratios = KLD.findall(said.stdout), RATIO.findall(said.stdout)
    if said.returncode or not klds:
        raise SystemExit(f"error: {shlex.join(command)} gave no KLD:\n{said.stdout}{said.stderr[-4000:]}")
    return Figure(name, text.domain, float(klds[-1][0]), float(klds[-1][1]),
                  float(ratios[-1]) if ratios else None, _bytes(out))  # fmt: skip


def _bytes(out: str) -> int:
    """Of the weight files; 0 for what is no path."""
    path = Path(out)
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.glob("*.safetensors"))


def table(figures: list[Figure], texts: list[DomainText]) -> str:
    """Markdown: outputs in rows, domains in columns; a second head line says which domains only report."""
    lines = [
        f"| mean KLD ± (PPL ratio) | MB | {' | '.join(text.domain for text in texts)} |",
        f"|---|---:|{'---:|' * len(texts)}",
        f"| | | {' | '.join('choices' if text.chosen_on else 'report only' for text in texts)} |",
    ]
    by_place = {(figure.output, figure.domain): figure for figure in figures}
    for output in dict.fromkeys(figure.output for figure in figures):
        row = [by_place.get((output, text.domain)) for text in texts]
        size = next(figure.bytes for figure in row if figure is not None)
        cells = " | ".join("–" if figure is None else str(figure) for figure in row)
        lines.append(f"| {output} | {size / 1e6:.1f} | {cells} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("outputs", nargs="+", metavar="OUT")
    parser.add_argument("--prose", type=Path)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--domains", default="", help="only these, separated by commas")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--judge", metavar="COMMAND", help="with {model}, {out} and {text}")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args()
    for place in ("{out}", "{text}"):
        if args.judge and place not in args.judge:
            parser.error(f"--judge has no {place}: it would judge the same thing every time")
    return args


def main() -> None:
    args = parse_arguments()
    texts = domain_texts(args.prose, args.cache, tuple(filter(None, args.domains.split(","))))
    for text in texts:
        print(f"{text.domain}: {text.source}, sha256 {text.sha256[:16]}", file=sys.stderr)
    figures: list[Figure] = []
    for output in args.outputs:
        name, _, out = output.rpartition("=") if "=" in output and not Path(output).exists() else ("", "", output)
        for text in texts:
            figures.append(measure(args, name or Path(out).name, out, text))
            print(f"{figures[-1].output}, {text.domain}: {figures[-1]}", file=sys.stderr, flush=True)
        if args.json:
            rows = {"texts": {text.domain: text.sha256 for text in texts}, "figures": [asdict(row) for row in figures]}
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(figures, texts))


if __name__ == "__main__":
    main()
