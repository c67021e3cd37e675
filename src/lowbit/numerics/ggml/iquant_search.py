"""How the i-quants are encoded: the points of a scale exactly, the scales by a short search.

Everything below is stated for sub-blocks [S, n] of n = 32 or 16 columns in blocks of 256, normalized: weights by the
largest magnitude of their block, importance w by its largest value. Where signs are stored separately, x is the
magnitude; where the number of negative signs must be even and is not, the sign of the x with the least w x² is flipped.
Sums are sequential, in float32.

1.  A free scale per sub-block. Given points g, the best scale is Σ w x g / Σ w g², and it reduces the squared error by
    (Σ w x g)² / Σ w g². IQ2, IQ3: of a few candidate scales, keep the points with the largest reduction; candidates are
    `guesses` times the scale that maps the largest magnitude to the largest level, then the best scale so far. IQ1,
    whose points are a third of all patterns: the points at one scale, `guesses` times the ratio of root mean squares,
    with the shifts for which rounding to levels (whether or not they form a point) has the least error.
2.  d of the block: of 32 candidates around (largest scale) / (largest odd number), the one for which the scales lie
    nearest to odd multiples of it, weighted by Σ w g². It is rounded to half precision, within its range.
3.  The points again, at the nearest scale that can be stored; with `neighbours`, at the better of the two nearest.
4.  Flipped signs move to the column where a flip costs least; d is refitted by least squares, given points and
    sub-scales, and rounded to half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.ggml.iquant_layout import GridIndex, grid, index_of
from lowbit.numerics.ggml.types import LARGEST_HALF

BLOCK = 256
SHIFT = 0.125  # IQ1: points are shifted by this much, up or down
LEAST_IMPORTANCE = 2.0**-20
NOTHING = 1e-9  # blocks of smaller weights become zeros
LEAST_COST = 1e-30  # keeps the costs of second halves, whose lowest bits are reused, out of the denormal range
PATTERN_MASK = 127
STEPS_TRIED = 32
CHUNK = 2048  # vectors searched at once


@dataclass(frozen=True)
class Search:
    """What the search depends on besides the grid.

    group           columns of a sub-block
    sub_scales      stored sub-scales are 0 … sub_scales − 1
    unit            effective scale = d · unit · (2 · sub-scale + 1)
    signs           "even", "free" or "none"; none: points are shifted up or down
    shift_columns   columns that share a shift
    guesses         see 1 above
    neighbours      1 or 2, see 3 above
    """

    group: int
    sub_scales: int
    unit: float
    signs: str
    shift_columns: int
    guesses: tuple[float, ...]
    neighbours: int


@dataclass(frozen=True)
class Found:
    """Of sub-blocks: scale and d (half, of their block), points, shifts (−1, 1 or 0), signs (1 where negative)."""

    sub_scale: Tensor  # float32 [S]
    d: Tensor  # float16 [B]
    entry: Tensor  # int32 [S, points]
    shift: Tensor  # float32 [S, points]
    negative: Tensor  # bool [S, n]


@dataclass(frozen=True)
class _Points:
    """Points of sub-blocks: number int64, shift float32 [S, points]; Σ w x g and Σ w g² [S]."""

    entry: Tensor
    shift: Tensor
    sxg: Tensor
    sgg: Tensor


@dataclass(frozen=True)
class _Tile:
    x: Tensor
    w: Tensor
    negative: Tensor
    unit: Tensor  # [B]


def search(type_name: str, how: Search, weight: Tensor, importance: Tensor) -> Found:
    """Codes of blocks: weight and importance, float32 [B, 256]."""
    tile = _load(how, weight, importance)
    blocks = len(weight)
    scale, points = _free_scales(type_name, how, tile)
    step = _fit_step(how, scale.reshape(blocks, -1), points.sgg.reshape(blocks, -1), tile.unit)
    sub_scale, points = _stored_scales(type_name, how, tile, scale, step.repeat_interleave(BLOCK // how.group), points)
    if how.signs == "even":
        tile = _move_flips(tile, _values(type_name, points))
        points = _add_up(type_name, tile, points.entry, points.shift)
    odd = 2 * sub_scale + 1
    above = _ordered_sum((odd * points.sxg).reshape(blocks, -1))
    below = _ordered_sum((odd * odd * points.sgg).reshape(blocks, -1))
    d = _half_of_step(how, torch.where(above > 0, above / below, 0.0), tile.unit)
    return Found(sub_scale, d, points.entry.int(), points.shift, tile.negative)


def nearest_points(index: GridIndex, x: Tensor, w: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """(number, cost) of the point of least Σ w (x − scaled level)², for each vector.

    x, w    float32 [V, columns]
    scaled  float32 [V, L]: what each level decodes to

    The cost of a point is P[a] + Q[b], of the patterns of its halves; the last 7 bits of Q[b] are replaced by b, so
    that a minimum says whose it is. Ties go to the smaller b and to the earlier a of `GridIndex.first`.
    """
    entries, costs = [], []
    for part in torch.arange(len(x)).split(CHUNK):
        entry, cost = _nearest(index, *pattern_costs(x[part], w[part], scaled[part]))
        entries.append(entry)
        costs.append(cost)
    return torch.cat(entries), torch.cat(costs)


def pattern_costs(x: Tensor, w: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q [V, patterns]: the costs of all patterns of first and of second halves."""
    off = x[:, :, None] - scaled[:, None, :]
    column = (off * off * w[:, :, None]).unbind(1)
    pairs = [
        (low[:, None, :] + LEAST_COST + high[:, :, None]).flatten(1)
        for low, high in zip(column[::2], column[1::2], strict=True)
    ]
    if len(pairs) == 2:
        return pairs[0], pairs[1]
    p, q = ((low[:, None, :] + high[:, :, None]).flatten(1) for low, high in (pairs[:2], pairs[2:]))
    return p, q


