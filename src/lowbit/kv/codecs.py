"""How engines round keys and values: a `Codec` takes the states of a layer and gives back what the cache would.

    states   float32 [B, heads, T, D]: keys after norms and rotary embedding, or values, as attention gets them
    facts    what calibration measured of them, for codecs whose `needs` is not "nothing"

Rounding is to nearest, ties to even, unless a codec says otherwise; a scale is rounded to its stored form before the
values are decoded with it, and before codes are chosen where the engine does so too. Sources are in `lowbit.kv.types`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import ShapeError
from lowbit.kv import blocks
from lowbit.numerics.hadamard import walsh

E4M3_MAX, E5M2_MAX, E2M1_MAX = 448.0, 57344.0, 6.0
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


Needs = Literal["nothing", "range", "distribution"]


@dataclass(frozen=True)
class SideFacts:
    """Keys or values of one layer over a calibration text.

    range      largest |x| of every head, float32 [heads]
    low, high  quantiles of every channel, float32 [heads, D]
    codebooks  bits → values for what lies between, mapped to −1 … 1, float32 [2^bits], rising
    """

    range: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    codebooks: Mapping[int, Tensor] = field(default_factory=dict)


class Codec:
    """One side of a cache, keys or values."""

    needs: Needs = "nothing"

    def bits(self, head_dim: int) -> float:
        """Stored bits of one value, with its share of the scales."""
        raise NotImplementedError

    def check(self, head_dim: int, name: str) -> None:
        """ShapeError if the codec does not take heads of this size; name: of the cache type."""

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Codec):
    """No quantization: f32, f16, bf16. Values beyond f16 become inf, as they would in the engine."""

    dtype: Literal["f32", "f16", "bf16"]

    def bits(self, head_dim: int) -> float:
        return 32.0 if self.dtype == "f32" else 16.0

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        return states.to(_DTYPES[self.dtype]).to(torch.float32)


@dataclass(frozen=True)
class Minifloat(Codec):
    """E4M3 or E5M2 of x / s, saturating. s: 1; or largest |x| / largest value, for all heads ("tensor") or each."""

    number: Literal["e4m3", "e5m2"]
    scale: Literal["one", "tensor", "head"] = "one"

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "nothing" if self.scale == "one" else "range"

    def bits(self, head_dim: int) -> float:
        return 8.0

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        limit = E4M3_MAX if self.number == "e4m3" else E5M2_MAX
        if self.scale == "one":
            return _minifloat(states, self.number)
        assert facts is not None, "checked by the caller"
        largest = facts.range if self.scale == "head" else facts.range.amax().expand_as(facts.range)
        scale = (largest / limit).clamp(min=1e-9)[:, None, None].to(states)
        return _minifloat(states / scale, self.number) * scale


@dataclass(frozen=True)
class PerTokenHead(Codec):
    """vLLM's int8 and fp8 per token and head: s = max(max|x| / 127 (448), 1e-6) in float32, of every vector."""

    number: Literal["int8", "e4m3"]

    def bits(self, head_dim: int) -> float:
        return 8.0 + 32.0 / head_dim

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        limit = 127.0 if self.number == "int8" else E4M3_MAX
        scale = (states.abs().amax(-1, keepdim=True) / limit).clamp(min=1e-6)
        placed = states * (1.0 / scale)
        codes = placed.round().clamp(-128, 127) if self.number == "int8" else _minifloat(placed, "e4m3")
        return codes * scale


@dataclass(frozen=True)
class RotatedInt4(Codec):
    """vLLM's int4 per token and head: y = H D x, D fixed random signs, H Sylvester's matrix without its 1 / sqrt(D).

        s = max((max y − min y) / 15, 1e-6)      z = clamp(rnd(−min y / s), 0, 15)     q = clamp(rnd(y / s + z), 0, 15)

    rnd takes halves away from zero. The zero point lies in the 4 lowest bits of the float32 scale, which loses them.
    """

    def bits(self, head_dim: int) -> float:
        return 4.0 + 32.0 / head_dim

    def check(self, head_dim: int, name: str) -> None:
        _power_of_two(head_dim, name)

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        size = states.shape[-1]
        signs, matrix = _vllm_signs(size).to(states), sylvester(size).to(states)
        turned = (states * signs) @ matrix
        low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-6)
        zero = _away(-low / scale).clamp(0, 15)
        codes = _away(turned * (1.0 / scale) + zero).clamp(0, 15)
        kept = (scale.contiguous().view(torch.int32) & -16).view(torch.float32)
        return ((codes - zero) * kept) @ matrix / size * signs


