"""Number formats. `grid_for` is the table from a scheme's `WeightSpec` to its `Grid`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.numerics.grid import Grid
    from lowbit.schemes import WeightSpec


def grid_for(spec: WeightSpec, model_dtype: str, lowest_zero_point: int | None = None) -> Grid:
    """The grid of a weight spec.

    model_dtype        how scales that the spec calls "model" are stored: a scale format of `lowbit.numerics.scales`
    lowest_zero_point  the least zero point that the file can store, where that is not the lowest code
    """
    from lowbit.numerics.integer import IntGrid
    from lowbit.numerics.minifloat import MinifloatGrid
    from lowbit.numerics.minifloat_formats import FORMATS

    scale_format = model_dtype if spec.scale_format == "model" else spec.scale_format
    if spec.number == "int":
        return IntGrid(spec.bits, spec.symmetric, scale_format, spec.narrow, lowest_zero_point)
    if spec.number in ("nf4", "fp4"):
        from lowbit.numerics.codebook import CODEBOOKS, CodebookGrid

        return CodebookGrid(CODEBOOKS[spec.number], scale_format)
    return MinifloatGrid(FORMATS[spec.number], scale_format)
