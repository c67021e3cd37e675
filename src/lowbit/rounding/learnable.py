"""Differentiable decoding: a stored weight of fixed codes as a function of its scales.

    weight = learnable(target, stored)                or LearnableVector(values, dtype)
    changes = weight.start()                          name → float32 zeros: what an optimizer moves
    weight.decoded(changes)                           float32 [N, K], with gradients to the changes
    weight.gradients(changes, of_weight)              name → gradient, of the gradient of a loss in the weight
    weight.stored(changes)                            what a file keeps; it decodes to `decoded(changes)`, bit for bit

A change is relative (`numerics.straight_through`): a scale becomes start · exp(change), rounded to the precision in
which the format stores it, and the gradient passes through that rounding. So a file is what was trained, and changes
of zero are the weight as it came.

    grids            scale                   float16, bfloat16, float32, E4M3 within its tensor scale, E8M0 …; of
                                             logarithmic codes too
                     absmax                  of double quantization, float32 per block of scales
    ggml types       d, dmin, m, scales, minima, e    halves, integer sub-scales, E8M0, E4M3 (`numerics.ggml.learnable`)

Fixed: codes and zero points; scales that are integers below one of their row (QoQ); tensor scales, which fused sets
share (NVFP4's second level, FP8 with a scale per tensor); the mean that double quantization subtracts; the values of
k-means, and outliers. Floats (F16 …) have no parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lowbit.numerics import ggml
from lowbit.numerics.fitted_grids import KMeansGrid
from lowbit.numerics.ggml.learnable import changed, parameter_names
from lowbit.numerics.ggml.types import Blocks, GgmlType, family, find_type
from lowbit.numerics.scales import NESTED_BLOCK, decode_scales
from lowbit.numerics.straight_through import changed_scale, straight_through
from lowbit.rounding.target import GridTarget, ScaledBlocks, Stored, Target
from lowbit.tensors import Granularity, QuantizedTensor

Changes = Mapping[str, Tensor]


class Learnable(ABC):
    """A stored tensor as a function of what can change in it."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter → its shape; empty if nothing of the weight can change."""

    @abstractmethod
    def decoded(self, changes: Changes) -> Tensor:
        """Float32 with these changes, a weight as [N, K]; parameters that are missing do not change."""

    @abstractmethod
    def stored(self, changes: Changes) -> Stored:
        """Codes and changed scales, or the values of a vector, as a writer takes them."""

    def start(self) -> dict[str, Tensor]:
        """No change."""
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def gradients(self, changes: Changes, of_weight: Tensor) -> dict[str, Tensor]:
        """Gradients of a loss in the changes, by name, from its gradient in the tensor, of any float dtype."""
        if not changes:
            return {}
        leaves = {name: change.detach().requires_grad_() for name, change in changes.items()}
        with torch.enable_grad():
            decoded = self.decoded(leaves)
            found = torch.autograd.grad(decoded, list(leaves.values()), of_weight.to(decoded), allow_unused=True)
        return {name: torch.zeros_like(leaves[name]) if gradient is None else gradient
                for name, gradient in zip(leaves, found, strict=True)}  # fmt: skip


def learnable(target: Target, stored: Stored) -> Learnable:
    """The learnable form of what a target stores.

    Scales are rounded to the `scale_format` of the grid, which has to be the one of the file.
    """
    if isinstance(stored, QuantizedTensor):
        return _GridWeight(stored)
    return _GgmlWeight(find_type(target.name), stored)


