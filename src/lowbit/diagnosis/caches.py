"""KV caches that lose more than the weights do, and what to take instead.

Read are the figures that `lowbit evaluate --kv-cache` left in the report, of each type at its longest context, but for
those of contexts that a window in 16 bits holds whole. Nothing is measured here, and a model without such figures gets
no finding. Weights and caches are measured on their own texts and contexts, which the finding says.

    costly     KLD − 2 · error > KLD of the weights
    layers     with --by-layer: the costliest ones, so many that the others cost less than the weights, at most
               MOST_LAYERS of them. A layer's part of the loss is its loss alone over the sum of all of these
    instead    of the measured types of the same engines: the fewest bits whose KLD + 2 · error is below the weights';
               else the one that loses least, if that is half or less
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from lowbit.checkpoint.base import is_gguf
from lowbit.diagnosis.evidence import Evidence
from lowbit.engines import find_engine
from lowbit.evaluation.cache_result import CacheEvaluation, context_label
from lowbit.kv.types import OF_OUTPUT
from lowbit.report.diagnosis import DiagnosisFinding, Suggestion

MOST_CACHES = 3  # that are named one by one
MOST_LAYERS = 0.25  # of the layers stay in 16 bits
# Types that are the engine's FP8 with scales from the files.
_WITH_SCALES = {OF_OUTPUT[name]: "fp8" for name in ("fp8", "fp8_per_head")}


def costly_caches(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """A warning for each of the worst, a note for the others together."""
    rows, total = _costly(evidence), evidence.total
    for row in rows[:MOST_CACHES]:
        context = context_label(row.context)
        yield DiagnosisFinding(
            kind="kv-cache", severity="warning", kld=row.kld_mean, se=row.kld_se,
            title=f"a cache in {row.type} costs more than the weights: {row.kld_mean:.5f} ± {row.kld_se:.5f} nats at "
            f"{context} tokens, the weights {total:.5f}",
            detail=f"{_advice(row, evidence)}; the cache was measured on {row.text.name}, {row.windows} × "
            f"{row.context} tokens, {row.protocol}",
        )  # fmt: skip
    if rest := rows[MOST_CACHES:]:
        yield DiagnosisFinding(
            kind="kv-cache", severity="note", title=f"{len(rest)} more cache types cost more than the weights",
            detail=", ".join(f"{row.type} {row.kld_mean:.5f}" for row in rest),
        )  # fmt: skip


def cache_suggestions(evidence: Evidence, quantized: str) -> Iterator[Suggestion]:
    """A command for each of the worst: serve with layers left out or another type, or measure layer by layer."""
    said: set[str] = set()
    for row in _costly(evidence)[:MOST_CACHES]:
        for made in _ways(row, evidence, quantized):
            if made.command not in said:
                said.add(made.command)
                yield made


def _ways(row: CacheEvaluation, evidence: Evidence, quantized: str) -> Iterator[Suggestion]:
    layers, other = layers_to_skip(row, evidence.total or 0.0), instead(row, evidence)
    if layers and (command := _serve(row, quantized, layers)):
        kept = ", ".join(map(str, layers))
        yield Suggestion(text=f"keep the cache of layers {kept} in 16 bits, the others in {row.type}",
                         command=command, gain=row.kld_mean * _share(row, layers))  # fmt: skip
    elif not row.by_layer and "vllm" in row.engines:
        command = ["lowbit", "evaluate", quantized, "--kv-cache", row.type, "--context", str(row.context), "--windows",
                   str(row.windows), "--by-layer"]  # fmt: skip
        yield Suggestion(text=f"find the layers that a cache in {row.type} should leave in 16 bits",
                         command=shlex.join(command))  # fmt: skip
    if other is not None and (command := _serve(other, quantized)):
        yield Suggestion(text=f"take {other.type} instead of {row.type} ({row.bits_per_value:.2f} → "
                         f"{other.bits_per_value:.2f} bits per cached value)", command=command,
                         gain=row.kld_mean - other.kld_mean)  # fmt: skip


def _advice(row: CacheEvaluation, evidence: Evidence) -> str:
    layers, other = layers_to_skip(row, evidence.total or 0.0), instead(row, evidence)
    said = []
    if layers:
        share = 100 * _share(row, layers)
        said.append(f"layers {', '.join(map(str, layers))} alone are {share:.0f} % of it: keep their cache in 16 bits")
    if other is not None:
        said.append(f"{other.type} costs {other.kld_mean:.5f} in {other.bits_per_value:.2f} bits")
    return ", or ".join(said) or "no type of the same engines that was measured is better: keep the cache in 16 bits"


def layers_to_skip(row: CacheEvaluation, total: float) -> tuple[int, ...]:
    """Layers whose cache is to stay in 16 bits, so that the rest costs less than `total`; none where the losses of
    layers were not measured, more than a quarter would be needed, or the engine skips none."""
    if not row.by_layer or "vllm" not in row.engines:
        return ()
    ordered = sorted(row.by_layer, key=lambda each: (-each.kld_mean, each.layer))
    for count in range(1, int(MOST_LAYERS * len(ordered)) + 1):
        layers = tuple(sorted(each.layer for each in ordered[:count]))
        if row.kld_mean * (1 - _share(row, layers)) < total:
            return layers
    return ()


def _share(row: CacheEvaluation, layers: tuple[int, ...]) -> float:
    """Of what all layers cost one by one, the part of these."""
    alone = sum(each.kld_mean for each in row.by_layer)
    return sum(each.kld_mean for each in row.by_layer if each.layer in layers) / alone if alone else 0.0


def instead(row: CacheEvaluation, evidence: Evidence) -> CacheEvaluation | None:
    """Another measured type for the same engines, by the rule above; None where there is none."""
    total = evidence.total or 0.0
    alike = [
        other for other in _measured(evidence)
        if other.type != row.type and _condition(other) == _condition(row)
        and bool(set(other.engines) & set(row.engines)) == bool(row.engines)
    ]  # fmt: skip
    below = [other for other in alike if other.kld_mean + 2 * other.kld_se <= total]
    if below:
        return min(below, key=lambda other: (other.bits_per_value, other.kld_mean))
    least = min(alike, key=lambda other: other.kld_mean, default=None)
    return least if least is not None and least.kld_mean <= row.kld_mean / 2 else None


def _condition(row: CacheEvaluation) -> tuple[object, ...]:
    return row.context, row.text.sha256, row.protocol, row.windows, row.bos


def _measured(evidence: Evidence) -> list[CacheEvaluation]:
    """One row for each type: its longest context, of those that it rounds at."""
    found: dict[str, CacheEvaluation] = {}
    for record in (evidence.report or {}).get("kv_cache") or ():
        row = CacheEvaluation.model_validate(record)
        if row.rounds and (row.type not in found or row.context > found[row.type].context):
            found[row.type] = row
    return list(found.values())


def _costly(evidence: Evidence) -> list[CacheEvaluation]:
    """Largest loss first."""
    if not evidence.total:
        return []
    over = [row for row in _measured(evidence) if row.kld_mean - 2 * row.kld_se > evidence.total]
    return sorted(over, key=lambda row: -row.kld_mean)


def _serve(row: CacheEvaluation, quantized: str, skip: tuple[int, ...] = ()) -> str | None:
    """The command of the first of the type's engines that reads such files and has the option; None for types that need
    scales which the files lack."""
    if row.type in _WITH_SCALES and row.scales != "stored":
        return None
    keys, _, values = _WITH_SCALES.get(row.type, row.type).partition("/")
    place = str(Path(quantized).absolute()) if Path(quantized).exists() else quantized
    for engine in map(find_engine, row.engines):
        command = engine.serve_with_cache(place, keys, values or keys, skip)
        if command is not None and engine.loading.reads_gguf == is_gguf(Path(quantized)):
            return command
    return None
