"""Models that answer here: whole in memory, or one decoder block at a time where they do not fit.

    whole           rows in batches, padded on the right, since a causal model does not see what follows; text by
                    `generate`
    block by block  all rows of like length through each block, then the head at the scored positions; text a token
                    at a time for all prompts together, so that N tokens read the weights N times

Rows that share all but their last token (choices of one token) are run once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.base import OpenOptions
from lowbit.evaluation.blockwise import BlockwiseRuns, Steps, fill_head
from lowbit.evaluation.forward import Runner
from lowbit.tasks.answering import Progress, Row, Score, until

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowbit.evaluation.opening import Opened

BATCH = 8
_LIKE = 2  # rows that are run together: the longest has at most so many times the tokens of the shortest


@dataclass(frozen=True)
class WholeModel:
    """A model with all its weights in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def scored(self, rows: Sequence[Row], progress: Progress = lambda done: None) -> list[Score]:
        found: list[Score] = []
        for begin in range(0, len(rows), BATCH):
            found += continuation_scores(self.model, rows[begin : begin + BATCH])
            progress(len(found))
        return found

    @torch.inference_mode()
    def written(
        self, prompts: Sequence[list[int]], stops: Sequence[str], tokens: int, progress: Progress = lambda done: None
    ) -> list[str]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.model.device)
            pad = self.tokenizer.pad_token_id
            made: Any = self.model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, temperature=None,
                top_p=None, top_k=None, pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            )  # fmt: skip
            text = str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
            found.append(until(text, stops))
            progress(len(found))
        return found


@torch.inference_mode()
def continuation_scores(model: PreTrainedModel, rows: Sequence[Row]) -> list[Score]:
    """Of the tokens from `start` on, of each (ids, start), in one batch."""
    ids, mask = _padded([tokens for tokens, _ in rows])
    logits: Tensor = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return [
        _score(logits[row, start - 1 : len(tokens) - 1].float().log_softmax(-1), tokens[start:])
        for row, (tokens, start) in enumerate(rows)
    ]


def _score(logp: Tensor, tokens: list[int]) -> Score:
    """logp: [len(tokens), V] of the positions before them."""
    wanted = torch.tensor(tokens, device=logp.device)
    total = logp.gather(1, wanted[:, None]).sum().item()
    return Score(total, bool((logp.argmax(-1) == wanted).all()))


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [rows, longest], with zeros on the right."""
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


@dataclass(frozen=True)
class BlockwiseModel:
    """A model of which one decoder block is in memory at a time.

    states_memory  bytes of hidden states that stay in memory; the rest goes to a file
    """

    opened: Opened
    context: Callable[[nn.Module], AbstractContextManager]
    options: OpenOptions
    states_memory: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.opened.tokenizer

    def scored(self, rows: Sequence[Row], progress: Progress = lambda done: None) -> list[Score]:
        inputs = list(dict.fromkeys(tuple(tokens[:-1]) for tokens, _ in rows))
        places = {each: place for place, each in enumerate(inputs)}
        asking: dict[int, list[int]] = {}
        for row, (tokens, _) in enumerate(rows):
            asking.setdefault(places[tuple(tokens[:-1])], []).append(row)
        found: dict[int, Score] = {}

        def keep(place: int, logp: Callable[[range], Tensor]) -> None:
            for row in asking[place]:
                tokens, start = rows[row]
                found[row] = _score(logp(range(start - 1, len(tokens) - 1)), tokens[start:])
            progress(len(found))

        self._run([list(each) for each in inputs], keep)
        return [found[row] for row in range(len(rows))]

    def written(
        self, prompts: Sequence[list[int]], stops: Sequence[str], tokens: int, progress: Progress = lambda done: None
    ) -> list[str]:
        made: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        ends = _end_tokens(self.opened.model, self.tokenizer)
        while unfinished:
            following = self._following([prompts[index] + made[index] for index in unfinished])
            for index, token in zip(unfinished, following, strict=True):
                made[index].append(token)
            texts = {index: self.tokenizer.decode(made[index], skip_special_tokens=True) for index in unfinished}
            unfinished = [index for index, text in texts.items()
                          if len(made[index]) < tokens and made[index][-1] not in ends
                          and not any(stop and stop in text for stop in stops)]  # fmt: skip
            progress(len(prompts) - len(unfinished))
        return [until(str(self.tokenizer.decode(each, skip_special_tokens=True)), stops) for each in made]

    def _following(self, inputs: list[list[int]]) -> list[int]:
        """The most probable token behind each input."""
        found: dict[int, int] = {}

        def keep(place: int, logp: Callable[[range], Tensor]) -> None:
            last = len(inputs[place]) - 1
            found[place] = int(logp(range(last, last + 1)).argmax())

        self._run(inputs, keep)
        return [found[place] for place in range(len(inputs))]

    @torch.inference_mode()
    def _run(self, inputs: list[list[int]], keep: Callable[[int, Callable[[range], Tensor]], None]) -> None:
        """keep(place, log-probabilities at some positions) for every input, those of like length together."""
        for group in _of_like_length(inputs):
            ids, _ = _padded([inputs[place] for place in group])
            steps = Steps(0, None)
            runner: Runner = BlockwiseRuns(ids, self.states_memory, self.options, steps).run(self.opened, self.context)
            fill_head(self.opened)
            for row, place in enumerate(group):
                keep(place, runner.decode(ids, row).log_probabilities)
            self.opened.loader.drop(lambda name: True)


def _of_like_length(inputs: list[list[int]]) -> list[list[int]]:
    """Places of the inputs in groups, the longest first."""
    groups: list[list[int]] = []
    for place in sorted(range(len(inputs)), key=lambda each: -len(inputs[each])):
        if groups and len(inputs[groups[-1][0]]) <= _LIKE * len(inputs[place]):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens behind which `generate` would write no more."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return {each for each in (*ends, tokenizer.eos_token_id) if isinstance(each, int)}
