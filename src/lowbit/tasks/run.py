"""`lowbit.evaluate_tasks`: reference and quantized on the same items, one model in memory at a time.

A model that does not fit is run block by block (`models.BlockwiseModel`); one that a server has is asked over it.

Refused: items longer than the model's context, unknown tasks, a chat template for the packaged items.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import CheckpointError, UsageError, did_you_mean
from lowbit.evaluation.footprint import fingerprint, read_report, state_of_files
from lowbit.evaluation.memory import choose_way
from lowbit.evaluation.opening import Opened, Opener, open_reference
from lowbit.evaluation.perplexity import Activations, Context, variants_of
from lowbit.measure import Meter
from lowbit.tasks import harness, humaneval
from lowbit.tasks.answering import Answerer, answers
from lowbit.tasks.items import CATEGORIES, Item, packaged_items
from lowbit.tasks.lm import language_model
from lowbit.tasks.models import BATCH, BlockwiseModel, WholeModel
from lowbit.tasks.result import TaskResult, rows_of
from lowbit.tasks.server import ServedModel

Progress = Callable[[int, int], None]
Outcomes = dict[tuple[str, str, str], bool]  # (category, filter of lm-eval, item) → right


@dataclass(frozen=True)
class _Suite:
    """What is asked.

    items    of the packaged categories and of HumanEval
    others   tasks of lm-eval
    limit    items of each task, None for all
    chat     lm-eval's tasks go through the chat template
    """

    title: str
    items: tuple[Item, ...]
    others: tuple[str, ...]
    seed: int
    limit: int | None
    chat: bool

    def of(self, answerer: Answerer, opened: Opened, done: Callable[[int], None]) -> Outcomes:
        """What one model makes of every item."""
        right = answers(answerer, self.items, done)
        numbers = dict.fromkeys((item.category for item in self.items), 0)
        found: Outcomes = {}
        for item, each in zip(self.items, right, strict=True):
            found[item.category, "", str(numbers[item.category])] = each
            numbers[item.category] += 1
        if self.others:
            judged = self._language_model(answerer, opened, done)
            found |= harness.outcomes(judged, self.others, self.limit, self.chat)
        return found

    def _language_model(self, answerer: Answerer, opened: Opened, done: Callable[[int], None]) -> Any:
        if self.chat and not getattr(opened.tokenizer, "chat_template", None):
            raise CheckpointError(f"{opened.checkpoint.source} has no chat template", "leave --chat-template out")
        if isinstance(answerer, WholeModel):
            return harness.whole_model(opened.model, opened.tokenizer, BATCH)
        return language_model(answerer, opened.model, lambda count: done(len(self.items) + count))


def evaluate_tasks(
    quantized: str | Path,
    reference: str | Path | None = None,
    tasks: Sequence[str] = ("all",),
    *,
    url: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat_template: bool = False,
    activations: Activations = "auto",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int | None = None,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Accuracy of a checkpoint beside its reference's, item by item.

    reference      the unquantized model; by default the source that the checkpoint's report names
    tasks          "all" packaged ones, some of arithmetic, facts, format, code, languages; humaneval; tasks of lm-eval
    url            of a running server that serves `quantized`, which is asked instead of loading it
    limit          items of each category or task; None: all
    seed           of the packaged items
    chat_template  lm-eval's tasks go through the model's chat template
    activations    "auto": simulated as the engine would where the scheme quantizes them; "none": weights alone
    max_memory     as in `evaluate`: a model that does not fit is run block by block, with a note
    progress       called with (items done, items in all), both models together; lm-eval's items are not counted

    UsageError for tasks, a limit or a seed that cannot be, before a model is opened.
    """
    if seed < 0:
        raise UsageError(f"the seed {seed} of the packaged items is below 0", "give one from 0 up")
    meter = Meter()
    options = options or OpenOptions()
    suite = _suite(tasks, limit, seed, chat_template, options.trust_remote_code)
    with contextlib.ExitStack() as stack:
        opener = Opener(stack, dtype, device, options)
        judged = opener.open(quantized)
        source = open_reference(reference, read_report(judged.checkpoint), opener)
        variants = variants_of(judged.checkpoint, activations)
        name, context = list(variants.items())[-1]
        notes = (*judged.checkpoint.notes, *source.notes)
        models = [judged] if source.opened is None else [source.opened, judged]
        found: list[Outcomes] = []
        if url is not None:  # first, since it refuses what is not the same model
            name = "simulated" if len(variants) > 1 else "none"  # by the engine itself
            of = f"{fingerprint(judged.checkpoint)} {state_of_files(judged.checkpoint)}"
            served = ServedModel(url, judged.tokenizer, of)
            served.check_tokens()
            with served.keeping_answers():
                found = [suite.of(served, judged, _told(suite, 0, len(models), progress))]
            notes += (f"asked over {served.url}, model {served.name!r}",)
            notes += (f"{served.earlier} answers are from a run that was stopped",) if served.earlier else ()
        if source.opened is not None:
            told = _told(suite, len(found), len(models), progress)
            outcomes, more = _asked(suite, source.opened, contextlib.nullcontext, told, max_memory, options)
            found.insert(0, outcomes)
            notes += tuple(f"reference: {note}" for note in more)
        if url is None:
            told = _told(suite, len(found), len(models), progress)
            outcomes, more = _asked(suite, judged, context, told, max_memory, options)
            found.append(outcomes)
            notes += more
        named = None if source.opened is None else source.opened.checkpoint.source
    keys = list(found[-1])
    if len(found) > 1 and found[0].keys() != found[1].keys():
        raise UsageError("the two models were asked different items", "is the reference the model that was quantized?")
    return TaskResult(
        suite=suite.title, model=str(quantized), reference=named,
        rows=rows_of([key[:2] for key in keys], [found[-1][key] for key in keys],
                     [found[0][key] for key in keys] if len(found) > 1 else None),
        seed=seed, dtype=str(dtype).removeprefix("torch."), activations=name, seconds=meter.seconds, notes=notes,
    )  # fmt: skip


