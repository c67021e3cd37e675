"""The plan of a linear in a folder: which scheme it gets, what its shape makes of that, what is stored for it.

    the user's --ignore, then --override, then the default of leaving lm_head, then the scheme
    → a group size that divides in_features → the tensors that the format stores

A scheme that does not fit a shape is adapted with a note, or the linear stays in 16 bits with the reason.
Refused: a group size of the user's that does not divide in_features; a weight that is no 16- or 32-bit float.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.architecture import Architecture, Linear
from lowbit.architecture.inspection import why_no_float
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError, ShapeError, UsageError
from lowbit.export import Exporter
from lowbit.methods import RTN, Rounding, parse_method
from lowbit.numerics import grid_for
from lowbit.plan.plan import Making, PlannedTensor
from lowbit.registry import FORMATS
from lowbit.rounding.target import GridTarget, Target
from lowbit.rounding.widen import widened
from lowbit.schemes import Scheme
from lowbit.settings import DEFAULT_IGNORE, Settings
from lowbit.tensors import Granularity, QuantizedTensor, RangeSearch

if TYPE_CHECKING:
    from lowbit.calibrate.store import BlockStore

# Group sizes that vLLM, SGLang and TensorRT-LLM have kernels for.
ENGINE_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class StoredRows:
    """A tensor of the source, under its own name.

    turned   True for a linear's weight that the files hold as [K, N]
    columns  K of a linear
    """

    name: str
    turned: bool = False
    columns: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Tensor:
        if self.turned:
            return checkpoint.read(self.name)[:, first:last].t().contiguous()
        return checkpoint.read(self.name, first, last)

    def read_calibrated(self, store: BlockStore, target: Target, first: int, last: int) -> QuantizedTensor:
        assert isinstance(target, GridTarget)
        return store.quantized(self.name.removesuffix(".weight"), target.spec, target.grid, self.columns, first, last)

    def repack(self, checkpoint: Checkpoint, target: Target, first: int, last: int) -> QuantizedTensor:
        assert isinstance(target, GridTarget)
        return widened(checkpoint.read_quantized(self.name, first, last), target.spec)


def common_group_sizes(architecture: Architecture, settings: Settings) -> dict[Scheme, int]:
    """Scheme → a group size that divides all its linears, for schemes whose own divides only some of them.

    One size keeps one group in the config, which all loaders read alike; without one `_fit_to_shape` adapts each layer.
    """
    columns: dict[Scheme, set[int]] = {}
    for linear in architecture.linears.values():
        scheme, _ = _choose(linear, settings)
        if scheme is not None and scheme.weight.group_size_is_free:
            columns.setdefault(scheme, set()).add(linear.shape[1])
    common = {}
    for scheme, widths in columns.items():
        own = scheme.weight.group_size or 1
        fitting = [size for size in ENGINE_GROUP_SIZES if size <= own and all(width % size == 0 for width in widths)]
        if fitting and any(width % own for width in widths):
            common[scheme] = fitting[0]
    return common


@dataclass(frozen=True)
class LinearPlanner:
    """Plans the weights of linears. common: scheme → the group size of all its linears"""

    checkpoint: Checkpoint
    settings: Settings
    dtype: torch.dtype
    exporter: Exporter
    common: dict[Scheme, int]

    def planned(self, tensor: PlannedTensor, linear: Linear) -> PlannedTensor:
        """With the scheme of the settings, adapted to its shape, or with the reason for none."""
        info = self.checkpoint.tensors[tensor.name]
        scheme, reason = _choose(linear, self.settings)
        if (
            self.exporter.FORMAT == "mxfp4"
            and linear.expert is None
            and self.settings.override_for(linear.name) is None
        ):
            scheme, reason = None, reason or "mxfp4 holds experts only; loaders expect everything else in 16 bits"
        if scheme is None:
            return replace(tensor, reason=reason)
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise CheckpointError(f"{info.file}: tensor {info.name} is {info.stored}, not a 16- or 32-bit float",
                                  why_no_float(info))  # fmt: skip
        scheme, notes, reason = _fit_to_shape(linear, scheme, self.settings, self.common)
        if reason is not None:
            return replace(tensor, reason=reason, unfit=True)
        return replace(self.with_scheme(tensor, linear, scheme), notes=notes)

    def with_scheme(self, tensor: PlannedTensor, linear: Linear, scheme: Scheme) -> PlannedTensor:
        self.exporter.storage_format(scheme)  # FormatError where the format has no such numbers
        reason = self.exporter.unfit(linear.shape, scheme)
        if reason is not None:
            return replace(tensor, reason=f"{self.exporter.FORMAT} cannot hold it: {reason}", unfit=True)
        if scheme.activation is not None and self.exporter.FORMAT != "float":
            reason = scheme.activation.unfit(linear.shape[1])
            if reason is not None:
                return replace(tensor, reason=reason, unfit=True)
        blockwise = self.settings.is_blockwise and linear.block is not None
        rounding = self.settings.rounding_of(linear.name)
        if scheme.weight.is_fitted:
            _refuse_scales_only(linear, scheme, rounding, parse_method(self.settings.method).learned)
        turned = linear.transposed and tensor.name not in self.checkpoint.schemes
        return replace(
            tensor,
            scheme=scheme,
            reason=None,
            making=Making.calibrated if blockwise else Making.rounded,
            rounding=RTN if rounding.needs_text else rounding,  # no block of the text meets it
            source=StoredRows(tensor.name, turned, linear.shape[1]),
            multiple=math.lcm(tensor.multiple, self.exporter.row_multiple(scheme, linear.shape)),
            **stored_as(linear, scheme, self.dtype, self.exporter, self.settings),
        )


def _refuse_scales_only(linear: Linear, scheme: Scheme, *roundings: Rounding | None) -> None:
    """UsageError for a method that moves the scales of fixed values, where values are fitted."""
    for rounding in roundings:
        if rounding is not None and rounding.scales_only:
            raise UsageError(f"{linear.name}: {rounding.name} moves the scales of fixed values, and those of "
                             f"{scheme.name} are fitted to the weights", "take --method gptq, or rtn")  # fmt: skip


def stored_as(
    linear: Linear, scheme: Scheme, dtype: torch.dtype, exporter: Exporter, settings: Settings
) -> dict[str, Any]:
    """The fields of a planned tensor that depend on the float dtype of its scales."""
    needless = exporter.needless(scheme) if linear.fused is not None and linear.expert is None else ()
    stored = tuple(tensor for tensor in exporter.stored_tensors(linear.name, linear.shape, scheme, dtype)
                   if tensor.name.rpartition(".")[2] not in needless)  # fmt: skip
    if linear.transposed and exporter.FORMAT == "float":  # the model class stores it as [K, N]
        stored = tuple(replace(tensor, shape=tensor.shape[::-1]) for tensor in stored)
    signed = FORMATS[exporter.FORMAT].signed_scales and scheme.may_sign_scales and not settings.positive_scales
    target = _grid_target(scheme, dtype, exporter, settings.range_search(scheme.weight), signed)
    return {"stored": stored, "dtype": dtype, "target": target}


@lru_cache(maxsize=256)
def _grid_target(
    scheme: Scheme, dtype: torch.dtype, exporter: Exporter, search: RangeSearch, signed: bool
) -> GridTarget:
    """The grid, with scales as the format stores them; cached, since most linears share one."""
    grid = grid_for(scheme.weight, exporter.scale_format(scheme, dtype), exporter.lowest_zero_point(scheme), signed)
    return GridTarget(scheme.weight, grid, search)


def _choose(linear: Linear, settings: Settings) -> tuple[Scheme | None, str | None]:
    """Scheme, or the reason for none: the user's ignore, then overrides, then the default ignore, then the scheme."""
    if linear.keep is not None:
        return None, linear.keep
    pattern = settings.ignored_by(linear.name)
    if pattern is not None:
        return None, f"matches --ignore {pattern}"
    override = settings.override_for(linear.name)
    if override is not None:
        return override, None
    if linear.block is None:
        if re.search(DEFAULT_IGNORE, linear.name):
            return None, "the output layer stays in 16 bits by default; --override 'lm_head=SCHEME' quantizes it"
        return None, "outside the decoder blocks"
    return settings.base_scheme(), None


