"""A running server in place of a model: items and lm-eval's tasks over OpenAI's completions, with log-probabilities.

    rows      go as token ids, and their log-probabilities come back: `echo` (vLLM, SGLang); a server without it
              (llama.cpp) is asked token by token: a bias makes it choose the token that is to be scored, and what it
              tells is the log-probability that this token had before the bias
    greedy    the token is as probable as the first of `top_logprobs`; unknown where a server gives none
    text      is written as text, the most probable tokens

Answers are kept as they come (`kept_answers`), so a run that a dying server stopped goes on where it was.

Refused: a server that makes other tokens of a text than the model's tokenizer (UsageError), or that cannot be asked, or
answers what is no log-probability (EngineFailure).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import EngineFailure, UsageError
from lowbit.tasks.answering import Progress, Row, Score, until
from lowbit.tasks.endpoint import Endpoint
from lowbit.tasks.items import packaged_items
from lowbit.tasks.kept import kept, kept_file, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMPARED = 12  # texts whose tokens are compared
_STOPS = 4  # OpenAI's limit; what is written behind another one is cut here
_CUT = "\ufffd"  # what a part of a character is decoded to
_MOST_PROBABLE, _ALL = 1000, 1 << 20  # tokens that are asked for: at first, and no vocabulary has more
_ABOVE_ZERO = 1e-3  # log-probabilities are at most 0, but for their rounding


class ServedModel:
    """A model behind `url`, asked with the tokens of `tokenizer`. of  tells it from others served there before

    earlier  how many of its answers are from a run that was stopped
    """

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, of: str = ""):
        self._endpoint = Endpoint(url)
        self.url, self.name, self.of = self._endpoint.url, self._endpoint.name, of
        self.tokenizer = tokenizer
        self.earlier = 0
        self._echo: bool | None = None
        self._known: dict[str, Any] = {}
        self._before: frozenset[str] = frozenset()
        self._add = self._known.__setitem__

    @contextmanager
    def keeping_answers(self) -> Iterator[None]:
        """Inside, answers are kept on disk as they come, and those of a run that was stopped are taken over."""
        path = kept_answers(self)
        with kept(path) as (self._known, self._add):
            self._before, self.earlier = frozenset(self._known), 0
            yield
        path.unlink(missing_ok=True)  # whole: the next run asks again

    def check_tokens(self, texts: Sequence[str] = ()) -> None:
        """UsageError where the server makes other tokens of a text, or as many others as can be told.

        texts  by default prompts of the packaged items
        """
        texts = texts or [item.prompt for item in packaged_items()]
        for text in texts[:: max(1, len(texts) // _COMPARED)]:
            ours = list(self.tokenizer(text)["input_ids"])
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

    def scored(self, rows: Sequence[Row], progress: Progress = lambda done: None) -> list[Score]:
        found = []
        for ids, start in rows:
            key = key_of("scored", repr(ids), str(start))
            if not self._has(key, _is_score):
                self._add(key, list(self._score(ids, start)))
            found.append(Score(*self._known[key]))
            progress(len(found))
        return found

    def written(
        self, prompts: Sequence[list[int]], stops: Sequence[str], tokens: int, progress: Progress = lambda done: None
    ) -> list[str]:
        found = []
        for ids in prompts:
            key = key_of("written", repr(ids), str(tokens), *stops)
            if not self._has(key, lambda value: isinstance(value, str)):
                text = self._complete(ids, tokens, stop=list(stops[:_STOPS]))["choices"][0].get("text", "")
                if not isinstance(text, str):
                    raise self._no_protocol(f"a {type(text).__name__} where the words are due")
                self._add(key, until(text, stops))
            found.append(self._known[key])
            progress(len(found))
        return found

    def _has(self, key: str, sound: Callable[[Any], bool]) -> bool:
        if key not in self._known or not sound(self._known[key]):
            return False
        self.earlier += key in self._before
        return True

    def _score(self, ids: list[int], start: int) -> Score:
        if self._echo is not False:
            choice = self._complete(ids, 1, echo=True, logprobs=1)["choices"][0]
            values = _of_tokens(choice, "token_logprobs")
            self._echo = values is not None and len(values) >= len(ids)
            if self._echo and values is not None:
                scored = [self._checked(value) for value in values[start : len(ids)]]
                tops = (_of_tokens(choice, "top_logprobs") or [])[start : len(ids)]
                return Score(sum(scored), _are_first(scored, tops))
        each = [self._of_next(ids[:place], ids[place]) for place in range(start, len(ids))]
        known = [first for _, first in each]
        return Score(sum(value for value, _ in each), None if None in known else all(known))

    def _of_next(self, before: list[int], token: int) -> tuple[float, bool | None]:
        """(log-probability of the token, whether it is the most probable one)."""
        told = self._told_of(before, token, 1)
        if told is None and _CUT in str(self.tokenizer.decode([token])):
            return self._of_part(before, token)
        if told is None:
            raise self._no_log_probabilities()
        try:
            return self._checked(told["logprob"]), int(told["top_logprobs"][0]["id"]) == token
        except (LookupError, TypeError, ValueError, OverflowError):
            return self._checked(told.get("logprob")), None

    def _of_part(self, before: list[int], token: int) -> tuple[float, bool]:
        """The same for a token that ends inside a character, of which llama.cpp tells nothing: another one is chosen,
        and this one is looked for among the most probable."""
        whole = next(each for each in range(len(self.tokenizer)) if str(self.tokenizer.decode([each])).isalnum())
        for count in (_MOST_PROBABLE, _ALL):
            told = self._told_of(before, whole, count)
            tops = told.get("top_logprobs") if told is not None else None
            for place, each in enumerate(tops if isinstance(tops, list) else []):
                if isinstance(each, dict) and each.get("id") == token:
                    return self._checked(each.get("logprob")), place == 0
        raise self._no_log_probabilities()

    def _told_of(self, before: list[int], token: int, tops: int) -> dict[str, Any] | None:
        """What it tells of a token that a bias makes it choose, with so many of the most probable ones; or nothing."""
        answer = self._complete(before, 1, logprobs=tops, logit_bias={str(token): 100})
        try:
            told = answer["choices"][0]["logprobs"]["content"][0]
            chosen = int(told["id"])
        except (LookupError, TypeError, ValueError, OverflowError):
            return None
        if chosen != token:
            raise EngineFailure(f"{self.url} chose token {chosen} although a bias of 100 was on {token}",
                                "it has neither echo nor logit_bias, of which one is needed")  # fmt: skip
        return told

    def _no_log_probabilities(self) -> EngineFailure:
        return EngineFailure(f"{self.url} gives no log-probabilities of its tokens",
                             "vLLM, SGLang and llama.cpp do, over /v1/completions")  # fmt: skip

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


def _of_tokens(choice: dict[str, Any], name: str) -> list[Any] | None:
    logprobs = choice.get("logprobs")
    values = logprobs.get(name) if isinstance(logprobs, dict) else None
    return values if isinstance(values, list) else None


def _are_first(values: list[float], tops: list[Any]) -> bool | None:
    """Whether each token is as probable as the first of those told for its place; None where none are told."""
    try:
        return all(value >= max(top.values()) for value, top in zip(values, tops, strict=True))
    except (AttributeError, TypeError, ValueError):
        return None


def _is_score(value: Any) -> bool:
    """Whether a kept answer is a score."""
    if not isinstance(value, list) or len(value) != 2 or not (value[1] is None or isinstance(value[1], bool)):
        return False
    return isinstance(value[0], float) and -math.inf < value[0] < 1


def kept_answers(served: ServedModel) -> Path:
    """Where the answers of an unfinished run lie."""
    return kept_file("tasks", key_of(f"{served.url} {served.name} {served.of}"))
