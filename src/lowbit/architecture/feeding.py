"""Which rows of a linear feed which columns of the linears behind it.

`Feed.rows` names the arrangement. For `heads` query heads, d = columns / heads and kv key/value heads:

    all          row c → column c                                        up_proj → down_proj, v_proj → o_proj
    values       rows [kv, d]; query heads share a key/value head        v_proj → o_proj
    first_half   [up | gate], last_half [gate | up]                      gate_up_proj → down_proj
    qkv          [q: heads · d | k: kv · d | v: kv · d]                  phi3, gpt2
    qkv_heads    [q d | k d | v d] of each head                          gpt-neox, bloom
    qkv_groups   [q … q | k | v] of each key/value head                  falcon
    kv_heads     [k without position | v d] of each head                 MLA

The shapes decide whether an arrangement is possible; a perturbation decides whether it is true (`perturb`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """What feeds an input with nothing but elementwise factors between.

    module  the norm or linear
    rows    arrangement of a linear's rows; "norm" of a norm
    """

    module: str
    rows: str


@dataclass(frozen=True)
class FedRows:
    """rows  int64 [C]: rows of the feeder; None: row c;  channel  int64 [K]: channel of each column; None: channel k"""

    rows: Tensor | None = None
    channel: Tensor | None = None


def fed_rows(arrangement: str, rows: int, columns: int, heads: int) -> FedRows | None:
    """The rows of a linear [rows, …] that feed `columns` columns; None where the shapes do not fit."""
    return ARRANGEMENTS[arrangement](rows, columns, heads)


def _all(rows: int, columns: int, heads: int) -> FedRows | None:
    return FedRows() if rows == columns else None


def _first_half(rows: int, columns: int, heads: int) -> FedRows | None:
    return FedRows(torch.arange(columns)) if rows == 2 * columns else None


def _last_half(rows: int, columns: int, heads: int) -> FedRows | None:
    return FedRows(torch.arange(columns, rows)) if rows == 2 * columns else None


def _values(rows: int, columns: int, heads: int) -> FedRows | None:
    shared = _shared(rows, columns, heads)
    return None if shared is None or rows == columns else FedRows(None, shared.channel)


def _qkv(rows: int, columns: int, heads: int) -> FedRows | None:
    values = (rows - columns) // 2
    if rows <= columns or (rows - columns) % 2 or _shared(values, columns, heads) is None:
        return None
    return FedRows(torch.arange(rows - values, rows), _channels(heads, columns // heads, values))


def _qkv_heads(rows: int, columns: int, heads: int) -> FedRows | None:
    if rows != 3 * columns or columns % heads:
        return None
    return FedRows(torch.arange(rows).reshape(heads, 3, columns // heads)[:, 2].flatten())


def _qkv_groups(rows: int, columns: int, heads: int) -> FedRows | None:
    values = (rows - columns) // 2
    if rows <= columns or (rows - columns) % 2 or _shared(values, columns, heads) is None:
        return None
    head = columns // heads
    groups = torch.arange(rows).reshape(values // head, -1, head)
    return FedRows(groups[:, -1].flatten(), _channels(heads, head, values))


def _kv_heads(rows: int, columns: int, heads: int) -> FedRows | None:
    if columns % heads or rows % heads or rows <= columns:
        return None
    return FedRows(torch.arange(rows).reshape(heads, -1)[:, -(columns // heads) :].flatten())


ARRANGEMENTS: dict[str, Callable[[int, int, int], FedRows | None]] = {
    "all": _all, "values": _values, "last_half": _last_half, "first_half": _first_half, "qkv": _qkv,
    "qkv_heads": _qkv_heads, "qkv_groups": _qkv_groups, "kv_heads": _kv_heads,
}  # fmt: skip


def _shared(rows: int, columns: int, heads: int) -> FedRows | None:
    """Rows [kv, d] of values, where kv divides the number of heads."""
    if columns % heads or rows <= 0 or rows % (columns // heads) or columns % rows:
        return None
    return FedRows(None, _channels(heads, columns // heads, rows))


def _channels(heads: int, head: int, channels: int) -> Tensor | None:
    """Channel of every column of o_proj: query head h takes its values from key/value head h // (heads / kv)."""
    if channels == heads * head:
        return None
    groups = heads // (channels // head)
    column = torch.arange(heads * head)
    return (column // head // groups) * head + column % head
