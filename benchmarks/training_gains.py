"""What a short training gains on the model as it was quantized: text that it did not see, of three domains.

usage: training_gains.py [ROW…] [--model demo:smollm2] [--steps 8] [--windows 2] [--work build/training-gains]

    ROW        W2A16, W4A16, Q2_K (quantized, then QAF and QAD of that), LoRA (QLoRA on NF4: base, adapter, merged), QA
               (QA-LoRA on Q4_1: base, merged); all of them in this order unless given
    --steps    of training, of one window of 256 tokens each, of the packaged calibration text
    --windows  of 256 tokens, of each domain, that are judged (`domain_texts.py`)

Each line of the table is one run of `lowbit`, which is printed. A run is timed (CPU time of the process) and judged
once: outputs and figures stay in --work, and what is there is not done again, so that the script can be stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domain_texts import DomainText, domain_texts
from safetensors.torch import load_file

import lowbit

DOMAINS = ("prose", "code", "dialogue")
WINDOW = 256
# Of weights and norms; scales have 30 times it. Chosen once, before anything was measured.
RATES = {"W2A16": 2e-4, "W4A16": 3e-5, "Q2_K": 1e-4}

# Of a quarter of the usual tokens, with the damping that so few need at 2 bits.
GPTQ = ("--method", "gptq", "--samples", "32", "--seqlen", str(WINDOW), "--damping", "0.1", "--correction", "0")


@dataclass(frozen=True)
class Run:
    """One line of the table.

    output   that is judged
    command  that makes it, without "lowbit"; empty: an earlier one did
    adapter  laid over the output
    """

    name: str
    output: Path
    command: tuple[str, ...]
    adapter: Path | None = None


def runs_of(row: str, args: argparse.Namespace) -> list[Run]:
    """The runs of a row, in the order in which they need each other."""
    model, work = args.model, args.work
    windows = 8 * args.steps // 7 + 2  # one in eight is held out
    course = ("--steps", str(args.steps), "--batch", "1", "--windows", str(windows), "--window-tokens", str(WINDOW),
              "--save-every", "0")  # fmt: skip
    if row in RATES:
        gguf = row == "Q2_K"
        start, qaf, qad = (work / f"{row}{end}{'.gguf' if gguf else ''}" for end in ("", "-QAF", "-QAD"))
        method = () if gguf else GPTQ
        train = ("--scheme", row, *course, "--learning-rate", f"{RATES[row]:g}")
        distill = ("--distill", "--reference", model)
        return [
            Run(f"{row}, as quantized", start, ("quantize", model, "-o", str(start), "--scheme", row, *method)),
            Run(f"{row}, QAF", qaf, ("finetune", str(start), "-o", str(qaf), *train)),
            Run(f"{row}, QAD", qad, ("finetune", str(start), "-o", str(qad), *train, *distill)),
        ]
    if row == "LoRA":
        adapter, base, merged = work / "NF4-adapter", work / "NF4-adapter-base", work / "NF4-merged"
        floats = work / "float"  # the demo model is a GGUF file of codes, which would be the base as it is
        train = ("finetune", str(floats), "-o", str(adapter), "--lora", "16", "--scheme", "NF4", *course)
        merge = ("quantize", str(floats), "--adapter", str(adapter), "-o", str(merged), "--scheme", "NF4")
        return [
            Run("decoded to 16 bits", floats, ("convert", model, "-o", str(floats), "--format", "float")),
            Run("NF4, base of an adapter of rank 16", base, train),
            Run("NF4 with the adapter beside it", base, (), adapter),
            Run("NF4, the adapter merged and rounded again", merged, merge),
        ]
    if row == "QA":
        base, merged = work / "Q4_1.gguf", work / "Q4_1-QA.gguf"
        train = ("finetune", model, "-o", str(merged), "--lora", "16", "--qa-lora", "--merge", "--scheme", "Q4_1")
        return [
            Run("Q4_1, as quantized", base, ("quantize", model, "-o", str(base), "--scheme", "Q4_1")),
            Run("Q4_1, QA-LoRA of rank 16, merged", merged, (*train, *course)),
        ]
    raise SystemExit(f"error: there is no row {row!r}\n\nhint: rows: {', '.join((*RATES, 'LoRA', 'QA'))}")


def made(run: Run) -> dict[str, Any]:
    """Run the command: its CPU seconds, and what it said of the training."""
    line = ("lowbit", *run.command)
    print(shlex.join(line), file=sys.stderr, flush=True)
    before = _cpu_of_children()
    done = subprocess.run([sys.executable, "-m", *line, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(line)} ended with {done.returncode}")
    said = json.loads(done.stdout)
    notes = said["notes"] if "notes" in said else said["source"]["notes"]
    trained = [note for note in notes if note.startswith("trained")]
    return {"command": shlex.join(line), "cpu_seconds": _cpu_of_children() - before, "notes": trained}


def judged(args: argparse.Namespace, run: Run, texts: list[DomainText]) -> dict[str, Any]:
    """Domain → KLD, its standard error and the ratio of perplexities, to the model in 16 bits."""
    found = {}
    output = run.output if run.adapter is None else _with_adapter(args, run)
    for text in texts:
        (row,) = lowbit.evaluate(output, reference=args.model, text=text.path, windows=args.windows,
                                 window_tokens=WINDOW, activations="none")  # fmt: skip
        found[text.domain] = {"kld": row.kld_mean, "kld_se": row.kld_se, "ratio": row.ppl_ratio}
    return {"domains": found, "bits_per_weight": None if run.adapter else row.bits_per_weight}


def _with_adapter(args: argparse.Namespace, run: Run) -> Path:
    """The decoded base in float32 with the adapter added: what an engine computes that has both."""
    summed = args.work / f"{run.output.name}-with-adapter"
    if summed.exists():
        return summed
    assert run.adapter is not None
    model, tokenizer = lowbit.load(run.output)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    matrices = load_file(run.adapter / "adapter_model.safetensors")
    for name in (name for name in matrices if name.endswith(".lora_A.weight")):
        module: Any = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        update = matrices[name.replace("lora_A", "lora_B")] @ matrices[name]
        module.weight.data += update * (config["lora_alpha"] / config["r"])
    model.save_pretrained(summed)
    tokenizer.save_pretrained(summed)
    return summed


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(figures: dict[str, Any]) -> str:
    """Markdown: runs in lines, domains in columns."""
    lines = [
        f"| | CPU min | bits per weight | {' | '.join(DOMAINS)} |",
        f"|---|---:|---:|{'---:|' * len(DOMAINS)}",
    ]
    for name, figure in figures.items():
        cells = [f"{cell['kld']:.4f} ± {cell['kld_se']:.4f} ({cell['ratio']:.3f})"
                 for cell in (figure["domains"][domain] for domain in DOMAINS)]  # fmt: skip
        minutes = f"{figure['cpu_seconds'] / 60:.1f}" if "cpu_seconds" in figure else ""
        bits = "" if figure["bits_per_weight"] is None else f"{figure['bits_per_weight']:.2f}"
        lines.append(f"| {name} | {minutes} | {bits} | {' | '.join(cells)} |")
    notes = [f"{name}: {note}" for name, figure in figures.items() for note in figure.get("notes", ())]
    return "\n".join([*lines, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", default=[*RATES, "LoRA", "QA"])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/training-gains"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    texts = domain_texts(domains=DOMAINS)
    for run in (run for row in args.rows for run in runs_of(row, args)):
        figure = figures.get(run.name, {})
        if "domains" in figure:
            continue
        if run.command and "cpu_seconds" not in figure:
            figure |= made(run)
            figures[run.name] = figure
            _write(kept, figures)
        figures[run.name] = figure | judged(args, run, texts)
        _write(kept, figures)
        print(table({run.name: figures[run.name]}), file=sys.stderr, flush=True)
    print(table({name: figure for name, figure in figures.items() if "domains" in figure}))


def _write(path: Path, figures: dict[str, Any]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(beside, path)


if __name__ == "__main__":
    main()
