"""The inner loops: ranges, rounding, decoding, errors, bit packing. Torch tensors in and out.

Tensors on the CPU go to the compiled core (`csrc/`), built once per instruction set; the best is chosen on first use.
Other devices, and machines without a compiled core, run the torch reference, which is the specification:
`lowbit.kernels.reference`. `LOWBIT_FORCE_ISA` = avx512, avx2, baseline, neon or reference overrides the choice; a name
that this machine lacks is a UsageError.

Common arguments, with N = out_features, K = in_features, g = group_size, G = ceil(K / g); the last group may be short:

    w           float32, bfloat16 or float16 [N, K]; computed in float32
    scale       float32 [N, G], > 0
    zero_point  int32 [N, G], or None
    codes       int8 [N, K] for integers, signed also where they are asymmetric; uint8 for minifloats (bit
                patterns) and codebooks (indices)

Codes, packed words, ranges and decoded weights have the same bits in every implementation; error sums agree to a
relative 1e-5. NaN and inf weights show in `group_range` and have undefined codes. Kernels are single-threaded and
reentrant: split rows over threads (the GIL is released).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.kernels import reference
from lowbit.kernels.choice import available_isas, compiled, isa, use_isa
from lowbit.kernels.tables import Codebook, MinifloatFormat, ValueTable, steps, values

__all__ = [
    "available_isas", "decode_int", "decode_table", "error_codebook", "error_int", "error_minifloat", "group_range",
    "isa", "pack_dense", "pack_dense_columns", "pack_nibbles", "round_codebook", "round_int", "round_minifloat",
    "squared_error", "unpack_dense", "unpack_dense_columns", "unpack_nibbles", "use_isa",
]  # fmt: skip


def group_range(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(low, high), float32 [N, G]: least and greatest element of each group.

    A NaN makes both ends NaN, an inf shows at its own end; −0.0 counts as 0.0.
    """
    core = compiled(w.device)
    if core is None:
        return reference.group_range(w, group_size)
    low, high = (_per_group_like(w, group_size) for _ in range(2))
    core.group_range(_plain(w), group_size, low, high)
    return low, high


