"""BitNet folders, read: the `Layout` of transformers' BitLinear and AutoBitLinear.

write.py pictures the bytes. What weight_scale means depends on linear_class of config.json:

    autobitlinear               decoded = code · weight_scale
    bitlinear (the default)     decoded = code / weight_scale          HF1BitLLM's models

A linear stays in 16 bits where transformers leaves it: an entry of modules_to_not_convert matches the beginning of its
name, as a regex up to a dot or the end, or the end of its name; without the list, the output head.

Refused: quantization_mode "online", whose files hold float weights; use_rms_norm, a norm that every linear has in front
of it; the code 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.patterns import Pattern, PatternError, up_to_a_dot
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import QuantizedTensor

SCHEME = SCHEMES["TERNARY"]
_CLASSES = ("bitlinear", "autobitlinear")
_ROWS = 4
_HINT = "the files and config.json do not belong together, or a download is incomplete"


class BitNetLayout(Layout):
    LEAVES = ("weight", "weight_scale")

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self._divides = _divides(stored, quantization)
        self._skipped = _skipped(stored, quantization)
        if self._divides:
            self.notes = ["scales are stored as their reciprocals (BitLinear)"]

    def linears(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "weight" and info.dtype == torch.uint8:
                rows, columns = matrix_shape(info, _HINT)
                found[linear] = (rows * _ROWS, columns)
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        skipped = any(pattern.match(linear) or linear.endswith(name) for name, pattern in self._skipped)
        return None if skipped else SCHEME

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        name = f"{linear}.weight_scale"
        scale = self.stored.tensors.get(name)
        single = () if scale is not None and scale.shape == () else (1,)
        return {
            f"{linear}.weight": Expected((torch.uint8,), (shape[0] // _ROWS, shape[1])),
            name: Expected(FLOATS, single),
        }

    def scale_dtype(self, linear: str) -> torch.dtype:
        return self.stored.tensors[f"{linear}.weight_scale"].dtype

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        stored = self._scale(linear)
        scale = 1.0 / stored if self._divides else stored
        codes = self._codes(f"{linear}.weight", shape[0] // _ROWS, start, stop)
        return QuantizedTensor(codes, scale, grid_for(SCHEME.weight, "float32"), SCHEME.weight.granularity, shape[1])

    def _codes(self, name: str, quarter: int, start: int, stop: int) -> Tensor:
        """int8 [stop − start, K]: of each quarter of the rows, those that lie in the range."""
        parts = []
        for index in range(_ROWS):
            first, last = max(start - index * quarter, 0), min(stop - index * quarter, quarter)
            if first < last:
                parts.append(self.stored.read(name, first, last) >> 2 * index & 3)
        unsigned = torch.cat(parts)
        if bool((unsigned == 3).any()):
            raise CheckpointError(f"{self.stored.tensors[name].file}: {name} holds the code 3; 0, 1 and 2 are ternary",
                                  "the file is damaged, or of another format")  # fmt: skip
        return unsigned.to(torch.int8) - 1

    def _scale(self, linear: str) -> Tensor:
        """float32 [1, 1], above 0."""
        name = f"{linear}.weight_scale"
        scale = self.stored.read(name).reshape(1, 1).float()
        if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
            raise CheckpointError(f"{self.stored.tensors[name].file}: {name} is {scale.item()}; a positive number is "
                                  f"needed", _HINT)  # fmt: skip
        return scale


def _divides(stored: Checkpoint, quantization: dict[str, Any]) -> bool:
    """True where weights are codes divided by their scale."""
    kind = quantization.get("linear_class", "bitlinear")
    if kind not in _CLASSES:
        raise CheckpointError(f"{stored.source}: config.json: linear_class is {kind!r}; {' or '.join(_CLASSES)} is "
                              f"needed", "correct config.json")  # fmt: skip
    mode = quantization.get("quantization_mode", "offline")
    if mode != "offline":
        raise CheckpointError(
            f"{stored.source}: config.json: quantization_mode is {mode!r}; offline is read, where files hold codes",
            "of a model that rounds as it runs, remove quantization_config: its weights are floats",
        )
    if quantization.get("use_rms_norm"):
        raise CheckpointError(f"{stored.source}: config.json: use_rms_norm puts a norm in front of every linear, which "
                              f"the model's class does not have", "lowbit cannot read such a model")  # fmt: skip
    return kind == "bitlinear"


def _skipped(stored: Checkpoint, quantization: dict[str, Any]) -> list[tuple[str, Pattern]]:
    """Entries of modules_to_not_convert with the regex that transformers makes of each."""
    entries = quantization.get("modules_to_not_convert")
    entries = ["lm_head"] if entries is None else entries
    if not isinstance(entries, list) or not all(isinstance(entry, str) and 0 < len(entry) < 1000 for entry in entries):
        raise CheckpointError(f"{stored.source}: config.json: modules_to_not_convert is {entries!r}; a list of names "
                              f"is needed", "correct config.json")  # fmt: skip
    try:
        return [(entry, up_to_a_dot(entry)) for entry in entries]
    except PatternError as error:
        raise CheckpointError(f"{stored.source}: config.json: modules_to_not_convert: {error}",
                              "correct config.json") from error  # fmt: skip