@dataclass(frozen=True)
class BlockFloat4(Codec):
    """NVFP4: E2M1 of x / s, s = E4M3(max|x| / 6 / g) · g of 16 values along the head.

    scale   g: 1, which is what vLLM takes without stored scales; or largest |x| of the layer / (6 · 448)
    search  "4over6": of max / 6 and max / 4 the scale of less squared error; the first of equals
    """

    scale: Literal["one", "tensor"] = "one"
    search: Literal["none", "4over6"] = "none"

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return "nothing" if self.scale == "one" else "range"

    def bits(self, head_dim: int) -> float:
        return 4.5

    def check(self, head_dim: int, name: str) -> None:
        _divides(head_dim, 16, name, "blocks of 16")

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        above = 1.0
        if self.scale == "tensor":
            assert facts is not None, "checked by the caller"
            above = max(float(facts.range.amax()) / (E2M1_MAX * E4M3_MAX), 1e-9)
        groups = states.unflatten(-1, (-1, 16))
        found = _block_float4(groups, above, E2M1_MAX)
        if self.search == "4over6":
            other = _block_float4(groups, above, 4.0)
            errors = [(each - groups).square().sum(-1, keepdim=True) for each in (other, found)]
            found = torch.where(errors[0] < errors[1], other, found)
        return found.flatten(-2)


@dataclass(frozen=True)
class GgmlBlock(Codec):
    """A ggml type of blocks of 32 along the head, as `lowbit.kv.blocks` has it.

    rotation  "keys": x is first multiplied by H / sqrt(n), n the largest power of two that divides the head, from 64;
              "values": n = 64; heads that 64 does not divide are not rotated
    """

    name: str
    rotation: Literal["none", "keys", "values"] = "none"

    def bits(self, head_dim: int) -> float:
        return blocks.BITS[self.name]

    def check(self, head_dim: int, name: str) -> None:
        _divides(head_dim, blocks.BLOCK, name, "blocks of 32")

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        size = 0 if states.shape[-1] % 64 or self.rotation == "none" else 64
        if size and self.rotation == "keys":
            size = states.shape[-1] & -states.shape[-1]
        if not size:
            return blocks.round_trip(self.name, states)
        return hadamard(blocks.round_trip(self.name, hadamard(states, size)), size)


