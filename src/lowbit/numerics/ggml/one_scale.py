"""Shared by the encoders of blocks with one scale: sub-blocks as columns, and the search for their scale.

    x ≈ d·v, v of a grid; for values v the best d is Σ w·x·v / Σ w·v·v and explains (Σ w·x·v)² / Σ w·v·v of Σ w·x·x

n weights of B sub-blocks are a matrix [n, B], so that one operation serves all sub-blocks. Sums run over j = 0, 1, …
in order and in float32, which is what makes the compiled core (csrc/ggml/one_scale.hpp) produce the same bytes.

A sub-block is brought into [−2, 2] by a power of two, which is exact, and its importance likewise; so neither the
smallest nor the largest floats leave the range in which sums of squares are finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbit.numerics.ggml.types import LARGEST_HALF

# Importance is at least this fraction of the largest in its block: one without importance is weighted uniformly,
# and a sub-block without importance beside important ones still gets a sensible scale.
LEAST_IMPORTANCE = 2.0**-20
# The inverse of anything smaller is taken as 0, because it might not be finite.
_LEAST_SCALE = 2.0**-120
# Adding and subtracting 1.5 · 2^23 leaves the nearest integer, ties to even.
ROUNDER = 12582912.0


class ScaleGrid(Protocol):
    """Values in units of the scale. A place is x / scale · per_step; `per_step` is chosen for easy lookup."""

    per_step: float
    scan_clamped: bool

    def bounded(self, place: Tensor) -> Tensor:
        """The place, clamped to the domain of `value` and `code`."""
        ...

    def value(self, place: Tensor) -> Tensor:
        """The value nearest to a place, float32."""
        ...

    def code(self, place: Tensor) -> Tensor:
        """Its code, uint8."""
        ...


@dataclass(frozen=True)
class Tile:
    """B sub-blocks of n weights value · unit.

    value       float32 [n, B]
    importance  float32 [n, B], all > 0
    unit        float32 [B]     a power of two; per_unit is its inverse
    """

    value: Tensor
    importance: Tensor
    unit: Tensor
    per_unit: Tensor


@dataclass(frozen=True)
class ScaleFit:
    """Best scale for given codes, float32 [B], by how much it reduces Σ w·x·x, and Σ w·v·v."""

    scale: Tensor
    gain: Tensor
    curvature: Tensor


def load_tile(weight: Tensor, importance: Tensor | None, n: int, run: int = 1) -> Tile:
    """Sub-blocks of n weights of rows [N, K]; `run` neighbours share a unit."""
    value, unit, per_unit = _normalize(weight.float().reshape(-1, n).T.contiguous(), run)
    if importance is None:
        return Tile(value, torch.ones_like(value), unit, per_unit)
    columns = importance.float().reshape(-1, n).repeat(weight.shape[0], 1).T.contiguous()
    weighed = _normalize(columns, run)[0]
    return Tile(value, weighed.clamp(min=LEAST_IMPORTANCE), unit, per_unit)


def _normalize(values: Tensor, run: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values over the power of two of the largest magnitude of `run` columns; that power and its inverse, [B]."""
    largest = values.abs().amax(dim=0).reshape(-1, run).amax(dim=1).repeat_interleave(run)
    field = (largest.view(torch.int32) >> 23).clamp(1, 253)
    unit, per_unit = (field << 23).view(torch.float32), ((254 - field) << 23).view(torch.float32)
    return values * per_unit, unit, per_unit


