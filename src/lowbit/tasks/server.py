"""A running server in place of a model: the packaged items over OpenAI's completions, with log-probabilities.

    choices   prompt and choice go as token ids, and their log-probabilities come back: `echo` (vLLM, SGLang); a
              server without it (llama.cpp) is asked token by token: a bias makes it choose the token of the choice, and
              what it tells is the log-probability that this token had before the bias
    code      is written as text

Answers are kept as they come (`kept_answers`), so a run that a dying server stopped goes on where it was.

Refused: a server that makes other tokens of a text than the model's tokenizer (UsageError), or that cannot be asked, or
answers what is no log-probability (EngineFailure).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import EngineFailure, UsageError
from lowbit.tasks.answering import WRITTEN, choice_tokens, until_end
from lowbit.tasks.endpoint import Endpoint
from lowbit.tasks.items import Item
from lowbit.tasks.kept import kept, kept_file, key_of
from lowbit.tasks.sandbox import run_cases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMPARED = 12  # texts whose tokens are compared
_ABOVE_ZERO = 1e-3  # log-probabilities are at most 0, but for their rounding


class ServedModel:
    """A model behind `url`, asked with the tokens of `tokenizer`. of  tells it from others served there before"""

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, of: str = ""):
        self._endpoint = Endpoint(url)
        self.url, self.name, self.of = self._endpoint.url, self._endpoint.name, of
        self._tokenizer = tokenizer
        self._echo: bool | None = None

    def check_tokens(self, texts: Sequence[str]) -> None:
        """UsageError where the server makes other tokens of a text, or as many others as can be told."""
        for text in texts[:: max(1, len(texts) // _COMPARED)]:
            ours = list(self._tokenizer(text)["input_ids"])
            body = {
                "model": self.name,
                "prompt": text,
                "content": text,
                "add_special_tokens": True,
                "add_special": True,
            }
            try:
                theirs = self._endpoint.ask("/tokenize", body).get("tokens")
            except EngineFailure:  # no such address: the count still tells most of the differences
                usage = self._complete(text, 1).get("usage")
                theirs = usage.get("prompt_tokens") if isinstance(usage, dict) else None
                ours = len(ours)
            if theirs is None:
                raise self._no_protocol("neither the tokens of a text nor their number")
            if theirs != ours:
                found, needed = str(theirs)[:80], str(ours)[:80]
                raise UsageError(
                    f"{self.url} makes {found} of {text[:40]!r}; the model's tokenizer makes {needed}",
                    "it serves another model, or one with another tokenizer",
                )

    def answer(self, item: Item) -> bool:
        """Whether the server has it right."""
        if not item.choices:
            ids = list(self._tokenizer(item.prompt)["input_ids"])
            text = self._complete(ids, WRITTEN)["choices"][0].get("text", "")
            if not isinstance(text, str):
                raise self._no_protocol(f"a {type(text).__name__} where the words are due")
            return run_cases(item.prompt + until_end(text), item.cases)[0]
        scores = [self._likelihood(item.prompt, choice) / len(choice.encode()) for choice in item.choices]
        return scores[0] > max(scores[1:])

    def _likelihood(self, prompt: str, choice: str) -> float:
        ids, start = choice_tokens(self._tokenizer, prompt, choice)
        if self._echo is not False:
            answer = self._complete(ids, 1, echo=True, logprobs=1)
            values = _token_logprobs(answer)
            self._echo = values is not None and len(values) >= len(ids)
            if self._echo and values is not None:
                return sum(self._checked(value) for value in values[start : len(ids)])
        return sum(self._of_next(ids[:place], ids[place]) for place in range(start, len(ids)))

    def _of_next(self, before: list[int], token: int) -> float:
        answer = self._complete(before, 1, logprobs=1, logit_bias={str(token): 100})
        try:
            told = answer["choices"][0]["logprobs"]["content"][0]
            chosen, value = int(told["id"]), told["logprob"]
        except (LookupError, TypeError, ValueError, OverflowError):
            raise EngineFailure(f"{self.url} gives no log-probabilities of its tokens",
                                "vLLM, SGLang and llama.cpp do, over /v1/completions") from None  # fmt: skip
        if chosen != token:
            raise EngineFailure(f"{self.url} chose token {chosen} although a bias of 100 was on {token}",
                                "it has neither echo nor logit_bias, of which one is needed")  # fmt: skip
        return self._checked(value)

    def _checked(self, value: Any) -> float:
        """A log-probability; EngineFailure for anything else: with it an answer would be right or wrong by chance."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < _ABOVE_ZERO:
            raise self._no_protocol(f"{str(value)[:40]} where the log-probability of a token is due")
        return float(value)

    def _no_protocol(self, what: str) -> EngineFailure:
        return EngineFailure(f"{self.url} answers {what}", "is it OpenAI's completions? lowbit evaluate without --url "
                             "loads the model here")  # fmt: skip

    def _complete(self, prompt: str | list[int], tokens: int, **more: Any) -> dict[str, Any]:
        body = {"model": self.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": True}
        answer = self._endpoint.ask("/v1/completions", body | more)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self._no_protocol(f"no choices: {str(answer)[:200]}")
        return answer


def _token_logprobs(answer: dict[str, Any]) -> list[Any] | None:
    logprobs = answer["choices"][0].get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return values if isinstance(values, list) else None


def served_answers(
    served: ServedModel, items: Sequence[Item], seed: int, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[bool], int]:
    """(whether each item is answered rightly, how many of them a run that was stopped had answered)."""
    served.check_tokens([item.prompt for item in items])
    path, right, before = kept_answers(served, seed), [], 0
    with kept(path) as (known, add):
        for place, item in enumerate(items):
            key = key_of(repr(item))
            if isinstance(known.get(key), bool):
                before += 1
            else:
                add(key, served.answer(item))
            right.append(known[key])
            progress(place + 1)
    path.unlink(missing_ok=True)  # whole: the next run asks again
    return right, before


def kept_answers(served: ServedModel, seed: int) -> Path:
    """Where the answers of an unfinished run lie."""
    return kept_file("tasks", key_of(f"{served.url} {served.name} {served.of} {seed}"))