@dataclass(frozen=True)
class Affine(Codec):
    """Integers of a range: s = (max − min) / (2^bits − 1), q = clamp(rint((x − m) / s)), x̂ = s·q + m, s and m halves.

    along     "head": groups of `group` values of one token and head, or the whole head (None)
              "tokens": of one channel of a head over `group` tokens; the last group may be short
    rotated   x is first multiplied by H / sqrt(D)
    solved    m is moved by HQQ's half-quadratic iterations: `_solve`
    """

    code_bits: int
    along: Literal["head", "tokens"] = "head"
    group: int | None = None
    rotated: bool = False
    solved: bool = False

    def bits(self, head_dim: int) -> float:
        return self.code_bits + 32.0 / (self.group or head_dim)

    def check(self, head_dim: int, name: str) -> None:
        if self.rotated:
            _power_of_two(head_dim, name)
        if self.group is not None and self.along == "head":
            _divides(head_dim, self.group, name, f"groups of {self.group} along the head")

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        if self.rotated:
            return hadamard(self._rounded(hadamard(states, states.shape[-1])), states.shape[-1])
        return self._rounded(states)

    def _rounded(self, states: Tensor) -> Tensor:
        if self.along == "head":
            return self._decoded(states.unflatten(-1, (-1, self.group or states.shape[-1]))).flatten(-2)
        assert self.group is not None, "groups of tokens have a size"
        whole = states.shape[-2] // self.group * self.group
        parts = []
        if whole:
            grouped = states[..., :whole, :].unflatten(-2, (-1, self.group)).transpose(-1, -2)
            parts.append(self._decoded(grouped).transpose(-1, -2).flatten(-3, -2))
        if whole < states.shape[-2]:
            parts.append(self._decoded(states[..., whole:, :].transpose(-1, -2)).transpose(-1, -2))
        return torch.cat(parts, dim=-2)

    def _decoded(self, groups: Tensor) -> Tensor:
        codes, scale, low = self.encode(groups)
        return codes * scale + low

    def encode(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes [..., n]; s, m [..., 1] as halves hold them), float32, of groups [..., n] with a range each."""
        highest = 2**self.code_bits - 1
        low = groups.amin(-1, keepdim=True)
        scale = (groups.amax(-1, keepdim=True) - low) / highest
        if self.solved:
            low = _solve(groups, scale, low, highest)
        scale, low = _half(scale), _half(low)
        usable = torch.where(scale > 0, scale, torch.ones_like(scale))
        return ((groups - low) / usable).round().clamp(0, highest), scale, low


@dataclass(frozen=True)
class LloydMax(Codec):
    """vLLM's TurboQuant keys: y = H x / (sqrt(D) · |x|), each to the nearest centroid c of N(0, 1/D); |x| is a half.

    The decoded vector is scaled to length 1 before |x| is multiplied in ("norm correction").
    """

    code_bits: int

    def bits(self, head_dim: int) -> float:
        return self.code_bits + 16.0 / head_dim

    def check(self, head_dim: int, name: str) -> None:
        _power_of_two(head_dim, name)

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        size = states.shape[-1]
        length = states.norm(dim=-1, keepdim=True)
        turned = hadamard(states / (length + 1e-8), size)
        centroids = lloyd_max_centroids(self.code_bits).to(states) / math.sqrt(size)
        nearest = centroids[torch.bucketize(turned.contiguous(), (centroids[1:] + centroids[:-1]) / 2, right=True)]
        direction = nearest / nearest.norm(dim=-1, keepdim=True)
        return hadamard(direction, size) * _half(length)


@lru_cache(maxsize=8)
def lloyd_max_centroids(code_bits: int) -> Tensor:
    """The 2^bits values of least mean squared error for N(0, 1), rising, float32 (Lloyd 1982, Max 1960).

    Each is the mean of its cell, Σ (φ(a) − φ(b)) / (Φ(b) − Φ(a)), and cells end halfway between neighbours; iterated
    until nothing moves.
    """
    count = 2**code_bits
    values = torch.linspace(-3.0, 3.0, count, dtype=torch.float64)
    for _ in range(3000):
        ends = torch.cat([values.new_tensor([-math.inf]), (values[1:] + values[:-1]) / 2,
                          values.new_tensor([math.inf])])  # fmt: skip
        density = torch.exp(-ends.square() / 2) / math.sqrt(2 * math.pi)
        below = torch.special.ndtr(ends)
        moved = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
        if float((moved - values).abs().max()) < 1e-12:
            break
        values = moved
    return values.float()


@dataclass(frozen=True)
class NonUniform(Codec):
    """KVQuant's nuq: the nearest of 2^bits values of a codebook, in a range that leaves the outliers out, exact in f16.

        keys ("channel")   the range of a channel: quantiles over the calibration text
        values ("token")   the range of a token, all heads together: what remains without the 1 % of largest distance

    Outliers are `share` of the values, half of them at each end, and cost 16 bits and a 16-bit index each.
    """

    code_bits: int
    per: Literal["channel", "token"]
    share: float = 0.01
    needs: Needs = "distribution"

    def bits(self, head_dim: int) -> float:
        return self.code_bits + 32.0 * self.share

    def round_trip(self, states: Tensor, facts: SideFacts | None = None) -> Tensor:
        assert facts is not None, "checked by the caller"
        low, high, outside = self.range_of(states, facts.low, facts.high)
        middle, half = (high + low) / 2, ((high - low) / 2).clamp(min=1e-12)
        codebook = facts.codebooks[self.code_bits].to(states)
        placed = ((states - middle) / half).clamp(-1, 1)
        nearest = codebook[torch.bucketize(placed.contiguous(), (codebook[1:] + codebook[:-1]) / 2)]
        return torch.where(outside, _half(states), nearest * half + middle)

    def range_of(self, states: Tensor, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(lowest, highest of what is no outlier; the outliers, bool [B, heads, T, D]); low, high: of channels."""
        if self.per == "channel":
            assert low is not None, "a distribution was measured"
            assert high is not None, "a distribution was measured"
            low, high = low[:, None, :].to(states), high[:, None, :].to(states)
            return low, high, (states < low) | (states > high)
        tokens = states.transpose(1, 2).flatten(2)
        ends = torch.quantile(tokens, tokens.new_tensor([self.share / 2, 1 - self.share / 2]), dim=-1)
        below, above = (end[:, None, :, None] for end in ends)
        outside = (states < below) | (states > above)
        low = states.masked_fill(outside, math.inf).amin((1, 3), keepdim=True)
        return low, states.masked_fill(outside, -math.inf).amax((1, 3), keepdim=True), outside


