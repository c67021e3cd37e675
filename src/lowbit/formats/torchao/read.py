"""torchao folders, read: what transformers 5 saves of a model that `TorchAoConfig` quantized.

Every quantized tensor is stored in parts; the header of the safetensors file (`__metadata__`) describes it:

    L.weight: {"_type": class, "_data": {"block_size": [1, g], …}, "_tensor_data_names": ["qdata", "scale", …]}

    Int8Tensor                 L._weight_qdata int8 [N, K]            L._weight_scale [N, K/g]
                               L._weight_zero_point int8 [N, K/g]     zeros
    Float8Tensor               L._weight_qdata float8_e4m3fn [N, K]   L._weight_scale [N, K/g]
    IntxUnpackedToInt8Tensor   L._weight_qdata int8 [N, K], within `target_dtype`     L._weight_scale [N, K/g]
                               L._weight_zero_point int8 [N, K/g]     codes

    W = (qdata − zero_point) · scale          g = K: one scale per row; block_size [N, K]: one for all, [1, 1]

These three classes are plain: their values are the codes. The rest of torchao's classes are refused by name. Int4Tensor
has zero points in the units of the weight, which no integer code stands for; the tile-packed, preshuffled and Int32
layouts follow the kernels of one device; MXTensor and NVFP4Tensor are prototypes. Refused too: E5M2, bits below 2,
zero points that are floats, asymmetric or static int8 activations of an Int8Tensor, scales of the activations' channels
(act_pre_scale), tensors without their metadata, and what torchao saved by pickle before it wrote safetensors.
Spec: torchao 0.18, prototype/safetensors and quantization/quantize_/workflows; integrations/torchao.py of transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.checkpoint.base import Checkpoint, TensorInfo
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.schemes import ActivationSpec, Number, Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity, QuantizedTensor

# class → (configurations of config.json that make it, parts that must be there)
_CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Int8Tensor": (("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"), ("qdata", "scale")),
    "Float8Tensor": (
        ("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"),
        ("qdata", "scale"),
    ),
    "IntxUnpackedToInt8Tensor": (
        ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"),
        ("qdata", "scale", "zero_point"),
    ),
}
_PARTS = ("qdata", "scale", "zero_point")
_TENSOR_PART = re.compile(r"(?P<module>.+)\._weight_(?P<part>qdata|scale|zero_point|act_pre_scale|scale_and_zero)")
_INT8_ASYM = ActivationSpec("int", 8, "token", symmetric=False)
_HINT = "quantize the 16-bit checkpoint with lowbit, or save this one dequantized with transformers"
_DAMAGED = "the files and config.json do not belong together, or a tool has written the files anew without metadata"


@dataclass(frozen=True)
class _Quantized:
    """One quantized weight, as the metadata states it."""

    scheme: Scheme
    shape: tuple[int, int]
    parts: tuple[str, ...]


class TorchAoLayout(Layout):
    LEAVES = tuple(f"_weight_{part}" for part in _PARTS)

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self.config_class, self.is_symmetric = _stated(quantization)
        self.found: dict[str, _Quantized] = {}
        for name in stored.tensors:
            part = _TENSOR_PART.fullmatch(name)
            if part is not None and part["module"] not in self.found:
                self.found[part["module"]] = self._open(part["module"])
        self._refuse_unreadable()

    def linears(self) -> dict[str, tuple[int, int]]:
        return {linear: quantized.shape for linear, quantized in self.found.items()}

    def scheme_of(self, linear: str) -> Scheme | None:
        return self.found[linear].scheme if linear in self.found else None

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        quantized = self.found[linear]
        spec = quantized.scheme.weight
        scale_shape = spec.granularity.scale_shape(*shape, spec.columns_per_scale(shape[1]))
        parts = {
            "qdata": Expected((torch.int8 if spec.number == "int" else torch.float8_e4m3fn,), shape),
            "scale": Expected(FLOATS, scale_shape),
            "zero_point": Expected((torch.int8,), scale_shape),
        }
        return {f"{linear}._weight_{part}": parts[part] for part in quantized.parts}

    def scale_dtype(self, linear: str) -> torch.dtype:
        return self.stored.tensors[f"{linear}._weight_scale"].dtype

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        quantized = self.found[linear]
        spec = quantized.scheme.weight
        rows = (0, 1) if spec.granularity is Granularity.TENSOR else (start, stop)
        codes = self.stored.read(f"{linear}._weight_qdata", start, stop)
        scale = self.stored.read(f"{linear}._weight_scale", *rows).float()
        zero_point = None
        if "zero_point" in quantized.parts:
            zero_point = self.stored.read(f"{linear}._weight_zero_point", *rows).to(torch.int32)
            if spec.symmetric and bool(zero_point.any()):
                raise CheckpointError(
                    f"{self.stored.source}: {linear}._weight_zero_point is not all zeros; {self.config_class} is "
                    f"symmetric",
                    _DAMAGED,
                )
        return QuantizedTensor(
            codes if spec.number == "int" else codes.view(torch.uint8), scale, grid_for(spec, "float32"),
            spec.granularity, spec.columns_per_scale(shape[1]), None if spec.symmetric else zero_point,
        )  # fmt: skip

    def _open(self, linear: str) -> _Quantized:
        """What the metadata says of a weight; CheckpointError for what the module docstring refuses."""
        where = f"{self.stored.source}: {linear}.weight"
        stated = self._metadata(f"{linear}.weight")
        if stated is None:
            raise CheckpointError(
                f"{where}: its parts are there, but the safetensors header does not say what they are", _DAMAGED
            )
        class_name, data, parts = (stated.get(key) for key in ("_type", "_data", "_tensor_data_names"))
        if class_name not in _CLASSES:
            raise CheckpointError(f"{where} is a {str(class_name)[:100]} of torchao, which lowbit does not read", _HINT)
        configs, needed = _CLASSES[class_name]
        if self.config_class is not None and self.config_class not in configs:
            raise CheckpointError(f"{where} is a {class_name}; config.json says {self.config_class}", _DAMAGED)
        if not isinstance(data, dict) or not isinstance(parts, list) or not set(needed) <= set(map(str, parts)):
            raise CheckpointError(f"{where}: its metadata lacks {', '.join(needed)}", _DAMAGED)
        unknown = sorted(set(map(str, parts)) - set(_PARTS))
        if unknown:
            raise CheckpointError(f"{where} has {unknown[0]}, which QuantizedTensor has no place for", _HINT)
        info = self.stored.tensors.get(f"{linear}._weight_qdata")
        if info is None or len(info.shape) != 2:
            shape = "absent" if info is None else f"of shape {list(info.shape)}"
            raise CheckpointError(f"{where}: {linear}._weight_qdata is {shape}; a matrix is needed", _DAMAGED)
        self._refuse_float_zero_point(linear)
        shape = (info.shape[0], info.shape[1])
        granularity, group_size = _granularity(where, data, shape)
        number, bits = _number(where, class_name, data, info)
        symmetric = number != "int" or class_name == "Int8Tensor" or self.is_symmetric
        weight = WeightSpec(number, bits, granularity, group_size, symmetric)
        scheme = scheme_of_specs(weight, _activation(where, class_name, data))
        return _Quantized(scheme, shape, tuple(part for part in _PARTS if part in parts))

    def _metadata(self, name: str) -> dict[str, Any] | None:
        text = self.stored.metadata.get(name)
        try:
            stated = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.stored.source}: metadata of {name} is no JSON ({error})", _DAMAGED) from error
        return stated if isinstance(stated, dict) else None

    def _refuse_float_zero_point(self, linear: str) -> None:
        info = self.stored.tensors.get(f"{linear}._weight_zero_point")
        if info is not None and info.dtype in FLOATS:
            raise CheckpointError(
                f"{info.file}: {info.name} is {info.stored}: a zero point in the units of the weight, which no code "
                f"stands for",
                _HINT,
            )

    def _refuse_unreadable(self) -> None:
        """Quantized parameters that are no `weight`, and folders in which nothing is quantized."""
        for name in self.stored.metadata:
            stated = self._metadata(name) if "." in name else None
            class_name = None if stated is None else stated.get("_type")
            if class_name is None or class_name == "Tensor":
                continue
            if not name.endswith(".weight") or name.removesuffix(".weight") not in self.found:
                raise CheckpointError(
                    f"{self.stored.source}: {name} is a {str(class_name)[:100]} of torchao that is no weight of a "
                    f"linear, or its parts are absent",
                    _HINT,
                )
        if not self.found:
            raise CheckpointError(
                f"{self.stored.source}: config.json says torchao, but no tensor is quantized as torchao saves it in "
                f"safetensors (L._weight_qdata)",
                "older releases saved by pickle; load it with the torchao that wrote it, and save it dequantized",
            )


def _stated(quantization: dict[str, Any]) -> tuple[str | None, bool]:
    """(class of the configuration, or None where layers have their own; True where its zero points are all zero)."""
    outer = quantization.get("quant_type")
    stated = outer.get("default") if isinstance(outer, dict) else None
    if not isinstance(stated, dict) or not isinstance(stated.get("_type"), str):
        raise CheckpointError(
            f"config.json: quantization_config.quant_type is {str(outer)[:200]!r}; a torchao configuration is needed",
            "older releases named them by strings and saved by pickle; quantize the 16-bit checkpoint instead",
        )
    data, name = stated.get("_data"), stated["_type"]
    if name in ("FqnToConfig", "ModuleFqnToConfig"):
        return None, False
    mapping = None
    if isinstance(data, dict):
        mapping = data.get("mapping_type", data.get("weight_mapping_type"))
    kind = mapping.get("_data") if isinstance(mapping, dict) else None
    return name, str(kind).startswith("SYMMETRIC")


def _granularity(where: str, data: dict[str, Any], shape: tuple[int, int]) -> tuple[Granularity, int | None]:
    block = data.get("block_size")
    if block in ([], list(shape)):
        return (Granularity.CHANNEL if shape[0] == 1 else Granularity.TENSOR), None
    if not isinstance(block, list) or len(block) != 2 or block[0] != 1 or type(block[1]) is not int or block[1] < 1:
        raise CheckpointError(
            f"{where}: block_size is {str(block)[:100]}; [1, columns] or {list(shape)} is needed", _HINT
        )
    if block[1] == shape[1]:
        return Granularity.CHANNEL, None
    if shape[1] % block[1]:
        raise CheckpointError(f"{where}: {shape[1]} columns do not divide into groups of {block[1]}", _DAMAGED)
    return Granularity.GROUP, block[1]


def _number(where: str, class_name: str, data: dict[str, Any], info: TensorInfo) -> tuple[Number, int]:
    """(number format, bits)."""
    if class_name == "Float8Tensor":
        if info.dtype == torch.float8_e5m2:
            raise CheckpointError(f"{info.file}: {info.name} is E5M2; only E4M3 is read", _HINT)
        return "e4m3", 8
    if class_name == "Int8Tensor":
        return "int", 8
    target = data.get("target_dtype")
    bits = re.fullmatch(r"int([2-8])", str(target.get("_data"))) if isinstance(target, dict) else None
    if bits is None:
        raise CheckpointError(f"{where}: target_dtype is {str(target)[:100]}; int2 to int8 are read", _HINT)
    return "int", int(bits[1])


def _activation(where: str, class_name: str, data: dict[str, Any]) -> ActivationSpec | None:
    """How the engine quantizes activations, by what is stored with the weight."""
    if class_name == "IntxUnpackedToInt8Tensor":
        stated = data.get("activation_quantization")
        if stated not in (None, "int8_asym_per_token"):
            raise CheckpointError(f"{where}: activation_quantization is {str(stated)[:100]}, which is not read", _HINT)
        return None if stated is None else _INT8_ASYM
    stated = data.get("act_quant_kwargs")
    if stated is None:
        return None
    inner = stated.get("_data") if isinstance(stated, dict) else None
    granularity = inner.get("granularity") if isinstance(inner, dict) else None
    per = {"PerRow": "token", "PerTensor": "tensor"}.get(
        str(granularity.get("_type")) if isinstance(granularity, dict) else ""
    )
    mapping = inner.get("mapping_type") if isinstance(inner, dict) else None
    symmetric = mapping is None or (isinstance(mapping, dict) and mapping.get("_data") == "SYMMETRIC")
    if per not in ("token", "tensor") or not symmetric:
        raise CheckpointError(f"{where}: act_quant_kwargs is {str(stated)[:200]}, which is not read", _HINT)
    return ActivationSpec("int" if class_name == "Int8Tensor" else "e4m3", 8, per)
