"""How K-quants are fitted: codes, integer sub-scales and half-precision scales of least Σ weight · (x − x̂)².

`fit_affine` is for x̂ = d·s·q − dmin·m (Q2_K, Q4_K, Q5_K), `fit_signed` for x̂ = d·s·q with signs (Q3_K, Q6_K). Both go

    1. Each sub-block separately. Many ranges are tried (with ends a little inside or outside the range of the
       weights); given the codes of a range, the best scale and minimum are a weighted least-squares fit, whose error is
       known in closed form. The best fit is rounded and fitted once more.
    2. d, then dmin: near its optimum the error of a sub-block is quadratic in its scale, so many d (those that make the
       largest scale 63, 62, … steps) can be tried on all sub-blocks without touching the weights.
    3. Sub-scales (and minima): neighbouring integers are compared by exact error. Then d and dmin are fitted by least
       squares given all codes and integers, and neighbours are compared again; the best round is kept.

The weight of a squared error is its importance relative to the super-block's mean: models made with it are nearer to
the original than with a product of importance and |x|. Without importance it is sqrt(mean x² + x²), since the largest
weights tend to meet the largest activations.

Every sum runs over one index in order, in float32, which is what the compiled encoder does too: the bytes are the same.
x is float32 [n, S, G]: n weights of G sub-blocks of S super-blocks. |x| below 1e-12 counts as zero and above 3e8, more
than any type can hold, as 3e8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.numerics.ggml.types import LARGEST_HALF

LARGEST, SMALLEST, FLOOR = 3e8, 1e-12, 1e-5


@dataclass(frozen=True)
class AffineKind:
    """Constants of a type, and the extent of the search.

    groups, codes, scales   sub-blocks; the largest code; the largest sub-scale and sub-minimum
    least_top   the largest sub-scale of a super-block is one of scales … least_top
    rounds      number of refits of d and dmin
    ends        positions tried for the smallest and the largest weight, in codes from the ends of the code range
    neighbours  offsets of sub-scale and sub-minimum to try
    """

    groups: int
    codes: float
    scales: float
    least_top: int
    rounds: int
    ends: tuple[float, ...]
    neighbours: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SignedKind:
    """Constants of a type, and the extent of the search.

    codes, scales   codes are −codes … codes − 1, sub-scales −scales … scales − 1
    least_top   the largest sub-scale of a super-block is one of scales … least_top
    overhangs   where the weight of largest magnitude may lie, in codes beyond the last code
    """

    codes: float
    scales: float
    least_top: int
    overhangs: tuple[float, ...]
    groups: int = 16


_NEAR = ((1, 1), (-1, -1), (0, 1), (0, -1))
AFFINE = {
    "Q2_K": AffineKind(16, 3, 15, 8, 2, (0.1, -0.15, -0.4, -0.7), (*_NEAR, (1, 0), (-1, 0))),
    "Q4_K": AffineKind(8, 15, 63, 24, 1, (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0), _NEAR),
    "Q5_K": AffineKind(8, 31, 63, 24, 1, (-0.55, -0.3, -0.05, 0.2, 0.45, 0.7), _NEAR),
}
SIGNED = {
    "Q3_K": SignedKind(4, 32, 16, (-0.6, -0.1, 0.4, 0.9, 1.4, 2.0, 2.7, 3.5, 4.6)),
    "Q6_K": SignedKind(32, 128, 108, (-0.7, -0.3, 0.1, 0.5, 1.0, 2.0)),
}
_SIGNED_ROUNDS = 1


@dataclass(frozen=True)
class ScaleChoice:
    """codes float32 [n, S, G]; d, dmin float16 [S]; scales, minima float32 [S, G], integers. Signed: no minima."""

    codes: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor | None = None
    minima: Tensor | None = None


def weighed(weight: Tensor, importance: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """x and the weight of its squared errors, [n, S, G] both, of rows [N, K] and importance [K]."""
    x = _by_group(weight.to(torch.float32), 16).clamp(-LARGEST, LARGEST)
    x = torch.where(x.abs() < SMALLEST, 0.0, x)
    if importance is None:
        squares = x * x
        # torch's float32 square root is not always the nearest number; that of float64 rounded to float32 is
        weights = (_mean(squares)[:, None] + squares).to(torch.float64).sqrt().to(torch.float32)
    else:
        values = _by_group(importance.to(torch.float32).expand(weight.shape), 16)
        mean = _mean(values)[:, None]
        weights = torch.where(mean == 0, 1.0, values / mean + FLOOR)
    return _regroup(x, groups), _regroup(weights, groups)


def fit_affine(kind: AffineKind, x: Tensor, weight: Tensor) -> ScaleChoice:
    """Codes and parameters of x [n, S, G], errors weighted by weight [n, S, G]."""
    sum_w, sum_x = _sum(weight), _sum(weight * x)
    scale, sum_q, curvature = _affine_groups(kind, x, weight, sum_w, sum_x)
    d = _best_step(scale, curvature, kind.scales, kind.least_top)
    s = (scale * _inverse(d)[:, None]).clamp(max=kind.scales).round()
    low = (sum_x - d[:, None] * s * sum_q) * _inverse(sum_w)
    least = torch.where(low < 0, -low, 0.0)
    dmin = _best_step(least, sum_w, kind.scales, kind.least_top)
    m = (least * _inverse(dmin)[:, None]).clamp(max=kind.scales).round()

    best = (d.new_full(d.shape, torch.inf), d * 0, dmin * 0, s * 0, m * 0)
    for round_ in range(kind.rounds + 1):
        s, m, errors = _affine_neighbours(kind, x, weight, d, dmin, s, m)
        error = _sum(errors.T)
        best = _take(error < best[0], (error, d, dmin, s, m), best)
        if round_ < kind.rounds:
            d, dmin = _affine_least_squares(kind, x, weight, d, dmin, s, m, sum_w, sum_x)
    _, d, dmin, s, m = best
    codes = _code(x + dmin[:, None] * m, _inverse(d[:, None] * s), 0.0, kind.codes)
    return ScaleChoice(codes, d.to(torch.float16), s, dmin.to(torch.float16), m)


def _affine_groups(kind: AffineKind, x: Tensor, weight: Tensor, sum_w: Tensor, sum_x: Tensor):
    """Step 1 → scale, Σ weight·q and curvature of the error of every sub-block, x ≈ scale · q + low, low ≤ 0."""
    low, high = x.amin(0).clamp(max=0.0), x.amax(0)
    zero = torch.zeros_like(low)
    per_weight = _inverse(sum_w)
    best_low = (sum_x * per_weight).clamp(max=0.0)
    best = (best_low * sum_x, zero, best_low, zero, zero)  # gain, scale, low, sum_q, sum_qq

    def improve(factor: Tensor, shift: Tensor, best):
        codes = (x * factor + shift).clamp(0.0, kind.codes).round()
        q, qq, qx = _sums(weight * codes, codes, x)
        determinant = sum_w * qq - q * q
        scale = (sum_w * qx - sum_x * q) / determinant
        low = (sum_x - scale * q) * per_weight
        free = (determinant > 1e-5 * (sum_w * qq)) & (low <= 0)
        scale = torch.where(free, scale, qx / qq)
        low = torch.where(free, low, 0.0)
        gain = scale * qx + low * sum_x
        better = (gain > best[0]) & (scale > 0)
        return _take(better, (gain, scale, low, q, qq), best)

    per_range = _inverse(high - low)
    ends = np.asarray(kind.ends, np.float32)
    for first in ends:
        for last in ends:
            factor = float(np.float32(kind.codes) - last - first) * per_range
            best = improve(factor, float(first) - low * factor, best)
    factor = _inverse(best[1])
    _, scale, _, q, qq = improve(factor, -best[2] * factor, best)
    return scale, q, qq - q * q * per_weight


def _affine_neighbours(kind: AffineKind, x, weight, d, dmin, scales, minima):
    """The best of the neighbours of sub-scales and minima, and its error, [S, G]."""

    def error_of(s: Tensor, m: Tensor) -> Tensor:
        scale = d[:, None] * s
        above = x + dmin[:, None] * m
        off = _code(above, _inverse(scale), 0.0, kind.codes) * scale - above
        return _sum(weight * off * off)

    best = (error_of(scales, minima), scales, minima)
    for step_s, step_m in kind.neighbours:
        s, m = (scales + step_s).clamp(0.0, kind.scales), (minima + step_m).clamp(0.0, kind.scales)
        error = error_of(s, m)
        best = _take(error < best[0], (error, s, m), best)
    return best[1], best[2], best[0]


def _affine_least_squares(kind: AffineKind, x, weight, d, dmin, s, m, sum_w, sum_x):
    """d and dmin of least Σ weight · (d·s·q − dmin·m − x)², given the current codes q."""
    factor = _inverse(d[:, None] * s)
    codes = (x * factor + dmin[:, None] * m * factor).clamp(0.0, kind.codes).round()
    q, qq, qx = _sums(weight * codes, codes, x)
    ss, sm, mm = _sum((s * s * qq).T), _sum((s * m * q).T), _sum((m * m * sum_w).T)
    sx, mx = _sum((s * qx).T), _sum((m * sum_x).T)
    determinant = ss * mm - sm * sm
    regular = determinant > 1e-5 * (ss * mm)
    new_d = torch.where(regular, (mm * sx - sm * mx) / determinant, sx * _inverse(ss))
    new_dmin = torch.where(regular, (sm * sx - ss * mx) / determinant, dmin)
    return _as_half(torch.where(new_d > 0, new_d, d)), _as_half(torch.where(new_dmin > 0, new_dmin, dmin))


def fit_signed(kind: SignedKind, x: Tensor, weight: Tensor) -> ScaleChoice:
    """Codes and parameters of x [n, S, G], errors weighted by weight [n, S, G]."""
    scale, curvature = _signed_groups(kind, x, weight)
    d = _best_signed_step(kind, scale, curvature)
    s = (scale * _inverse(d)[:, None]).clamp(-kind.scales, kind.scales - 1).round()

    def code(scale: Tensor) -> Tensor:
        return _code(x, _inverse(scale), -kind.codes, kind.codes - 1)

    def error_of(s: Tensor) -> Tensor:
        off = code(d[:, None] * s) * (d[:, None] * s) - x
        return _sum(weight * off * off)

    best = (d.new_full(d.shape, torch.inf), d * 0, s * 0)
    for round_ in range(_SIGNED_ROUNDS + 1):
        errors, old = error_of(s), s
        for step in (-1, 1):
            near = (old + step).clamp(-kind.scales, kind.scales - 1)
            error = error_of(near)
            s, errors = torch.where(error < errors, near, s), torch.where(error < errors, error, errors)
        error = _sum(errors.T)
        best = _take(error < best[0], (error, d, s), best)
        if round_ < _SIGNED_ROUNDS:
            codes = code(d[:, None] * s)
            _, qq, qx = _sums(weight * codes, codes, x)
            ss, sx = _sum((s * s * qq).T), _sum((s * qx).T)
            d = _as_half(torch.where(ss > 0, sx / ss, d))
    _, d, s = best
    return ScaleChoice(code(d[:, None] * s), d.to(torch.float16), s)


def _signed_groups(kind: SignedKind, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Step 1 → scale and curvature of every sub-block, x ≈ scale · q."""
    extreme = x[0]
    for value in x[1:]:
        extreme = torch.where(value.abs() > extreme.abs(), value, extreme)
    best = (torch.zeros_like(extreme),) * 3  # gain, scale, curvature

    def improve(factor: Tensor, best):
        codes = _code(x, factor, -kind.codes, kind.codes - 1)
        _, qq, qx = _sums(weight * codes, codes, x)
        scale = qx / qq
        gain = scale * qx
        return _take(gain > best[0], (gain, scale, qq), best)

    overhangs = np.asarray(kind.overhangs, np.float32)
    for end in np.concatenate([-np.float32(kind.codes) - overhangs, np.float32(kind.codes - 1) + overhangs]):
        best = improve(_inverse(extreme) * float(end), best)
    return improve(_inverse(best[1]), best)[1:]


