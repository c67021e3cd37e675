"""HQQ folders (quant_method "hqq"), read: safetensors that transformers 4 or `save_to_safetensors` of hqq wrote.

For a linear `L` with weight [N, K], cut in groups of g along `axis`, beside its bias:

    axis 1   the weight as [R, C] = [N·K/g, g]     L.scale, L.zero  [R, 1]     g columns of a row share a scale
    axis 0   the weight as [R, C] = [g, N·K/g]     L.scale, L.zero  [1, C]     g rows, N/g apart, share one

    L.W_q       codes of [R, C], s rows in one; row r of W_q has the rows r, r + P, r + 2P, … of [R, C], P = rows of W_q
                packing    s    item, most significant bits first
                8bit_u8    1    uint8      8, 6 or 5 bits (L.nbits)
                4bit_u8    2    uint8      r  r+P
                3bit_32   10    int32      00  r  r+P  …  r+9P      R filled up to a multiple of 10
                2bit_u8    4    uint8      r  r+P  r+2P  r+3P       also 1.58 bits, which use three of the codes
                1bit_u8    8    uint8      r … r+7P
                with L.view_as_float the same bytes are called floats of the dtype of the scales
    decoded     (code − zero) · scale, each step rounded to the dtype of the scales; zero is a float, between codes

What a linear is, its own small tensors say: L.shape [2], L.axis, L.group_size, L.nbits, L.packing (letters as uint8)
and L.view_as_float. HQQ loads by these as well; `quant_config` in config.json is not asked. Folders of hqq itself have
no quantization_config: they are known by their tensors.

Refused by name: scales or zeros that are quantized themselves or stacked (quant_scale, quant_zero, zero_scale: of hqq
before 0.2), one scale for a whole matrix (channel_wise false), and what is absent or does not fit. The pickles of
`save_quantized` (qmodel.pt) are not read: one dict of dicts in place of tensors.
Spec: hqq 0.2.8, core/quantize.py and core/bitpack.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.schemes import Scheme, WeightSpec
from lowbit.tensors import Granularity, QuantizedTensor

# packing → (rows of codes in one, bits of each; None where nbits says it, bytes of an item)
_PACKINGS = {"8bit_u8": (1, None, 1), "4bit_u8": (2, 4, 1), "3bit_32": (10, 3, 4), "2bit_u8": (4, 2, 1),
             "1bit_u8": (8, 1, 1)}  # fmt: skip
_FLAGS = ("quant_scale", "quant_zero", "offload_meta")
_SAID = ("shape", "axis", "group_size", "nbits", "packing", "view_as_float", "channel_wise")
_OTHERS = ("unpack_view_dtype", "compute_dtype", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero")
_HINT = (
    "the files are damaged, or of another version of hqq; load them with the hqq that wrote them, and save W decoded"
)


@dataclass(frozen=True)
class _PackedLinear:
    """How one weight [rows, columns] lies in W_q.

    height, width    of the matrix of codes, R and C
    slots, bits      rows of codes in a row of W_q, and bits of each
    item             bytes of an item that holds `slots` codes
    along_rows       True where each row of codes has a scale (axis 1)
    """

    rows: int
    columns: int
    height: int
    width: int
    slots: int
    bits: int
    item: int
    along_rows: bool
    as_float: bool

    @property
    def step(self) -> int:
        """Rows of W_q, P."""
        return -(-self.height // self.slots)

    @property
    def group_size(self) -> int:
        return self.width if self.along_rows else self.height

    @property
    def has_groups_of_columns(self) -> bool:
        """True where a scale is for consecutive columns of one row."""
        return self.along_rows and self.columns % self.width == 0


class HqqLayout(Layout):
    LEAVES = ("W_q", "scale", "zero", *_SAID, *_FLAGS, *_OTHERS)

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        linears = [name.removesuffix(".W_q") for name in stored.tensors if name.endswith(".W_q")]
        self.packed = {linear: self._said(linear) for linear in linears}
        if not linears:
            raise CheckpointError(f"{stored.source}: config.json says hqq, but there is no tensor L.W_q", _HINT)

    def linears(self) -> dict[str, tuple[int, int]]:
        return {linear: (packed.rows, packed.columns) for linear, packed in self.packed.items()}

    def scheme_of(self, linear: str) -> Scheme | None:
        packed = self.packed.get(linear)
        if packed is None:
            return None
        whole = packed.has_groups_of_columns and packed.width == packed.columns
        granularity, size = (Granularity.CHANNEL, None) if whole else (Granularity.GROUP, packed.group_size)
        spec = WeightSpec("hqq", packed.bits, granularity, size, symmetric=False)
        along = "columns" if packed.along_rows else "rows"
        return Scheme(f"HQQ{packed.bits}", spec, None, f"{packed.bits}-bit integers with float zeros, along {along}")

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        packed = self.packed[linear]
        unit = torch.int32 if packed.item == 4 else torch.uint8
        dtypes, columns = (unit,), packed.width
        if packed.as_float:
            dtypes = (self.scale_dtype(linear),)
            columns = packed.width * packed.item // dtypes[0].itemsize
        scales = (packed.height, 1) if packed.along_rows else (1, packed.width)
        return {
            f"{linear}.W_q": Expected(dtypes, (packed.step, columns)),
            f"{linear}.scale": Expected(FLOATS, scales),
            f"{linear}.zero": Expected((self.scale_dtype(linear),), scales),
        }

    def scale_dtype(self, linear: str) -> torch.dtype:
        info = self.stored.tensors.get(f"{linear}.scale")
        return torch.float16 if info is None else info.dtype

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        packed, scheme = self.packed[linear], self.quantized_scheme(linear)
        first, last = start * packed.columns // packed.width, -(-stop * packed.columns // packed.width)
        skipped = start * packed.columns - first * packed.width

        def of_rows(values: Tensor) -> Tensor:
            """[last − first, C] → [stop − start, K]"""
            count = (stop - start) * packed.columns
            return values.flatten()[skipped : skipped + count].reshape(-1, packed.columns).contiguous()

        codes = of_rows(self._codes(f"{linear}.W_q", packed, first, last))
        scale, zero = (self._floats(f"{linear}.{leaf}", packed, first, last) for leaf in ("scale", "zero"))
        if packed.has_groups_of_columns:
            scale, zero, group_size = scale.reshape(stop - start, -1), zero.reshape(stop - start, -1), packed.width
        else:  # every weight with a scale of its own
            scale, zero = (of_rows(each.expand(last - first, packed.width)) for each in (scale, zero))
            group_size = 1
        grid = grid_for(scheme.weight, str(self.scale_dtype(linear)).removeprefix("torch."))
        return QuantizedTensor(codes, scale, grid, Granularity.GROUP, group_size, zero)

    def _codes(self, name: str, packed: _PackedLinear, first: int, last: int) -> Tensor:
        """uint8 [last − first, C]: rows first..last of the matrix of codes."""
        parts, at, mask = [], first, (1 << packed.bits) - 1
        while at < last:
            slot, row = divmod(at, packed.step)
            end = min(packed.step, row + last - at)
            items = self.stored.read(name, row, end).contiguous()
            if packed.as_float:
                items = items.view(torch.int32 if packed.item == 4 else torch.uint8)
            parts.append(((items >> packed.bits * (packed.slots - 1 - slot)) & mask).to(torch.uint8))
            at += end - row
        return torch.cat(parts)

    def _floats(self, name: str, packed: _PackedLinear, first: int, last: int) -> Tensor:
        """float32, of rows first..last: [last − first, 1], or [1, C]."""
        return (self.stored.read(name, first, last) if packed.along_rows else self.stored.read(name)).float()

    def _said(self, linear: str) -> _PackedLinear:
        """What a linear's own tensors say of it; CheckpointError where that cannot be."""
        where = f"{self.stored.source}: {linear}"
        for leaf in _FLAGS:
            if f"{linear}.{leaf}" in self.stored.tensors and self._numbers(f"{linear}.{leaf}") != [0]:
                raise CheckpointError(
                    f"{where}.{leaf} is set: scales and zeros are codes themselves, or stacked", _HINT
                )
        absent = [leaf for leaf in _SAID[:5] if f"{linear}.{leaf}" not in self.stored.tensors]
        if absent:
            raise CheckpointError(
                f"{where}.W_q is there, but {linear}.{absent[0]}, which says what it is, is absent", _HINT
            )
        said = {leaf: self._numbers(f"{linear}.{leaf}") for leaf in _SAID if f"{linear}.{leaf}" in self.stored.tensors}
        packing = "".join(chr(int(letter)) for letter in said["packing"] if 32 <= letter < 127)
        shape, sizes = said["shape"], [*said["axis"], *said["group_size"]]
        if packing not in _PACKINGS or len(shape) != 2 or len(sizes) != 2 or len(said["nbits"]) != 1:
            raise CheckpointError(f"{where} has packing {packing!r}, shape {shape}, axis and group size {sizes}", _HINT)
        if said.get("channel_wise") == [0]:
            raise CheckpointError(f"{where}.channel_wise is 0: one scale for the whole matrix is not read", _HINT)
        slots, bits, item = _PACKINGS[packing]
        bits = int(said["nbits"][0]) if bits is None else bits
        rows, columns, axis, size = (int(number) for number in (*shape, *sizes))
        fits = min(rows, columns, size) > 0 and axis in (0, 1) and rows * columns % max(size, 1) == 0 and 1 <= bits <= 8
        groups = rows * columns // size if fits else 0
        height, width = (groups, size) if axis == 1 else (size, groups)
        if not fits or (slots != 10 and height % slots):
            raise CheckpointError(
                f"{where}: {bits} bits, axis {axis} and groups of {size} do not fit {rows} × {columns}", _HINT
            )
        return _PackedLinear(
            rows, columns, height, width, slots, bits, item, axis == 1, said.get("view_as_float") == [1]
        )

    def _numbers(self, name: str) -> list[float]:
        """The content of one of the small tensors, all finite."""
        info = self.stored.tensors[name]
        if info.nbytes > 256:
            raise CheckpointError(f"{info.file}: {name} has {info.nbytes} bytes; one number or word is needed", _HINT)
        numbers = self.stored.read(name).reshape(-1).tolist()
        if not all(map(math.isfinite, numbers)):
            raise CheckpointError(f"{info.file}: {name} holds NaN or inf; whole numbers are needed", _HINT)
        return numbers
