"""Types whose codes of 4 bits index 16 values.

    IQ4_NL  half d; uint8 qs[16]                                        x = d·value[q]              4.5  bits per weight
    IQ4_XS  half d; uint16 scales_h; uint8 scales_l[4]; uint8 qs[128]   x = d·(s − 32)·value[q]     4.25
    MXFP4   uint8 e; uint8 qs[16]                                       x = 2^(e − 128)·value[q]    4.25
    NVFP4   uint8 s[4]; uint8 qs[32]                                    x = E4M3(s)/2·value[q]      4.5

A sub-block of n weights (32; NVFP4: 16) has code j in the low and code j + n/2 in the high half of byte j. The 6 bits
of IQ4_XS's scale i of 8: the low 4 in half i % 2 of scales_l[i // 2], the high 2 at bit 2·i of scales_h,
little-endian. The values of IQ4 are dense around zero, and not symmetric; those of FP4 are twice E2M1, hence the
halved scales.

MXFP4's e is OCP's E8M0; NVFP4's s an unsigned E4M3 (bias 7, 0x7f decodes to 0, the top bit has no meaning). NVIDIA's
NVFP4 also has a float32 scale per matrix. A ggml block does not: it lies in a tensor beside the weight
(`formats.gguf.weight_scales`), and `GgmlTarget` divides the weights by it. Without it, sub-blocks whose largest weight
is below 6·2^−6 ≈ 0.09 get a subnormal s with fewer than 3 bits.

Search. IQ4_NL: the weight of largest magnitude is mapped to each of a list of target values, positive and negative;
each target gives codes, and the codes their best d; the best d is refined (`one_scale`). IQ4_XS: the same for each
sub-block separately; then the largest of the eight scales is mapped to each of a list of values of s − 32, d is rounded
to half precision, and each sub-block takes the best of three integers by exact error; the best d is refined by least
squares, given codes and integers. MXFP4 and NVFP4: the scale of least exact error among the neighbours of the scale
that maps the largest magnitude to 6.

Decoded MXFP4 is encoded to the same blocks; the other types, where the codes span most of the range.
"""

from __future__ import annotations

import torch
from gguf.quants import IQ4_NL as GGUF_IQ4_NL
from gguf.quants import MXFP4 as GGUF_MXFP4
from torch import Tensor

from lowbit.numerics.ggml import one_scale
from lowbit.numerics.ggml.one_scale import (
    ROUNDER,
    Tile,
    float_of_half_bits,
    half_bits,
    inverse_or_zero,
    nearest,
    squared_error,
    sum_of_runs,
)
from lowbit.numerics.ggml.types import Blocks, GgmlType, per_column

IQ4_VALUES = tuple(GGUF_IQ4_NL.kvalues)
FP4_VALUES = tuple(GGUF_MXFP4.kvalues)

# fmt: off
# Targets for the weight of largest magnitude, also beyond the ends of the table: it may have little importance.
ENDS = (
    -170, -162, -155, -149, -144, -140, -136, -132, -128, -124, -120, -116, -112, -108, -104, -99, -94, -88, -82, -76,
    74, 80, 86, 92, 97, 102, 106, 110, 113, 116, 120, 124, 128, 132, 136, 141, 146, 152, 160,
)
# Targets for the largest sub-block scale, in units of d.
SCALE_PLACES = (-33, -32.5, -32, -31.5, -31, -30.5, -30, -29.5, -29, -28.5, -28, -27, -26, -25, -24, -22)
# fmt: on
STEPS = 2
REFINEMENTS = 2
SUB_BLOCKS = 8  # of IQ4_XS
MXFP4_TOP = 252  # 12·2^(e − 128) is finite
NVFP4_TOP = 0x7E