def ordered_sum(terms: Tensor) -> Tensor:
    """[n, B] → [B], summed sequentially in float32."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def sum_of_runs(values: Tensor, run: int) -> Tensor:
    """[B] → [B]: the sum of each `run` neighbours, added in order from the first, for all of them."""
    first, *others = values.reshape(-1, run).unbind(dim=1)
    for term in others:
        first = first + term
    return first.repeat_interleave(run)


def inverse_or_zero(values: Tensor) -> Tensor:
    """1 / v, and 0 where v is so small that this might not be finite."""
    return torch.where(values.abs() < _LEAST_SCALE, torch.zeros_like(values), 1.0 / values)


def nearest(values: Tensor) -> Tensor:
    """Nearest integer, ties to even, for magnitudes up to 2^22."""
    return (values + ROUNDER) - ROUNDER


def extreme(tile: Tile) -> Tensor:
    """The value of largest magnitude of each sub-block, [B]; the first of several."""
    most, at = torch.zeros_like(tile.unit), torch.zeros_like(tile.unit)
    for value in tile.value:
        more = value.abs() > most
        most, at = torch.where(more, value.abs(), most), torch.where(more, value, at)
    return at


def fit_scale(grid: ScaleGrid, tile: Tile, inverse: Tensor, clamped: bool = True) -> ScaleFit:
    """The best scale for the codes that result from an inverse scale [B]."""
    place = tile.value * inverse
    value = grid.value(grid.bounded(place) if clamped else place)
    weighed = tile.importance * value
    xv, vv = ordered_sum(weighed * tile.value), ordered_sum(weighed * value)
    scale = xv * inverse_or_zero(vv)
    return ScaleFit(scale, scale * xv, vv)


def _better(fit: ScaleFit, best: ScaleFit) -> ScaleFit:
    better = fit.gain > best.gain
    return ScaleFit(
        torch.where(better, fit.scale, best.scale),
        torch.where(better, fit.gain, best.gain),
        torch.where(better, fit.curvature, best.curvature),
    )


def search_scale(grid: ScaleGrid, tile: Tile, ends: tuple[float, ...], steps: int) -> ScaleFit:
    """The best of the scales that map the value of largest magnitude to one of `ends`.

    Then bettered `steps` times by rounding anew with the fitted scale.
    """
    zeros = torch.zeros_like(tile.unit)
    best = ScaleFit(zeros, zeros, zeros)
    inverse = inverse_or_zero(extreme(tile))
    per_step = torch.tensor(grid.per_step, dtype=torch.float32)
    for end in torch.tensor(ends, dtype=torch.float32) * per_step:
        best = _better(fit_scale(grid, tile, inverse * end, grid.scan_clamped), best)
    for _ in range(steps):
        best = _better(fit_scale(grid, tile, inverse_or_zero(best.scale) * per_step), best)
    return best


def places(grid: ScaleGrid, tile: Tile, scale: Tensor) -> Tensor:
    """x / scale of each weight, in the grid's steps and bounds, [n, B]."""
    return grid.bounded(tile.value * (inverse_or_zero(scale) * torch.tensor(grid.per_step, dtype=torch.float32)))


def squared_error(grid: ScaleGrid, tile: Tile, scale: Tensor) -> Tensor:
    """Σ w·(x − scale·v)² of the values nearest to x / scale, [B]."""
    off = tile.value - scale * grid.value(places(grid, tile, scale))
    return ordered_sum(tile.importance * off * off)


def codes(grid: ScaleGrid, tile: Tile, scale: Tensor, rows: int) -> Tensor:
    """Nearest codes of all weights given scales [B] in units of the tile: uint8 [rows, K]."""
    return grid.code(places(grid, tile, scale)).T.reshape(rows, -1)


def half_bits(values: Tensor) -> Tensor:
    """Bits of the nearest half, saturated: int32."""
    return values.clamp(-LARGEST_HALF, LARGEST_HALF).half().view(torch.int16).int() & 0xFFFF


def float_of_half_bits(bits: Tensor) -> Tensor:
    """The numbers that bits of halves, int32, stand for."""
    return bits.to(torch.int16).view(torch.float16).float()


def best_half(grid: ScaleGrid, tile: Tile, scale: Tensor) -> Tensor:
    """Bits of the half of least error among the one nearest to a scale [B] and its two neighbours."""
    middle = half_bits(scale * tile.unit)
    best, least = middle, squared_error(grid, tile, float_of_half_bits(middle) * tile.per_unit)
    for step in (-1, 1):
        half = ((middle & 0x7FFF) + step).clamp(0, 0x7BFF) | (middle & 0x8000)
        error = squared_error(grid, tile, float_of_half_bits(half) * tile.per_unit)
        best, least = torch.where(error < least, half, best), torch.where(error < least, error, least)
    return best


def halves(bits: Tensor, rows: int) -> Tensor:
    """Bits [B] → float16 [rows, B / rows]."""
    return bits.to(torch.int16).view(torch.float16).reshape(rows, -1)


def pack_nibbles(codes: Tensor, n: int) -> Tensor:
    """uint8 [N, K] below 16 → [N, K / n, n / 2]: byte j of n codes has code j (low half) and code j + n / 2 (high)."""
    low, high = codes.reshape(codes.shape[0], -1, 2, n // 2).unbind(dim=2)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse: uint8 [N, B, n / 2] → [N, B · n]."""
    return torch.cat((packed & 15, packed >> 4), dim=2).flatten(1)
