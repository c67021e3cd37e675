"""A text that says nothing: one token again and again, the same sentence again and again, or hardly a word.

Statistics of such a text are of low rank, and what is calibrated on it fits nothing else. (A file that was preallocated
and never written is zero bytes.)

    entropy   −Σ p log2 p over the tokens, p their shares; a text in single bytes has 4 bits, others 6 to 10
    packed    size after DEFLATE; of prose two fifths, of logs and tables a tenth
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAME = 0.95  # share of one token at which a text is refused
_FEWEST_WORDS = 0.3  # share of letters and digits below which a note says so
_LOOKED_AT = 4096  # tokens
# tokens → bits, below which a note says so: of eight tokens of equal shares, or of three where a text is short, since
# 32 bytes of a table or of digits often have less than three
_LEAST_ENTROPY = {64: 3.0, 32: 1.5}
_LEAST_PACKED = 0.05  # of its size, below which a note says that a text repeats itself
_PACKED_TOKENS = 256  # in a text that is judged by its packed size, of which a part does not shrink


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
    notes, counts = [], torch.unique(ids, return_counts=True)[1].double()
    shares = counts / ids.numel()
    entropy = -float((shares * shares.log2()).sum())
    text = str(tokenizer.decode(ids.reshape(-1)[:_LOOKED_AT].tolist(), skip_special_tokens=True))
    raw = text.encode("utf-8", errors="replace")
    packed = len(zlib.compress(raw)) / max(len(raw), 1)
    least = next((bits for tokens, bits in _LEAST_ENTROPY.items() if ids.numel() >= tokens), 0.0)
    if entropy < least or (ids.numel() >= _PACKED_TOKENS and packed < _LEAST_PACKED):
        notes.append(
            f"the text {name!r} says the same again and again: {len(counts)} different tokens, an entropy of "
            f"{entropy:.1f} bits a token; its first {min(_LOOKED_AT, ids.numel()):,} tokens pack to {packed:.1%} of "
            f"their size"
        )
    characters = [character for character in text if not character.isspace()]
    share = sum(character.isalnum() for character in characters) / len(characters) if characters else 0.0
    if share < _FEWEST_WORDS:
        notes.append(f"the text {name!r} has hardly a word in it ({share:.0%} letters and digits)")
    return notes