def hadamard(states: Tensor, size: int) -> Tensor:
    """Every `size` values along the head times H / sqrt(size), which is its own inverse."""
    grouped = states.unflatten(-1, (-1, size))
    return (grouped @ (sylvester(size).to(states) / math.sqrt(size))).flatten(-2)


@lru_cache(maxsize=8)
def sylvester(size: int) -> Tensor:
    """Sylvester's Hadamard matrix [size, size] of ±1, float32; a power of two."""
    return walsh(torch.eye(size)[None])[0]


def _minifloat(values: Tensor, number: str) -> Tensor:
    limit, dtype = (E4M3_MAX, torch.float8_e4m3fn) if number == "e4m3" else (E5M2_MAX, torch.float8_e5m2)
    return values.clamp(-limit, limit).to(dtype).to(torch.float32)


def _block_float4(groups: Tensor, above: float, largest: float) -> Tensor:
    scale = _minifloat(groups.abs().amax(-1, keepdim=True) / largest / above, "e4m3") * above
    placed = groups / torch.where(scale > 0, scale, torch.ones_like(scale))
    magnitude = placed.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, placed) * scale


def _solve(groups: Tensor, scale: Tensor, low: Tensor, highest: int) -> Tensor:
    """HQQ's offset for a fixed scale: `optimize_weights_proximal` of hqq/core/optimize.py, p 0.7, β 10, κ 1.01.

    In its terms the zero point z = −m / s is a float; 20 iterations, stopped where the mean error grows.
    """
    inverse = 1.0 / torch.where(scale > 0, scale, torch.ones_like(scale))
    zero, beta, best = -low * inverse, 10.0, math.inf
    for _ in range(20):
        codes = (groups * inverse + zero).round().clamp(0, highest)
        error = groups - (codes - zero) / inverse
        mean = float(error.abs().mean())
        if mean >= best:
            break
        best = mean
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-8).pow(-0.3) / beta).clamp(min=0)
        zero = (codes - (groups - shrunk) * inverse).mean(-1, keepdim=True)
        beta *= 1.01
    return torch.where(scale > 0, -zero / inverse, low)


@lru_cache(maxsize=8)
def _vllm_signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return 2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1.0


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).to(torch.float32)


def _away(values: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero."""
    return torch.copysign((values.abs() + 0.5).floor(), values)


def _divides(head_dim: int, size: int, name: str, what: str) -> None:
    if head_dim % size:
        raise ShapeError(
            f"cache type {name} has {what}, which do not divide heads of {head_dim} values",
            "a type without blocks along the head fits, such as fp8_e4m3 or int8_per_token_head; "
            "`lowbit evaluate --kv-cache` measures them",
        )


def _power_of_two(head_dim: int, name: str) -> None:
    if head_dim & (head_dim - 1):
        raise ShapeError(
            f"cache type {name} rotates every head by a Hadamard matrix, whose size is a power of two; heads have "
            f"{head_dim} values",
            "a type without a rotation fits, such as int8_per_token_head or lmdeploy_int4",
        )
