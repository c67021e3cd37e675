"""Number formats. `grid_for` is the table from a scheme's `WeightSpec` to its `Grid`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.schemes import WeightSpec
    from lowbit.tensors import Grid


def grid_for(
    spec: WeightSpec, model_dtype: str, lowest_zero_point: int | None = None, signed_scales: bool = False
) -> Grid:
    """The grid of a weight spec.

    model_dtype        scale format (`lowbit.numerics.scales`) of scales that the spec calls "model"
    lowest_zero_point  the least zero point that the file can store, if it is not the lowest code
    signed_scales      integers without zero points may have negative scales
    """
    from lowbit.kernels.tables import CODEBOOKS, MINIFLOATS
    from lowbit.numerics.fitted_grids import KMeansGrid, LogGrid
    from lowbit.numerics.scalar_grids import CodebookGrid, FloatZeroGrid, IntGrid, MinifloatGrid

    scale_format = model_dtype if spec.scale_format == "model" else spec.scale_format
    if spec.number == "int":
        return IntGrid(spec.bits, spec.symmetric, scale_format, spec.narrow, lowest_zero_point, signed_scales)
    if spec.number == "ternary":
        return IntGrid(spec.bits, True, scale_format, narrow=True)
    if spec.is_fitted:
        return (KMeansGrid if spec.number == "kmeans" else LogGrid)(spec.bits, scale_format)
    if spec.number == "hqq":
        return FloatZeroGrid(spec.bits, scale_format)
    if spec.number in CODEBOOKS:
        return CodebookGrid(CODEBOOKS[spec.number], scale_format)
    return MinifloatGrid(MINIFLOATS[spec.number], scale_format)
