"""lowbit's codebook folders, read: the `Layout`, and `unpacked`, which transformers' linears use too.

write.py pictures the bytes.

Refused: another version; a group of config.json with another key, number, bits, group size or share of outliers; a
linear named twice; a base that is no step of 2 .. 8; columns of outliers that lie outside of the weight or do not rise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.numerics.fitted_grids import STEPS, log_tables
from lowbit.schemes import SCHEMES, Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity, QuantizedTensor, SparseOutliers

_HALF = (torch.float16,)
_KEYS = {"number", "bits", "group_size", "outliers", "linears"}
_HINT = "the files and config.json do not belong together, or a download is incomplete"
_KINDS = {(scheme.weight.number, scheme.weight.bits) for scheme in SCHEMES.values() if scheme.weight.is_fitted}
_MAX_OUTLIERS = 50.0  # percent


class CodebookLayout(Layout):
    LEAVES = ("weight", "table", "scale", "base", "outlier_columns", "outlier_values")

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        try:
            self._specs = stated_specs(quantization)
        except ValueError as error:
            raise CheckpointError(f"{stored.source}: config.json: {error}", "correct config.json") from error

    def linears(self) -> dict[str, tuple[int, int]]:
        """Also of linears that config.json does not name, whose codes are int32; `scheme_of` is None for them."""
        found = {}
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "weight" and info.dtype == torch.int32:
                rows, words = matrix_shape(info, _HINT)
                spec = self._specs.get(linear)
                found[linear] = (rows, words * 32 // (spec.bits if spec else 4))
        absent = next((linear for linear in self._specs if linear not in found), None)
        if absent is not None:
            raise CheckpointError(f"{self.stored.source}: config.json says that {absent} is quantized, but the files "
                                  f"hold no int32 {absent}.weight", _HINT)  # fmt: skip
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        spec = self._specs.get(linear)
        return None if spec is None else scheme_of_specs(spec, None)

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        return {f"{linear}.{leaf}": Expected(dtypes, part)
                for leaf, (dtypes, part) in parts_of(self._specs[linear], shape).items()}  # fmt: skip

    def owned(self, linear: str) -> list[str]:
        leaves = self.LEAVES if linear not in self._specs else tuple(parts_of(self._specs[linear], (1, 32)))
        return [f"{linear}.{leaf}" for leaf in leaves if f"{linear}.{leaf}" in self.stored.tensors]

    def scale_dtype(self, linear: str) -> torch.dtype:
        return torch.float16

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        spec = self._specs[linear]
        parts = {leaf: self.stored.read(f"{linear}.{leaf}", start, stop) for leaf in parts_of(spec, shape)}
        try:
            return unpacked(spec, shape[1], parts)
        except ValueError as error:
            file = self.stored.tensors[f"{linear}.weight"].file
            raise CheckpointError(f"{file}: {linear}.{error}", "the file is damaged") from error


def stated_specs(quantization: Mapping[str, Any]) -> dict[str, WeightSpec]:
    """Linear → spec, of `quantization_config`; ValueError says what is wrong with it."""
    version, groups = quantization.get("version"), quantization.get("groups")
    if version != 1:
        raise ValueError(f"version is {version!r} of lowbit-codebook; this lowbit reads 1")
    if not isinstance(groups, list):
        raise ValueError(f"groups is {groups!r}; a list is needed")
    specs: dict[str, WeightSpec] = {}
    for place, group in enumerate(groups):
        spec = _stated_spec(group, f"groups[{place}]")
        linears = group["linears"]
        if not isinstance(linears, list) or not all(isinstance(linear, str) and linear for linear in linears):
            raise ValueError(f"groups[{place}].linears is {str(linears)[:60]}; a list of names is needed")
        for linear in linears:
            if linear in specs:
                raise ValueError(f"groups[{place}] names {linear} again")
            specs[linear] = spec
    return specs


def _stated_spec(group: Any, where: str) -> WeightSpec:
    if not isinstance(group, dict) or set(group) != _KEYS:
        found = ", ".join(sorted(map(str, group))) if isinstance(group, dict) else repr(group)[:60]
        raise ValueError(f"{where} has {found or 'nothing'}; {', '.join(sorted(_KEYS))} are needed")
    kind, size, outliers = (group["number"], group["bits"]), group["group_size"], group["outliers"]
    if not isinstance(kind[0], str) or type(kind[1]) is not int or kind not in _KINDS:
        known = ", ".join(f"{number} of {bits}" for number, bits in sorted(_KINDS))
        raise ValueError(f"{where} is {kind[0]!r} of {kind[1]!r} bits; {known} are read")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"{where}.group_size is {size!r}; null or a number above 0 is needed")
    if isinstance(outliers, bool) or not isinstance(outliers, int | float) or not 0 <= outliers <= _MAX_OUTLIERS:
        raise ValueError(f"{where}.outliers is {outliers!r}; a percentage of 0 to {_MAX_OUTLIERS:g} is needed")
    granularity = Granularity.CHANNEL if size is None else Granularity.GROUP
    return WeightSpec(kind[0], kind[1], granularity, size, outliers=float(outliers))  # type: ignore[arg-type]


def parts_of(spec: WeightSpec, shape: tuple[int, int]) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
    """Leaf → (dtypes, shape) of the stored tensors of a linear [N, K]."""
    rows, columns = shape
    groups, count = -(-columns // spec.columns_per_scale(columns)), spec.outliers_per_row(columns)
    parts: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]
    parts = {"weight": ((torch.int32,), (rows, columns * spec.bits // 32))}
    if spec.number == "kmeans":
        parts["table"] = (_HALF, (rows, groups << spec.bits))
    else:
        parts |= {"scale": (_HALF, (rows, groups)), "base": ((torch.uint8,), (rows, groups))}
    if count:
        parts |= {"outlier_columns": ((torch.uint16,), (rows, count)), "outlier_values": (_HALF, (rows, count))}
    return parts


def unpacked(spec: WeightSpec, columns: int, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """Rows of a weight from the parts of them, leaf → tensor; ValueError begins with the leaf that is wrong."""
    codes = kernels.unpack_dense(parts["weight"].contiguous(), spec.bits, columns, offset=0)
    if spec.number == "kmeans":
        table = parts["table"].float().reshape(len(codes), -1, 1 << spec.bits)
        if not bool(table.isfinite().all()):
            raise ValueError("table holds NaN or inf")
        scale = torch.ones_like(table[..., 0])
    else:
        scale, steps = parts["scale"].float(), parts["base"]
        if not bool(((steps >= STEPS[0]) & (steps <= STEPS[-1])).all()):
            raise ValueError(f"base holds a number that is not within {STEPS[0]} .. {STEPS[-1]}")
        table = log_tables(spec.bits, steps)
    outliers = None
    if "outlier_columns" in parts:
        chosen, values = parts["outlier_columns"].to(torch.int64), parts["outlier_values"].float()
        if not bool((chosen.diff(dim=1) > 0).all() and (chosen < columns).all()):
            raise ValueError(f"outlier_columns do not rise within 0 .. {columns - 1}")
        if not bool(values.isfinite().all()):
            raise ValueError("outlier_values holds NaN or inf")
        outliers = SparseOutliers(chosen, values)
    group_size = spec.columns_per_scale(columns)
    grid = grid_for(spec, "float16")
    return QuantizedTensor(codes, scale, grid, spec.granularity, group_size, table=table, outliers=outliers)
