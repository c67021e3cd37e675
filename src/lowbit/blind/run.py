"""`compare_blind`: two models answer the same prompts; a page for people, and a judge's verdicts if one is named.

The judge is a model behind OpenAI's chat completions. Each pair is judged twice, with the sides swapped, because
judges prefer a side (Zheng et al. 2023, Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, from where the form of
the verdict is too): [[A]], [[B]] or [[C]] for a tie. A verdict that flips with the side is a tie. A reply with no
verdict, or with several that differ, is counted as unreadable and never guessed at.
"""

from __future__ import annotations

import gc
import math
import random
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit.blind.answering import Answers, Generation, answer_all, trimmed
from lowbit.blind.prompts import BlindPrompt, read_prompts
from lowbit.blind.result import AnswerPair, BlindTest, Judged, Verdict
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import UsageError
from lowbit.tasks.endpoint import Endpoint, is_url
from lowbit.tasks.kept import kept, kept_file, key_of

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


TOKENS = 1024  # of a reply; judges think aloud
SYSTEM = (
    "You compare the answers of two assistants to the same question. Judge which answers it better: correctness first, "
    "then whether it does what was asked, then clarity. Do not let the order of the answers, their length or their "
    "names influence you. Give your reason in one or two sentences. Then end with your verdict, in this form and "
    "nothing after it: [[A]] if assistant A is better, [[B]] if assistant B is better, [[C]] for a tie."
)
_ASKED = "[Question]\n{}\n\n[Answer of assistant A]\n{}\n\n[Answer of assistant B]\n{}\n[End]"
_FORM = re.compile(r"\[\[([ABC])\]\]")


def read_verdict(reply: object) -> str | None:
    """ "A", "B" or "C"; None of a reply that has no verdict, or several that differ."""
    if not isinstance(reply, str):
        return None
    found = set(_FORM.findall(trimmed(reply, False).text))
    return found.pop() if len(found) == 1 else None


def combine(first: str | None, second: str | None) -> Verdict:
    """Of the verdict with a's answer first, and that with b's answer first."""
    if first is None or second is None:
        return "unreadable"
    straight = {"A": "a", "B": "b", "C": "tie"}[first]
    swapped = {"A": "b", "B": "a", "C": "tie"}[second]
    if straight == swapped:
        return straight  # type: ignore[return-value]
    return "half" if "tie" in (straight, swapped) else "flip"


def ask_judge(
    pairs: Sequence[AnswerPair], server: Endpoint, done: Callable[[int], None] = lambda count: None
) -> tuple[Judged, Callable[[], None]]:
    """(the verdicts, how to remove the replies that were kept for a run that is stopped).

    done  called with the number of pairs that are through; pairs of equal answers are not asked
    """
    verdicts: list[Verdict | None] = []
    before = 0
    path = kept_file("blind", f"verdicts-{key_of(f'{server.url} {server.name}')}")
    with kept(path) as (known, add):
        for pair in pairs:
            replies = []
            for first, second in () if pair.same else ((pair.a, pair.b), (pair.b, pair.a)):
                key = key_of(pair.prompt, first, second)
                if key in known and isinstance(known[key], str | None):
                    before += 1
                else:
                    add(key, _reply(server, pair.prompt, first, second))
                replies.append(read_verdict(known[key]))
            verdicts.append(combine(*replies) if replies else None)
            done(len(verdicts))
    notes = (f"{before} replies of the judge are from a run that was stopped",) if before else ()
    return Judged(server.name, server.url, tuple(verdicts), notes), lambda: path.unlink(missing_ok=True)


def _reply(server: Endpoint, prompt: str, first: str, second: str) -> Any:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": _ASKED.format(prompt, first or "(no answer)", second or "(no answer)")},
    ]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0}
    message = server.choice("/v1/chat/completions", body).get("message")
    said = message.get("content") if isinstance(message, dict) else None
    return said if isinstance(said, str) else None