def _best_step(values: Tensor, weights: Tensor, top: float, least_top: int) -> Tensor:
    """Step 2: the step [S] whose multiples 0 … top lie nearest to values ≥ 0 [S, G], as a half in float32."""
    largest = values.amax(1)
    candidates = [(float(steps), largest / steps) for steps in range(int(top), least_top - 1, -1)]
    return _nearest_multiples(values, weights, largest, candidates, -torch.inf, torch.inf)


def _best_signed_step(kind: SignedKind, values: Tensor, weights: Tensor) -> Tensor:
    """The same for signed values: the largest is at −top … −least_top or least_top … top − 1 steps."""
    extreme = values[:, 0]
    for value in values.T[1:]:
        extreme = torch.where(value.abs() > extreme.abs(), value, extreme)
    top = int(kind.scales)
    order = range(2 * (top - kind.least_top) + 1)
    candidates = [(float(n), extreme / n) for n in (top - (k + 1) // 2 if k % 2 else k // 2 - top for k in order)]
    return _nearest_multiples(values, weights, extreme, candidates, -kind.scales, kind.scales - 1)


def _nearest_multiples(values, weights, largest, candidates, least: float, most: float) -> Tensor:
    """The step of least Σ weight · (value − step · integer)² among candidates (steps in the largest value, step).

    As a half, rounded away from 0 where rounding towards it would lose much (the step is a few times 2^-24, the least
    half), so that the largest multiple does not fall short.
    """
    best = (torch.full_like(largest, torch.inf), torch.zeros_like(largest))
    for steps, step in candidates:
        integers = (values * (_inverse(largest) * steps)[:, None]).clamp(least, most).round()
        off = values - integers * step[:, None]
        error = _sum((weights * off * off).T)
        best = _take(error < best[0], (error, step), best)
    step = best[1]
    half = _as_half(step)
    more = step + torch.where(step < 0, -(2.0**-25), 2.0**-25)
    return torch.where(half.abs() < step.abs() * (1 - 2**-8), _as_half(more), half)


def _code(x: Tensor, factor: Tensor, least: float, most: float) -> Tensor:
    return (x * factor).clamp(least, most).round()


def _sums(weighted_codes: Tensor, codes: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ weight·q, Σ weight·q², Σ weight·q·x over the weights of a sub-block."""
    return _sum(weighted_codes), _sum(weighted_codes * codes), _sum(weighted_codes * x)


def _sum(terms: Tensor) -> Tensor:
    """Sum over the first dimension, in order."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _mean(values: Tensor) -> Tensor:
    """[16, S, 16] → [S]: sub-block by sub-block."""
    return _sum(_sum(values).T) * (1 / 256)


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, 1.0 / values)


def _as_half(values: Tensor) -> Tensor:
    return values.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16).to(torch.float32)


def _take(better: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`new` where better, else `old`; better per super-block also chooses what is per sub-block."""

    def mask(values: Tensor) -> Tensor:
        return better if better.dim() == values.dim() else better[:, None]

    return tuple(torch.where(mask(mine), mine, theirs) for mine, theirs in zip(new, old, strict=True))


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """[N, K] → [256 / groups, S, groups]."""
    return rows.reshape(-1, groups, 256 // groups).permute(2, 0, 1).contiguous()


def _regroup(values: Tensor, groups: int) -> Tensor:
    """[16, S, 16] → [256 / groups, S, groups]."""
    return _by_group(values.permute(1, 2, 0).reshape(-1, 256), groups)
