"""The kernels in torch: the readable specification, which the compiled core must match bit for bit.

    codes = clamp(rint(w / scale) + zero_point, qmin, qmax)       integers, ties to even
    codes = nearest value of w / scale, ties to the even code     minifloats, saturating
    codes = nearest value of w · (1 / scale), ties to the smaller codebooks, as bitsandbytes

Runs on any device and is what runs where there is no compiled core. Signatures and shapes are those of
`lowbit.kernels`: w [N, K] float32, bfloat16 or float16 (computed in float32), cut along K into groups of g columns, the
last of which may be short; scale float32 [N, G] > 0; zero_point int32 [N, G] or None. Codes of NaN or inf weights are
undefined; only `group_range` shows them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.numerics import codebook_tables
from lowbit.numerics.codebook_tables import Codebook
from lowbit.numerics.minifloat_formats import MinifloatFormat, values


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
    midpoints, code_of = (table.to(w.device) for table in codebook_tables.steps(book))
    scaled = w.to(torch.float32) * _per_column(1.0 / scale, w, group_size)
    return code_of[torch.bucketize(scaled, midpoints)]


def decode_int(codes: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """scale * (codes − zero_point), float32 [N, K]."""
    shifted = codes.to(torch.int32)
    if zero_point is not None:
        shifted = shifted - _per_column(zero_point, codes, group_size)
    return _per_column(scale, codes, group_size) * shifted.to(torch.float32)


def decode_minifloat(codes: Tensor, group_size: int, scale: Tensor, fmt: MinifloatFormat) -> Tensor:
    """scale * value(codes), float32 [N, K]."""
    return _per_column(scale, codes, group_size) * values(fmt).to(codes.device)[codes.to(torch.int64)]


def decode_codebook(codes: Tensor, group_size: int, scale: Tensor, book: Codebook) -> Tensor:
    """scale * value(codes), float32 [N, K]."""
    return _per_column(scale, codes, group_size) * codebook_tables.values(book).to(codes.device)[codes.to(torch.int64)]


def error_int(
    w: Tensor,
    group_size: int,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    importance: Tensor | None = None,
    by_magnitude: bool = False,
) -> Tensor:
    """Σ importance · (w − decode(round(w)))² of each group, float32 [N, G].

    importance    float32 [K], None for ones
    by_magnitude  weigh each square with |w| as well
    """
    codes = round_int(w, group_size, scale, zero_point, qmin, qmax)
    return _group_error(w, decode_int(codes, group_size, scale, zero_point), group_size, importance, by_magnitude)


def error_minifloat(
    w: Tensor,
    group_size: int,
    scale: Tensor,
    fmt: MinifloatFormat,
    importance: Tensor | None = None,
    by_magnitude: bool = False,
) -> Tensor:
    """Σ importance · (w − decode(round(w)))² of each group, float32 [N, G].

    importance    float32 [K], None for ones
    by_magnitude  weigh each square with |w| as well
    """
    codes = round_minifloat(w, group_size, scale, fmt)
    return _group_error(w, decode_minifloat(codes, group_size, scale, fmt), group_size, importance, by_magnitude)


def error_codebook(
    w: Tensor,
    group_size: int,
    scale: Tensor,
    book: Codebook,
    importance: Tensor | None = None,
    by_magnitude: bool = False,
) -> Tensor:
    """Σ importance · (w − decode(round(w)))² of each group, float32 [N, G].

    importance    float32 [K], None for ones
    by_magnitude  weigh each square with |w| as well
    """
    codes = round_codebook(w, group_size, scale, book)
    return _group_error(w, decode_codebook(codes, group_size, scale, book), group_size, importance, by_magnitude)


def squared_error(
    w: Tensor,
    codes: Tensor,
    group_size: int,
    scale: Tensor,
    zero_point: Tensor | None = None,
    fmt: MinifloatFormat | Codebook | None = None,
) -> tuple[float, float, float]:
    """(Σ (w − decoded)², Σ w², max |w − decoded|), accumulated in float64."""
    if fmt is None:
        decoded = decode_int(codes, group_size, scale, zero_point)
    elif isinstance(fmt, Codebook):
        decoded = decode_codebook(codes, group_size, scale, fmt)
    else:
        decoded = decode_minifloat(codes, group_size, scale, fmt)
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
