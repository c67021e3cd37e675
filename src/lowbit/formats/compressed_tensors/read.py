"""Compressed-tensors folders, read: the `Layout` of llm-compressor's format.

The layouts are pictured in write.py; this file reads them from the files and config.json
alone. Static activation scales: L.input_scale, or L.input_global_scale (a divisor) with NVFP4. Scales of an FP8 KV
cache (kv_cache_scheme) are read by kv_cache.py.

A trap: releases before 0.20 pack 3, 5, 6 and 7 bits differently (the last bits of a word stay empty), which shows in
the number of words per row; such a file is refused by name, never guessed at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.compressed_tensors_config import Group, is_fp8_cache, parse_quantization_config
from lowbit.checkpoint.kv_cache import kv_cache_scheme
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout, matrix_shape
from lowbit.checkpoint.transform_config import parse_transform_config
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.numerics.hadamard import Rotation
from lowbit.numerics.scales import e8m0_values
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity, QuantizedTensor


class CompressedTensorsLayout(Layout):
    LEAVES = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale",
              "input_scale", "input_zero_point", "input_global_scale", "weight_g_idx")  # fmt: skip
    HAS_KV_CACHE = True

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self.parsed = parse_quantization_config({"quantization_config": quantization})
        self.transforms = parse_transform_config(quantization.get("transform_config"))
        if self.transforms.attention:
            self.notes.append("queries and keys are rotated as the model runs, which only a rounded cache feels; they "
                              "are read without")  # fmt: skip
        cache = self.parsed.kv_cache
        if cache is not None and is_fp8_cache(cache):
            self.kv_cache = kv_cache_scheme("head" if cache.get("strategy") == "attn_head" else "tensor")

    def linears(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name in self.stored.tensors:
            linear, _, leaf = name.rpartition(".")
            if leaf == "weight_packed" or (leaf == "weight" and f"{linear}.weight_scale" in self.stored.tensors):
                found[linear] = self._logical_shape(linear, leaf)
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        return self.parsed.scheme_of(linear)

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        group = self.parsed.group_of(linear)
        assert group is not None, "asked only of linears that have a scheme"
        return expected_tensors(linear, shape, group)

    def rotation(self, linear: str, columns: int, quantized: bool = True) -> Rotation | None:
        transform = self.transforms.of(linear)
        if transform is None or quantized or transform.names(linear):
            return self.transforms.rotation(linear, columns, self.stored)
        if "embed" in linear.rpartition(".")[2]:
            return None
        raise CheckpointError(
            f"config.json: transform {transform.name} takes every Linear, and {linear} may be one or not",
            "its targets or its ignore must name it",
        )

    def beside(self) -> list[str]:
        return [name for name in self.stored.tensors if self.transforms.owns(name)]

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        scheme = self.scheme_of(linear)
        return 1 if scheme is None else scheme.weight.block_rows

    def scale_dtype(self, linear: str) -> torch.dtype:
        return self.stored.tensors[f"{linear}.weight_scale"].dtype

    def input_scale(self, linear: str) -> float | None:
        if f"{linear}.input_scale" in self.stored.tensors:
            return self.stored.read(f"{linear}.input_scale").float().reshape(-1)[0].item()
        if f"{linear}.input_global_scale" in self.stored.tensors:
            return 1.0 / self.stored.read(f"{linear}.input_global_scale").reshape(-1)[0].item()
        return None

    def input_zero_point(self, linear: str) -> int | None:
        name = f"{linear}.input_zero_point"
        return int(self.stored.read(name).reshape(-1)[0].item()) if name in self.stored.tensors else None

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        spec = self.quantized_scheme(linear).weight
        scale, global_scale = self._scale(linear, spec.granularity, spec.group_size or 1, start, stop)
        zero_point = None if spec.symmetric else self._zero_point(linear, spec.bits, shape[0], start, stop)
        return QuantizedTensor(
            self._codes(linear, spec.number, spec.bits, shape[1], start, stop), scale, grid_for(spec, "float32"),
            spec.granularity, spec.columns_per_scale(shape[1]), zero_point, global_scale,
        )  # fmt: skip

    def _logical_shape(self, linear: str, leaf: str) -> tuple[int, int]:
        info = self.stored.tensors[f"{linear}.{leaf}"]
        stored = matrix_shape(info)
        if leaf == "weight":
            return stored
        if info.dtype == torch.uint8:
            return (stored[0], 2 * stored[1])
        if f"{linear}.weight_shape" not in self.stored.tensors:
            raise CheckpointError(f"{info.file}: {linear}.weight_shape is absent", "the checkpoint is incomplete")
        shape = self.stored.read(f"{linear}.weight_shape").reshape(-1).tolist()
        scheme = self.scheme_of(linear)
        if len(shape) != 2 or scheme is None:
            return stored  # `QuantizedCheckpoint` reports the problem
        rows, columns = int(shape[0]), int(shape[1])
        if (rows, words_of(columns, scheme.weight.bits)) != stored:
            raise CheckpointError(
                f"{info.file}: {info.name} has shape {list(stored)}; {scheme.weight.bits}-bit codes of a "
                f"[{rows}, {columns}] weight need [{rows}, {words_of(columns, scheme.weight.bits)}]",
                "releases of compressed-tensors before 0.20 pack 3, 5, 6 and 7 bits differently; convert it with those",
            )
        return (rows, columns)

    def _codes(self, linear: str, number: str, bits: int, columns: int, start: int, stop: int) -> Tensor:
        if f"{linear}.weight_packed" not in self.stored.tensors:
            codes = self.stored.read(f"{linear}.weight", start, stop)
            return codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
        packed = self.stored.read(f"{linear}.weight_packed", start, stop)
        return kernels.unpack_dense(packed, bits, columns) if number == "int" else kernels.unpack_nibbles(packed)

    def _scale(self, linear: str, granularity: Granularity, block: int, start: int, stop: int) -> tuple[Tensor, float]:
        name = f"{linear}.weight_scale"
        if granularity is Granularity.TENSOR:
            return self.stored.read(name).float().reshape(1, 1), 1.0
        if granularity is Granularity.BLOCK:
            return self.stored.read(name, start // block, -(-stop // block)).float(), 1.0
        scale = self.stored.read(name, start, stop)
        scale = scale.reshape(stop - start, -1)
        if scale.dtype == torch.uint8:
            return e8m0_values(scale), 1.0
        if f"{linear}.weight_global_scale" in self.stored.tensors:
            divisor = self.stored.read(f"{linear}.weight_global_scale").float().reshape(-1)[0]
            return scale.float() / divisor, 1.0 / divisor.item()  # in double: its reciprocal is the divisor again
        return scale.float(), 1.0

    def _zero_point(self, linear: str, bits: int, rows: int, start: int, stop: int) -> Tensor:
        """Rows of zero points; packed ones lie along N: rows whose words hold start..stop are unpacked, then cut."""
        name = f"{linear}.weight_zero_point"
        if self.stored.tensors[name].dtype == torch.int8:
            return self.stored.read(name, start, stop).to(torch.int32)
        first = start // 32 * 32
        words = self.stored.read(name, first * bits // 32, min(words_of(stop, bits), words_of(rows, bits)))
        unpacked = kernels.unpack_dense(words.t().contiguous(), bits, stop - first).t()
        return unpacked[start - first :].to(torch.int32).contiguous()


def words_of(elements: int, bits: int) -> int:
    """32-bit words that hold so many dense codes."""
    return -(-elements * bits // 32)


def expected_tensors(linear: str, shape: tuple[int, int], group: Group) -> dict[str, Expected]:
    """What a linear of a group consists of in the files, biases aside."""
    rows, columns = shape
    spec, activation = group.scheme.weight, group.scheme.activation
    scale_shape: tuple[int, ...] = spec.granularity.scale_shape(rows, columns, spec.columns_per_scale(columns))
    if spec.granularity is Granularity.TENSOR:
        scale_shape = (1,)
    scale_dtypes = {"e8m0": (torch.uint8,), "e4m3": (torch.float8_e4m3fn,)}.get(spec.scale_format, FLOATS)
    leaves = {"weight_scale": Expected(scale_dtypes, scale_shape)}
    packed = group.format == "pack-quantized"
    if packed:
        leaves["weight_packed"] = Expected((torch.int32,), (rows, words_of(columns, spec.bits)))
        leaves["weight_shape"] = Expected((torch.int64,), (2,))
    elif spec.number == "e2m1":
        leaves["weight_packed"] = Expected((torch.uint8,), (rows, columns // 2))
    else:
        leaves["weight"] = Expected((torch.int8 if spec.number == "int" else torch.float8_e4m3fn,), shape)
    if not spec.symmetric:
        zero_rows = words_of(rows, spec.bits) if packed else scale_shape[0]
        leaves["weight_zero_point"] = Expected((torch.int32 if packed else torch.int8,), (zero_rows, *scale_shape[1:]))
    if spec.two_level:
        leaves["weight_global_scale"] = Expected((torch.float32,), (1,))
    if activation is not None and activation.needs_calibration:
        local = activation.dynamic == "local"
        leaves["input_global_scale" if local else "input_scale"] = Expected((torch.float32,) if local else FLOATS, (1,))
        if not activation.symmetric:
            leaves["input_zero_point"] = Expected((torch.int8,), (1,))
    return {f"{linear}.{leaf}": expected for leaf, expected in leaves.items()}
