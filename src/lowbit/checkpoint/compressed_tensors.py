"""Compressed-tensors folders as a `Checkpoint` of decoded weights.

Every quantized linear appears under its Hugging Face name, `L.weight`, float32 [N, K]; `read` unpacks and decodes just
the rows asked for. `read_quantized` gives the codes themselves. The layouts are pictured in
lowbit/export/compressed_tensors.py; this file reads them from the files and config.json alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint, TensorInfo
from lowbit.checkpoint.compressed_tensors_config import parse_quantization_config
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.numerics.scales import e8m0_values
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity, QuantizedTensor

_OWN_LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale",
               "input_scale", "input_zero_point", "input_global_scale", "weight_g_idx")  # fmt: skip


class CompressedTensorsCheckpoint:
    """A view of an open safetensors folder. `tensors` lists logical weights; see the module docstring."""

    kind = "compressed-tensors"

    def __init__(self, stored: Checkpoint):
        self.stored = stored
        self.source, self.folder, self.metadata = stored.source, stored.folder, stored.metadata
        self.notes = list(stored.notes)
        self._parsed = parse_quantization_config(stored.config())
        self.schemes: dict[str, Scheme] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "weight_packed" or (leaf == "weight" and f"{linear}.weight_scale" in stored.tensors):
                self._add_linear(linear, info)
            elif leaf not in _OWN_LEAVES:
                self.tensors[name] = info

    def config(self) -> dict[str, Any]:
        return self.stored.config()

    @property
    def input_scales(self) -> dict[str, float]:
        """Weight name → static activation scale (multiplier), for schemes that store one."""
        scales = {}
        for weight in self.schemes:
            linear = weight.removesuffix(".weight")
            if f"{linear}.input_scale" in self.stored.tensors:
                scales[weight] = self.stored.read(f"{linear}.input_scale").float().reshape(-1)[0].item()
            elif f"{linear}.input_global_scale" in self.stored.tensors:
                scales[weight] = 1.0 / self.stored.read(f"{linear}.input_global_scale").reshape(-1)[0].item()
        return scales

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self.schemes:
            return self.stored.read(name, start, stop)
        stop = self.tensors[name].shape[0] if stop is None else stop
        return self.read_quantized(name, start, stop).decode()

    def release(self, name: str) -> None:
        linear = name.removesuffix(".weight")
        for stored in (name, *(f"{linear}.{leaf}" for leaf in _OWN_LEAVES)):
            if stored in self.stored.tensors:
                self.stored.release(stored)

    def close(self) -> None:
        self.stored.close()

    def read_quantized(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        """Codes and scales of rows start..stop of a quantized weight; for BLOCK, start divides by the block."""
        rows, columns = self.tensors[name].shape
        stop = rows if stop is None else stop
        linear, spec = name.removesuffix(".weight"), self.schemes[name].weight
        grid = grid_for(spec, "float32")
        scale, global_scale = self._scale(linear, spec.granularity, spec.group_size or 1, start, stop)
        zero_point = None if spec.symmetric else self._zero_point(linear, spec.bits, start, stop)
        return QuantizedTensor(
            self._codes(linear, spec.number, spec.bits, columns, start, stop), scale, grid, spec.granularity,
            spec.columns_per_scale(columns), zero_point, global_scale,
        )  # fmt: skip

    def _add_linear(self, linear: str, info: TensorInfo) -> None:
        name = f"{linear}.weight"
        scheme = self._parsed.scheme_of(linear)
        if scheme is None:
            raise CheckpointError(f"{info.file}: {info.name} is stored as a quantized weight, but config.json does not "
                                  f"say how", "no group of quantization_config targets it")  # fmt: skip
        shape = self._logical_shape(linear, info, scheme)
        self.schemes[name] = scheme
        leaves = (self.stored.tensors.get(f"{linear}.{leaf}") for leaf in ("weight", *_OWN_LEAVES))
        nbytes = sum(leaf.nbytes for leaf in leaves if leaf is not None)
        self.tensors[name] = TensorInfo(name, shape, torch.float32, f"{info.stored} ({scheme.name})", nbytes, info.file)

    def _logical_shape(self, linear: str, info: TensorInfo, scheme: Scheme) -> tuple[int, int]:
        if info.name.endswith(".weight"):
            return (info.shape[0], info.shape[1])
        if info.dtype == torch.uint8:
            return (info.shape[0], 2 * info.shape[1])
        if f"{linear}.weight_shape" not in self.stored.tensors:
            raise CheckpointError(f"{info.file}: {linear}.weight_shape is absent", "the checkpoint is incomplete")
        rows, columns = (int(size) for size in self.stored.read(f"{linear}.weight_shape").tolist())
        if (rows, -(-columns * scheme.weight.bits // 32)) != tuple(info.shape):
            raise CheckpointError(
                f"{info.file}: {info.name} has shape {list(info.shape)}; {scheme.weight.bits}-bit codes of a "
                f"[{rows}, {columns}] weight need [{rows}, {-(-columns * scheme.weight.bits // 32)}]",
                "releases of compressed-tensors before 0.20 pack 3, 5, 6 and 7 bits differently; convert it with those",
            )
        return (rows, columns)

    def _codes(self, linear: str, number: str, bits: int, columns: int, start: int, stop: int) -> Tensor:
        if f"{linear}.weight" in self.stored.tensors:
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
            return scale.float() / divisor, (1.0 / divisor).item()
        return scale.float(), 1.0

    def _zero_point(self, linear: str, bits: int, start: int, stop: int) -> Tensor:
        """Rows of zero points, packed along N: rows whose words hold start..stop are unpacked, then cut."""
        first, last = start // 32 * 32, -(-stop // 32) * 32
        name = f"{linear}.weight_zero_point"
        words = self.stored.read(name, first * bits // 32, min(last * bits // 32, self.stored.tensors[name].shape[0]))
        count = min(last, words.shape[0] * 32 // bits + first) - first
        unpacked = kernels.unpack_dense(words.t().contiguous(), bits, count).t()
        return unpacked[start - first : stop - first].to(torch.int32).contiguous()


def is_compressed_tensors(config: dict[str, Any]) -> bool:
    """True if config.json says that its weights are compressed-tensors codes."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors"
