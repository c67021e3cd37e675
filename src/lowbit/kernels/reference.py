"""The kernels in torch: the readable specification, which the compiled core must match bit for bit.

    codes = clamp(rint(w / scale) + zero_point, qmin, qmax)       integers, ties to even
    codes = nearest value of w / scale, ties to the even code     minifloats, saturating
    codes = nearest value of w · (1 / scale), ties to the smaller codebooks, as bitsandbytes

Runs on any device and is what runs where there is no compiled core. Signatures and shapes are those of
`lowbit.kernels` and, for rounding with error feedback, of `lowbit.kernels.feedback`: w [N, K] float32, bfloat16 or
float16 (computed in float32), cut along K into groups of g columns, the last of which may be short; scale float32
[N, G] > 0; zero_point int32 [N, G] or None. Codes of NaN or inf weights are undefined; only `group_range` shows them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.kernels.tables import Codebook, MinifloatFormat, ValueTable, steps, values

_LEAST_SCALE = torch.finfo(torch.float32).smallest_normal


def group_range(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest element of each group, float32 [N, G]. A NaN makes both NaN; −0 counts as 0."""
    # Repeating the last column leaves the range of a short group as it is.
    missing = -w.shape[1] % group_size
    padded = torch.cat([w, w[:, -1:].expand(-1, missing)], dim=1) if missing else w
    groups = _grouped(padded.to(torch.float32), group_size)
    return groups.amin(dim=2) + 0.0, groups.amax(dim=2) + 0.0


