"""What the `quantization_config` of an AMD Quark folder says of each linear.

    {"quant_method": "quark", "global_quant_config": {"weight": TENSOR, "input_tensors": TENSOR, …},
     "layer_type_quant_config": {"Linear": …}, "layer_quant_config": {PATTERN: …}, "exclude": [PATTERN, …],
     "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": [PATTERN, …]}}

    TENSOR   null, or {"dtype": "int4", "qscheme": "per_group", "group_size": 128, "ch_axis": -1, "symmetric": true,
             "is_dynamic": false, "scale_format": "e8m0", …}, or a list of two, of which the second rounds the scales

read.py says which of them are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.patterns import PatternError, compiled
from lowbit.schemes import SCHEMES, ActivationSpec, Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity

_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
_STORED = {"int4": torch.int32, "uint4": torch.int32, "int8": torch.int8, "uint8": torch.uint8,
           "fp8_e4m3": torch.float8_e4m3fn, "fp4": torch.uint8}  # fmt: skip
_HINT = "start from the 16-bit checkpoint, or run it as it is: vLLM, or transformers with the package amd-quark"


@dataclass(frozen=True)
class StatedWeight:
    """How one linear is stored. dtype: Quark's name of the codes"""

    scheme: Scheme
    dtype: str

    @property
    def zero_code(self) -> int:
        """The stored number that stands for the signed code 0: the middle of unsigned codes."""
        return 1 << (_BITS[self.dtype] - 1) if self.dtype.startswith("uint") else 0

    @property
    def is_packed(self) -> bool:
        """Eight codes to a word."""
        return _BITS.get(self.dtype) == 4

    @property
    def codes_per_item(self) -> int:
        return 8 if self.is_packed else 2 if self.dtype == "fp4" else 1

    @property
    def is_transposed(self) -> bool:
        """Integers in groups lie as [K, N]."""
        return self.dtype in _BITS and self.scheme.weight.granularity is Granularity.GROUP

    @property
    def stored_dtype(self) -> torch.dtype:
        return _STORED[self.dtype]


class QuarkStatement:
    """pack_method: "reorder" or "order". notes: for the user, filled as linears are asked for."""

    def __init__(self, quantization: dict[str, Any]):
        export = _mapping(quantization, "export")
        self.pack_method = export.get("pack_method") or "reorder"
        if self.pack_method not in ("reorder", "order"):
            raise _refused("export.pack_method", self.pack_method, "reorder or order")
        if export.get("weight_format") not in (None, "real_quantized"):
            raise _refused("export.weight_format", export["weight_format"], "real_quantized")
        self._exclude = _names(quantization, "exclude")
        self._layers = _mapping(quantization, "layer_quant_config")
        self._every = _mapping(quantization, "layer_type_quant_config").get("Linear") or _mapping(
            quantization, "global_quant_config"
        )
        caches = _mapping(quantization, "kv_cache_quant_config") | self._layers
        self.has_fp8_cache = any(_is_fp8_cache(caches.get(name)) for name in _names(export, "kv_cache_group"))
        self.notes: set[str] = set()
        self._known: dict[str, StatedWeight | None] = {}
        self._parsed: dict[str, StatedWeight | None] = {}

    def weight_of(self, linear: str) -> StatedWeight | None:
        """None where config.json leaves the linear in 16 bits."""
        if linear not in self._known:
            self._known[linear] = None if self._is_excluded(linear) else self._parse(*self._entry(linear))
        return self._known[linear]

    def _is_excluded(self, linear: str) -> bool:
        return any(
            compiled(entry[3:]).match(linear) if entry.startswith("re:") else fnmatchcase(linear, entry)
            for entry in self._exclude
        )

    def _entry(self, linear: str) -> tuple[str, Any]:
        """(where it stands, the entry) of config.json that is for a linear."""
        for pattern, entry in self._layers.items():
            if fnmatchcase(linear, pattern):
                return f"layer_quant_config[{pattern!r}]", entry
        return "global_quant_config", self._every

    def _parse(self, where: str, entry: Any) -> StatedWeight | None:
        if where not in self._parsed:
            if not isinstance(entry, dict):
                raise _refused(where, entry, "a mapping")
            weight = entry.get("weight")
            self._parsed[where] = None if not weight else self._quantized(where, weight, entry.get("input_tensors"))
        return self._parsed[where]

    def _quantized(self, where: str, weight: Any, inputs: Any) -> StatedWeight:
        spec, dtype = _weight(f"{where}.weight", weight)
        activation = _activation(inputs)
        if inputs and activation is None:
            first = inputs[0] if isinstance(inputs, list) else inputs
            stated = first.get("dtype") if isinstance(first, dict) else first
            self.notes.add(
                f"inputs are stated as {str(stated)[:40]} in a way that is not simulated; they stay in 16 bits"
            )
        return StatedWeight(scheme_of_specs(spec, activation), dtype)


