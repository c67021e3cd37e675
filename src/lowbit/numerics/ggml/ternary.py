"""TQ1_0 and TQ2_0: 256 weights of −d, 0 or d, as in BitNet. x = d · (q − 1), q in {0, 1, 2}.

    TQ1_0   uint8 qs[48]; uint8 qh[4]; half d    1.6875 bits per weight
            a byte is ceil(256 / 243 · Σ q · 3^(4−n)), n = 0…4 (0…3 in qh); q n is (uint8(byte · 3^n) · 3) >> 8
            qs[m] holds weights m + 32·n, qs[32 + m] holds 160 + m + 16·n, qh[m] holds 240 + m + 4·n
    TQ2_0   uint8 qs[64]; half d                 2.0625 bits per weight
            bits 2n, 2n + 1 of qs[32·h + m] are the q of weight 128·h + 32·n + m; q = 3 decodes to 2 · d and is not made

The encoder finds the d of least Σ importance · (x − d·(q − 1))². At the optimum q − 1 is not zero for the m largest
|x|, for some m; d is their weighted mean, and the m is the one of largest Σ importance·|x| · mean. So: sort by |x|, try
all 256 m, round d to a half, and round the weights to that d (a tie to zero). Weights −a, 0, a with a a half come back
exactly. An all-zero block gets d = 0; d beyond the halves is 65504; importance that is all zero counts as all alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.ggml.types import LARGEST_HALF, Blocks, GgmlType, per_column

BLOCK = 256

# Bytes of TQ1_0: (first weight, bytes, weights in a byte), in the order of the file
_TQ1_PARTS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """See `lowbit.numerics.ggml.encode`."""
    rows, columns = weight.shape
    x = weight.to(torch.float32).reshape(-1, BLOCK)
    if importance is not None:
        importance = importance.to(torch.float32).expand(rows, columns).reshape(-1, BLOCK)
    d = _scale(x, importance).reshape(rows, -1)
    params = Blocks(weight.new_empty((rows, 0), dtype=torch.uint8), d.to(torch.float32), stored={"d": d})
    return pack(kind, round(kind, x.reshape(rows, columns), params), params.stored)


def unpack(kind: GgmlType, blocks: Tensor) -> Blocks:
    """codes uint8 [N, K], the q; stored: d, half [N, B].

    TQ1_0 has several bytes for the same q; those that no encoder makes come back as the ones encoders make.
    """
    rows = blocks.shape[0]
    each = blocks.reshape(-1, kind.size)
    d = each[:, -2:].contiguous().view(torch.float16).reshape(rows, -1)
    if kind.name == "TQ1_0":
        codes = _codes_of_tq1(each[:, :-2])
    else:
        codes = (each[:, :-2].reshape(-1, 2, 1, 32) >> _tq2_shifts(torch.uint8, blocks)) & 3
    return Blocks(codes.reshape(rows, -1), d.to(torch.float32), stored={"d": d})


def pack(kind: GgmlType, codes: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The inverse of `unpack`: uint8 [N, row bytes]."""
    rows = codes.shape[0]
    codes = codes.reshape(-1, BLOCK).to(torch.int32)
    if kind.name == "TQ1_0":
        packed = _tq1_of_codes(codes)
    else:
        packed = (codes.reshape(-1, 2, 4, 32) << _tq2_shifts(torch.int32, codes)).sum(dim=2).reshape(-1, 64)
    d = stored["d"].reshape(-1, 1).contiguous().view(torch.uint8)
    return torch.cat([packed.to(torch.uint8), d], dim=1).reshape(rows, -1)


def value(kind: GgmlType, codes: Tensor) -> Tensor:
    """q − 1."""
    return codes.to(torch.float32) - 1


def round(kind: GgmlType, weight: Tensor, blocks: Blocks, importance: Tensor | None = None) -> Tensor:
    """The nearest of −d, 0 and d; ties to 0, and 0 where d is 0."""
    d = per_column(blocks.scale, weight.shape[1])
    border = torch.where(d > 0, 0.5 * d, torch.inf)
    x = weight.to(torch.float32)
    return (1 + (x > border).to(torch.uint8) - (x < -border).to(torch.uint8)).to(torch.uint8)


def _scale(x: Tensor, importance: Tensor | None) -> Tensor:
    """d of least weighted squared error, half [B], of blocks [B, 256]. Sums are sequential, in float32.

    Magnitudes and importance are divided by their largest, so that sums and products neither overflow nor vanish.
    """
    largest = x.abs().amax(dim=1)
    largest = torch.where(largest > 0, largest, 1.0)
    magnitude = x.abs() / largest[:, None]
    weights = torch.ones_like(magnitude)
    if importance is not None:
        most = importance.amax(dim=1, keepdim=True)
        weights = torch.where(most > 0, importance / most, 1.0)
    magnitude, weights = _sort(magnitude, weights)
    total, weighted, best, best_gain = torch.zeros((4, x.shape[0]), device=x.device)
    for position in range(BLOCK):
        weighted = weighted + weights[:, position] * magnitude[:, position]
        total = total + weights[:, position]
        mean = weighted / total  # 0 / 0 is NaN, which never compares as better
        gain = weighted * mean
        better = gain > best_gain
        best, best_gain = torch.where(better, mean, best), torch.where(better, gain, best_gain)
    return (best * largest).clamp(max=LARGEST_HALF).to(torch.float16)


def _sort(keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, 256], by falling key: a bitonic network, whose order of equal keys the compiled encoder shares."""
    run = 2
    while run <= BLOCK:
        step = run // 2
        while step:
            ascending = (torch.arange(BLOCK, device=keys.device).reshape(-1, 2, step)[:, 0] & run) != 0
            a, b = keys.reshape(-1, BLOCK // 2 // step, 2, step).unbind(2)
            v, w = weights.reshape(-1, BLOCK // 2 // step, 2, step).unbind(2)
            swap = torch.where(ascending, b < a, a < b)
            keys = torch.stack([torch.where(swap, b, a), torch.where(swap, a, b)], dim=2).reshape(-1, BLOCK)
            weights = torch.stack([torch.where(swap, w, v), torch.where(swap, v, w)], dim=2).reshape(-1, BLOCK)
            step //= 2
        run *= 2
    return keys, weights


def _codes_of_tq1(packed: Tensor) -> Tensor:
    """Bytes [B, 52] → q, uint8 [B, 256]."""
    parts, at = [], 0
    for _, width, digits in _TQ1_PARTS:
        of_part = packed[:, None, at : at + width].to(torch.int32)
        powers = 3 ** torch.arange(digits, dtype=torch.int32, device=packed.device)
        parts.append((((of_part * powers[:, None]) & 0xFF) * 3 >> 8).reshape(len(packed), -1))
        at += width
    return torch.cat(parts, dim=1).to(torch.uint8)


def _tq1_of_codes(codes: Tensor) -> Tensor:
    """q, int32 [B, 256] → bytes [B, 52]."""
    parts = []
    for first, width, digits in _TQ1_PARTS:
        of_part = codes[:, first : first + width * digits].reshape(-1, digits, width)
        powers = 3 ** (4 - torch.arange(digits, dtype=torch.int32, device=codes.device))
        number = (of_part * powers[:, None]).sum(dim=1, dtype=torch.int32)
        parts.append((number * 256 + 242) // 243)
    return torch.cat(parts, dim=1)


def _tq2_shifts(dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.tensor([[0], [2], [4], [6]], dtype=dtype, device=like.device)
