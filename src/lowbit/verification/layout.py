"""Where compressed-tensors keeps a linear: names, dtypes and shapes, and the way back from words to codes.

    L.weight_packed int32   b-bit codes + 2^(b−1), dense: element i of a row occupies bits i·b .. i·b + b − 1 of the
                            row's little-endian bit stream; bits past the last element are zero
    L.weight_packed uint8   two 4-bit codes a byte, even column in the low nibble
    L.weight                one code per byte

Written from the specification, not from the writer. Words are unpacked by the kernel that every reader uses, which
golden bytes and compressed-tensors' own packer hold in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.tensors import Granularity

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Expected:
    """A tensor that must be in the files. Loaders convert between float dtypes, so several may do."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


def plain_tensor(shape: tuple[int, ...]) -> Expected:
    return Expected(FLOATS, tuple(shape))


def expected_tensors(linear: str, shape: tuple[int, int], group: Group) -> dict[str, Expected]:
    """What a linear of a group consists of in the files, biases aside."""
    rows, columns = shape
    spec, activation = group.scheme.weight, group.scheme.activation
    scale_shape: tuple[int, ...] = spec.granularity.scale_shape(rows, columns, spec.columns_per_scale(columns))
    if spec.granularity is Granularity.TENSOR:
        scale_shape = (1,)
    scale_dtypes = {"e8m0": (torch.uint8,), "e4m3": (torch.float8_e4m3fn,)}.get(spec.scale_format, FLOATS)
    leaves = {"weight_scale": Expected(scale_dtypes, scale_shape)}
    packed = group.format == "pack-quantized"
    if packed:
        leaves["weight_packed"] = Expected((torch.int32,), (rows, words_of(columns, spec.bits)))
        leaves["weight_shape"] = Expected((torch.int64,), (2,))
    elif spec.number == "e2m1":
        leaves["weight_packed"] = Expected((torch.uint8,), (rows, columns // 2))
    else:
        leaves["weight"] = Expected((torch.int8 if spec.number == "int" else torch.float8_e4m3fn,), shape)
    if not spec.symmetric:
        zero_rows = words_of(rows, spec.bits) if packed else scale_shape[0]
        leaves["weight_zero_point"] = Expected((torch.int32 if packed else torch.int8,), (zero_rows, *scale_shape[1:]))
    if spec.two_level:
        leaves["weight_global_scale"] = Expected((torch.float32,), (1,))
    if activation is not None and activation.needs_calibration:
        local = activation.dynamic == "local"
        leaves["input_global_scale" if local else "input_scale"] = Expected((torch.float32,) if local else FLOATS, (1,))
        if not activation.symmetric:
            leaves["input_zero_point"] = Expected((torch.int8,), (1,))
    return {f"{linear}.{leaf}": expected for leaf, expected in leaves.items()}


def words_of(elements: int, bits: int) -> int:
    """32-bit words that hold so many dense codes."""
    return -(-elements * bits // 32)


def unpack_words(words: Tensor, bits: int, elements: int) -> tuple[Tensor, bool]:
    """int32 [rows, words] -> (signed codes int8 [rows, elements], True if a padding bit is set)."""
    dirty = _padding_is_set(words.contiguous().view(torch.uint8), elements * bits)
    return kernels.unpack_dense(words, bits, elements), dirty


def _padding_is_set(stream: Tensor, used_bits: int) -> bool:
    whole, partial = divmod(used_bits, 8)
    if partial and bool((stream[:, whole] >> partial).any()):
        return True
    return bool(stream[:, whole + (partial > 0) :].any())


class StoredLinear:
    """Codes, scales and zero points of one quantized linear, row slab by row slab."""

    def __init__(self, checkpoint: Checkpoint, linear: str, shape: tuple[int, int], group: Group):
        self.checkpoint, self.linear, self.shape, self.group = checkpoint, linear, shape, group
        self.spec = group.scheme.weight
        self.columns_per_scale = self.spec.columns_per_scale(shape[1])

    @property
    def code_name(self) -> str:
        packed = f"{self.linear}.weight_packed"
        return packed if packed in self.checkpoint.tensors else f"{self.linear}.weight"

    @property
    def is_packed(self) -> bool:
        """True where a code cannot be out of range."""
        return self.code_name.endswith("_packed")

    def codes(self, start: int, stop: int) -> tuple[Tensor, bool]:
        """(codes of rows start..stop, True if a padding bit is set): int8, signed; minifloats: uint8 bit patterns."""
        stored = self.checkpoint.read(self.code_name, start, stop)
        if stored.dtype == torch.int32:
            return unpack_words(stored, self.spec.bits, self.shape[1])
        if stored.dtype == torch.int8:
            return stored, False
        if self.spec.number == "e2m1":
            return torch.stack((stored & 15, stored >> 4), dim=-1).reshape(stop - start, -1), False
        return stored.view(torch.uint8), False

    def stored_scale(self, start: int, stop: int) -> Tensor:
        """Scales of rows start..stop as they are stored, [rows, G]; E8M0 as the powers of two, code 255 as NaN."""
        name, granularity = f"{self.linear}.weight_scale", self.spec.granularity
        if granularity is Granularity.TENSOR:
            scale = self.checkpoint.read(name).reshape(1, 1).expand(stop - start, 1)
        elif granularity is Granularity.BLOCK:
            block = self.columns_per_scale
            scale = self.checkpoint.read(name, start // block, -(-stop // block))
            scale = scale[torch.arange(start, stop) // block - start // block]
        else:
            scale = self.checkpoint.read(name, start, stop)
        if self.spec.scale_format == "e8m0":
            exponent = scale.to(torch.float32) - 127
            return torch.where(scale == 255, torch.nan, torch.exp2(exponent))
        return scale.to(torch.float32)

    def divisor(self) -> float:
        """What stored group scales are divided by; 1 where there is one level."""
        if not self.spec.two_level:
            return 1.0
        return self.checkpoint.read(f"{self.linear}.weight_global_scale").item()

    def zero_points(self) -> tuple[Tensor | None, bool]:
        """(int32 [N, G], or None where the codes are symmetric; True if a padding bit is set)."""
        if self.spec.symmetric:
            return None, False
        stored = self.checkpoint.read(f"{self.linear}.weight_zero_point")
        if stored.dtype == torch.int8:
            return stored.to(torch.int32).reshape(-1, stored.shape[-1]), False
        unpacked, dirty = unpack_words(stored.t(), self.spec.bits, self.shape[0])
        return unpacked.t().to(torch.int32).contiguous(), dirty

    def spread(self, values: Tensor) -> Tensor:
        """[rows, G] -> [rows, K]: every column's scale or zero point; [rows, 1] stays, it broadcasts."""
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.columns_per_scale, dim=1)[:, : self.shape[1]]

    def release(self) -> None:
        for leaf in ("weight", "weight_packed", "weight_scale", "weight_zero_point"):
            if f"{self.linear}.{leaf}" in self.checkpoint.tensors:
                self.checkpoint.release(f"{self.linear}.{leaf}")