def _weight(where: str, stated: Any) -> tuple[WeightSpec, str]:
    """(spec, Quark's name of its codes)"""
    levels = stated if isinstance(stated, list) else [stated]
    if not levels or not all(isinstance(level, dict) for level in levels):
        raise _refused(where, stated, "a mapping, or a list of them")
    first, dtype = levels[0], str(levels[0].get("dtype"))
    if any(level.get("is_dynamic") for level in levels):
        raise _refused(f"{where}.is_dynamic", True, "false")
    if first.get("zero_point_type") == "float32" and first.get("symmetric") is not True and dtype in _BITS:
        raise _refused(f"{where}.zero_point_type", "float32", "int32: a code stands for 0")
    if len(levels) > 1:
        if len(levels) == 2 and _is_group(first, "fp4", 16) and levels[1].get("dtype") == "fp8_e4m3":
            return SCHEMES["NVFP4"].weight, dtype
        names = ", ".join(str(level.get("dtype")) for level in levels)
        raise _refused(f"{where}.dtype", names, "one level, or fp4 in 16s below fp8_e4m3 (NVFP4)")
    if dtype in _BITS:
        return _integers(where, first, dtype), dtype
    if dtype == "fp4" and _is_group(first, "fp4", 32) and first.get("scale_format") == "e8m0":
        return SCHEMES["MXFP4"].weight, dtype
    if dtype == "fp8_e4m3":
        return _fp8(where, first), dtype
    raise _refused(f"{where}.dtype", _described(first), f"{', '.join(_BITS)}, fp8_e4m3, or fp4 in 32s with e8m0 scales")


def _integers(where: str, stated: dict[str, Any], dtype: str) -> WeightSpec:
    symmetric = stated.get("symmetric") is True and not dtype.startswith("u")
    granularity, group_size = _granularity(where, stated)
    return WeightSpec("int", _BITS[dtype], granularity, group_size, symmetric)


def _fp8(where: str, stated: dict[str, Any]) -> WeightSpec:
    is_mx, blocks = stated.get("scale_format") == "e8m0", stated.get("block_size")
    if is_mx and (_is_group(stated, "fp8_e4m3", 32) or blocks == [1, 32]):
        return SCHEMES["MXFP8"].weight
    side = blocks[0] if isinstance(blocks, list) and len(blocks) == 2 and blocks[0] == blocks[1] else None
    if not is_mx and stated.get("qscheme") == "per_block" and type(side) is int and side > 0:
        return WeightSpec("e4m3", 8, Granularity.BLOCK, side)
    if is_mx or stated.get("qscheme") not in ("per_tensor", "per_channel"):
        needed = "one scale per tensor, channel or square block, or e8m0 scales of 32 columns"
        raise _refused(where, _described(stated), needed)
    return WeightSpec("e4m3", 8, *_granularity(where, stated))


def _granularity(where: str, stated: dict[str, Any]) -> tuple[Granularity, int | None]:
    """(granularity, group size), of scales for rows or for columns within a row."""
    qscheme, axis, size = stated.get("qscheme"), stated.get("ch_axis"), stated.get("group_size")
    if qscheme == "per_tensor":
        return Granularity.TENSOR, None
    if qscheme == "per_channel" and axis in (0, -2):
        return Granularity.CHANNEL, None
    if qscheme == "per_group" and axis in (1, -1, None) and type(size) is int and size > 0:
        return Granularity.GROUP, size
    raise _refused(where, _described(stated), "per_tensor, per_channel along axis 0, or per_group along axis -1")


def _activation(stated: Any) -> ActivationSpec | None:
    """None where inputs stay in 16 bits, or are rounded in a way that no scheme has."""
    if isinstance(stated, list) and len(stated) == 2 and all(isinstance(level, dict) for level in stated):
        return SCHEMES["NVFP4"].activation if _is_group(stated[0], "fp4", 16) else None
    if not isinstance(stated, dict):
        return None
    dtype, qscheme, dynamic = stated.get("dtype"), stated.get("qscheme"), stated.get("is_dynamic") is True
    if dynamic and stated.get("scale_format") == "e8m0":
        for name, scheme in (("fp4", "MXFP4"), ("fp8_e4m3", "MXFP8")):
            if _is_group(stated, name, 32):
                return SCHEMES[scheme].activation
        return None
    number = {"fp8_e4m3": "e4m3", "int8": "int"}.get(str(dtype))
    per = {"per_tensor": "tensor", "per_channel": "token", "per_token": "token"}.get(str(qscheme))
    if number is None or per is None or (per == "token" and not dynamic):
        return None
    symmetric = number == "e4m3" or stated.get("symmetric") is True
    return ActivationSpec(number, 8, per, dynamic, symmetric=symmetric)  # type: ignore[arg-type]


def _is_group(stated: dict[str, Any], dtype: str, size: int) -> bool:
    return (stated.get("dtype"), stated.get("qscheme"), stated.get("group_size")) == (dtype, "per_group", size)


def _is_fp8_cache(entry: Any) -> bool:
    outputs = entry.get("output_tensors") if isinstance(entry, dict) else None
    outputs = outputs[0] if isinstance(outputs, list) and outputs else outputs
    stated = outputs if isinstance(outputs, dict) else {}
    return stated.get("dtype") == "fp8_e4m3" and stated.get("qscheme") == "per_tensor" and not stated.get("is_dynamic")


def _described(stated: dict[str, Any]) -> str:
    keys = ("dtype", "qscheme", "ch_axis", "group_size", "block_size", "scale_format")
    return ", ".join(f"{key} {stated[key]}" for key in keys if stated.get(key) is not None)


def _mapping(stated: dict[str, Any], key: str) -> dict[str, Any]:
    found = stated.get(key)
    if found is not None and not isinstance(found, dict):
        raise _refused(key, found, "a mapping")
    return found or {}


def _names(stated: dict[str, Any], key: str) -> list[str]:
    found = stated.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) and 0 < len(name) < 1000 for name in found):
        raise _refused(key, found, "a list of names")
    for name in found:
        if name.startswith("re:"):
            try:
                compiled(name[3:])
            except PatternError as error:
                raise _refused(key, name, f"a regular expression ({error})") from error
    return found


def _refused(where: str, found: Any, needed: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config.{where} is {str(found)[:200]!r}; {needed} is read", _HINT)
