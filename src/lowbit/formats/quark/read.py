"""AMD Quark folders (quant_method "quark"), read: what its safetensors export writes and vLLM loads.

For a linear `L` with weight [N, K] and groups of g:

    int8, uint8   per tensor, channel   L.weight int8 or uint8 [N, K]    L.weight_scale [] or [N]
                  per group             L.weight [K, N]                  L.weight_scale [K/g, N]
    int4, uint4   per tensor, channel   L.weight int32 [N, K/8]          L.weight_scale [] or [N]
                  per group             L.weight int32 [K, ⌈N/8⌉]        L.weight_scale [K/g, N]
    fp8_e4m3      per tensor, channel   L.weight float8_e4m3fn [N, K]    L.weight_scale [] or [N]
                  per block b × b       L.weight [N, K]                  L.weight_scale [⌈N/b⌉, ⌈K/b⌉]
                  32 columns, e8m0      L.weight [N, K]                  L.weight_scale uint8 [N, K/32]         MXFP8
    fp4           32 columns, e8m0      L.weight uint8 [N, K/2]          L.weight_scale uint8 [N, K/32]         MXFP4
                  16 columns, fp8_e4m3  L.weight uint8 [N, K/2]          L.weight_scale float8_e4m3fn [N, K/16]
                                        L.weight_scale_2 float []                                               NVFP4

    int4 word, bit 31 → 0       pack_method reorder: 7 5 3 1 6 4 2 0 of its eight      order: 7 6 5 4 3 2 1 0
    fp4 byte                    column 2j + 1 in the high nibble, 2j in the low one
    decoded                     (code − zero_point) · scale; int4 codes are two's complement, uint4 codes 0 .. 15

Integers have L.weight_zero_point beside the scale, packed like the codes, zeros where the scheme is symmetric (there it
may be absent). Static activations have L.input_scale and, of integers, L.input_zero_point; NVFP4 L.input_scale_2.

The entry of config.json for a linear: none where `exclude` names it; else the first pattern that fits among those of
`layer_quant_config`; else `layer_type_quant_config.Linear`, or `global_quant_config`. Quark matches names by fnmatch;
vLLM takes entries with "re:" for regular expressions. How activations are rounded is stated too; what lowbit has no
scheme for is read as if inputs stayed in 16 bits, with a note. k_proj.output_scale and v_proj.output_scale are of an
FP8 KV cache.

Refused by name: weights of 2, 3 and 6 bits, mx6, mx9, bfp16, E5M2 and FP4 with float scales; FP8 that is rounded again
to int4; zero points that are floats; the export fake_quantized; quantized biases and outputs; inputs that are rotated
or scaled as the model runs (input_rotation, input_pre_scale).
Spec: amd-quark 0.13, torch/export and torch/utils/pack.py; quantization/quark of vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.kv_cache import kv_cache_scheme
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.formats.quark.stated import QuarkStatement, StatedWeight
from lowbit.numerics import grid_for
from lowbit.numerics.scales import e8m0_values
from lowbit.schemes import ActivationSpec, Scheme
from lowbit.tensors import Granularity, QuantizedTensor

_HINT = "the files and config.json do not belong together, or a download is incomplete"
_CODES = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)
_SCALES = {"e4m3": (torch.float8_e4m3fn,), "e8m0": (torch.uint8, torch.float8_e8m0fnu)}
_NIBBLES = {"reorder": (0, 4, 1, 5, 2, 6, 3, 7), "order": tuple(range(8))}  # place within its eight → nibble
# Ending of a tensor's name → what it says of its linear.
_FOREIGN = {
    "input_rotation": "its input is rotated as the model runs",
    "input_pre_scale": "its input is scaled as the model runs",
    "bias_scale": "its bias is quantized",
    "output_scale": "its output is rounded",
}


class QuarkLayout(Layout):
    LEAVES = (
        "weight", "weight_scale", "weight_scale_2", "weight_zero_point", "weight_zero_point_2", "input_scale",
        "input_scale_2", "input_zero_point", "input_zero_point_2",
    )  # fmt: skip
    HAS_KV_CACHE = True

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self.stated = QuarkStatement(quantization)
        self.kv_cache = kv_cache_scheme("tensor") if self.stated.has_fp8_cache else None
        _refuse_foreign(stored)
        for linear in self.linears():
            self.scheme_of(linear)  # which fills the notes
        self.notes += sorted(self.stated.notes)

    def linears(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "weight" and info.dtype in _CODES:
                found[linear] = self._logical_shape(linear)
            elif leaf == "weight_scale" and f"{linear}.weight" not in self.stored.tensors:
                raise CheckpointError(f"{info.file}: {name} is there, but {linear}.weight is absent", _HINT)
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        weight = self.stated.weight_of(linear)
        return None if weight is None else weight.scheme

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        weight, (rows, columns) = self._weight(linear), shape
        spec, activation = weight.scheme.weight, weight.scheme.activation
        scale_rows, groups = spec.granularity.scale_shape(rows, columns, spec.columns_per_scale(columns))
        words = -(-rows // 8) if weight.is_packed else rows
        shapes: tuple[tuple[int, ...], ...] = ((scale_rows, groups),)  # of scales
        points: tuple[tuple[int, ...], ...] = ((), (1,))  # of zero points, of which only integers have any
        if spec.granularity is Granularity.TENSOR:
            shapes = points
        elif spec.granularity is Granularity.CHANNEL:
            shapes, points = ((rows,), (rows, 1)), ((words,), (words, 1))
        elif weight.is_transposed:
            shapes, points = ((groups, rows),), ((groups, words),)
        codes = (columns, words) if weight.is_transposed else (rows, columns // weight.codes_per_item)
        leaves = {
            "weight": Expected((weight.stored_dtype,), codes),
            "weight_scale": Expected(
                _SCALES.get(spec.scale_format, FLOATS), self._one_of(linear, "weight_scale", shapes)
            ),
        }
        if spec.number == "int" and not (spec.symmetric and f"{linear}.weight_zero_point" not in self.stored.tensors):
            dtypes = (weight.stored_dtype, torch.int32)
            leaves["weight_zero_point"] = Expected(dtypes, self._one_of(linear, "weight_zero_point", points))
        once = ["weight_scale_2"] if spec.two_level else []
        once += [_input_leaf(activation)] if activation is not None and activation.needs_calibration else []
        for leaf in once:
            leaves[leaf] = Expected(FLOATS, self._one_of(linear, leaf, ((), (1,))))
        return {f"{linear}.{leaf}": expected for leaf, expected in leaves.items()}

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        weight = self._weight(linear)
        return 8 if weight.is_transposed and weight.is_packed else weight.scheme.weight.block_rows

    def scale_dtype(self, linear: str) -> torch.dtype:
        leaf = "weight_scale_2" if self._weight(linear).scheme.weight.two_level else "weight_scale"
        return self.stored.tensors[f"{linear}.{leaf}"].dtype

    def input_scale(self, linear: str) -> float | None:
        scheme = self.scheme_of(linear)
        if scheme is None or scheme.activation is None or not scheme.activation.needs_calibration:
            return None
        return self._number(f"{linear}.{_input_leaf(scheme.activation)}")

    def input_zero_point(self, linear: str) -> int | None:
        scheme, name = self.scheme_of(linear), f"{linear}.input_zero_point"
        if scheme is None or scheme.activation is None or scheme.activation.symmetric:
            return None
        return int(self._number(name)) if name in self.stored.tensors else None

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        weight = self._weight(linear)
        spec = weight.scheme.weight
        scale = self._scale(f"{linear}.weight_scale", weight, start, stop)
        global_scale = self._number(f"{linear}.weight_scale_2") if spec.two_level else 1.0
        if spec.two_level:
            scale = scale * torch.tensor(global_scale, dtype=torch.float32)
        zero_point = self._zero_point(linear, weight, start, stop)
        return QuantizedTensor(
            self._codes(f"{linear}.weight", weight, start, stop), scale, grid_for(spec, "float32"), spec.granularity,
            spec.columns_per_scale(shape[1]), zero_point, global_scale,
        )  # fmt: skip

    def _codes(self, name: str, weight: StatedWeight, start: int, stop: int) -> Tensor:
        """Signed codes int8 [n, K]; of floats their bits, uint8."""
        if weight.is_transposed:
            return self._rows_of_columns(name, weight, start, stop)
        stored = self.stored.read(name, start, stop)
        if weight.scheme.weight.number == "e2m1":
            return kernels.unpack_nibbles(stored)
        return stored.view(torch.uint8) if weight.scheme.weight.number == "e4m3" else self._integers(stored, weight)

    def _rows_of_columns(self, name: str, weight: StatedWeight, start: int, stop: int) -> Tensor:
        """int8 [n, …]: rows start..stop, where the file has them down its columns; start divides by 8 if packed."""
        per_item = 8 if weight.is_packed else 1
        stored = self.stored.read(name)[:, start // per_item : -(-stop // per_item)]
        return self._integers(stored, weight).t()[: stop - start].contiguous()

    def _integers(self, stored: Tensor, weight: StatedWeight) -> Tensor:
        """Signed codes int8 [n, m] of what a file holds, int32 words or single codes."""
        if not weight.is_packed:
            return (stored.to(torch.int16) - weight.zero_code).to(torch.int8)
        words = stored.contiguous()
        nibbles = kernels.unpack_dense(words, 4, 8 * words.shape[1], offset=0).to(torch.int8)
        ordered = nibbles.reshape(-1, 8)[:, _NIBBLES[self.stated.pack_method]].reshape(nibbles.shape)
        return ordered - 8 if weight.zero_code else (ordered ^ 8) - 8  # the sign bit is worth −8

    def _scale(self, name: str, weight: StatedWeight, start: int, stop: int) -> Tensor:
        """Float32, of the shape that the granularity has in a QuantizedTensor, before any second level."""
        spec = weight.scheme.weight
        if spec.granularity is Granularity.TENSOR:
            return self.stored.read(name).float().reshape(1, 1)
        if weight.is_transposed:
            return self.stored.read(name)[:, start:stop].t().float().contiguous()
        scale = self.stored.read(name, start // spec.block_rows, -(-stop // spec.block_rows))
        if spec.scale_format == "e8m0":
            return e8m0_values(scale.view(torch.uint8))
        return scale.float().reshape(scale.shape[0], -1)

    def _zero_point(self, linear: str, weight: StatedWeight, start: int, stop: int) -> Tensor | None:
        """int32, of the shape of the scale; None of symmetric schemes, in which it must be 0."""
        name, spec = f"{linear}.weight_zero_point", weight.scheme.weight
        if spec.number != "int" or name not in self.stored.tensors:
            return None
        if weight.is_transposed:
            zero_point = self._rows_of_columns(name, weight, start, stop)
        elif spec.granularity is Granularity.TENSOR:
            zero_point = self.stored.read(name).to(torch.int32).reshape(1, 1) - weight.zero_code
        else:
            zero_point = self._integers(self.stored.read(name).reshape(1, -1), weight)[:, start:stop].t()
        if spec.symmetric and bool(zero_point.any()):
            raise CheckpointError(
                f"{self.stored.tensors[name].file}: {name} is not all zeros; config.json says symmetric", _HINT
            )
        return None if spec.symmetric else zero_point.to(torch.int32).contiguous()

    def _weight(self, linear: str) -> StatedWeight:
        weight = self.stated.weight_of(linear)
        assert weight is not None, "checked when the folder was opened"
        return weight

    def _number(self, name: str) -> float:
        return self.stored.read(name).float().reshape(-1)[0].item()

    def _one_of(self, linear: str, leaf: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """The stored shape where it is one of `shapes`, else the first of them."""
        info = self.stored.tensors.get(f"{linear}.{leaf}")
        return tuple(info.shape) if info is not None and tuple(info.shape) in shapes else shapes[0]

    def _logical_shape(self, linear: str) -> tuple[int, int]:
        weight = self.stated.weight_of(linear)
        first, second = matrix_shape(self.stored.tensors[f"{linear}.weight"], _HINT)
        if weight is None:
            return (first, second)
        if not weight.is_transposed:
            return (first, second * weight.codes_per_item)
        scale = self.stored.tensors.get(f"{linear}.weight_scale")
        padded = 8 * second if weight.is_packed else second
        rows = scale.shape[-1] if scale is not None and 0 <= padded - scale.shape[-1] < 8 else padded
        return (rows, first)


def _input_leaf(activation: ActivationSpec) -> str:
    return "input_scale_2" if activation.dynamic == "local" else "input_scale"


def _refuse_foreign(stored: Checkpoint) -> None:
    for name, info in stored.tensors.items():
        linear, _, leaf = name.rpartition(".")
        if leaf in _FOREIGN and not (leaf == "output_scale" and linear.endswith(("q_proj", "k_proj", "v_proj"))):
            raise CheckpointError(
                f"{info.file}: {name}: {_FOREIGN[leaf]}, which is not read",
                "start from the 16-bit checkpoint, or export it without",
            )
