"""Signed gradient descent on rounding (AutoRound, "SignRound": Cheng et al. 2023, arXiv 2309.05516).

    ŵ = s · (clamp(rint(w / s + z + V)) − z)      V in −1/2 .. 1/2 for every weight, s = stored(s₀ · m), m near 1
    V ← V − lr · sign(∂L/∂V)                      m likewise; lr falls linearly to 0
    L = mean ‖block(x) − block_Ŵ(x̃)‖²             x from the float model, x̃ from the quantized blocks before

All linears of a transformer block are tuned at once on the block's output, so that one linear can compensate errors of
another. Asymmetric grids tune both ends of the range. Gradients pass straight through rounding and stop at clipped
weights. V uses only their sign, so it needs just ∂L/∂ŵ, which autograd leaves in the linear's weight.

Grids with uneven steps (FP4, NF4) are rounded on the index of their values: u(x) is linear between two neighbours, so
that rint(u) is the nearest value and an offset of 1/2 is half a step everywhere.

Every step ends on storable scales. Scales that rows share, that are powers of two or codes themselves stay fixed, and
only offsets are tuned. The result is the best of several evaluations on the same windows, the start included. Refused:
vector codebooks and ggml types, whose codes do not stand for single weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbit.errors import NonFiniteError, UsageError
from lowbit.numerics.precision import has_fast_bfloat16
from lowbit.numerics.scalar_grids import IntGrid
from lowbit.numerics.scales import storable_scale
from lowbit.rounding.target import GridTarget, LinearSlot, Rounded
from lowbit.tensors import Granularity, Grid, GroupParams, QuantizedTensor

if TYPE_CHECKING:
    from lowbit.settings import Settings

Call = Callable[[nn.Module, Tensor], Tensor]

_CHUNK = 1 << 17  # weights at a time, so that temporaries stay in the cache
_SMALLEST_MULTIPLIER, _LARGEST_MULTIPLIER = 0.5, 1.5


@dataclass(frozen=True)
class SignSGDOptions:
    """
    iterations          200 is AutoRound's default, 1000 its best setting
    batch_windows       windows per iteration
    learning_rate       of offsets, in steps of the grid; None: 1 / iterations, so that an offset can just reach ±1/2
    scale_rate          learning rate of range ends over that of offsets; AutoRound uses 8 at four bits
    evaluations         comparisons with the best so far, on `evaluation_windows` windows
    margin              distance from the cell's edge, in steps, of start codes that are not the nearest
    bfloat16            run the block under autocast; None: if bfloat16 is faster on this processor
    """

    iterations: int = 200
    batch_windows: int = 8
    learning_rate: float | None = None
    scale_rate: float = 2.0
    evaluations: int = 10
    evaluation_windows: int = 16
    margin: float = 0.1
    bfloat16: bool | None = None
    seed: int = 0

    @classmethod
    def of(cls, settings: Settings) -> SignSGDOptions:
        """The user's settings, defaults for the rest."""
        return cls(iterations=settings.iterations, seed=settings.seed)


def sign_sgd_block(
    module: nn.Module, call: Call, inputs: Tensor, targets: Tensor, linears: dict[str, LinearSlot],
    options: SignSGDOptions | None = None,
) -> dict[str, Rounded]:  # fmt: skip
    """Tune all linears of a block; the result has the keys of `linears`, and the module is restored.

    module    a decoder block with float weights
    call      call(module, x [b, T, H]) → hidden states [b, T, H]
    inputs    float [windows, T, H], hidden states after the quantized blocks before; may be memory-mapped
    targets   float [windows, T, H]: the block's output in the float model

    Deterministic for a seed, a machine and a number of threads. A loss that is not finite ends the descent with the
    best result so far and a note. UsageError for targets without single codes, NonFiniteError if the block's output is
    not finite at the start.
    """
    options = options or SignSGDOptions()
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise UsageError(f"sign-SGD needs inputs and targets of the same windows, not {len(inputs)} and {len(targets)}")
    tuned = {name: _Tuned(name, slot, options) for name, slot in linears.items()}
    if not tuned:
        return {}
    frozen = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for one in tuned.values():
        one.module.weight = one.parameter
    try:
        run = _Descent(module, call, inputs, targets, list(tuned.values()), options)
        run.descend()
    finally:
        for one in tuned.values():
            one.module.weight = one.original
        for parameter in frozen:
            parameter.requires_grad_(True)
    return {name: Rounded(one.best, one.best.decode(), run.notes) for name, one in tuned.items()}


