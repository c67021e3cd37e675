"""A text that says nothing: one token again and again, or hardly a word.

Statistics of such a text are of rank one, and what is calibrated on it fits nothing else. (A file that was preallocated
and never written is zero bytes.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAME = 0.95  # share of one token at which a text is refused
_FEWEST_WORDS = 0.3  # share of letters and digits below which a note says so
_LOOKED_AT = 4096  # tokens
_FEWEST_TOKENS, _OF_TOKENS = 8, 256  # different ones, below which a note says so; of a text of at least so many


def refuse_degenerate(ids: Tensor, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """CheckpointError where nearly all tokens, int64 [windows, T], are one and the same."""
    tokens, counts = torch.unique(ids, return_counts=True)
    most = int(counts.argmax())
    share = counts[most].item() / ids.numel()
    if ids.numel() >= 32 and share >= _SAME:
        token = int(tokens[most])
        raise CheckpointError(
            f"the text {name!r} is one token again and again: {share:.0%} of its tokens are {token} "
            f"({tokenizer.decode([token])!r})",
            "give a text of the kind that the model will see",
        )


def degenerate_notes(ids: Tensor, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Notes where a text says the same again and again, or has hardly a letter or a digit in it."""
    notes, distinct = [], torch.unique(ids).numel()
    if distinct < _FEWEST_TOKENS and ids.numel() >= _OF_TOKENS:
        notes.append(f"the text {name!r} is made of {distinct} different tokens only: it says the same again and again")
    text = tokenizer.decode(ids.reshape(-1)[:_LOOKED_AT].tolist(), skip_special_tokens=True)
    characters = [character for character in text if not character.isspace()]
    share = sum(character.isalnum() for character in characters) / len(characters) if characters else 0.0
    if share < _FEWEST_WORDS:
        notes.append(f"the text {name!r} has hardly a word in it ({share:.0%} letters and digits)")
    return notes