def _told(suite: _Suite, place: int, models: int, progress: Progress | None) -> Callable[[int], None]:
    """What tells `progress` of the items of one of several models; questions of lm-eval come on top."""
    count = len(suite.items)
    if progress is None or not count:
        return lambda done: None
    return lambda done: progress(place * count + min(done, count), models * count)


def _asked(
    suite: _Suite, opened: Opened, context: Context, told: Callable[[int], None], max_memory: int | None,
    options: OpenOptions,
) -> tuple[Outcomes, tuple[str, ...]]:  # fmt: skip
    """(what the model makes of the items, notes on how it was run); the model is empty after it."""
    way = choose_way([opened.loader], 1, max_memory)
    try:
        if way.block_by_block:
            answerer = BlockwiseModel(opened, context, options, way.states_memory)
            return suite.of(answerer, opened, told), way.notes
        opened.loader.fill()
        with context(opened.model):
            return suite.of(WholeModel(opened.model, opened.tokenizer), opened, told), way.notes
    finally:
        opened.model.to_empty(device="meta")
        gc.collect()


def _suite(tasks: Sequence[str], limit: int | None, seed: int, chat: bool, trust_remote_code: bool) -> _Suite:
    names = tuple(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not names:
        raise UsageError("no task was named", f"--tasks all, or some of {', '.join(CATEGORIES)}")
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} items of each task say nothing", "give 1 or more")
    packaged = CATEGORIES if "all" in names else tuple(name for name in CATEGORIES if name in names)
    others = tuple(name for name in names if name not in (*CATEGORIES, "all", humaneval.NAME))
    if chat and not others:
        raise UsageError("the packaged tasks and HumanEval are asked without a chat template",
                         "leave --chat-template out, or name tasks of lm-eval")  # fmt: skip
    hint = did_you_mean(others[0], (*CATEGORIES, humaneval.NAME)) if others else ""
    if hint and len(names) == 1:
        raise UsageError(f"there is no task {others[0]!r}", hint)
    titles = ["packaged"] if packaged else []
    items = _first(packaged_items(seed, packaged), limit)
    if humaneval.NAME in names:
        items += humaneval.humaneval_items()[:limit]
        titles.append(humaneval.suite_name())
    if others:
        titles.append(harness.check_tasks(others, trust_remote_code))
    return _Suite(" + ".join(titles), tuple(items), harness.spelled(others), seed, limit, chat)


def _first(items: list[Item], limit: int | None) -> list[Item]:
    """The first `limit` of each category."""
    seen = dict.fromkeys((item.category for item in items), 0)
    kept = []
    for item in items:
        seen[item.category] += 1
        if limit is None or seen[item.category] <= limit:
            kept.append(item)
    return kept
