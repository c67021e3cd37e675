"""Answers to items: which choice a model finds most likely, or what it writes.

    likelihood  Σ log p(token | what is before it) over the tokens of a choice, ÷ its bytes in UTF-8
    right       the first choice has the highest; ties go to a wrong one, so that a broken model is not credited

A choice's tokens are those of prompt + choice behind what the prompt alone has in common with it, so that a tokenizer
may merge across the seam. Written answers are the most probable tokens, cut where a function ends.

Who answers is an `Answerer`: a model in memory or block by block (`models.py`), or a server (`server.py`).

Refused: likelihoods that are NaN (NonFiniteError).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lowbit.errors import NonFiniteError, UsageError
from lowbit.tasks.items import Item
from lowbit.tasks.sandbox import run_cases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where a function that a model writes has ended.
ENDS = ("\ndef ", "\nclass ", "\n#", "\nprint", "\nif ", "\nassert", "\n```", "\n\n\n", '\n"""')
Row = tuple[list[int], int]  # token ids, and where the part begins that is scored
Progress = Callable[[int], None]


class Score(NamedTuple):
    """total: Σ log p of the scored tokens; greedy: each is the most probable one, None where that is not known."""

    total: float
    greedy: bool | None


class Answerer(Protocol):
    """Whatever scores tokens and writes them; progress is told how many rows or prompts are done."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def scored(self, rows: Sequence[Row], progress: Progress) -> list[Score]: ...

    def written(
        self, prompts: Sequence[list[int]], stops: Sequence[str], tokens: int, progress: Progress
    ) -> list[str]: ...


def answers(answerer: Answerer, items: Sequence[Item], progress: Progress = lambda done: None) -> list[bool]:
    """Whether each item is answered rightly. progress  called with the number of items that are done."""
    chosen = [item for item in items if item.choices]
    right: dict[int, bool] = {}
    for item, scores in zip(chosen, likelihoods(answerer, chosen, progress), strict=True):
        right[id(item)] = scores[0] > max(scores[1:])
    done = len(chosen)
    for length in dict.fromkeys(item.tokens for item in items if not item.choices):
        asked = [item for item in items if not item.choices and item.tokens == length]
        prompts = [list(answerer.tokenizer(item.prompt)["input_ids"]) for item in asked]
        for item, text in zip(asked, answerer.written(prompts, ENDS, length, _behind(progress, done)), strict=True):
            right[id(item)], _ = run_cases(item.prompt + text + item.test, item.cases)
        done += len(asked)
    return [right[id(item)] for item in items]


def likelihoods(answerer: Answerer, items: Sequence[Item], progress: Progress = lambda done: None) -> list[list[float]]:
    """Log-likelihood per byte of every choice of every item."""
    rows = [choice_tokens(answerer.tokenizer, item.prompt, choice) for item in items for choice in item.choices]
    per_item = max((len(item.choices) for item in items), default=1)
    sums = answerer.scored(rows, lambda done: progress(done // per_item))
    if not all(each.total == each.total for each in sums):
        raise NonFiniteError("the model's likelihoods are NaN", "lowbit evaluate without --tasks says where they begin")
    remaining: Iterator[Score] = iter(sums)
    return [[next(remaining).total / len(choice.encode()) for choice in item.choices] for item in items]


def choice_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str) -> Row:
    """(tokens of prompt and choice, where the choice begins)."""
    whole = list(tokenizer(prompt + choice)["input_ids"])
    before = list(tokenizer(prompt)["input_ids"])
    start = next(
        (i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), min(len(whole), len(before))
    )
    if not 0 < start < len(whole):
        raise UsageError(f"the tokenizer makes no tokens of {choice!r}, or none before it",
                         "is it the tokenizer of this model?")  # fmt: skip
    return whole, start


def until(text: str, stops: Sequence[str]) -> str:
    """What is written, up to the first of the stops."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def _behind(progress: Progress, before: int) -> Progress:
    return lambda done: progress(before + done)
