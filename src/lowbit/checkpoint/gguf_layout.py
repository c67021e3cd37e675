"""How llama.cpp's converter arranges the rows of a tensor, and back.

Rows of the Hugging Face tensor and rows of the GGUF tensor, for `rows` rows that belong to `heads` heads; h, p and q
count halves (2), pairs, and the parts q, k, v (3):

    ROTARY      the two halves of a rotary pair become neighbours, within a head of d = rows / heads rows
                Hugging Face  head·d + h·d/2 + p            GGUF  head·d + 2p + h
    QKV         q, k and v, interleaved head by head, become three matrices; d = rows / heads / 3
                Hugging Face  head·3d + q·d + i             GGUF  q·heads·d + head·d + i
    TRANSPOSED  Conv1D of GPT-2: [K, N] in Hugging Face, [N, K] in GGUF
    PLUS_ONE    norms of Gemma: w in Hugging Face, w + 1 in GGUF
    ONE_ROW     one row of weights: [1, K] in Hugging Face, [1, K] or [K] in GGUF
    SAME        nothing changes

Both orders keep rows of one head close together: d consecutive GGUF rows of a head lie within d consecutive Hugging
Face rows, which is what bounds the memory of reading a slab.
"""

from __future__ import annotations

from enum import Enum

import numpy as np


class Layout(Enum):
    """See the module's docstring."""

    SAME = "same"
    ROTARY = "rotary pairs"
    QKV = "q, k and v by head"
    TRANSPOSED = "transposed"
    PLUS_ONE = "plus one"
    ONE_ROW = "one row"

    @property
    def reorders(self) -> bool:
        return self in _ROWS_PER_HEAD


_ROWS_PER_HEAD = {Layout.ROTARY: 1, Layout.QKV: 3}


def head_dim(layout: Layout, rows: int, heads: int) -> int | None:
    """Rows of one head (of q, k or v) in a tensor of `rows` rows; None where they do not divide evenly."""
    parts = _ROWS_PER_HEAD[layout] * heads
    if heads < 1 or rows % parts or (layout is Layout.ROTARY and rows // parts % 2):
        return None
    return rows // parts


def stored_rows(layout: Layout, hf_rows: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """Hugging Face rows, int64 [n] → the GGUF rows that hold them, int64 [n]. dim  rows of a head, from `head_dim`."""
    if layout is Layout.ROTARY:
        head, row = np.divmod(hf_rows, dim)
        half, pair = np.divmod(row, dim // 2)
        return head * dim + 2 * pair + half
    head, row = np.divmod(hf_rows, 3 * dim)
    part, row = np.divmod(row, dim)
    return (part * heads + head) * dim + row


def hf_rows(layout: Layout, stored: np.ndarray, heads: int, dim: int) -> np.ndarray:
    """GGUF rows, int64 [n] → the Hugging Face rows that they hold, int64 [n]; the inverse of `stored_rows`."""
    if layout is Layout.ROTARY:
        head, row = np.divmod(stored, dim)
        pair, half = np.divmod(row, 2)
        return head * dim + half * (dim // 2) + pair
    part, row = np.divmod(stored, heads * dim)
    head, row = np.divmod(row, dim)
    return (head * 3 + part) * dim + row
