"""`RowLayout`: how a stored tensor is arranged, with respect to the Hugging Face tensor that it is made of.

Layouts are llama.cpp's (conversion/*.py). A layout serves both directions. `rows` says it once: which row of the
source each stored row holds; reading a file back inverts that array.

    SAME        nothing changes
    rotary      the two halves of a rotary pair become neighbours, within a head of d rows; h and p count halves, pairs
                source  head·d + h·d/2 + p              stored  head·d + 2p + h
    halves      the other way around, where a model pairs neighbours and llama.cpp only halves
    QKV         q, k and v, interleaved head by head, become three matrices of d rows a head; part counts q, k, v
                source  head·3d + part·d + i            stored  part·heads·d + head·d + i
    TRANSPOSED  Conv1D of GPT-2: [K, N] in Hugging Face, [N, K] in GGUF
    PLUS_ONE    norms of Gemma: w in Hugging Face, w + 1 in GGUF
    NEG_EXP     decay of state spaces: log a in Hugging Face, -a in GGUF
    ONE_ROW     one row of weights: [1, K] in Hugging Face, [1, K] or [K] in GGUF
    PER_HEAD    a norm for each head: [heads, d] in both

A memory of one slab is enough: the source rows of a slab are read as few contiguous runs, then put in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Key of config.json → value; None where it has none.
Lookup = Callable[[str], Any]
Shape = tuple[int, ...]
# (look-up, rows of the source) → the source row of each stored row, int64 [stored rows]. ValueError says what is wrong.
Rows = Callable[[Lookup, int], np.ndarray]
# (look-up, rows of the stored tensor) → what multiplies them, one number or float32 [stored rows].
Factors = Callable[[Lookup, int], float | np.ndarray]


@dataclass(frozen=True)
class RowLayout:
    """One arrangement; without any field, the same one. Applied in the order of the fields.

    name        of the arrangement
    transposed  matrices only
    rows        rows of the stored tensor, all of the source's or a part of them
    columns     the same of columns; rows packed in blocks cannot follow, so such a tensor is never calibrated
    heads       look-up → (heads, rows of a head, first, last): rows first..last of every head, transposed: from
                [heads · rows, K] to [heads, K, last - first] (the absorbed keys of latent attention)
    values      float32 → float32, elementwise, and its inverse `undo`
    factors     multipliers of config.json that the stored rows have in them (Falcon-H1)
    shape       (look-up, shape so far) → the stored shape, the numbers in the same order; `unshape` is its inverse
    """

    name: str = "same"
    transposed: bool = False
    rows: Rows | None = None
    columns: Rows | None = None
    heads: Callable[[Lookup], tuple[int, int, int, int]] | None = None
    values: Callable[[Tensor], Tensor] | None = None
    undo: Callable[[Tensor], Tensor] | None = None
    factors: Factors | None = None
    shape: Callable[[Lookup, Shape], Shape] | None = None
    unshape: Callable[[Lookup, Shape], Shape] | None = None

    def arranged(self, get: Lookup, shape: Shape) -> Arranged:
        """This layout of a source of one shape; ValueError where they do not fit."""
        stored = source = shape[::-1] if self.transposed and len(shape) == 2 else shape
        rows = None if self.rows is None else self.rows(get, stored[0])
        stored = stored if rows is None else (len(rows), *stored[1:])
        columns = None if self.columns is None or len(stored) < 2 else self.columns(get, stored[-1])
        heads = None
        if self.heads is not None:
            heads = count, size, first, last = self.heads(get)
            if len(stored) != 2 or stored[0] != count * size:
                raise ValueError(f"{list(shape)} is not {count} heads of {size} rows")
            stored = (count, stored[1], last - first)
        factors = None if self.factors is None else self._multipliers(self.factors, get, stored)
        stored = stored if self.shape is None else self.shape(get, stored)
        return Arranged(self, source, stored, rows, columns, heads, factors)

    @staticmethod
    def _multipliers(factors: Factors, get: Lookup, stored: Shape) -> np.ndarray | None:
        found = np.broadcast_to(np.asarray(factors(get, stored[0]), np.float32), stored[:1])
        return None if (found == 1).all() else found


@dataclass(frozen=True)
class Arranged:
    """A layout of one tensor.

    source, stored  shapes; of a transposed source, the shape after that
    rows, columns   int64, the source row of each stored row; None: the same
    factors         float32 [stored rows], of a matrix; None: all are 1
    """

    layout: RowLayout
    source: Shape
    stored: Shape
    rows: np.ndarray | None
    columns: np.ndarray | None
    heads: tuple[int, int, int, int] | None
    factors: np.ndarray | None = None

    @property
    def is_changed(self) -> bool:
        """True where the stored values are a function of the source's."""
        return self.layout.values is not None or self.factors is not None

    @property
    def is_plain(self) -> bool:
        """True where row n of one is row n of the other."""
        return self.rows is None and self.columns is None and self.heads is None and not self.is_changed

    @property
    def keeps_rows(self) -> bool:
        """True where the stored rows are the source's, all of them, as a linear applies them: packed rows can move."""
        whole = self.rows is None or len(self.rows) == self.source[0]
        return whole and self.columns is None and self.heads is None and not self.is_changed

    @property
    def _is_vector(self) -> bool:
        """True for [n], and for numbers in a row of several dimensions: [1, 1, n, 1]."""
        deep = len(self.source) > 2 and self.source[0] == 1
        return len(self.source) < 2 or (deep and math.prod(self.source) == max(self.source))

    def stored_rows(self, read: Callable[[int, int], Tensor], first: int, last: int) -> Tensor:
        """Rows first..last of the stored tensor seen as [rows, K]; `read` gives source rows, [n, …] or [n]."""
        columns = self.stored[-1] if self.stored else 1
        if self._is_vector:  # small: whole
            values = read(0, self.source[0] if self.source else 1).reshape(-1)
            values = values if self.rows is None else values[torch.from_numpy(self.rows)]
            return self._valued(values).reshape(-1, columns)[first:last]
        if self.heads is not None:
            return torch.cat([self._valued(part) for part in self._transposed_heads(read, first, last)])
        if self.rows is None:
            values = read(first, last)
        else:
            values = gather(read, self.rows[first:last])
        values = values.reshape(last - first, -1)
        values = values if self.columns is None else values[:, torch.from_numpy(self.columns)]
        if self.factors is not None:
            values = values.float() * torch.tensor(self.factors[first:last])[:, None]
        return self._valued(values)

    def _valued(self, values: Tensor) -> Tensor:
        return values if self.layout.values is None else self.layout.values(values.float())

    def _transposed_heads(self, read: Callable[[int, int], Tensor], first: int, last: int) -> list[Tensor]:
        assert self.heads is not None
        _, size, start, stop = self.heads
        width, parts = self.source[1], []
        for head in range(first // width, -(-last // width)):
            part = read(head * size + start, head * size + stop).t()
            parts.append(part[max(first - head * width, 0) : last - head * width])
        return parts

    def source_rows(self, decode: Callable[[np.ndarray], Tensor], wanted: slice) -> tuple[np.ndarray, Tensor]:
        """(which of the source rows start..stop this stored tensor holds, int64 [n]; their values [n, …]).

        decode  stored rows, int64 [n] → [n, K], of the stored tensor seen as [rows, K]
        """
        start, stop = wanted.start, wanted.stop
        if self._is_vector:
            count = int(np.prod(self.stored[:-1], dtype=np.int64)) if len(self.stored) > 1 else 1
            values = self._undone(decode(np.arange(count)).reshape(-1))
            if len(self.source) > 1:
                return np.arange(start, stop), values.reshape(self.source)[start:stop]
            rows = np.arange(len(values)) if self.rows is None else self.rows
            chosen = np.flatnonzero((rows >= start) & (rows < stop))
            return rows[chosen], values[torch.from_numpy(chosen)]
        if self.heads is not None:
            return self._heads_back(decode, start, stop)
        if self.rows is None:
            rows = places = np.arange(start, stop)
        else:
            places = np.flatnonzero((self.rows >= start) & (self.rows < stop))
            rows = self.rows[places]
        values = self._undone(decode(places))
        if self.factors is not None:
            values = values / torch.tensor(self.factors[places])[:, None]
        if self.columns is not None:
            values = values[:, torch.from_numpy(np.argsort(self.columns))]
        return rows, values.reshape(len(rows), *self.source[1:])

    def _undone(self, values: Tensor) -> Tensor:
        return values if self.layout.undo is None else self.layout.undo(values.float())

    def _heads_back(self, decode: Callable[[np.ndarray], Tensor], start: int, stop: int) -> tuple[np.ndarray, Tensor]:
        assert self.heads is not None
        _, size, first, last = self.heads
        width, rows, parts = self.source[1], [], []
        for head in range(start // size, -(-stop // size)):
            begin, end = max(start, head * size + first), min(stop, head * size + last)
            if begin >= end:
                continue
            whole = decode(np.arange(head * width, (head + 1) * width)).t()  # [last - first, K]
            offset = head * size + first
            parts.append(self._undone(whole[begin - offset : end - offset]))
            rows.append(np.arange(begin, end))
        if not parts:
            return np.zeros(0, np.int64), torch.empty((0, width))
        return np.concatenate(rows), torch.cat(parts)


def gather(read: Callable[[int, int], Tensor], rows: np.ndarray) -> Tensor:
    """Rows of these numbers, in their order; `read` is called once for each contiguous run of them."""
    ordered, places = np.unique(rows, return_inverse=True)
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    runs = np.split(ordered, breaks) if len(ordered) else []
    parts = [read(int(run[0]), int(run[-1]) + 1) for run in runs]
    if not parts:
        return read(0, 0)
    return torch.cat(parts)[torch.from_numpy(places)]


# --- the arrangements -----------------------------------------------------------------------------------------------


def heads_of(get: Lookup, key: str) -> int:
    """A number of heads; that of the queries where config.json leaves the one for keys out."""
    heads = get(key) or get("num_attention_heads")
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{key} is {str(heads)[:40]}")
    return heads


def rotary_rows(count: int, heads: int) -> np.ndarray:
    """The source row of each stored row of rotary pairs, int64 [count]."""
    if count % (2 * heads):
        raise ValueError(f"{count} rows are not {heads} heads of rotary pairs")
    return np.arange(count).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)


def rotary(key: str) -> RowLayout:
    """Rotary pairs; `key` of config.json counts the heads."""

    def rows(get: Lookup, count: int) -> np.ndarray:
        return rotary_rows(count, heads_of(get, key))

    return RowLayout("rotary pairs", rows=rows)


def pairs_to_halves(key: str) -> RowLayout:
    """Neighbours of a rotary pair become halves, within the part of a head that rotates."""

    def rows(get: Lookup, count: int) -> np.ndarray:
        heads = heads_of(get, key)
        if count % (2 * heads):
            raise ValueError(f"{count} rows are not {heads} heads of rotary pairs")
        head = np.arange(count // heads)
        rotated = int(len(head) * (get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)) // 2 * 2
        head[:rotated] = head[:rotated].reshape(-1, 2).T.reshape(-1)
        return (np.arange(heads)[:, None] * len(head) + head).reshape(-1)

    return RowLayout("rotary halves", rows=rows)


def _qkv_rows(get: Lookup, count: int) -> np.ndarray:
    heads = heads_of(get, "num_attention_heads")
    if count % (3 * heads):
        raise ValueError(f"{count} rows are not q, k and v of {heads} heads")
    return np.arange(count).reshape(heads, 3, -1).transpose(1, 0, 2).reshape(-1)


def _log_of_minus(decay: Tensor) -> Tensor:
    """log(-decay), or the next float32 of which -exp is decay again, so that a file comes back with the same bytes."""
    found = above = below = torch.log(-decay)
    for _ in range(3):  # each of log and exp is off by a unit in the last place
        above, below = (
            torch.nextafter(x, torch.full_like(x, end)) for x, end in ((above, math.inf), (below, -math.inf))
        )
        for other in (above, below):
            found = torch.where((-torch.exp(found) != decay) & (-torch.exp(other) == decay), other, found)
    return found


SAME = RowLayout()
ROTARY_Q, ROTARY_K = rotary("num_attention_heads"), rotary("num_key_value_heads")
HALVES_Q, HALVES_K = pairs_to_halves("num_attention_heads"), pairs_to_halves("num_key_value_heads")
QKV = RowLayout("q, k and v by head", rows=_qkv_rows)
TRANSPOSED = RowLayout("transposed", transposed=True)
PLUS_ONE = RowLayout("plus one", values=lambda w: w + 1, undo=lambda w: w - 1)
NEG_EXP = RowLayout("minus exp", values=lambda w: -torch.exp(w), undo=_log_of_minus)
ONE_ROW = RowLayout("one row")
PER_HEAD = RowLayout("a norm for each head", shape=lambda get, shape: shape)
