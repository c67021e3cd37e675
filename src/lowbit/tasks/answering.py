"""A model's answers to items: which choice it finds most likely, or what it writes.

    likelihood  Σ log p(token | what is before it) over the tokens of a choice, ÷ its bytes in UTF-8
    right       the first choice has the highest; ties go to a wrong one, so that a broken model is not credited

A choice's tokens are those of prompt + choice behind what the prompt alone has in common with it, so that a tokenizer
may merge across the seam. Written answers are the most probable tokens, cut where a function ends.

Refused: likelihoods that are NaN (NonFiniteError).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.errors import NonFiniteError, UsageError
from lowbit.tasks.items import Item
from lowbit.tasks.sandbox import run_cases

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8
WRITTEN = 40  # tokens; every body of the packaged functions is one line
_ENDS = ("\ndef ", "\nclass ", "\n#", "\nprint", "\nif ", "\nassert", "\n```", "\n\n\n", '\n"""')


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    progress: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """Whether each item is answered rightly. progress  called with the number of items that are done."""
    chosen = [item for item in items if item.choices]
    right: dict[int, bool] = {}
    for item, scores in zip(chosen, likelihoods(model, tokenizer, chosen, progress), strict=True):
        right[id(item)] = scores[0] > max(scores[1:])
    for place, item in enumerate(item for item in items if not item.choices):
        right[id(item)], _ = run_cases(item.prompt + written(model, tokenizer, item.prompt), item.cases)
        progress(len(chosen) + place + 1)
    return [right[id(item)] for item in items]


def likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Log-likelihood per byte of every choice of every item."""
    rows = [
        (*choice_tokens(tokenizer, item.prompt, choice), len(choice.encode()))
        for item in items
        for choice in item.choices
    ]
    found: list[float] = []
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        sums = continuation_sums(model, [(ids, start) for ids, start, _ in batch])
        found += [total / size for total, (_, _, size) in zip(sums, batch, strict=True)]
        progress(len(found) // max(1, len(items[0].choices)))
    if not all(value == value for value in found):
        raise NonFiniteError("the model's likelihoods are NaN", "lowbit evaluate without --tasks says where they begin")
    remaining: Iterator[float] = iter(found)
    return [[next(remaining) for _ in item.choices] for item in items]


def choice_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str) -> tuple[list[int], int]:
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


@torch.inference_mode()
def continuation_sums(model: PreTrainedModel, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    """Σ log p of the tokens from `start` on, of each (ids, start); float32 [B]."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(rows):  # padded on the right: a causal model does not see what follows
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    sums = []
    for row, (tokens, start) in enumerate(rows):
        logp = logits[row, start - 1 : len(tokens) - 1].float().log_softmax(-1)
        sums.append(logp.gather(1, ids[row, start : len(tokens), None]).sum().item())
    return sums


@torch.inference_mode()
def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = WRITTEN) -> str:
    """What the model writes behind a prompt, up to the end of the function that it is in."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    made: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None,
        top_k=None, pad_token_id=pad,
    )  # fmt: skip
    text = str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return until_end(text)


def until_end(text: str) -> str:
    """What is written, up to the end of the function."""
    ends = [text.find(end) for end in _ENDS if end in text]
    return text[: min(ends)] if ends else text
