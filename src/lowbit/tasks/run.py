"""`lowbit.evaluate_tasks`: reference and quantized on the same items, one model in memory at a time.

Refused: models that do not fit in memory whole (tasks write answers, token by token), items longer than the model's
context, unknown tasks, packaged tasks and lm-eval's in one call.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import UsageError
from lowbit.evaluation.footprint import fingerprint, read_report, state_of_files
from lowbit.evaluation.memory import choose_way
from lowbit.evaluation.opening import Opened, Opener, open_reference
from lowbit.evaluation.perplexity import Activations, variants_of
from lowbit.measure import Meter
from lowbit.tasks import harness
from lowbit.tasks.answering import BATCH, answers
from lowbit.tasks.items import CATEGORIES, Item, packaged_items
from lowbit.tasks.result import TaskResult, rows_of
from lowbit.tasks.server import ServedModel, served_answers

Progress = Callable[[int, int], None]
Outcomes = dict[tuple[str, str, str], bool]  # (category, filter of lm-eval, item) → right


@dataclass(frozen=True)
class _Suite:
    """names: categories of the packaged items, or tasks of lm-eval; limit: items of each, None for all."""

    title: str
    names: tuple[str, ...]
    packaged: bool
    seed: int
    limit: int | None

    def of(self, opened: Opened, context: Callable[..., contextlib.AbstractContextManager], done: Callable[[int], None]
           ) -> Outcomes:  # fmt: skip
        """What one model makes of every item; it is filled, asked and emptied."""
        opened.loader.fill()
        with context(opened.model):
            if not self.packaged:
                return harness.outcomes(opened.model, opened.tokenizer, self.names, self.limit, BATCH)
            items = self.items()
            right = answers(opened.model, opened.tokenizer, items, done)
        return self.by_item(right)

    def by_item(self, right: list[bool]) -> Outcomes:
        """Outcomes of the packaged items, in their order."""
        pairs = zip(self.items(), right, strict=True)
        return {(item.category, "", str(place)): each for place, (item, each) in enumerate(pairs)}

    def items(self) -> list[Item]:
        """The packaged items, the first `limit` of each category."""
        found = packaged_items(self.seed, self.names)
        seen = dict.fromkeys(CATEGORIES, 0)
        kept = []
        for item in found:
            seen[item.category] += 1
            if self.limit is None or seen[item.category] <= self.limit:
                kept.append(item)
        return kept


def evaluate_tasks(
    quantized: str | Path,
    reference: str | Path | None = None,
    tasks: Sequence[str] = ("all",),
    *,
    url: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    activations: Activations = "auto",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int | None = None,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Accuracy of a checkpoint beside its reference's, item by item.

    reference    the unquantized model; by default the source that the checkpoint's report names
    tasks        "all" packaged ones, some of arithmetic, facts, format, code; or tasks of lm-eval
    url          of a running server that serves `quantized`, which is asked instead of loading it; packaged tasks only
    limit        items of each category or task; None: all
    seed         of the packaged items
    activations  "auto": simulated as the engine would where the scheme quantizes them; "none": weights alone
    progress     called with (items done, items in all), both models together; packaged tasks only
    """
    meter = Meter()
    options = options or OpenOptions()
    suite = _suite(tasks, limit, seed, options.trust_remote_code)
    if url is not None and not suite.packaged:
        raise UsageError("tasks of lm-eval are not run over a server by lowbit",
                         "lm-eval does it itself: --model local-completions; or --tasks all")  # fmt: skip
    with contextlib.ExitStack() as stack:
        opener = Opener(stack, dtype, device, options)
        judged = opener.open(quantized)
        source = open_reference(reference, read_report(judged.checkpoint), opener)
        variants = variants_of(judged.checkpoint, activations)
        name, context = list(variants.items())[-1]
        notes = (*judged.checkpoint.notes, *source.notes)
        count = 1 if source.opened is None else 2
        found = []
        if url is not None:  # first, since it refuses what is not the same model
            name = "simulated" if len(variants) > 1 else "none"  # by the engine itself
            of = f"{fingerprint(judged.checkpoint)} {state_of_files(judged.checkpoint)}"
            served = ServedModel(url, judged.tokenizer, of)
            right, before = served_answers(served, suite.items(), seed, _told(suite, 0, count, progress))
            found = [suite.by_item(right)]
            notes += (f"asked over {served.url}, model {served.name!r}",)
            notes += (f"{before} answers are from a run that was stopped",) if before else ()
        if source.opened is not None:
            told = _told(suite, len(found), count, progress)
            found.insert(0, _asked(suite, source.opened, contextlib.nullcontext, told, max_memory))
        if url is None:
            found.append(_asked(suite, judged, context, _told(suite, len(found), count, progress), max_memory))
        named = None if source.opened is None else source.opened.checkpoint.source
    keys = list(found[-1])
    if len(found) > 1 and found[0].keys() != found[1].keys():
        raise UsageError("the two models were asked different items", "is the reference the model that was quantized?")
    return TaskResult(
        suite=suite.title, model=str(quantized), reference=named,
        rows=rows_of([category if not filtered or filtered == "none" else f"{category} ({filtered})"
                      for category, filtered, _ in keys], [found[-1][key] for key in keys],
                     [found[0][key] for key in keys] if len(found) > 1 else None),
        seed=seed, dtype=str(dtype).removeprefix("torch."), activations=name, seconds=meter.seconds, notes=notes,
    )  # fmt: skip


def _told(suite: _Suite, place: int, models: int, progress: Progress | None) -> Callable[[int], None]:
    """What tells `progress` of the items of one of several models."""
    count = len(suite.items()) if suite.packaged else 0
    if progress is None:
        return lambda done: None
    return lambda done: progress(place * count + done, models * count)


def _asked(
    suite: _Suite, opened: Opened, context: Callable[..., contextlib.AbstractContextManager],
    told: Callable[[int], None], max_memory: int | None,
) -> Outcomes:  # fmt: skip
    if choose_way([opened.loader], 0, max_memory).block_by_block:
        raise UsageError(f"{opened.checkpoint.source} does not fit in memory, and tasks need a whole model",
                         "run them on a larger machine, or on a running server: --url")  # fmt: skip
    try:
        return suite.of(opened, context, told)
    finally:
        opened.model.to_empty(device="meta")
        gc.collect()


def _suite(tasks: Sequence[str], limit: int | None, seed: int, trust_remote_code: bool) -> _Suite:
    names = tuple(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not names:
        raise UsageError("no task was named", f"--tasks all, or some of {', '.join(CATEGORIES)}")
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} items of each task say nothing", "give 1 or more")
    if names == ("all",):
        return _Suite("packaged", CATEGORIES, True, seed, limit)
    packaged = [name for name in names if name in CATEGORIES]
    if len(packaged) == len(names):
        return _Suite("packaged", names, True, seed, limit)
    others = tuple(name for name in names if name not in CATEGORIES)
    if packaged or "all" in others:
        raise UsageError(f"{', '.join(others)} are not packaged tasks, and those are run apart from the others",
                         f"the packaged ones are {', '.join(CATEGORIES)}; name one kind at a time")  # fmt: skip
    near = difflib.get_close_matches(others[0], CATEGORIES, n=1)
    if len(others) == 1 and near:
        raise UsageError(f"there is no task {others[0]!r}", f"did you mean {near[0]}?")
    return _Suite(harness.check_tasks(others, trust_remote_code), others, False, seed, limit)
