"""`lowbit demo`: the main job on a small real model: quantize, verify, evaluate, report; one table, one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.console import echo

DEMO_SCHEMES = ("W4A16", "FP8_DYNAMIC")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the quantized models.")] = Path("demo-out"),
    model: Annotated[str, typer.Option(help="Any model that lowbit reads.")] = "demo:smollm2",
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens to evaluate on.")] = 24,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Quantize a small real model to W4A16 and FP8_DYNAMIC, and show what it cost."""
    import lowbit
    from lowbit.cli.console import byte_progress, print_json, print_table, say, window_progress
    from lowbit.measure import return_freed_memory
    from lowbit.reporting import add_to_report

    return_freed_memory()
    rows = []
    made = []
    for scheme in DEMO_SCHEMES:
        with byte_progress(f"{scheme}: quantize and verify", quiet=json) as progress:
            done = lowbit.quantize(model, output / scheme, scheme=scheme, overwrite=True, progress=progress)
        made.append((scheme, done))
    for scheme, done in made:
        with window_progress(f"{scheme}: evaluate", quiet=json) as progress:
            evaluations = lowbit.evaluate(done.path, reference=model, windows=windows, progress=progress)
        report = add_to_report(done.path, evaluation=tuple(evaluations))
        rows.append((scheme, done.path, report, evaluations, _sample(done.path)))
    if json:
        print_json([_as_json(*row) for row in rows])
        return
    print_table(_table(model, rows))
    for scheme, folder, _, _, text in rows:
        echo(f"\n{scheme} says: {text}")
        say(f"report: {folder / 'report.html'}")


def _sample(folder: Path) -> str:
    """One greedy sentence, so that a reader sees a model that still talks."""
    import lowbit

    said = lowbit.generate(folder, "In one sentence, why is the sky blue?", max_tokens=40)
    return said.strip()


def _table(model: str, rows: list[Any]) -> Any:
    from rich.table import Table

    from lowbit.measure import human_bytes

    first = rows[0][3][0]
    caption = (
        f"{first.windows} windows of {first.window_tokens} tokens of {first.text.name}; ± is one standard error; "
        f"seconds and peak memory: quantizing / evaluating"
    )
    table = Table(title=f"{model} against itself, quantized", caption=caption, title_justify="left",
                  caption_justify="left")  # fmt: skip
    table.add_column("scheme")
    for column in ("file", "bits/weight", "PPL ratio", "KLD", "same top-1", "seconds", "peak memory"):
        table.add_column(column, justify="right")
    for _, _, report, evaluations, _ in rows:
        for evaluation in evaluations:
            totals = report.totals
            table.add_row(
                evaluation.label,
                human_bytes(totals.bytes_out),
                f"{totals.decoder_bits_per_weight:.3f}",
                f"{evaluation.ppl_ratio:.4f} ± {evaluation.ppl_ratio_se:.4f}",
                f"{evaluation.kld_mean:.5f} ± {evaluation.kld_se:.5f}",
                f"{100 * evaluation.same_top1:.2f} %",
                f"{totals.seconds:.1f} / {evaluation.seconds:.0f}",
                f"{human_bytes(totals.peak_memory_bytes)} / {human_bytes(evaluation.peak_memory_bytes)}",
            )
    return table


def _as_json(scheme: str, folder: Path, report: Any, evaluations: list[Any], text: str) -> dict[str, Any]:
    return {
        "scheme": scheme,
        "folder": str(folder),
        "totals": report.totals.model_dump(mode="json"),
        "evaluation": [evaluation.model_dump(mode="json") for evaluation in evaluations],
        "says": text,
    }