class _Descent:
    """The loop over batches; `notes` hold its outcome."""

    def __init__(self, module: nn.Module, call: Call, inputs: Tensor, targets: Tensor, tuned: list[_Tuned],
                 options: SignSGDOptions):  # fmt: skip
        self.module, self.call, self.inputs, self.targets = module, call, inputs, targets
        self.tuned, self.options = tuned, options
        self.device = tuned[0].parameter.device
        self.bfloat16 = _in_bfloat16(options, tuned[0].parameter)
        generator = torch.Generator().manual_seed(options.seed)
        self.batches = _batches(len(inputs), options.batch_windows, generator)
        judged = torch.randperm(len(inputs), generator=generator)[: options.evaluation_windows]
        self.judged = judged.sort().values.split(options.batch_windows)
        self.notes: tuple[str, ...] = ()

    def descend(self) -> None:
        options = self.options
        rate = options.learning_rate if options.learning_rate is not None else 1.0 / max(1, options.iterations)
        every = max(1, options.iterations // max(1, options.evaluations))
        start = best = self._evaluate()
        if not torch.isfinite(torch.tensor(start)):
            raise NonFiniteError(
                "the output of a block with its linears rounded is not finite",
                "check the weights and the calibration text; round this model with GPTQ or to nearest",
            )
        for iteration in range(options.iterations):
            loss = self._backward(next(self.batches))
            if not torch.isfinite(loss):
                self.notes = (f"sign-SGD stopped: the loss was not finite in iteration {iteration + 1}",)
                break
            now = rate * (1.0 - iteration / options.iterations)
            for one in self.tuned:
                one.step(now, now * options.scale_rate)
            if (iteration + 1) % every == 0 or iteration + 1 == options.iterations:
                found = self._evaluate()
                if found < best:
                    best = found
                    for one in self.tuned:
                        one.keep()
        self.notes += (f"sign-SGD: loss {start:.4g} → {best:.4g}",)

    def _backward(self, windows: Tensor) -> Tensor:
        """The loss of a batch; leaves the gradient in the weights."""
        for one in self.tuned:
            one.parameter.grad = None
        with torch.enable_grad():
            loss = self._loss(windows)
            loss.backward()
        return loss.detach()

    def _evaluate(self) -> float:
        """The mean loss over the evaluation windows."""
        with torch.no_grad():
            losses = [self._loss(windows).double() * len(windows) for windows in self.judged]
        return (torch.stack(losses).sum() / sum(len(windows) for windows in self.judged)).item()

    def _loss(self, windows: Tensor) -> Tensor:
        x, wanted = (values[windows].to(self.device, torch.float32) for values in (self.inputs, self.targets))
        x = x if self.bfloat16 else x.to(self.tuned[0].parameter.dtype)
        with torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext():
            found = self.call(self.module, x)
        return (found.float() - wanted).square().mean(dim=-1).mean()


class _Tuned:
    """One linear while it is tuned: offsets and scale multipliers, float32 [N, G, g] and [N, G].

    best  codes and scales of the best evaluation so far
    """

    def __init__(self, name: str, slot: LinearSlot, options: SignSGDOptions):
        weight = slot.module.weight.detach()
        self.module, self.original = slot.module, slot.module.weight
        stored = _start(name, slot, weight)
        self.best = stored
        self.columns = weight.shape[1]
        params, self.group_size = stored.grouped()
        # Each row and group has a scale of its own that can move in small steps.
        fine = stored.grid.scale_format not in ("e8m0", "nested", "qoq") and stored.nested is None  # type: ignore[attr-defined]
        self.scale_is_free = fine and stored.granularity in (Granularity.GROUP, Granularity.CHANNEL)
        self.global_scale = params.global_scale
        self.scale0, self.zero0 = params.scale.float(), params.zero_point
        self.values = _Values(stored.grid, weight.device)
        self.scale, self.zero_point = self.scale0, self.zero0
        self.low = torch.ones_like(self.scale0)  # multiplies the range's lower end, or the scale where there is one
        self.high = torch.ones_like(self.scale0)
        self.grid = stored.grid
        self.base = self._within_cells(self._grouped(weight.float()), self._grouped(stored.codes), options.margin)
        self.offset = torch.zeros_like(self.base)
        dtype = torch.bfloat16 if _in_bfloat16(options, weight) else weight.dtype
        self.parameter = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=weight.device))
        self.write()

    def step(self, rate: float, scale_rate: float) -> None:
        """One step down the gradient of the parameter, then `write`; rates in steps of the grid."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        toward_scale, toward_zero = torch.zeros_like(self.scale0), torch.zeros_like(self.scale0)
        for rows in self._chunks():
            slope = self._grouped(gradient[rows].float())
            x = self.base[rows] / self.scale[rows, :, None]
            position = self.values.position(x, self._zero(rows)).add_(self.offset[rows])
            index = position.round_()
            nearest = index.clamp(0, self.values.count - 1)
            inside = index == nearest
            self.offset[rows].sub_(slope.sign() * inside, alpha=rate).clamp_(-0.5, 0.5)
            if self.scale_is_free:
                moved = self.values.at(nearest, self._zero(rows)).sub_(x.mul_(inside))
                toward_scale[rows] = (slope * moved).sum(dim=-1)
                if self.zero0 is not None:
                    toward_zero[rows] = -(slope * ~inside).sum(dim=-1)
        if self.scale_is_free:
            self._move_scales(toward_scale, toward_zero * self.scale, scale_rate * 2.0 / self.values.count)
        self.write()

    def write(self) -> None:
        """Write the rounded weights into the parameter that the block reads."""
        with torch.no_grad():
            for rows in self._chunks():
                decoded = self.values.at(self._index(rows), self._zero(rows)).mul_(self.scale[rows, :, None])
                self.parameter[rows] = decoded.flatten(1)[:, : self.columns].to(self.parameter.dtype)

    def keep(self) -> None:
        """Record the current codes and scales as the best so far."""
        codes = torch.empty_like(self.best.codes)
        for rows in self._chunks():
            codes[rows] = self.values.codes[self._index(rows).long()].flatten(1)[:, : self.columns].to(codes.dtype)
        changed: dict[str, Tensor | None] = {"codes": codes}
        if self.scale_is_free:
            changed |= {"scale": self.scale.clone(), "zero_point": self.zero_point}
        self.best = replace(self.best, **changed)  # type: ignore[arg-type]

    def _index(self, rows: slice) -> Tensor:
        """Index of each weight's current value in the grid; float32 [rows, G, g]."""
        position = self.values.position(self.base[rows] / self.scale[rows, :, None], self._zero(rows))
        return position.add_(self.offset[rows]).round_().clamp_(0, self.values.count - 1)

    def _move_scales(self, toward_scale: Tensor, toward_zero: Tensor, rate: float) -> None:
        """One signed step of the multipliers; toward_* are ∂L/∂scale and ∂L/∂zero_point [N, G]."""
        limits = _SMALLEST_MULTIPLIER, _LARGEST_MULTIPLIER
        if self.zero0 is None:
            self.low = (self.low - rate * toward_scale.sign()).clamp(*limits)
            wanted = self.scale0 * self.low
            self.scale = storable_scale(wanted, self.grid.scale_format, self.global_scale)  # type: ignore[attr-defined]
            return
        grid = self.grid
        assert isinstance(grid, IntGrid)
        # scale = (high − low) / steps and zero point = qmin − low / scale
        low0, high0 = (grid.qmin - self.zero0) * self.scale0, (grid.qmax - self.zero0) * self.scale0
        toward_scale = toward_scale + toward_zero * low0 * self.low / self.scale.square()
        steps = grid.qmax - grid.qmin
        toward_low, toward_high = -toward_scale / steps - toward_zero / self.scale, toward_scale / steps
        self.low = (self.low - rate * (toward_low * low0).sign()).clamp(*limits)
        self.high = (self.high - rate * (toward_high * high0).sign()).clamp(*limits)
        params = grid.params_from_range(low0 * self.low, high0 * self.high)
        self.scale, self.zero_point = params.scale, params.zero_point

    def _within_cells(self, weight: Tensor, codes: Tensor, margin: float) -> Tensor:
        """Weights [N, G, g], moved `margin` deep into the cell of their code if they do not round to it."""
        values, out = self.values, torch.empty_like(weight)
        for rows in self._chunks():
            zero, scale = self._zero(rows), self.scale[rows, :, None]
            position = values.position(weight[rows] / scale, zero)
            index = values.index_of(codes[rows])
            clipped = position.round().clamp(0, values.count - 1)
            depth = torch.where(clipped == index, 1e-3, margin)
            least = torch.where(index == 0, -torch.inf, index - 0.5 + depth)
            moved = position.clamp(least, torch.where(index == values.count - 1, torch.inf, index + 0.5 - depth))
            out[rows] = torch.where(moved == position, weight[rows], values.weight_at(moved, zero) * scale)
        return out

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[N, K] → [N, G, g]; the last group is filled up with zeros."""
        groups = self.scale0.shape[1]
        missing = groups * self.group_size - matrix.shape[1]
        if missing:
            matrix = nn.functional.pad(matrix, (0, missing))
        return matrix.reshape(matrix.shape[0], groups, self.group_size)

    def _zero(self, rows: slice) -> Tensor | None:
        return None if self.zero_point is None else self.zero_point[rows, :, None].float()

    def _chunks(self) -> Iterator[slice]:
        rows, step = self.scale0.shape[0], max(1, _CHUNK // self.columns)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _Values:
    """The values of a grid in ascending order, as positions 0 .. count − 1; integers shifted by a zero point.

    codes  the code of every position
    """

    def __init__(self, grid: Grid, device: torch.device):
        count = 1 << grid.bits
        self.even = isinstance(grid, IntGrid)
        if isinstance(grid, IntGrid):
            self.values = torch.arange(grid.qmin, grid.qmax + 1, device=device).float()
            self.codes = self.values.to(torch.int8)
        else:
            codes = torch.arange(count, dtype=torch.uint8, device=device)[None]
            found = grid.decode(codes, GroupParams(torch.ones(1, 1, device=device)), count)[0]
            codes = codes[0][found.isfinite()]
            ordered, order = found[found.isfinite()].sort(stable=True)
            first = torch.ones_like(order, dtype=torch.bool)  # two zeros are one value
            first[1:] = ordered[1:] != ordered[:-1]
            self.values, self.codes = ordered[first], codes[order[first]]
            of_code = torch.searchsorted(self.values, found.nan_to_num(0.0).clamp(self.values[0], self.values[-1]))
            self.of_code = of_code.float()
        self.count = len(self.values)
        self.gaps = self.values.diff()

    def position(self, x: Tensor, zero_point: Tensor | None) -> Tensor:
        """Position of x = w / scale among the values, in steps between neighbours; extrapolates beyond the ends."""
        if self.even:
            return x - self.values[0] if zero_point is None else x + (zero_point - self.values[0])
        below = (torch.bucketize(x, self.values, right=True) - 1).clamp_(0, self.count - 2)
        return (x - self.values[below]).div_(self.gaps[below]).add_(below)

    def weight_at(self, position: Tensor, zero_point: Tensor | None) -> Tensor:
        """The inverse of `position`."""
        if self.even:
            return position + self.values[0] if zero_point is None else position + self.values[0] - zero_point
        below = position.floor().clamp(0, self.count - 2).long()
        return self.values[below] + (position - below) * self.gaps[below]

    def at(self, index: Tensor, zero_point: Tensor | None) -> Tensor:
        """The values at whole positions, float32."""
        if self.even:
            return index + self.values[0] if zero_point is None else index + (self.values[0] - zero_point)
        return self.values[index.long()]

    def index_of(self, codes: Tensor) -> Tensor:
        return codes.float() - self.values[0] if self.even else self.of_code[codes.long()]


def _start(name: str, slot: LinearSlot, weight: Tensor) -> QuantizedTensor:
    target = slot.target
    if not isinstance(target, GridTarget) or target.columns_per_code != 1:
        raise UsageError(
            f"{name}: sign-SGD cannot tune {target.name}, whose codes do not stand for single weights",
            "use --method gptq for this type",
        )
    stored = (slot.start or target.nearest(weight)).stored
    if not isinstance(stored, QuantizedTensor) or stored.grid != target.grid:
        raise AssertionError(f"{name}: the start is not on the grid {target.name}")
    if stored.g_idx is not None:
        raise UsageError(
            f"{name}: sign-SGD cannot start from groups in activation order",
            "use static groups, which engines prefer too",
        )
    return stored


def _in_bfloat16(options: SignSGDOptions, weight: Tensor) -> bool:
    return has_fast_bfloat16(str(weight.device)) if options.bfloat16 is None else options.bfloat16


def _batches(windows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of window indices; every window comes once before any comes again."""
    size = min(size, windows)
    left = torch.empty(0, dtype=torch.long)
    while True:
        if len(left) < size:
            left = torch.cat([left, torch.randperm(windows, generator=generator)])
        yield left[:size]
        left = left[size:]