def _fit_to_shape(
    linear: Linear, scheme: Scheme, settings: Settings, common: dict[Scheme, int]
) -> tuple[Scheme, tuple[str, ...], str | None]:
    """(the scheme with a group size that divides K, notes on changes, the reason where none fits)."""
    weight = scheme.weight
    columns = linear.shape[1]
    if scheme in common and settings.group_size is None:
        note = f"group size {common[scheme]} in all layers, because {weight.group_size} does not divide some of them"
        return scheme.with_group_size(common[scheme]), (note,), None
    if weight.granularity is not Granularity.GROUP or weight.group_size is None or columns % weight.group_size == 0:
        return scheme, (), None
    if not weight.group_size_is_free:
        return scheme, (), f"in_features {columns} is not a multiple of {weight.group_size}, which {scheme.name} fixes"
    # the largest group size up to the scheme's that engines have kernels for, else the nearest divisor
    own = weight.group_size
    fitting = [size for size in ENGINE_GROUP_SIZES if size <= own and columns % size == 0]
    divisors = [size for size in range(2, columns + 1) if columns % size == 0]
    divisor = fitting[0] if fitting else min(divisors, key=lambda size: abs(size - own), default=columns)
    if settings.group_size is not None:
        raise ShapeError(
            f"{linear.name}: in_features {columns} is not a multiple of group size {weight.group_size}",
            f"choose --group-size {divisor}, or leave it out to have it chosen for each layer",
        )
    note = f"group size {divisor}, because {weight.group_size} does not divide in_features {columns}"
    return scheme.with_group_size(divisor), (note,), None