class Iq4Grid:
    """The values of IQ4. Places are in steps of 11, less than the least distance between two midpoints.

    So at most one midpoint lies within half a step of an integer. Tables by integer modulo 32: that midpoint, and the
    codes below and above it.
    """

    per_step, scan_clamped = float(torch.tensor(1.0) / 11.0), False

    def __init__(self):
        values = torch.tensor(IQ4_VALUES, dtype=torch.float32)
        midpoints = (values[:-1] + values[1:]) * 0.5
        low_edges = (torch.arange(32) + 16) % 32 - 16.5
        self.below = (midpoints[None] < (low_edges * 11.0)[:, None]).sum(dim=1)
        self.above = (self.below + 1).clamp(max=15)
        self.values = values
        self.midpoint = (values[self.below] + values[self.above]) * 0.5 * (torch.tensor(1.0) / 11.0)

    def bounded(self, place: Tensor) -> Tensor:
        return place.clamp(-15.0, 15.0)

    def value(self, place: Tensor) -> Tensor:
        return self.values[self._index(place)]

    def code(self, place: Tensor) -> Tensor:
        return self._index(place).to(torch.uint8)

    def _index(self, place: Tensor) -> Tensor:
        at = nearest(place).long() & 31
        return torch.where(place > self.midpoint[at], self.above[at], self.below[at])


class Fp4Grid:
    """Twice E2M1: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, ties to the even code."""

    per_step, scan_clamped = 1.0, True

    def bounded(self, place: Tensor) -> Tensor:
        return place.clamp(-12.0, 12.0)

    def value(self, place: Tensor) -> Tensor:
        """Multiples of the spacing, which is 1, 2 and 4: adding 1.5·2^23·spacing leaves them."""
        magnitude = place.abs()
        rounder = torch.full_like(place, 4 * ROUNDER)
        rounder = torch.where(magnitude < 8.0, 2 * ROUNDER, rounder)
        rounder = torch.where(magnitude < 4.0, ROUNDER, rounder)
        return (place + rounder) - rounder

    def code(self, place: Tensor) -> Tensor:
        """A zero has code 0, whatever its sign."""
        doubled = self.value(place)
        magnitudes = torch.tensor(FP4_VALUES[:8], dtype=torch.float32)
        code = torch.searchsorted(magnitudes, doubled.abs().contiguous())
        return (code + 8 * (doubled < 0)).to(torch.uint8)


_GRIDS = {"IQ4_NL": Iq4Grid(), "IQ4_XS": Iq4Grid(), "MXFP4": Fp4Grid(), "NVFP4": Fp4Grid()}


