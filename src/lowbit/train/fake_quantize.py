"""Fake quantization of a parameter: forward, what a file of its codes decodes to; backward, straight through.

    ŵ = s · (clamp(rint(w / s) + z) − z)        any grid, any ggml type
    ∂ŵ/∂w = 1 within the range of the grid, 0 beyond it

Scales of grids are learned (LSQ: Esser et al. 2020, arXiv 1902.08153). A scale is s = stored(s₀ · exp(θ)), rounded to
the precision of the file with the gradient of what was rounded (`numerics.straight_through`):

    ∂ŵ/∂θ = ŵ − w within the range, ŵ beyond it            LSQ's gradient times s

s₀ is fitted to the weights, or, of a model that was quantized to the same grid, the scale that it has: fitted to
decoded weights it would be another one, and every code would change before the first step.

θ is relative, which takes the place of LSQ's gradient scale: one learning rate fits scales of every size. Zero points
of integers are learned beside them (LSQ+: Bhalgat et al. 2020, arXiv 2004.09576), as shares φ of the range of codes:

    z = clamp(rint(z₀ + φ · (q_max − q_min)), q_min, q_max)        ∂ŵ/∂z = 0 within the range, −s beyond it

Scales of a whole tensor, which fused sets share (NVFP4's second level, FP8), stay those of the start.

Fitted anew in every forward pass by the type's own encoder, from the weights as they are: ggml types, double
quantization, scales below one of their row (QoQ), and grids with `learn_scales=False`. Ternary types take the absmean
of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764):

    s = mean |w| of the matrix, codes = clamp(rint(w / s), −1, 1)        TQ1_0, TQ2_0, the scheme TERNARY

and, as BitNet has it, every weight gets its gradient, also beyond ±s, where four in ten of them lie.

A weight that is not finite raises NonFiniteError, before its codes would be anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lowbit.architecture.structure import Part
from lowbit.errors import NonFiniteError
from lowbit.kernels.tables import Codebook, MinifloatFormat
from lowbit.numerics.scalar_grids import IntGrid
from lowbit.numerics.straight_through import changed_scale, straight_through
from lowbit.rounding.rtn import Fitted
from lowbit.rounding.target import GridTarget, Stored, Target
from lowbit.tensors import Granularity, QuantizedTensor

TERNARY = ("TQ1_0", "TQ2_0")  # ggml types; the scheme of that name has its scale from `rounding.rtn`


@dataclass(frozen=True)
class QuantizedPart:
    """One linear in a parameter: the whole of it, or a part, of one expert.

    turned  the parameter has it as [K, N]
    """

    linear: str
    target: Target
    part: Part
    expert: int | None = None
    turned: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """The view [N, K] of the linear's weight in a parameter."""
        values = self.part.of(parameter if self.expert is None else parameter[self.expert])
        return values.t() if self.turned else values


def learns_scales(target: Target) -> bool:
    """True for grids with scales of their own: of rows, groups or blocks, stored as numbers."""
    if not isinstance(target, GridTarget) or target.is_nested or target.spec.scale_format == "qoq":
        return False
    return target.spec.granularity != Granularity.TENSOR


