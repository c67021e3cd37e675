"""FP8 folders as their makers publish them (quant_method "fp8"), read: DeepSeek, Qwen, Mistral and others.

For a linear `L` with weight [N, K] and blocks of b × b (`weight_block_size`, 128 for all that are known):

    blocks       L.weight float8_e4m3fn [N, K]   L.weight_scale_inv float [⌈N/b⌉, ⌈K/b⌉]
    per tensor   L.weight float8_e4m3fn [N, K]   L.weight_scale_inv float [], or L.weight_scale [] or [1] as vLLM has it
    static activations (per tensor only)         L.activation_scale float [], or L.input_scale [] or [1] as vLLM has it

W = codes · scale: "inv" is the inverse of the factor that the weight was multiplied by. Scales may be float8_e8m0fnu
(powers of two, `scale_fmt: "ue8m0"`). Modules in `modules_to_not_convert` (`ignored_layers`) stay in 16 bits; without
either list, as in DeepSeek-V3, the files decide. Scales of an FP8 KV cache are read by kv_cache.py.
Spec: `FineGrainedFP8Config`, `FP8Linear` and `Fp8Dequantize` of transformers 5.23; fp8.py of vLLM 0.32.

Refused: E5M2 and E4M3 "fnuz" (AMD's, other values for the same bits), blocks that are not squares, packed FP4 experts,
E4M3 weights without a scale, a linear in 16 bits that config.json does not leave out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.kv_cache import kv_cache_names, kv_cache_scheme
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.numerics.scales import e8m0_values
from lowbit.patterns import Pattern, PatternError, up_to_a_dot
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import Granularity, QuantizedTensor

_SCALES = ("weight_scale_inv", "weight_scale")
_INPUT_SCALES = ("activation_scale", "input_scale")
_LARGEST_BLOCK = 1 << 16
_HINT = "the files and config.json do not belong together, or a download is incomplete"


class Fp8Layout(Layout):
    LEAVES = ("weight", *_SCALES, *_INPUT_SCALES)
    HAS_KV_CACHE = True

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        _check_numbers(quantization)
        self.scheme = _scheme(quantization)
        self.skip = _skip_patterns(quantization)
        # vLLM reads the scales of a cache by their names, when it is told to quantize one.
        self.kv_cache = kv_cache_scheme("tensor") if kv_cache_names(stored) else None
        if self.skip is None:
            self.notes.append("config.json does not list what stays in 16 bits; the tensors themselves say it")

    def linears(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf not in ("weight", *_SCALES) or (leaf == "weight" and info.dtype != torch.float8_e4m3fn):
                continue
            weight = self.stored.tensors.get(f"{linear}.weight")
            if weight is None:
                raise CheckpointError(f"{info.file}: {name} is there, but {linear}.weight is absent", _HINT)
            found[linear] = matrix_shape(weight, _HINT)
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        if self.skip is None:
            info = self.stored.tensors.get(f"{linear}.weight")
            return None if info is not None and info.dtype in FLOATS else self.scheme
        listed = any(linear.endswith(entry) or pattern.match(linear) for entry, pattern in self.skip)
        return None if listed else self.scheme

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        weight, activation = self.scheme.weight, self.scheme.activation
        scale_name = f"{linear}.{self._leaf(linear, _SCALES)}"
        expected = {f"{linear}.weight": Expected((torch.float8_e4m3fn,), shape)}
        if weight.granularity is Granularity.BLOCK:
            scale_shape = weight.granularity.scale_shape(*shape, weight.columns_per_scale(shape[1]))
            expected[f"{linear}.{_SCALES[0]}"] = Expected((*FLOATS, torch.float8_e8m0fnu), scale_shape)
        else:
            expected[scale_name] = Expected(FLOATS, self._scalar_shape(scale_name))
        if activation is not None and activation.needs_calibration:
            input_name = f"{linear}.{self._leaf(linear, _INPUT_SCALES)}"
            expected[input_name] = Expected(FLOATS, self._scalar_shape(input_name))
        return expected

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        return self.scheme.weight.group_size or 1

    def scale_dtype(self, linear: str) -> torch.dtype:
        return self.stored.tensors[f"{linear}.{self._leaf(linear, _SCALES)}"].dtype

    def input_scale(self, linear: str) -> float | None:
        name = f"{linear}.{self._leaf(linear, _INPUT_SCALES)}"
        activation = self.scheme.activation
        if activation is None or not activation.needs_calibration or name not in self.stored.tensors:
            return None
        return self.stored.read(name).float().reshape(-1)[0].item()

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        spec = self.scheme.weight
        name = f"{linear}.{self._leaf(linear, _SCALES)}"
        if spec.granularity is Granularity.BLOCK:
            block = spec.group_size or 1
            scale = self.stored.read(name, start // block, -(-stop // block))
        else:
            scale = self.stored.read(name).reshape(1, 1)
        scale = e8m0_values(scale.view(torch.uint8)) if scale.dtype == torch.float8_e8m0fnu else scale.float()
        codes = self.stored.read(f"{linear}.weight", start, stop).view(torch.uint8)
        return QuantizedTensor(
            codes, scale, grid_for(spec, "float32"), spec.granularity, spec.columns_per_scale(shape[1])
        )

    def _leaf(self, linear: str, leaves: tuple[str, ...]) -> str:
        """The spelling that the files use; the first where none is there."""
        return next((leaf for leaf in leaves if f"{linear}.{leaf}" in self.stored.tensors), leaves[0])

    def _scalar_shape(self, name: str) -> tuple[int, ...]:
        info = self.stored.tensors.get(name)
        return (1,) if info is not None and tuple(info.shape) == (1,) else ()


def _check_numbers(quantization: dict[str, Any]) -> None:
    """The number format is E4M3, of the usual kind."""
    number = quantization.get("fmt", "e4m3")
    if number not in ("e4m3", "float8_e4m3fn"):
        raise _bad("fmt", number, "'e4m3' (E5M2 and the fnuz formats give other values to the same bits)")
    if quantization.get("scale_fmt", "float") not in (None, "float", "ue8m0"):
        raise _bad("scale_fmt", quantization["scale_fmt"], "'float' or 'ue8m0'")
    if quantization.get("expert_dtype", "fp8") not in (None, "fp8"):
        raise _bad("expert_dtype", quantization["expert_dtype"], "'fp8'; packed FP4 experts cannot be read")


def _scheme(quantization: dict[str, Any]) -> Scheme:
    activations = quantization.get("activation_scheme")
    if activations not in ("dynamic", "static"):
        raise _bad("activation_scheme", activations, "'dynamic' or 'static'")
    block = quantization.get("weight_block_size")
    if block is None:
        if activations == "static":
            return SCHEMES["FP8"]
        summary = "FP8 E4M3 per tensor; activations FP8 per token, dynamic"
        return replace(SCHEMES["FP8_DYNAMIC"], weight=SCHEMES["FP8"].weight, summary=summary)
    if activations != "dynamic":
        raise _bad("activation_scheme", activations, "'dynamic' with weight_block_size")
    square = isinstance(block, list) and len(block) == 2 and block[0] == block[1] and type(block[0]) is int
    if not square or not 0 < block[0] <= _LARGEST_BLOCK:
        raise _bad("weight_block_size", block, "a square such as [128, 128]")
    scheme = SCHEMES["FP8_BLOCK"]
    if block[0] == scheme.weight.group_size:
        return scheme
    assert scheme.activation is not None
    return replace(
        scheme, weight=replace(scheme.weight, group_size=block[0]),
        activation=replace(scheme.activation, group_size=block[0]), summary=f"as FP8_BLOCK, in squares of {block[0]}",
    )  # fmt: skip


def _skip_patterns(quantization: dict[str, Any]) -> list[tuple[str, Pattern]] | None:
    """Entries of the list of exceptions with the regex that transformers makes of each; None where there is no list."""
    key = next((key for key in ("modules_to_not_convert", "ignored_layers") if quantization.get(key) is not None), None)
    if key is None:
        return None
    entries = quantization[key]
    if not isinstance(entries, list) or not all(isinstance(entry, str) and 0 < len(entry) < 1000 for entry in entries):
        raise _bad(key, entries, "a list of module names")
    patterns = []
    for entry in entries:
        try:
            patterns.append((entry, up_to_a_dot(entry)))
        except PatternError as error:
            raise _bad(key, entry, f"a name or regular expression ({error})") from error
    return patterns


def _bad(where: str, found: Any, needed: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config.{where} is {str(found)[:200]!r}; needed is {needed}",
        "start from the 16-bit checkpoint, or correct config.json",
    )
