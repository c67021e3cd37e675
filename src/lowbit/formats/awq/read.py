"""AWQ folders, read: the `Layout` of AutoAWQ's GEMM version.

write.py pictures the layout; scales may be any float dtype here. config.json has bits (old: w_bit), group_size (old:
q_group_size), zero_point, version and modules_to_not_convert: a linear whose name contains one of these strings stays
unquantized. zero_point false means symmetric: qzeros are absent, or 8 everywhere. lowbit writes `sym` beside zero_point
true where all zero points are 8; other tools write `sym` without meaning it, so it counts only where `meta` names
lowbit.

Refused: the versions gemv, gemv_fast, marlin, exllama, ipex and llm-awq, which pack differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.schemes import Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity, QuantizedTensor

BITS = 4
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # row within its eight → nibble


class AwqLayout(Layout):
    LEAVES = ("qweight", "qzeros", "scales")

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self._scheme = _scheme(stored, quantization)
        self._skipped = _skipped(stored, quantization)
        self._says_sym = not _stated(stored, quantization, "zero_point", default=True)

    def linears(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "qweight":
                columns, words = matrix_shape(info)
                found[linear] = (words * 8, columns)
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        if f"{linear}.weight" in self.stored.tensors and f"{linear}.qweight" not in self.stored.tensors:
            return None
        return None if any(part in linear for part in self._skipped) else self._scheme

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        rows, columns = shape
        groups = -(-columns // self._scheme.weight.columns_per_scale(columns))
        leaves = {
            "qweight": Expected((torch.int32,), (columns, rows // 8)),
            "qzeros": Expected((torch.int32,), (groups, rows // 8)),
            "scales": Expected(FLOATS, (groups, rows)),
        }
        if self._says_sym and f"{linear}.qzeros" not in self.stored.tensors:
            del leaves["qzeros"]
        return {f"{linear}.{leaf}": expected for leaf, expected in leaves.items()}

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        return 8

    def scale_dtype(self, linear: str) -> torch.dtype:
        return self.stored.tensors[f"{linear}.scales"].dtype

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        spec = self._scheme.weight
        scale = self.stored.read(f"{linear}.scales")[:, start:stop].t().float().contiguous()
        zero_point = self._zero_point(linear, start, stop)
        return QuantizedTensor(
            self._rows(f"{linear}.qweight", start, stop), scale, grid_for(spec, "float32"), spec.granularity,
            spec.columns_per_scale(shape[1]), None if spec.symmetric else zero_point,
        )  # fmt: skip

    def _zero_point(self, linear: str, start: int, stop: int) -> Tensor | None:
        """Zero points − 8, int32 [n, G]; CheckpointError where config.json says symmetric and they are not 8."""
        name = f"{linear}.qzeros"
        if name not in self.stored.tensors:
            return None
        zero_point = self._rows(name, start, stop).to(torch.int32)
        if self._scheme.weight.symmetric and bool((zero_point != 0).any()):
            found = int(zero_point[zero_point != 0][0]) + 8
            said = "zero_point false" if self._says_sym else "sym"
            raise CheckpointError(
                f"{self.stored.tensors[name].file}: {name} holds {found}; config.json says {said}, which needs 8",
                'the model is asymmetric: set "zero_point": true and "sym": false in config.json',
            )
        return zero_point

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Signed codes int8 [n, K] of rows start..stop, out of int32 [K, N/8]."""
        words = self.stored.read(name)[:, start // 8 : -(-stop // 8)].contiguous()
        rows = kernels.unpack_dense(words, BITS, words.shape[1] * 8).t()
        ordered = rows.reshape(-1, 8, rows.shape[1])[:, NIBBLES].reshape(rows.shape)
        return ordered[: stop - start].contiguous()


def _scheme(stored: Checkpoint, quantization: dict[str, Any]) -> Scheme:
    version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(
            f"{stored.source}: config.json: version is {version!r}, an AWQ layout that lowbit cannot read",
            "it reads gemm; start from the GEMM files or the original model",
        )
    bits = _stated(stored, quantization, "bits", "w_bit")
    if isinstance(bits, bool) or bits != BITS:
        raise CheckpointError(f"{stored.source}: config.json: bits is {bits!r}; AWQ's GEMM layout has 4")
    group_size = _stated(stored, quantization, "group_size", "q_group_size")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"{stored.source}: config.json: group_size is {group_size!r}; -1 or a positive number is needed"
        )
    zero_point = _stated(stored, quantization, "zero_point", default=True)
    if not isinstance(zero_point, bool):
        raise CheckpointError(f"{stored.source}: config.json: zero_point is {zero_point!r}; true or false is needed")
    symmetric = not zero_point or (quantization.get("sym") is True and _is_ours(quantization))
    granularity = Granularity.CHANNEL if group_size == -1 else Granularity.GROUP
    weight = WeightSpec("int", BITS, granularity, None if group_size == -1 else group_size, symmetric)
    return scheme_of_specs(weight, None)


def _stated(stored: Checkpoint, quantization: dict[str, Any], *keys: str, default: Any = None) -> Any:
    """The value under the first of the keys that is there."""
    for key in keys:
        if quantization.get(key) is not None:
            return quantization[key]
    if default is not None:
        return default
    raise CheckpointError(
        f"{stored.source}: config.json: quantization_config has no {keys[0]}",
        "get config.json or quant_config.json again from where the model is from",
    )


def _skipped(stored: Checkpoint, quantization: dict[str, Any]) -> list[str]:
    said = quantization.get("modules_to_not_convert") or []
    if not isinstance(said, list) or not all(isinstance(name, str) and name for name in said):
        raise CheckpointError(
            f"{stored.source}: config.json: modules_to_not_convert is {said!r}; a list of names is needed"
        )
    return said


def _is_ours(quantization: dict[str, Any]) -> bool:
    meta = quantization.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    return isinstance(makers, list) and any(str(maker).startswith("lowbit:") for maker in makers)
