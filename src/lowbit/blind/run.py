"""`compare_blind`: two models answer the same prompts; a page for people, and a judge's verdicts if one is named."""

from __future__ import annotations

import gc
import math
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lowbit.blind.answering import Answers, Generation, answer_all
from lowbit.blind.judge import judge as ask_judge
from lowbit.blind.prompts import BlindPrompt, read_prompts
from lowbit.blind.result import AnswerPair, BlindTest
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import UsageError
from lowbit.tasks.endpoint import Endpoint, is_url

Progress = Callable[[int, int], None]


def compare_blind(
    a: str,
    b: str,
    prompts: Path | None = None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> BlindTest:
    """Answers of two models to the same prompts, each pair in a random order.

    a, b         a folder, a .gguf file, a hub id, or the address of a server (`lowbit.tasks.endpoint`)
    prompts      a file (`lowbit.blind.prompts`); None: the packaged ones
    temperature  0: always the most probable token
    seed         of the order of sides and of sampling; None: the order is drawn anew and sampling has 0
    judge        address of a server that judges each pair, and the model there
    progress     called with (answers and verdicts done, in all)

    Raises LowbitError: nothing that was answered is lost, the same call goes on from it.
    """
    if max_tokens < 1 or not (0 <= temperature < math.inf):
        raise UsageError(f"{max_tokens} tokens at temperature {temperature} cannot be generated")
    if seed is not None and not 0 <= seed < 2**32:
        raise UsageError(f"the seed {seed} has more than 32 bits", "give one from 0 to 4294967295")
    if judge_model is not None and judge is None:
        raise UsageError("--judge-model names a model of --judge, which was not given", "add --judge URL")
    asked, notes = read_prompts(prompts)
    options = options or OpenOptions()
    for each in (a, b):  # now, before an hour of answers
        if is_url(each):
            Endpoint(each)
        else:
            open_checkpoint(each, options).close()
    judging = None if judge is None else Endpoint(judge, judge_model)
    how = Generation(max_tokens, temperature, seed or 0, dtype, device, options)
    total = len(asked) * (2 if judging is None else 3)

    def told(offset: int) -> Callable[[int], None]:
        return lambda count: None if progress is None else progress(offset + count, total)

    first = answer_all(a, asked, how, told(0))
    gc.collect()  # before the other model is loaded: modules hold one another in cycles
    # other draws than the first: with the same ones, similar models would say the same by the luck of the draw
    second = answer_all(b, asked, replace(how, seed=how.seed + len(asked)), told(len(asked)))
    order = secrets.randbelow(2**32) if seed is None else seed
    pairs = in_order(asked, first, second, order)
    notes += dict.fromkeys((*_of_the_pair(first, second), *first.notes, *second.notes))
    # greedy answers of one model on both sides are the same file, which the first side has just filled
    for model, answers in ((a, first), *(((b, second),) if second.kept != first.kept else ())):
        if answers.known:
            notes.append(f"{model}: {answers.known} answers are from a run that was stopped")
    if all(pair.same for pair in pairs):
        notes.append("all answers are the same, word for word: there is nothing to vote on")
    found = BlindTest(a, b, pairs, order, max_tokens, temperature, how.seed, notes=tuple(notes))
    if judging is not None:
        if f"{judging.url} {judging.name}" in (first.identity, second.identity):
            notes.append("the judge is one of the two models, and models prefer their own words")
        judged, forget = ask_judge(pairs, judging, told(2 * len(asked)))
        found = replace(found, judged=judged, notes=(*notes, *judged.notes))
        forget()
    for path in {first.kept, second.kept}:  # whole: the next run asks again
        path.unlink(missing_ok=True)
    return found


def in_order(prompts: Sequence[BlindPrompt], first: Answers, second: Answers, seed: int) -> tuple[AnswerPair, ...]:
    """The pairs; which model stands on the left is drawn for each."""
    draw = random.Random(seed)
    return tuple(
        AnswerPair(prompt.text, prompt.kind, a.text, b.text, "a" if draw.random() < 0.5 else "b")
        for prompt, a, b in zip(prompts, first.answers, second.answers, strict=True)
    )


def _of_the_pair(first: Answers, second: Answers) -> list[str]:
    if first.identity != second.identity:
        return []
    return ["both are the same model, given twice: what is preferred here is chance"]