class FakeQuantize(nn.Module):
    """A parametrization (torch.nn.utils.parametrize) of one parameter.

    parts    what is quantized in it; the rest passes through
    changes  θ of each part with learned scales, float32, by its number
    shifts   φ of those that have zero points
    scales   linear → its scales in the model that training starts from; passed over where the grid is another

    `hold` rounds once: forward passes and an export then have these codes, whatever the parameter is, and compute in
    the dtype that it had then.
    """

    lowbit_fake_quantization = True

    def __init__(
        self, parameter: Tensor, parts: Sequence[QuantizedPart], learn_scales: bool = True,
        scales: Mapping[str, Fitted] = MappingProxyType({}),
    ):  # fmt: skip
        super().__init__()
        self.parts = tuple(parts)
        self.changes, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        self._fitted: dict[int, Fitted] = {}
        self._held: dict[int, tuple[Stored, Tensor]] = {}
        self._computes = parameter.dtype
        for index, each in enumerate(self.parts):
            if learn_scales and learns_scales(each.target):
                weight = each.of(parameter.detach()).float().contiguous()
                _refuse_not_finite(weight, each.linear)
                assert isinstance(each.target, GridTarget)
                fitted = _known(scales.get(each.linear), each.target, weight) or each.target.fit(weight)
                self.register_buffer(f"scale_{index}", fitted.scale)
                self.register_buffer(f"zero_point_{index}", fitted.zero_point)
                self._fitted[index] = replace(fitted, scale=fitted.scale[:0], zero_point=None)
                self.changes[str(index)] = nn.Parameter(torch.zeros_like(fitted.scale))
                if fitted.zero_point is not None:
                    self.shifts[str(index)] = nn.Parameter(torch.zeros_like(fitted.scale))

    def forward(self, parameter: Tensor) -> Tensor:
        """The parameter with its linears rounded, in its own dtype."""
        if len(self.parts) == 1 and self.parts[0].part.whole and self.parts[0].expert is None:
            only = self.parts[0]
            weight = self._through(0, only.of(parameter))
            return weight.t() if only.turned else weight
        rounded = parameter.to(self._computes if self._held else parameter.dtype, copy=True)
        for index, each in enumerate(self.parts):
            each.of(rounded).copy_(self._through(index, each.of(parameter)))
        return rounded

    @torch.no_grad()
    def hold(self, parameter: Tensor) -> None:
        """Round a parameter, and keep these codes from now on."""
        self._held.clear()
        self._computes = parameter.dtype
        self._held = {index: self.rounded(index, parameter) for index in range(len(self.parts))}

    @torch.no_grad()
    def shift(self, shift: Tensor) -> None:
        """Move the minima of held codes by float32 [N, G]; of a parameter that is one linear.

        NonFiniteError where one leaves the range of what the file stores.
        """
        (only,), (stored, _) = self.parts, self._held[0]
        moved = only.target.shifted(stored, shift)
        _refuse_not_finite(moved.decoded, only.linear)
        self._held[0] = (moved.stored, moved.decoded)

    def let_go(self) -> None:
        """Round the parameter itself again, in every forward pass."""
        self._held.clear()

    @torch.no_grad()
    def rounded(self, index: int, parameter: Tensor) -> tuple[Stored, Tensor]:
        """(what a file keeps of a part, the float32 weight that it decodes to), as the forward pass has them."""
        return self._rounded(index, self.parts[index].of(parameter.detach()).float().contiguous())

    def _through(self, index: int, weight: Tensor) -> Tensor:
        """The rounded weight [N, K] with the gradients of the module docstring; without any where it is held."""
        if index in self._held:
            return self._held[index][1].to(self._computes)
        with torch.no_grad():
            plain = weight.detach().float().contiguous()
            stored, decoded = self._rounded(index, plain)
            target = self.parts[index].target
            clipped = isinstance(stored, QuantizedTensor) and not _is_ternary(target)
            inside = _inside(target, plain, stored) if clipped and isinstance(stored, QuantizedTensor) else None
        wanted = weight if inside is None else weight * inside
        if inside is not None and str(index) in self.changes:
            change = _per_weight(self.changes[str(index)], stored, weight.shape)
            wanted = wanted.float() + change * (decoded - plain * inside)
        if inside is not None and str(index) in self.shifts:
            assert isinstance(stored, QuantizedTensor)
            grid, scale = self._integers(index), _per_weight(stored.scale, stored, weight.shape)
            codes = (grid.qmax - grid.qmin) * _per_weight(self.shifts[str(index)], stored, weight.shape)
            wanted = wanted.float() - codes * scale * ~inside
        return straight_through(wanted.to(weight.dtype), decoded.to(weight.dtype))

    def _rounded(self, index: int, weight: Tensor) -> tuple[Stored, Tensor]:
        if index in self._held:
            return self._held[index]
        each = self.parts[index]
        _refuse_not_finite(weight, each.linear)
        if index in self._fitted:
            grid, global_scale = self._fitted[index].grid, self._fitted[index].global_scale
            start: Tensor = getattr(self, f"scale_{index}")
            scale = changed_scale(start, self.changes[str(index)], grid.scale_format, global_scale)  # type: ignore[attr-defined]
            zero_point: Tensor | None = getattr(self, f"zero_point_{index}")
            if zero_point is not None:
                zero_point = self._moved(index, zero_point)
            stored = replace(self._fitted[index], scale=scale, zero_point=zero_point).round(weight)
            return stored, stored.decode()
        target = each.target
        if target.name in TERNARY:
            weight = absmean_ternary(weight)
        elif _is_ternary(target):
            target = target.ranged(target.measured(weight))
        rounded = target.nearest(weight)
        return rounded.stored, rounded.decoded

    def _integers(self, index: int) -> IntGrid:
        """The grid of a part with zero points."""
        grid = self._fitted[index].grid
        assert isinstance(grid, IntGrid), "no other grid has zero points and learns scales"
        return grid

    def _moved(self, index: int, start: Tensor) -> Tensor:
        """The zero points of a part as they are now."""
        grid = self._integers(index)
        lowest = grid.qmin if grid.lowest_zero_point is None else grid.lowest_zero_point
        wanted = start + self.shifts[str(index)] * (grid.qmax - grid.qmin)
        return wanted.round().clamp(lowest, grid.qmax).to(start.dtype)


