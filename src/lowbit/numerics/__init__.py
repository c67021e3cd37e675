"""Number formats. `grid_for` is the table from a scheme's `WeightSpec` to its `Grid`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.numerics.grid import Grid
    from lowbit.schemes import WeightSpec


def grid_for(spec: WeightSpec, model_dtype: str) -> Grid:
    """The grid of a weight spec; scales that it calls "model" are stored as `model_dtype`: "bfloat16", "float16" …"""
    from lowbit.numerics.integer import IntGrid
    from lowbit.numerics.minifloat import MinifloatGrid
    from lowbit.numerics.minifloat_formats import FORMATS

    scale_format = model_dtype if spec.scale_format == "model" else spec.scale_format
    if spec.number == "int":
        return IntGrid(spec.bits, spec.symmetric, scale_format)
    return MinifloatGrid(FORMATS[spec.number], scale_format)
