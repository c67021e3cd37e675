"""Figures of tasks: reference and quantized on the same items, so their difference is paired.

difference  = (gained − lost) / n              lost: right before, wrong now; gained: the other way round
its error   = √((lost + gained) / n − difference²) / √n
p           = P(at least as one-sided | lost and gained equally likely), two-sided, exact: McNemar (1947) as a
              binomial test of lost against gained; items that both have right or both wrong say nothing
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from lowbit.records import Count, NonNegative, Record

if TYPE_CHECKING:
    from rich.table import Table

ALL = "all"
_SURE = 0.05  # a p above it is what chance gives


class TaskRow(Record):
    """A category, or all of them. Without a reference only `items` and `right` are known.

    right, reference_right   items answered rightly
    lost, gained             items that flipped
    """

    category: str
    items: Count
    right: Count
    reference_right: Count | None = None
    lost: Count | None = None
    gained: Count | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> TaskRow:
        if self.right > self.items:
            raise ValueError("more right answers than items")
        if self.reference_right is not None:
            if self.lost is None or self.gained is None:
                raise ValueError("flips are missing")
            if self.reference_right - self.lost + self.gained != self.right:
                raise ValueError("the flips do not lead from the reference to the model")
        return self

    @property
    def accuracy(self) -> float:
        return self.right / self.items if self.items else 0.0

    @property
    def difference(self) -> float | None:
        """Of accuracies; negative where the quantized model is worse."""
        if self.lost is None or self.gained is None or not self.items:
            return None
        return (self.gained - self.lost) / self.items

    @property
    def difference_se(self) -> float | None:
        if self.difference is None or self.lost is None or self.gained is None:
            return None
        spread = (self.lost + self.gained) / self.items - self.difference**2
        return math.sqrt(max(0.0, spread) / self.items)

    @property
    def p(self) -> float | None:
        return None if self.lost is None or self.gained is None else mcnemar(self.lost, self.gained)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p of the flips: 1 where there are none."""
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1)) / 2**flips
    return min(1.0, 2 * tail)


class TaskResult(Record):
    """What a model can do, beside its reference.

    suite        "packaged", or "lm-eval 0.4.13"
    rows         by category, then all
    seed         of the packaged items
    activations  as in `Evaluation`
    notes        for the reader
    """

    suite: str
    model: str
    reference: str | None
    rows: tuple[TaskRow, ...]
    seed: Count
    dtype: str
    activations: Literal["none", "simulated"]
    seconds: NonNegative
    notes: tuple[str, ...] = ()

    @property
    def first_to_suffer(self) -> TaskRow | None:
        """The category that lost most, of those whose loss is more than its error; None where none is."""
        found = [row for row in self.rows if row.category != ALL and row.difference is not None
                 and row.difference_se is not None and row.difference < -row.difference_se]  # fmt: skip
        return min(found, key=lambda row: row.difference or 0.0, default=None)


def rows_of(categories: list[str], right: list[bool], reference: list[bool] | None) -> tuple[TaskRow, ...]:
    """Rows by category, in the order in which they come, and one of all; lists are by item."""
    rows = []
    for name in (*dict.fromkeys(categories), ALL):
        chosen = [i for i, category in enumerate(categories) if name in (category, ALL)]
        ours = [right[i] for i in chosen]
        before = None if reference is None else [reference[i] for i in chosen]
        rows.append(TaskRow(
            category=name, items=len(chosen), right=sum(ours),
            reference_right=None if before is None else sum(before),
            lost=None if before is None else sum(b and not o for b, o in zip(before, ours, strict=True)),
            gained=None if before is None else sum(o and not b for b, o in zip(before, ours, strict=True)),
        ))  # fmt: skip
    return tuple(rows)


def task_sentence(result: TaskResult) -> str:
    """ "loses 3.4 % ± 1.2 % of the answers (12 lost, 4 gained, p = 0.08: no more than chance); format suffers most" """
    row = result.rows[-1]
    if row.difference is None or row.difference_se is None or row.p is None:
        return f"{row.right} of {row.items} right; there is no reference to compare with"
    verb = "loses" if row.difference < 0 else "gains" if row.difference > 0 else "keeps its share"
    amount = "" if row.difference == 0 else f" {abs(100 * row.difference):.1f} % ± {100 * row.difference_se:.1f} %"
    first = result.first_to_suffer
    suffers = "" if first is None else f"; {first.category} suffers most"
    flipped = bool(row.lost or row.gained)
    chance = ": no more than chance" if flipped and row.p > _SURE else ""
    flips = f"{row.lost} lost, {row.gained} gained, p = {row.p:.2g}{chance}"
    return f"{verb}{amount} of the answers ({flips}){suffers}"


def task_table(result: TaskResult) -> Table:
    """A rich table, a row per category."""
    from rich.table import Table

    table = Table()
    table.add_column("task")
    for column in ("items", "reference", "quantized", "difference", "lost", "gained", "p"):
        table.add_column(column, justify="right")
    for row in result.rows:
        if row.reference_right is None or row.difference is None or row.difference_se is None or row.p is None:
            paired = ("–",) * 5
            table.add_row(row.category, str(row.items), paired[0], f"{100 * row.accuracy:.1f} %", *paired[1:])
        else:
            table.add_row(row.category, str(row.items), f"{100 * row.reference_right / row.items:.1f} %",
                          f"{100 * row.accuracy:.1f} %",
                          f"{100 * row.difference:+.1f} % ± {100 * row.difference_se:.1f} %", str(row.lost),
                          str(row.gained), f"{row.p:.2g}")  # fmt: skip
    return table


def as_json(result: TaskResult) -> dict[str, Any]:
    """The record, with what follows from the counts."""
    values = result.model_dump(mode="json")
    for shown, row in zip(values["rows"], result.rows, strict=True):
        shown |= {
            "accuracy": row.accuracy,
            "difference": row.difference,
            "difference_se": row.difference_se,
            "p": row.p,
        }
    return values