def _known(scales: Fitted | None, target: GridTarget, weight: Tensor) -> Fitted | None:
    """Scales of the same grid for a weight, in the precision of the target; None where they are of another one."""
    if scales is None or scales.nested is not None or scales.grid.name != target.grid.name:
        return None
    group_size = target.spec.columns_per_scale(weight.shape[1])
    if (scales.granularity, scales.group_size) != (target.spec.granularity, group_size):
        return None
    return replace(scales, grid=target.grid, scale=scales.scale.to(weight.device))


def _is_ternary(target: Target) -> bool:
    """True for the scheme TERNARY: its scale follows the weights, and all of them learn."""
    return isinstance(target, GridTarget) and target.spec.number == "ternary"


def _inside(target: Target, weight: Tensor, stored: QuantizedTensor) -> Tensor:
    """True for weights within the values that the grid has at these scales, [N, K]."""
    assert isinstance(target, GridTarget)
    levels = target.levels
    if isinstance(levels, MinifloatFormat):
        low, high = -levels.max_value, levels.max_value
    elif isinstance(levels, Codebook):
        low, high = min(levels.values), max(levels.values)
    else:
        assert levels is not None, "values that are fitted are not trained"
        low, high = float(levels.lowest), float(levels.highest)
    params, group = stored.grouped()
    zero = 0.0 if params.zero_point is None else params.zero_point
    ends = [_across(end * params.scale, group, weight.shape[1]) for end in (low - zero, high - zero)]
    return (weight >= torch.minimum(*ends)) & (weight <= torch.maximum(*ends))  # a scale may be negative


def absmean_ternary(weight: Tensor) -> Tensor:
    """s · clamp(rint(w / s), −1, 1), s = mean |w| of the whole matrix; zeros where all weights are."""
    scale = weight.abs().mean()
    if not scale > 0:
        return torch.zeros_like(weight)
    return (weight / scale).round().clamp(-1, 1) * scale


def _per_weight(change: Tensor, stored: Stored, shape: torch.Size) -> Tensor:
    """θ of every weight, [N, K], of one per row, group or block."""
    assert isinstance(stored, QuantizedTensor)
    params = replace(stored, scale=change, zero_point=None).params()
    return _across(params.scale, stored.columns_per_scale, shape[1])


def _across(params: Tensor, group: int, columns: int) -> Tensor:
    """[N, G] → [N, columns], each for `group` columns; the last group may be short."""
    return params.repeat_interleave(group, dim=1)[:, :columns] if params.shape[1] > 1 else params.expand(-1, columns)


def _refuse_not_finite(weight: Tensor, linear: str) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"{linear}.weight holds NaN or inf: the last step of the training went wrong",
            "stop at a loss that is not finite, before the optimizer's step; go back to the last good state, and lower "
            "the learning rate",
        )