def round_int(w: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Codes int8 [N, K]."""
    scaled = torch.round(w.to(torch.float32) / _per_column(scale, w, group_size))
    shift = 0 if zero_point is None else _per_column(zero_point, w, group_size)
    return (scaled + shift).clamp(qmin, qmax).to(torch.int8)


def round_minifloat(w: Tensor, group_size: int, scale: Tensor, fmt: MinifloatFormat) -> Tensor:
    """Codes uint8 [N, K]: the bit pattern; the sign survives rounding to zero."""
    scaled = w.to(torch.float32) / _per_column(scale, w, group_size)
    midpoints = _midpoints(fmt).to(w.device)
    magnitude = scaled.abs()
    lower = torch.bucketize(magnitude, midpoints)
    is_tie = torch.bucketize(magnitude, midpoints, right=True) != lower
    code = lower + (is_tie & (lower % 2 == 1))
    return (code + fmt.sign_bit * torch.signbit(scaled)).to(torch.uint8)


def round_codebook(w: Tensor, group_size: int, scale: Tensor, book: Codebook) -> Tensor:
    """Codes uint8 [N, K]: of the value nearest to w · (1 / scale); halfway between two, of the smaller one."""
    midpoints, code_of = (table.to(w.device) for table in steps(book))
    scaled = w.to(torch.float32) * _per_column(1.0 / scale, w, group_size)
    return code_of[torch.bucketize(scaled, midpoints)]


def decode_int(codes: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """scale * (codes − zero_point), float32 [N, K]."""
    shifted = codes.to(torch.int32)
    if zero_point is not None:
        shifted = shifted - _per_column(zero_point, codes, group_size)
    return _per_column(scale, codes, group_size) * shifted.to(torch.float32)


def decode_table(codes: Tensor, group_size: int, scale: Tensor, fmt: ValueTable) -> Tensor:
    """scale * value(codes), float32 [N, K]."""
    return _per_column(scale, codes, group_size) * values(fmt).to(codes.device)[codes.to(torch.int64)]


def error_int(
    w: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int,
    importance: Tensor | None = None, by_magnitude: bool = False,
) -> Tensor:  # fmt: skip
    """Σ importance · (w − decode(round(w)))² of each group, float32 [N, G]."""
    codes = round_int(w, group_size, scale, zero_point, qmin, qmax)
    return _group_error(w, decode_int(codes, group_size, scale, zero_point), group_size, importance, by_magnitude)


def error_minifloat(
    w: Tensor, group_size: int, scale: Tensor, fmt: MinifloatFormat, importance: Tensor | None = None,
    by_magnitude: bool = False,
) -> Tensor:  # fmt: skip
    """Σ importance · (w − decode(round(w)))² of each group, float32 [N, G]."""
    codes = round_minifloat(w, group_size, scale, fmt)
    return _group_error(w, decode_table(codes, group_size, scale, fmt), group_size, importance, by_magnitude)


def error_codebook(
    w: Tensor, group_size: int, scale: Tensor, book: Codebook, importance: Tensor | None = None,
    by_magnitude: bool = False,
) -> Tensor:  # fmt: skip
    """Σ importance · (w − decode(round(w)))² of each group, float32 [N, G]."""
    codes = round_codebook(w, group_size, scale, book)
    return _group_error(w, decode_table(codes, group_size, scale, book), group_size, importance, by_magnitude)


def squared_error(
    w: Tensor, codes: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None = None,
    fmt: ValueTable | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """(Σ (w − decoded)², Σ w², max |w − decoded|), accumulated in float64."""
    if fmt is None:
        decoded = decode_int(codes, group_size, scale, zero_point)
    else:
        decoded = decode_table(codes, group_size, scale, fmt)
    weight = w.to(torch.float32)
    error = weight - decoded
    if error.numel() == 0:
        return 0.0, 0.0, 0.0
    sums = error.to(torch.float64).square().sum(), weight.to(torch.float64).square().sum()
    return float(sums[0]), float(sums[1]), float(error.abs().max())


def pack_dense(codes: Tensor, bits: int, offset: int | None = None) -> Tensor:
    """codes [N, K] → int32 [N, ceil(K · bits / 32)]; element i of a row at bits [i·bits, (i+1)·bits), LSB first."""
    rows, columns = codes.shape
    unsigned = codes.to(torch.int64) + (1 << (bits - 1) if offset is None else offset)
    if unsigned.numel() and (int(unsigned.min()) < 0 or int(unsigned.max()) >= 1 << bits):
        raise ValueError("a code does not fit in its bits")
    word_count = -(-columns * bits // 32)
    stream = torch.zeros(rows, word_count * 32, dtype=torch.int64, device=codes.device)
    for bit in range(bits):
        stream[:, bit : columns * bits : bits] = (unsigned >> bit) & 1
    place = torch.arange(32, device=codes.device)
    words = (stream.view(rows, word_count, 32) << place).sum(dim=2)
    return words.to(torch.int32)  # wraps bit 31 into the sign


def unpack_dense(words: Tensor, bits: int, columns: int, offset: int | None = None) -> Tensor:
    """The inverse of `pack_dense`: int8 [N, K], or uint8 where offset is 0."""
    rows, word_count = words.shape
    place = torch.arange(32, device=words.device)
    stream = ((words.to(torch.int64)[:, :, None] >> place) & 1).reshape(rows, word_count * 32)
    unsigned = torch.zeros(rows, columns, dtype=torch.int64, device=words.device)
    for bit in range(bits):
        unsigned |= stream[:, bit : columns * bits : bits] << bit
    codes = unsigned - (1 << (bits - 1) if offset is None else offset)
    return codes.to(torch.uint8 if offset == 0 else torch.int8)


def subtract_product(w: Tensor, change: Tensor, spread: Tensor, begin: int, end: int) -> None:
    """w[:, begin:end] −= change @ spread[:, begin:end], in place.

    On the CPU every weight sees the same float32 operations in the same order, whatever the number of rows or threads:
    a product is rounded before it is added, and the sum goes from left to right. Other devices sum in their own order,
    so a code that lies at a tie can differ there.
    """
    here = spread[:, begin:end]
    if w.device.type != "cpu":
        w[:, begin:end] -= change @ here
        return
    total = torch.zeros_like(w[:, begin:end])
    for column in range(change.shape[1]):
        total += change[:, column : column + 1] * here[column]
    w[:, begin:end] -= total


def feedback(
    w: Tensor, spread: Tensor, span: tuple[int, int, int], descend: bool, codes: Tensor, decoded: Tensor, nearest
) -> None:
    """nearest(weights [N, 1], column) → (codes [N, 1], decoded [N, 1])."""
    begin, end, block = span
    for start in range(begin, end, block):
        stop = min(start + block, end)
        change = torch.empty_like(w[:, start:stop])
        for column in range(start, stop):
            here = slice(column, column + 1)
            code, value = nearest(w[:, here], here)
            delta = value - decoded[:, here] if descend else w[:, here] - value
            codes[:, here], decoded[:, here] = code, value
            first = start if descend else column + 1
            w[:, first:stop] -= delta * spread[column, first:stop]
            change[:, column - start : column - start + 1] = delta
        if descend:
            subtract_product(w, change, spread[start:stop], 0, start)
        subtract_product(w, change, spread[start:stop], stop, w.shape[1])


def nearest_int(scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, qmin: int, qmax: int):
    """x = scale · (code − zero_point) + offset; the code of 0 where the scale is 0."""

    def nearest(w: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        above = w if offset is None else w - offset[:, here]
        steps = torch.where(scale[:, here] == 0, 0.0, above / scale[:, here])
        zero = torch.zeros((), dtype=torch.int32, device=w.device) if zero_point is None else zero_point[:, here]
        steps = torch.minimum(torch.maximum(steps, (qmin - zero).float()), (qmax - zero).float()).round()
        value = scale[:, here] * steps
        return (steps.to(torch.int32) + zero).to(torch.int8), value if offset is None else value + offset[:, here]

    return nearest


def nearest_minifloat(scale: Tensor, fmt: MinifloatFormat):
    """As `round_minifloat`."""

    def nearest(w: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        codes = round_minifloat(w, 1, scale[:, here], fmt)
        return codes, decode_table(codes, 1, scale[:, here], fmt)

    return nearest


def nearest_codebook(scale: Tensor, book: Codebook):
    """As `round_codebook`, for scales of either sign; the value nearest to 0 where a scale is 0 (or subnormal)."""
    midpoints, code_of = (part.to(scale.device) for part in steps(book))
    table = values(book).to(scale.device)
    reciprocal = torch.where(scale.abs() >= _LEAST_SCALE, 1.0 / scale, 0.0)

    def nearest(w: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        codes = code_of[torch.bucketize((w * reciprocal[:, here]).contiguous(), midpoints)]
        return codes, scale[:, here] * table[codes.to(torch.int64)]

    return nearest


def _per_column(per_group: Tensor, like: Tensor, group_size: int) -> Tensor:
    """[N, G] → [N, K]."""
    rows, columns = like.shape
    if per_group.shape != (rows, -(-columns // group_size)):
        raise ValueError(f"expected one value per row and group of {group_size}, found {tuple(per_group.shape)}")
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def _group_error(w: Tensor, decoded: Tensor, group_size: int, importance: Tensor | None, by_magnitude: bool) -> Tensor:
    squared = (w.to(torch.float32) - decoded).to(torch.float64).square()
    if importance is not None:
        squared = squared * importance
    if by_magnitude:
        squared = squared * w.abs()
    padded = torch.nn.functional.pad(squared, (0, -w.shape[1] % group_size))
    return _grouped(padded, group_size).sum(dim=2).to(torch.float32)


def _grouped(padded: Tensor, group_size: int) -> Tensor:
    """[N, G·g] → [N, G, g]."""
    return padded.reshape(padded.shape[0], padded.shape[1] // group_size, group_size)


@lru_cache
def _midpoints(fmt: MinifloatFormat) -> Tensor:
    """Halfway between neighbouring magnitudes, exact in float32; everything above the last one saturates."""
    magnitudes = values(fmt)[: fmt.finite_magnitudes]
    return (magnitudes[1:] + magnitudes[:-1]) / 2
