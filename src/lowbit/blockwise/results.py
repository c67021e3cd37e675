"""What the report says of linears that calibration decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowbit.blockwise.store import BlockStore, LinearResult


@dataclass(frozen=True)
class TensorResult:
    """What rounding one weight cost: ‖W − Ŵ‖² / ‖W‖², the largest |w − ŵ|, and what calibration says of it."""

    relative_error: float
    max_error: float
    decided: LinearResult | None = None


def decided_results(store: BlockStore) -> dict[str, TensorResult]:
    """Weight → what rounding it cost, of those that calibration decided."""
    return {
        f"{name}.weight": TensorResult(result.relative_error, result.max_error, result)
        for record in store.records.values()
        for name, result in record.linears.items()
    }


def joined_results(parts: Sequence[TensorResult]) -> TensorResult:
    """Of a tensor made of several weights of one shape (stacked experts): mean errors, the largest error, all notes."""
    if len(parts) == 1:
        return parts[0]
    decided = [part.decided for part in parts if part.decided is not None]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    methods = sorted({each.method for each in decided})
    whole = replace(
        decided[0],
        method=" and ".join(methods),
        layer_error=mean([each.layer_error for each in decided]),
        nearest_error=mean([each.nearest_error for each in decided]),
        tokens=sum(each.tokens for each in decided),
        notes=tuple(f"expert {index}: {note}" for index, each in enumerate(decided) for note in each.notes),
    )
    relative = sum(part.relative_error for part in parts) / len(parts)
    return TensorResult(relative, max(part.max_error for part in parts), whole)