def round_int(w: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """codes = clamp(rint(w / scale) + zero_point, qmin, qmax), int8 [N, K]; true division, ties to even."""
    core = compiled(w.device)
    if core is None:
        return reference.round_int(w, group_size, scale, zero_point, qmin, qmax)
    codes = torch.empty(w.shape, dtype=torch.int8)
    core.round_int(_plain(w), group_size, _plain(scale), _plain_or_none(zero_point), qmin, qmax, codes)
    return codes


def round_minifloat(w: Tensor, group_size: int, scale: Tensor, fmt: MinifloatFormat) -> Tensor:
    """Bit patterns, uint8 [N, K], of the values of `fmt` nearest to w / scale.

    Ties to the even code; saturates at ±max_value, never inf or NaN; a negative weight that rounds to zero keeps its
    sign (as `Tensor.to(torch.float8_e4m3fn)` does).
    """
    core = compiled(w.device)
    if core is None:
        return reference.round_minifloat(w, group_size, scale, fmt)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    core.round_minifloat(_plain(w), group_size, _plain(scale), _fields(fmt), codes)
    return codes


def round_codebook(w: Tensor, group_size: int, scale: Tensor, book: Codebook) -> Tensor:
    """Codes, uint8 [N, K], of the values of `book` nearest to w · (1 / scale), the reciprocal rounded to float32.

    Halfway between two values the smaller one; beyond the ends the last one.
    """
    core = compiled(w.device)
    if core is None:
        return reference.round_codebook(w, group_size, scale, book)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    core.round_codebook(_plain(w), group_size, _plain(scale), *_ascending(book), codes)
    return codes


def decode_int(codes: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """scale * (codes − zero_point), float32 [N, K]; one float32 multiply."""
    core = compiled(codes.device)
    if core is None:
        return reference.decode_int(codes, group_size, scale, zero_point)
    weights = torch.empty(codes.shape, dtype=torch.float32)
    core.decode_int(_plain(codes), group_size, _plain(scale), _plain_or_none(zero_point), weights)
    return weights


def decode_table(codes: Tensor, group_size: int, scale: Tensor, fmt: ValueTable) -> Tensor:
    """scale * value(codes), float32 [N, K]. Non-finite codes of minifloats decode to inf and NaN."""
    core = compiled(codes.device)
    if core is None:
        return reference.decode_table(codes, group_size, scale, fmt)
    weights = torch.empty(codes.shape, dtype=torch.float32)
    core.decode_table(_plain(codes), group_size, _plain(scale), _byte_table(fmt), weights)
    return weights


def error_int(
    w: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int,
    importance: Tensor | None = None, by_magnitude: bool = False,
) -> Tensor:  # fmt: skip
    """Σ importance · (w − decode(round(w)))² of each group, float32 [N, G].

    importance    float32 [K], None for ones
    by_magnitude  weigh each square with |w| as well
    """
    core = compiled(w.device)
    if core is None:
        return reference.error_int(w, group_size, scale, zero_point, qmin, qmax, importance, by_magnitude)
    errors = _per_group_like(w, group_size)
    zero_point, importance = _plain_or_none(zero_point), _plain_or_none(importance)
    core.error_int(_plain(w), group_size, _plain(scale), zero_point, qmin, qmax, importance, by_magnitude, errors)
    return errors


def error_minifloat(
    w: Tensor, group_size: int, scale: Tensor, fmt: MinifloatFormat, importance: Tensor | None = None,
    by_magnitude: bool = False,
) -> Tensor:  # fmt: skip
    """As `error_int`."""
    core = compiled(w.device)
    if core is None:
        return reference.error_minifloat(w, group_size, scale, fmt, importance, by_magnitude)
    errors = _per_group_like(w, group_size)
    core.error_minifloat(
        _plain(w), group_size, _plain(scale), _fields(fmt), _plain_or_none(importance), by_magnitude, errors
    )
    return errors


def error_codebook(
    w: Tensor, group_size: int, scale: Tensor, book: Codebook, importance: Tensor | None = None,
    by_magnitude: bool = False,
) -> Tensor:  # fmt: skip
    """As `error_int`."""
    core = compiled(w.device)
    if core is None:
        return reference.error_codebook(w, group_size, scale, book, importance, by_magnitude)
    errors = _per_group_like(w, group_size)
    importance = _plain_or_none(importance)
    core.error_codebook(_plain(w), group_size, _plain(scale), *_ascending(book), importance, by_magnitude, errors)
    return errors


def squared_error(
    w: Tensor, codes: Tensor, group_size: int, scale: Tensor, zero_point: Tensor | None = None,
    fmt: ValueTable | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """(Σ (w − decoded)², Σ w², max |w − decoded|); codes are of `fmt`, or integers where it is None."""
    core = compiled(w.device)
    if core is None:
        return reference.squared_error(w, codes, group_size, scale, zero_point, fmt)
    if fmt is None:
        return core.squared_error_int(_plain(w), _plain(codes), group_size, _plain(scale), _plain_or_none(zero_point))
    return core.squared_error_table(_plain(w), _plain(codes), group_size, _plain(scale), _byte_table(fmt))


def pack_dense(codes: Tensor, bits: int, offset: int | None = None) -> Tensor:
    """codes [N, K] → int32 [N, ceil(K · bits / 32)]: a dense bit stream per row, least significant bit first.

    u = code + offset, with offset 2^(bits−1) for signed codes (the default; compressed-tensors) and 0 for codes that
    are unsigned already (GPTQ). Element i is at bits [i·bits, (i+1)·bits) of its row, across word boundaries; the tail
    of a row is zero. ValueError if a code does not fit in its bits.

        bits = 4     word 0, bit 31 → 0:   u7   u6  u5  u4  u3  u2  u1  u0
        bits = 3     word 0, bit 31 → 0:   ..a  u9  u8  u7  u6  u5  u4  u3  u2  u1  u0
                     word 1, bit 31 → 0:   … u12  u11  b       u10 = b a: its low two bits, then its top bit

    codes   int8, uint8 or a wider integer
    """
    core = compiled(codes.device)
    if core is None:
        return reference.pack_dense(codes, bits, offset)
    codes, offset = _as_bytes(codes, 1 << (bits - 1) if offset is None else offset, bits)
    rows, columns = codes.shape
    words = torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32)
    core.pack_dense(codes, bits, offset, words)
    return words


def unpack_dense(words: Tensor, bits: int, columns: int, offset: int | None = None) -> Tensor:
    """The inverse of `pack_dense`: int32 [N, ceil(K · bits / 32)] → int8 [N, K], or uint8 where offset is 0."""
    core = compiled(words.device)
    if core is None:
        return reference.unpack_dense(words, bits, columns, offset)
    codes = torch.empty(words.shape[0], columns, dtype=torch.uint8)
    core.unpack_dense(_plain(words), bits, 1 << (bits - 1) if offset is None else offset, codes)
    return codes if offset == 0 else codes.view(torch.int8)


def pack_dense_columns(codes: Tensor, bits: int, offset: int | None = None) -> Tensor:
    """codes [N, G] → int32 [ceil(N · bits / 32), G]: `pack_dense` down each column (zero points)."""
    return pack_dense(codes.t(), bits, offset).t().contiguous()


def unpack_dense_columns(words: Tensor, bits: int, rows: int, offset: int | None = None) -> Tensor:
    """The inverse of `pack_dense_columns`: int32 [ceil(N · bits / 32), G] → int8 [N, G], or uint8 where offset is 0."""
    return unpack_dense(words.t(), bits, rows, offset).t().contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] in 0..15, K even → uint8 [N, K / 2]; the even column is in the low nibble.

    byte j, bit 7 → 0:   code[2j + 1]  code[2j]
    """
    columns = codes.shape[1]
    if columns % 2:
        raise ValueError(f"nibbles are packed in pairs, found {columns} columns")
    # The same bits as a dense stream of 4-bit codes, less the padding to whole words.
    return pack_dense(codes, 4, offset=0).view(torch.uint8)[:, : columns // 2].contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [N, K / 2] → uint8 [N, K] in 0..15."""
    half = packed.shape[1]
    words = torch.nn.functional.pad(packed, (0, -half % 4)).contiguous().view(torch.int32)
    return unpack_dense(words, 4, 2 * half, offset=0)


def _plain(tensor: Tensor) -> Tensor:
    """What the core takes: contiguous, without a gradient."""
    return tensor.detach().contiguous()


def _plain_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _plain(tensor)


def _per_group_like(w: Tensor, group_size: int) -> Tensor:
    return torch.empty(w.shape[0], -(-w.shape[1] // group_size), dtype=torch.float32)


def _as_bytes(codes: Tensor, offset: int, bits: int) -> tuple[Tensor, int]:
    """Codes as uint8, and what remains to be added to them modulo 256."""
    is_signed = codes.dtype == torch.int8 and offset == 1 << (bits - 1)
    is_unsigned = codes.dtype == torch.uint8 and offset == 0
    if is_signed or is_unsigned:
        return _plain(codes).view(torch.uint8), offset
    # Other combinations could wrap around a byte unnoticed.
    shifted = codes.to(torch.int64) + offset
    if shifted.numel() and not 0 <= int(shifted.min()) <= int(shifted.max()) < 1 << bits:
        raise ValueError("a code does not fit in its bits")
    return _plain(shifted.to(torch.uint8)), 0


@lru_cache
def _fields(fmt: MinifloatFormat) -> tuple[int, int, int, float]:
    return fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.max_value


@lru_cache
def _byte_table(fmt: ValueTable) -> Tensor:
    """float32 [256]: the value of every byte; NaN for bytes that are not codes of the format."""
    table = torch.full((256,), float("nan"))
    table[: 1 << fmt.bits] = values(fmt)
    return table


@lru_cache
def _ascending(book: Codebook) -> tuple[Tensor, Tensor, Tensor]:
    """Midpoints float32 [15], then in ascending order of their values: values float32 [16] and codes uint8 [16]."""
    midpoints, codes = steps(book)
    return midpoints, values(book)[codes.to(torch.int64)], codes
