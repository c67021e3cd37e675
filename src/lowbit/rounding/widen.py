"""The same weights on a wider grid, so that one format can hold another's codes bit for bit.

    ternary ⊂ 2 bits    narrow ⊂ full range      symmetric ⊂ asymmetric (zero point 0)      b bits ⊂ more bits
    one scale a tensor ⊂ one a row ⊂ one a group of g ⊂ one a group of g / n     double-quantized scales ⊂ floats
    a range beside the scales ⊂ none

Nothing is rounded: codes stay, scales are repeated. `Exporter.inexact` decides whether a format's scale dtype holds
such a scale exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lowbit.numerics import grid_for
from lowbit.schemes import ScaleFormat, WeightSpec
from lowbit.tensors import Granularity, QuantizedTensor

_FINENESS = {Granularity.TENSOR: 0, Granularity.CHANNEL: 1, Granularity.GROUP: 2}
# Group sizes and bits to try, the cheapest in bytes first.
_GROUP_SIZES = (128, 64, 32)
_BITS = (4, 8)


def wider_specs(spec: WeightSpec, columns: int) -> Iterator[WeightSpec]:
    """Specs that hold every weight of `spec` exactly: itself first, then by cost in bytes."""
    if spec.number == "ternary":
        yield spec
        spec = replace(spec, number="int")
    bits = [spec.bits] + [bits for bits in _BITS if spec.number == "int" and bits > spec.bits]
    for width in bits:
        for granularity, group_size in _scalings(spec, columns):
            for symmetric in (True, False) if spec.symmetric else (False,):
                for narrow in (True, False) if spec.narrow and symmetric and width == spec.bits else (False,):
                    for scale_format, ranged in _scale_kinds(spec):
                        if symmetric or spec.number in ("int", "hqq"):
                            yield replace(
                                spec, bits=width, granularity=granularity, group_size=group_size, symmetric=symmetric,
                                narrow=narrow, scale_format=scale_format, ranged=ranged,
                            )  # fmt: skip


def _scale_kinds(spec: WeightSpec) -> Iterator[tuple[ScaleFormat, bool]]:
    """Formats of scales, and whether a range of the tensor lies beside them, which changes no value."""
    plain = spec.scale_format in ("nested", "qoq")  # which floats hold too
    formats: list[ScaleFormat] = [spec.scale_format, *(["model"] if plain else [])]
    for scale_format in formats:
        for ranged in dict.fromkeys((spec.ranged, False)):
            yield scale_format, ranged


def _scalings(spec: WeightSpec, columns: int) -> Iterator[tuple[Granularity, int | None]]:
    yield spec.granularity, spec.group_size
    if spec.scale_format != "model" or spec.granularity is Granularity.BLOCK:
        return
    if spec.granularity is Granularity.TENSOR:
        yield Granularity.CHANNEL, None
    if spec.number == "int":
        own = columns if spec.group_size is None else spec.group_size
        yield from ((Granularity.GROUP, size) for size in _GROUP_SIZES if size < own and own % size == 0)


def widened(quantized: QuantizedTensor, spec: WeightSpec) -> QuantizedTensor:
    """`quantized` on the grid and with the scales of `spec`, which must be one of its `wider_specs`."""
    if spec.number == "hqq":  # which has no wider spec than its own
        return quantized
    rows, columns = quantized.shape
    scale, zero_point = quantized.scale, quantized.zero_point
    if _FINENESS.get(spec.granularity, 0) > _FINENESS.get(quantized.granularity, 0):
        scale = scale.expand(rows, -1)
    groups = spec.granularity.scale_shape(rows, columns, spec.columns_per_scale(columns))[1]
    times = groups // scale.shape[1]
    if times > 1:
        scale = scale.repeat_interleave(times, dim=1)
        zero_point = None if zero_point is None else zero_point.repeat_interleave(times, dim=1)
    if zero_point is None and not spec.symmetric:
        zero_point = torch.zeros(scale.shape, dtype=torch.int32)
    nested = quantized.nested if spec.scale_format == "nested" else None
    return replace(
        quantized, scale=scale.contiguous(), zero_point=zero_point, grid=grid_for(spec, "float32"), nested=nested,
        granularity=spec.granularity, group_size=spec.columns_per_scale(columns),
    )  # fmt: skip
