"""lowbit's own folder of fitted codes (quant_method "lowbit-codebook"): k-means and logarithmic weights.

For a linear `L` with weight [N, K], K a multiple of 32, b bits, g columns to a group (K where a row is one),
G = ceil(K / g):

    L.weight           int32   [N, K·b/32]   codes, a dense bit stream per row, least significant bit first
    L.table            float16 [N, G·2^b]    k-means: the values of the codes of each group, ascending
    L.scale            float16 [N, G]        logarithmic: the largest value of each group
    L.base             uint8   [N, G]        logarithmic: s, of the base 2^(s/8), 2 .. 8
    L.outlier_columns  uint16  [N, n]        columns kept in 16 bits, ascending; with outliers only
    L.outlier_values   float16 [N, n]        their weights, in place of what the codes decode to

    word 0, bit 31 → 0, b = 4:   c7 c6 c5 c4 c3 c2 c1 c0
    k-means       decoded = table[group][c]
    logarithmic   decoded = (−1)^S · scale · 2^(s·(e − E)/8), c = S·2^(b−1) + e, E = 2^(b−1) − 1; 0 where e = 0

n is the nearest whole number to K times `outliers` percent, at least 1. config.json names every quantized linear:

    {"quant_method": "lowbit-codebook", "version": 1, "groups": [{"number": "kmeans", "bits": 4, "group_size": null,
      "outliers": 0.45, "linears": ["model.layers.0.mlp.up_proj", …]}]}

Codes have the name of the weight on purpose: transformers skips a quantization that it does not know, and then refuses
`L.weight` for its shape. After `import lowbit.transformers` it knows this one.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit import kernels
from lowbit.errors import FormatError
from lowbit.export import (
    Piece,
    block_rows,
    every_zero_point,
    float16_scales,
    no_companions,
    none_needless,
    usual_engine,
)
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.numerics.fitted_grids import log_steps, log_tables
from lowbit.schemes import Scheme
from lowbit.tensors import InputRange, QuantizedTensor

FORMAT = "codebook"
row_multiple, lowest_zero_point, companion_files, engine_of = block_rows, every_zero_point, no_companions, usual_engine
needless, scale_format = none_needless, float16_scales

QUANT_METHOD, VERSION = "lowbit-codebook", 1
_COLUMNS = 32  # whose codes fill whole words
_MAX_COLUMN = 1 << 16


def storage_format(scheme: Scheme) -> str:
    """ "kmeans" or "log"; FormatError for other numbers."""
    if not scheme.weight.is_fitted:
        raise FormatError(f"codebook holds values that are fitted to the weights, not {scheme.name}",
                          "use --scheme KMEANS4, KMEANS3 or LOG4, or another --format")  # fmt: skip
    return scheme.weight.number


def unfit(shape: tuple[int, int], scheme: Scheme) -> str | None:
    if shape[1] % _COLUMNS:
        return f"in_features {shape[1]} is not a multiple of {_COLUMNS}"
    if scheme.weight.outliers and shape[1] > _MAX_COLUMN:
        return f"in_features {shape[1]} are more than the {_MAX_COLUMN} that 16 bits number, and it has outliers"
    return None


def stored_tensors(linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> list[StoredTensor]:
    rows, columns = shape
    weight = scheme.weight
    groups = -(-columns // weight.columns_per_scale(columns))
    stored = [StoredTensor(f"{linear}.weight", torch.int32, (rows, columns * weight.bits // 32))]
    if weight.number == "kmeans":
        stored.append(StoredTensor(f"{linear}.table", torch.float16, (rows, groups << weight.bits)))
    else:
        stored += [StoredTensor(f"{linear}.scale", torch.float16, (rows, groups)),
                   StoredTensor(f"{linear}.base", torch.uint8, (rows, groups))]  # fmt: skip
    count = weight.outliers_per_row(columns)
    if count:
        stored += [StoredTensor(f"{linear}.outlier_columns", torch.uint16, (rows, count)),
                   StoredTensor(f"{linear}.outlier_values", torch.float16, (rows, count))]  # fmt: skip
    return stored


def pack(linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
         dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
    assert quantized.table is not None, "storage_format lets only fitted codes through"
    values = {"weight": kernels.pack_dense(quantized.codes, scheme.weight.bits, offset=0)}
    if scheme.weight.number == "kmeans":
        values["table"] = quantized.table.flatten(1).to(torch.float16)
    else:
        values |= {"scale": quantized.scale.to(torch.float16), "base": log_steps(quantized.table)}
    if quantized.outliers is not None:
        values |= {"outlier_columns": quantized.outliers.columns.to(torch.uint16),
                   "outlier_values": quantized.outliers.values.to(torch.float16)}  # fmt: skip
    return [Piece(f"{linear}.{leaf}", each, first_row) for leaf, each in values.items()]


def inexact(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Why a source's values would change."""
    if quantized.table is None:
        return "its values are not fitted to its weights"
    if scheme.weight.number == "kmeans":
        return None if _in_float16(quantized.table) else "one of its values is no float16"
    if not _in_float16(quantized.scale):
        return "one of its scales is no float16"
    steps = log_steps(quantized.table)
    exact = torch.equal(log_tables(scheme.weight.bits, steps), quantized.table)
    return None if exact else "one of its bases is no 2^(s/8)"


def quantization_config(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`; FormatError for numbers that are not fitted."""
    groups: dict[Scheme, list[str]] = {}
    for linear, scheme in schemes.items():
        storage_format(scheme)
        groups.setdefault(scheme, []).append(linear)
    stated = [
        {"number": scheme.weight.number, "bits": scheme.weight.bits, "group_size": scheme.weight.group_size,
         "outliers": scheme.weight.outliers, "linears": linears}
        for scheme, linears in groups.items()
    ]  # fmt: skip
    return {"quant_method": QUANT_METHOD, "version": VERSION, "groups": stated}


def _in_float16(values: torch.Tensor) -> bool:
    return torch.equal(values.to(torch.float16).float(), values)