def e8m0_half(codes: Tensor) -> Tensor:
    """2^(e − 128), float32, of codes uint8; the two smallest are subnormal."""
    e = codes.int()
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def ue4m3_half(codes: Tensor) -> Tensor:
    """Half of an unsigned E4M3, float32, of codes uint8; 0 for 0x7f."""
    exponent, mantissa = ((codes >> 3) & 15).float(), (codes & 7).float()
    normal = (1 + mantissa / 8) * torch.exp2(exponent - 8)
    return torch.where(codes == 0x7F, 0.0, torch.where(exponent == 0, mantissa * 2.0**-10, normal))


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weights [N, K] → blocks, uint8 [N, row bytes]; see `lowbit.numerics.ggml.encode`."""
    rows = weight.shape[0]
    tile = one_scale.load_tile(weight, importance, kind.group, SUB_BLOCKS if kind.name == "IQ4_XS" else 1)
    scale, stored = _SEARCHES[kind.name](tile, rows)
    return pack(kind, one_scale.codes(_GRIDS[kind.name], tile, scale, rows), stored)


_Found = tuple[Tensor, dict[str, Tensor]]  # scales [B] in units of the tile, and `stored`


def _search_iq4_nl(tile: Tile, rows: int) -> _Found:
    grid = _GRIDS["IQ4_NL"]
    d = one_scale.best_half(grid, tile, one_scale.search_scale(grid, tile, ENDS, STEPS).scale)
    return float_of_half_bits(d) * tile.per_unit, {"d": one_scale.halves(d, rows)}


def _search_iq4_xs(tile: Tile, rows: int) -> _Found:
    scale = one_scale.search_scale(_GRIDS["IQ4_XS"], tile, ENDS, STEPS).scale
    eights = scale.reshape(-1, SUB_BLOCKS)
    largest = eights[:, 0]
    for each in eights.unbind(dim=1)[1:]:
        largest = torch.where(each.abs() > largest.abs(), each, largest)
    largest = largest.repeat_interleave(SUB_BLOCKS)

    per_place = 1.0 / torch.tensor(SCALE_PLACES, dtype=torch.float32)
    best = _choose_integers(tile, largest * per_place[0], scale)
    for each in per_place[1:]:
        best = _better_joint(_choose_integers(tile, largest * each, scale), best)
    for _ in range(REFINEMENTS):
        best = _better_joint(_choose_integers(tile, _fit_super_scale(tile, best), scale), best)

    half, integer, _error = best
    d = one_scale.halves(half[::SUB_BLOCKS], rows)
    return float_of_half_bits(half) * tile.per_unit * integer, {
        "d": d,
        "scales": (integer + 32).to(torch.uint8).reshape(rows, -1),
    }


# d as bits of a half and the integer of each sub-block, and the error of its super-block: [B] each
_Joint = tuple[Tensor, Tensor, Tensor]


def _choose_integers(tile: Tile, d_wanted: Tensor, scale: Tensor) -> _Joint:
    """Given d of a super-block: for each sub-block, the best of the three integers nearest to its own scale."""
    half = half_bits(d_wanted * tile.unit)
    d = float_of_half_bits(half) * tile.per_unit
    place = nearest((scale * inverse_or_zero(d)).clamp(-32, 31))
    integer, least = torch.zeros_like(place), torch.full_like(place, torch.inf)
    for step in (0, -1, 1):
        tried = (place + step).clamp(-32, 31)
        error = squared_error(_GRIDS["IQ4_XS"], tile, d * tried)
        integer, least = torch.where(error < least, tried, integer), torch.where(error < least, error, least)
    return half, integer, sum_of_runs(least, SUB_BLOCKS)


def _better_joint(joint: _Joint, best: _Joint) -> _Joint:
    better = joint[2] < best[2]
    return (
        torch.where(better, joint[0], best[0]),
        torch.where(better, joint[1], best[1]),
        torch.where(better, joint[2], best[2]),
    )


def _fit_super_scale(tile: Tile, joint: _Joint) -> Tensor:
    """Fit d by least squares, given integers and the resulting codes."""
    half, integer, _error = joint
    grid = _GRIDS["IQ4_XS"]
    inverse = inverse_or_zero(float_of_half_bits(half) * tile.per_unit * integer)
    fit = one_scale.fit_scale(grid, tile, inverse * torch.tensor(grid.per_step, dtype=torch.float32))
    xv = sum_of_runs(fit.scale * fit.curvature * integer, SUB_BLOCKS)
    vv = sum_of_runs(fit.curvature * integer * integer, SUB_BLOCKS)
    return xv * inverse_or_zero(vv)


def _search_mxfp4(tile: Tile, rows: int) -> _Found:
    magnitude = one_scale.extreme(tile).abs()
    # floor(log2) of the largest magnitude − 2 + 127, from the biased exponents of its parts
    middle = (magnitude.view(torch.int32) >> 23) + (tile.unit.view(torch.int32) >> 23) - (127 + 2)
    e = _best_code(tile, middle, (0, -1, 1, 2), MXFP4_TOP, e8m0_half)
    e = torch.where(magnitude == 0, 0, e).to(torch.uint8)
    return e8m0_half(e) * tile.per_unit, {"e": e.reshape(rows, -1)}


def _search_nvfp4(tile: Tile, rows: int) -> _Found:
    largest = one_scale.extreme(tile).abs() * tile.unit
    wanted = largest * (torch.tensor(1.0) / 6.0)
    # a normal's code is its exponent and three bits of mantissa; a subnormal counts 2^−9
    normal = ((wanted.view(torch.int32) >> 20) - ((127 - 7) << 3)).clamp(max=NVFP4_TOP)
    middle = torch.where(wanted < 2.0**-6, nearest(wanted.clamp(max=1.0) * 512.0).int(), normal)
    steps = (0, *range(-6, 0), *range(1, 7))
    scales = _best_code(tile, middle, steps, NVFP4_TOP, ue4m3_half)
    scales = torch.where(largest == 0, 0, scales).to(torch.uint8)
    return ue4m3_half(scales) * tile.per_unit, {"scales": scales.reshape(rows, -1)}


def _best_code(tile: Tile, middle: Tensor, steps: tuple[int, ...], top: int, decode_scale) -> Tensor:
    """The code of least error among middle + steps, within 0 … top."""
    best, least = torch.zeros_like(middle), torch.full_like(tile.unit, torch.inf)
    for step in steps:
        code = (middle + step).clamp(0, top)
        error = squared_error(_GRIDS["MXFP4"], tile, decode_scale(code.to(torch.uint8)) * tile.per_unit)
        best, least = torch.where(error < least, code, best), torch.where(error < least, error, least)
    return best


_SEARCHES = {
    "IQ4_NL": _search_iq4_nl,
    "IQ4_XS": _search_iq4_xs,
    "MXFP4": _search_mxfp4,
    "NVFP4": _search_nvfp4,
}


def unpack(kind: GgmlType, blocks: Tensor) -> Blocks:
    """Codes uint8. `stored`: d as halves [N, B], scales (0 … 63 of IQ4_XS, E4M3 of NVFP4) or e as uint8 [N, B·n]."""
    rows = blocks.shape[0]
    parts = blocks.reshape(rows, -1, kind.size)
    stored = {}
    if kind.name.startswith("IQ4"):
        stored["d"] = parts[..., 0:2].contiguous().view(torch.float16)[..., 0]
        scale = stored["d"].float()
    if kind.name == "IQ4_XS":
        stored["scales"] = _unpack_scales(parts[..., 2:8]).reshape(rows, -1)
        integer = stored["scales"].float() - 32.0
        scale = per_column(scale, integer.shape[1]) * integer
    elif kind.name == "MXFP4":
        stored["e"] = parts[..., 0]
        scale = e8m0_half(stored["e"])
    elif kind.name == "NVFP4":
        stored["scales"] = parts[..., :4].reshape(rows, -1)
        scale = ue4m3_half(stored["scales"])
    packed = parts[..., -kind.weights // 2 :].reshape(rows, -1, kind.group // 2)
    return Blocks(one_scale.unpack_nibbles(packed), scale, None, stored)


def pack(kind: GgmlType, codes: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The inverse of `unpack`: uint8 [N, row bytes]."""
    rows = codes.shape[0]
    parts = []
    if "d" in stored:
        parts.append(stored["d"][..., None].view(torch.uint8))
    if kind.name == "IQ4_XS":
        parts.append(_pack_scales(stored["scales"].reshape(rows, -1, SUB_BLOCKS)))
    elif kind.name == "MXFP4":
        parts.append(stored["e"][..., None])
    elif kind.name == "NVFP4":
        parts.append(stored["scales"].reshape(rows, -1, 4))
    nibbles = one_scale.pack_nibbles(codes, kind.group).reshape(rows, -1, kind.weights // 2)
    return torch.cat([*parts, nibbles], dim=2).flatten(1)


def _unpack_scales(packed: Tensor) -> Tensor:
    """uint8 [N, B, 6], scales_h and scales_l → 6-bit scales, uint8 [N, B, 8]."""
    low = one_scale.unpack_nibbles(packed[..., 2:, None].flatten(0, 1)).reshape(*packed.shape[:2], SUB_BLOCKS)
    high = (packed[..., :2, None] >> torch.arange(0, 8, 2, dtype=torch.uint8)) & 3
    return low | (high.flatten(2) << 4)


def _pack_scales(scales: Tensor) -> Tensor:
    """The inverse."""
    low = scales[..., 0::2] & 15 | (scales[..., 1::2] & 15) << 4
    high = (scales >> 4).reshape(*scales.shape[:2], 2, 4) << torch.arange(0, 8, 2, dtype=torch.uint8)
    return torch.cat([high.sum(dim=3, dtype=torch.uint8), low], dim=2)


def value(kind: GgmlType, codes: Tensor) -> Tensor:
    """Codes → unscaled values, float32."""
    values = IQ4_VALUES if kind.name.startswith("IQ4") else FP4_VALUES
    return torch.tensor(values, dtype=torch.float32)[codes.long()]


def round(kind: GgmlType, weight: Tensor, blocks: Blocks, importance: Tensor | None = None) -> Tensor:
    """Nearest codes, uint8, of weights [N, k] given the scale; see `lowbit.numerics.ggml.types`."""
    grid = _GRIDS[kind.name]
    inverse = inverse_or_zero(per_column(blocks.scale, weight.shape[1]))
    return grid.code(grid.bounded(weight.float() * (inverse * grid.per_step)))