def count_parameters(target: Target, shape: tuple[int, int]) -> int:
    """How many numbers the learnable form of a weight [N, K] has, without rounding one."""
    rows, columns = shape
    if isinstance(target, GridTarget):
        groups = math.prod(target.spec.granularity.scale_shape(rows, columns, target.spec.columns_per_scale(columns)))
        if target.is_nested:
            return -(-groups // NESTED_BLOCK)
        fixed = target.spec.granularity is Granularity.TENSOR or target.spec.scale_format == "qoq"
        return 0 if fixed else groups
    kind = find_type(target.name)
    one = family(kind).unpack(kind, torch.zeros((1, kind.size), dtype=torch.uint8))
    return rows * (columns // kind.weights) * sum(one.stored[name].shape[1] for name in parameter_names(one))


class LearnableVector(Learnable):
    """The weight or bias of a norm, or the bias of a linear: start + unit · change, rounded to the dtype of the file.

    The unit is the root mean square of the values, so that a change of 1 % is one of a typical entry; of a vector of
    zeros it is 1.
    """

    def __init__(self, values: Tensor, dtype: torch.dtype):
        self._start, self._dtype = values.to(dtype), dtype
        size = self._start.float().square().mean().sqrt()
        self._unit = torch.where(size > 0, size, torch.ones_like(size))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"values": tuple(self._start.shape)}

    def decoded(self, changes: Changes) -> Tensor:
        if "values" not in changes:
            return self._start.float()
        wanted = self._start.float() + self._unit * changes["values"]
        return straight_through(wanted, wanted.detach().to(self._dtype).float())

    def stored(self, changes: Changes) -> Tensor:
        with torch.no_grad():
            return self.decoded(changes).to(self._dtype)


class _GridWeight(Learnable):
    def __init__(self, stored: QuantizedTensor):
        self._stored = stored
        self._columns = stored.codes.shape[1]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self._stored.nested is not None:
            return {"absmax": tuple(self._stored.nested.absmax.shape)}
        grid = self._stored.grid
        whole = self._stored.granularity is Granularity.TENSOR
        if whole or isinstance(grid, KMeansGrid) or grid.scale_format == "qoq":  # type: ignore[attr-defined]
            return {}
        return {"scale": tuple(self._stored.scale.shape)}

    def decoded(self, changes: Changes) -> Tensor:
        params, group = replace(self._stored, scale=self._scale(changes)).grouped()
        decoded = _multiplied(self._values, params.scale, group)
        return decoded if self._stored.outliers is None else self._stored.outliers.placed(decoded)

    def stored(self, changes: Changes) -> QuantizedTensor:
        with torch.no_grad():
            scale = self._scale(changes)
            nested = self._stored.nested
            if nested is not None:
                nested = replace(nested, absmax=self._absmax(changes))
        return replace(self._stored, scale=scale, nested=nested)

    @property
    def _values(self) -> Tensor:
        """The unscaled values of the codes, float32 [N, K]."""
        params, group = self._stored.grouped()
        ones = replace(params, scale=torch.ones_like(params.scale))
        return self._stored.grid.decode(self._stored.codes, ones, group)

    def _scale(self, changes: Changes) -> Tensor:
        """The scales, of the shape of the granularity."""
        if self._stored.nested is not None:
            return decode_scales(replace(self._stored.nested, absmax=self._absmax(changes)))
        if "scale" not in changes:
            return self._stored.scale
        scale_format = self._stored.grid.scale_format  # type: ignore[attr-defined]
        return changed_scale(self._stored.scale, changes["scale"], scale_format, self._stored.global_scale)

    def _absmax(self, changes: Changes) -> Tensor:
        """Those of double quantization; a block that would get a scale of 0 or less keeps its own."""
        nested = self._stored.nested
        assert nested is not None
        if "absmax" not in changes:
            return nested.absmax
        wanted = changed_scale(nested.absmax, changes["absmax"], "float32")
        with torch.no_grad():
            scales = decode_scales(replace(nested, absmax=wanted)).reshape(-1)
            padded = torch.nn.functional.pad(scales, (0, -len(scales) % nested.block), value=1.0)
            sound = padded.reshape(-1, nested.block).amin(dim=1) > 0
        return torch.where(sound, wanted, nested.absmax)


class _GgmlWeight(Learnable):
    def __init__(self, kind: GgmlType, stored: Stored):
        assert not isinstance(stored, QuantizedTensor)
        self._kind = kind
        self._matrix_scale = stored.scale if isinstance(stored, ScaledBlocks) else None
        self._bytes = stored.blocks if isinstance(stored, ScaledBlocks) else stored
        self._columns = self._bytes.shape[1] // kind.size * kind.weights

    @property
    def _blocks(self) -> Blocks:
        return family(self._kind).unpack(self._kind, self._bytes)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        one = family(self._kind).unpack(self._kind, self._bytes[:1])
        return {name: (len(self._bytes), one.stored[name].shape[1]) for name in parameter_names(one)}

    def decoded(self, changes: Changes) -> Tensor:
        if not changes:
            weight = ggml.decode(self._kind.name, self._bytes)
        else:
            blocks = self._blocks
            new = changed(self._kind, blocks, changes)
            values = family(self._kind).value(self._kind, blocks.codes)
            group = self._columns // new.scale.shape[1]
            weight = _multiplied(values, new.scale, group)
            if new.offset is not None:
                weight = weight + _per_column(new.offset, group, self._columns)
        return weight if self._matrix_scale is None else weight * self._matrix_scale

    def stored(self, changes: Changes) -> Stored:
        blocks = self._blocks
        new = changed(self._kind, blocks, {name: change.detach() for name, change in changes.items()})
        packed = family(self._kind).pack(self._kind, blocks.codes, new.stored) if changes else self._bytes
        return packed if self._matrix_scale is None else ScaledBlocks(packed, self._matrix_scale)


def _multiplied(values: Tensor, scale: Tensor, group: int) -> Tensor:
    """Values [N, K] times scales [N, G] of `group` columns each, one float32 multiplication per weight."""
    return values * _per_column(scale, group, values.shape[1])


def _per_column(params: Tensor, group: int, columns: int) -> Tensor:
    """[N, G] → [N, columns], by an expansion where groups are whole: its gradient is a plain sum."""
    if params.shape[1] * group == columns:
        return params[:, :, None].expand(-1, -1, group).reshape(len(params), columns)
    return params.repeat_interleave(group, dim=1)[:, :columns]