def _nearest(index: GridIndex, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    numbers = torch.arange(q.shape[1], dtype=torch.int32)
    keys = (q.contiguous().view(torch.int32) & ~PATTERN_MASK) | numbers
    least = keys[:, index.second.flatten()].reshape(len(q), *index.second.shape).amin(dim=2)
    costs = p[:, index.first] + least.view(torch.float32)
    at = costs.argmin(dim=1, keepdim=True)
    first, second = index.first[at[:, 0]], least.gather(1, at)[:, 0] & PATTERN_MASK
    return index.entry[first, second.long()].long(), costs.gather(1, at)[:, 0]


def _load(how: Search, weight: Tensor, importance: Tensor) -> _Tile:
    unit = weight.abs().amax(dim=1)
    unit = torch.where(unit > 0, unit, 1.0)
    most = importance.amax(dim=1, keepdim=True)
    w = torch.where(most > 0, importance / most, 1.0).clamp(min=LEAST_IMPORTANCE).reshape(-1, how.group)
    x = (weight / unit[:, None]).reshape(-1, how.group)
    if how.signs == "none":
        return _Tile(x, w, torch.zeros_like(x, dtype=torch.bool), unit)
    negative, x = x < 0, x.abs()
    if how.signs == "even":
        odd = negative.reshape(-1, 8).sum(dim=1) % 2 == 1
        x, negative = _flip(x, negative, odd, w * x * x)
    return _Tile(x, w, negative, unit)


def _flip(x: Tensor, negative: Tensor, where: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Flip the sign that costs least in each group of 8 columns selected by `where` [groups]."""
    at = cost.reshape(-1, 8).argmin(dim=1, keepdim=True)
    flip = (torch.arange(8) == at) & where[:, None]
    flip = flip.reshape(x.shape)
    return torch.where(flip, -x, x), negative ^ flip


def _move_flips(tile: _Tile, point: Tensor) -> _Tile:
    """Move flipped signs to the best column: a flip costs 4 · scale · w |x| g, given points g [S, n]."""
    flipped = tile.x < 0
    magnitude = tile.x.abs()
    where = flipped.reshape(-1, 8).any(dim=1)
    x, negative = _flip(magnitude, tile.negative ^ flipped, where, tile.w * magnitude * point)
    return _Tile(x, tile.w, negative, tile.unit)


def _free_scales(type_name: str, how: Search, tile: _Tile) -> tuple[Tensor, _Points]:
    """Step 1."""
    base = _first_scale(type_name, how, tile)
    unshifted = torch.zeros(len(base), how.group // grid(type_name).shape[1])
    if how.signs == "none":
        points = _find(type_name, tile, *_rough(type_name, how, tile, base))
        return points.sxg / points.sgg, points
    best = _find(type_name, tile, base * how.guesses[0], unshifted)
    scale = best.sxg / best.sgg
    saved = best.sxg * scale
    for guess in (*how.guesses[1:], None):
        points = _find(type_name, tile, scale if guess is None else base * guess, unshifted)
        fitted = points.sxg / points.sgg
        saves = points.sxg * fitted
        better = saves > saved
        best = _choose(better, points, best)
        scale, saved = torch.where(better, fitted, scale), torch.where(better, saves, saved)
    return scale, best


def _rough(type_name: str, how: Search, tile: _Tile, base: Tensor) -> tuple[Tensor, Tensor]:
    """Scale [S] and shifts [S, points] for which rounding to levels, whether or not they form a point, costs least."""
    levels, share = index_of(type_name).levels, how.shift_columns // 8
    scale, shift, least = base, torch.full((len(base), how.group // 8), SHIFT), torch.full_like(base, 3e38)
    for guess in how.guesses:
        up, down = (_rough_cost(tile, base * guess, levels + by, share) for by in (SHIFT, -SHIFT))
        cost = _ordered_sum(torch.minimum(up, down))
        shifts = torch.where(down < up, -SHIFT, SHIFT).repeat_interleave(share, dim=1)
        better = cost < least
        least, scale = torch.where(better, cost, least), torch.where(better, base * guess, scale)
        shift = torch.where(better[:, None], shifts, shift)
    return scale, shift


def _rough_cost(tile: _Tile, scale: Tensor, levels: Tensor, share: int) -> Tensor:
    """[S, shifts]: the cost of the columns that share a shift, summed in groups of eight."""
    off = (tile.x[:, :, None] - (scale[:, None] * levels)[:, None, :]).abs().amin(dim=2)
    eights = _ordered_sum((off * off * tile.w).reshape(-1, 8))
    return _ordered_sum(eights.reshape(-1, share)).reshape(len(scale), -1)


def _first_scale(type_name: str, how: Search, tile: _Tile) -> Tensor:
    one = torch.tensor(1.0)
    if how.signs != "none":
        return tile.x.abs().amax(dim=1) * (one / index_of(type_name).levels[-1])
    root_mean_square = grid(type_name).double().square().mean().sqrt().float()
    squares, total = _ordered_sum(tile.w * tile.x * tile.x), _ordered_sum(tile.w)
    return (squares / total).sqrt() * (one / root_mean_square)


def _find(type_name: str, tile: _Tile, scale: Tensor, shift: Tensor) -> _Points:
    """The nearest points at scales [S], shifted."""
    columns, index = grid(type_name).shape[1], index_of(type_name)
    scaled = scale[:, None, None] * (index.levels + shift[:, :, None])
    entry, _ = nearest_points(index, tile.x.reshape(-1, columns), tile.w.reshape(-1, columns), scaled.flatten(0, 1))
    return _add_up(type_name, tile, entry.reshape(shift.shape), shift)


def _values(type_name: str, points: _Points) -> Tensor:
    """Coordinates [S, n]."""
    return (grid(type_name)[points.entry].to(torch.float32) + points.shift[:, :, None]).flatten(1)


def _add_up(type_name: str, tile: _Tile, entry: Tensor, shift: Tensor) -> _Points:
    zeros = torch.zeros(len(entry))
    value = _values(type_name, _Points(entry, shift, zeros, zeros))
    weighed = tile.w * value
    return _Points(entry, shift, _ordered_sum(weighed * tile.x), _ordered_sum(weighed * value))


def _choose(better: Tensor, new: _Points, old: _Points) -> _Points:
    each = better[:, None]
    return _Points(
        torch.where(each, new.entry, old.entry),
        torch.where(each, new.shift, old.shift),
        torch.where(better, new.sxg, old.sxg),
        torch.where(better, new.sgg, old.sgg),
    )


def _fit_step(how: Search, scale: Tensor, weight: Tensor, unit: Tensor) -> Tensor:
    """Step 2: scales and their weights [B, sub-blocks] → the step between scales that a half d makes, [B]."""
    largest = scale.amax(dim=1).clamp(min=0)
    smallest = largest / (2 * how.sub_scales - 1)
    tried = torch.arange(STEPS_TRIED, dtype=torch.float32) * 0.011 + 0.85
    step = smallest[:, None] * tried
    half_inverse = 0.5 / step
    error = torch.zeros_like(step)
    for k in range(scale.shape[1]):
        s = _clamped(torch.round(scale[:, k, None] * half_inverse - 0.5), how.sub_scales - 1)
        off = scale[:, k, None] - step * (s + s + 1)
        error = error + weight[:, k, None] * off * off
    best = step.gather(1, error.argmin(dim=1, keepdim=True))[:, 0]
    half = _half_of_step(how, best, unit)
    tiny = (half == 0) & (largest > 0) & (unit > NOTHING)
    half = torch.where(tiny, torch.tensor(2.0**-24, dtype=torch.float16), half)
    return half.to(torch.float32) * how.unit / unit


def _stored_scales(
    type_name: str, how: Search, tile: _Tile, scale: Tensor, step: Tensor, best: _Points
) -> tuple[Tensor, _Points]:
    """Step 3: (sub-scales as floats [S], points), where effective scales are odd multiples of `step`."""
    top = how.sub_scales - 1
    wish = scale * (0.5 / step) - 0.5
    near = _clamped(torch.round(wish), top)
    far = _clamped(near + torch.where(wish < near, -1.0, 1.0), top)
    results = []
    for candidate in (near, far)[: how.neighbours]:
        effective = step * (candidate + candidate + 1)
        points = _find(type_name, tile, effective, best.shift)
        results.append((points, effective * (effective * points.sgg - points.sxg - points.sxg)))
    if how.neighbours == 1:
        return near, results[0][0]
    better = results[1][1] < results[0][1]
    return torch.where(better, far, near), _choose(better, results[1][0], results[0][0])


def _half_of_step(how: Search, step: Tensor, unit: Tensor) -> Tensor:
    """d in half precision, for a distance between scales of weights divided by `unit`."""
    return (step * unit * (1 / how.unit)).clamp(max=LARGEST_HALF).to(torch.float16)


def _clamped(values: Tensor, top: int) -> Tensor:
    """Clamp to 0 … top; NaN (0 / 0, from blocks of zeros) becomes 0."""
    return torch.where(values > 0, values, 0.0).clamp(max=top)


def _ordered_sum(terms: Tensor) -> Tensor:
    """[S, n] → [S], summed sequentially in float32."""
    total = torch.zeros(len(terms))
    for term in terms.unbind(1):
        total = total + term
    return total
