"""ModelOpt folders, read: the `Layout` of NVIDIA's format, from config.json or from hf_quant_config.json alone.

The layouts are pictured in write.py; this file reads them from the files and the two JSON files alone. Read as well:

    NVFP4_AWQ                             NVFP4 with L.pre_quant_scale
    W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN    TensorRT-LLM's name of W8A8_SQ_PER_CHANNEL's tensors
    W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN      one weight scale per tensor, L.weight_scale []

`L.pre_quant_scale` [K] multiplies the input of a linear: its codes are of W / pre_quant_scale, and `rotation` has what
takes that out again. Ones are the same as none.

Scales with a dimension of 1 more or less are the same: [] and [1], [N] and [N, 1], [⌈N/128⌉, 1, K/128, 1] and without
the ones. Names in `ignore` (exclude_modules) are wildcards; as vLLM does for old checkpoints, they are taken for a part
of a name too where the files hold the linear in 16 bits. Scales of an FP8 KV cache (kv_cache_quant_algo, or
kv_cache_scheme in config.json) are read by kv_cache.py.

Refused by name: algorithms that lowbit does not know; `pre_quant_scale` of a linear that is not quantized, or with a
value that is not finite and above 0; AWQ with zero points; experts fused into one tensor; a group size other than the
algorithm's; AWQ without a group size; config.json and hf_quant_config.json that name two algorithms.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint, read_json_object
from lowbit.checkpoint.kv_cache import kv_cache_scheme
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.numerics.column_scales import ColumnScales, InputBasis
from lowbit.numerics.scales import e8m0_values
from lowbit.schemes import KV_CACHE_SCHEMES, SCHEMES, KVCacheScheme, Scheme, WeightSpec
from lowbit.tensors import Granularity, QuantizedTensor

COMPANION = "hf_quant_config.json"

# quant_algo in capitals → scheme. FP8_BLOCK_SCALES is how TensorRT-LLM spells FP8_PB_WO.
_SCHEME_OF = {
    "FP8": SCHEMES["FP8"],
    "FP8_PER_CHANNEL_PER_TOKEN": SCHEMES["FP8_DYNAMIC"],
    "FP8_PB_WO": SCHEMES["FP8_BLOCK"],
    "FP8_BLOCK_SCALES": SCHEMES["FP8_BLOCK"],
    "NVFP4": SCHEMES["NVFP4"],
    "W4A16_NVFP4": SCHEMES["NVFP4A16"],
    "MXFP8": SCHEMES["MXFP8"],
    "NVFP4_AWQ": SCHEMES["NVFP4"],
    "W4A16_AWQ": SCHEMES["W4A16"],
    "W4A8_AWQ": SCHEMES["W4AFP8_STATIC"],
    "W8A16": SCHEMES["W8A16"].with_group_size(-1),
    "W8A8_SQ_PER_CHANNEL": SCHEMES["W8A8_STATIC"],
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": SCHEMES["W8A8_STATIC"],
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": SCHEMES["W8A8"],
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": SCHEMES["W8A8_TENSOR"],
}
_CODES = (torch.float8_e4m3fn, torch.uint8, torch.int8)
_HINT = "the files and config.json do not belong together, or a download is incomplete"


class ModelOptLayout(Layout):
    LEAVES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
    HAS_KV_CACHE = True

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        stated = _stated(quantization)
        _check_companion(stored, stated)
        self.ignore = _names(stated, "ignore")
        self.layers = _layers(stated)
        self.scheme = None if self.layers is not None else _scheme(stated, "quantization_config")
        self.schemes: dict[str, Scheme | None] = {}  # of linears that were asked for
        self.kv_cache = _kv_cache(stated)
        self._refuse_unreadable()

    def linears(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            is_codes = leaf == "weight" and info.dtype in _CODES
            if is_codes or leaf in ("weight_scale", "weight_scale_2"):
                if f"{linear}.weight" not in self.stored.tensors:
                    raise CheckpointError(f"{info.file}: {name} is there, but {linear}.weight is absent", _HINT)
                found[linear] = self._logical_shape(linear)
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        if linear not in self.schemes:
            self.schemes[linear] = self._find_scheme(linear)
        return self.schemes[linear]

    def _find_scheme(self, linear: str) -> Scheme | None:
        if any(fnmatchcase(linear, entry) for entry in self.ignore):
            return None
        info = self.stored.tensors.get(f"{linear}.weight")
        holds_codes = info is not None and info.dtype in _CODES
        if not holds_codes and any(entry in linear for entry in self.ignore):
            return None
        if self.layers is None:
            return self.scheme
        path = linear
        while path and path not in self.layers:
            path = path.rpartition(".")[0]  # experts may be listed as a whole
        return self.layers.get(path)

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        scheme = self.quantized_scheme(linear)
        spec, (rows, columns) = scheme.weight, shape
        scale_rows, groups = spec.granularity.scale_shape(rows, columns, spec.columns_per_scale(columns))
        shapes: tuple[tuple[int, ...], ...] = ((scale_rows, groups),)
        if spec.granularity is Granularity.TENSOR:
            shapes = ((), (1,))
        elif spec.granularity is Granularity.CHANNEL:
            shapes = ((rows,), (rows, 1))
        elif spec.granularity is Granularity.BLOCK:
            shapes = ((scale_rows, 1, groups, 1), (scale_rows, groups))
        scale_dtypes = {"e4m3": (torch.float8_e4m3fn,), "e8m0": (torch.uint8, torch.float8_e8m0fnu)}
        packed = (torch.uint8, (rows // 2, columns)) if spec.bits == 4 else (torch.int8, shape)
        codes = {"e2m1": (torch.uint8, (rows, columns // 2)), "int": packed}
        dtype, code_shape = codes.get(spec.number, (torch.float8_e4m3fn, shape))
        leaves = {
            "weight": Expected((dtype,), code_shape),
            "weight_scale": Expected(scale_dtypes.get(spec.scale_format, FLOATS),
                                     self._as_stored(f"{linear}.weight_scale", *shapes)),
        }  # fmt: skip
        once = ["weight_scale_2"] if spec.two_level or spec.ranged else []
        once += ["input_scale"] if scheme.activation is not None and scheme.activation.needs_calibration else []
        for leaf in once:
            leaves[leaf] = Expected((torch.float32,), self._as_stored(f"{linear}.{leaf}", (), (1,)))
        name = f"{linear}.pre_quant_scale"
        if name in self.stored.tensors:
            leaves["pre_quant_scale"] = Expected(FLOATS, self._as_stored(name, (columns,), (1, columns)))
        return {f"{linear}.{leaf}": expected for leaf, expected in leaves.items()}

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        weight = self.quantized_scheme(linear).weight
        return 2 if (weight.number, weight.bits) == ("int", 4) else weight.block_rows

    def scale_dtype(self, linear: str) -> torch.dtype:
        leaf = "weight_scale_2" if self.quantized_scheme(linear).weight.two_level else "weight_scale"
        return self.stored.tensors[f"{linear}.{leaf}"].dtype

    def rotation(self, linear: str, columns: int, quantized: bool = True) -> InputBasis | None:
        """The scales that multiply the input; None where there are none, or all are 1."""
        name = f"{linear}.pre_quant_scale"
        info = self.stored.tensors.get(name)
        if info is None:
            return None
        scale = self.stored.read(name).float().reshape(-1)
        if not quantized:
            raise CheckpointError(f"{info.file}: {name} is of a linear that is not quantized", _HINT)
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise CheckpointError(f"{info.file}: {name} holds a value that is not finite and above 0",
                                  "the checkpoint is damaged; get another copy of it")  # fmt: skip
        return None if bool((scale == 1).all()) else ColumnScales(scale)

    def input_scale(self, linear: str) -> float | None:
        scheme, name = self.scheme_of(linear), f"{linear}.input_scale"
        is_static = scheme is not None and scheme.activation is not None and scheme.activation.needs_calibration
        return self._number(name) if is_static and name in self.stored.tensors else None

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        spec = self.quantized_scheme(linear).weight
        scale = self._scale(f"{linear}.weight_scale", spec.granularity, spec.group_size or 1, start, stop)
        global_scale = self._number(f"{linear}.weight_scale_2") if spec.two_level or spec.ranged else 1.0
        if spec.two_level:
            scale = scale * torch.tensor(global_scale, dtype=torch.float32)
        return QuantizedTensor(
            self._codes(f"{linear}.weight", spec, start, stop), scale, grid_for(spec, "float32"),
            spec.granularity, spec.columns_per_scale(shape[1]), global_scale=global_scale,
        )  # fmt: skip

    def _codes(self, name: str, spec: WeightSpec, start: int, stop: int) -> Tensor:
        if (spec.number, spec.bits) == ("int", 4):
            packed = self.stored.read(name, start // 2, -(-stop // 2))
            nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=1).reshape(-1, packed.shape[1])
            return ((nibbles ^ 8).to(torch.int8) - 8)[: stop - start].contiguous()  # the sign bit is worth −8
        codes = self.stored.read(name, start, stop)
        if spec.number == "int":
            return codes
        return kernels.unpack_nibbles(codes) if spec.number == "e2m1" else codes.view(torch.uint8)

    def _scale(self, name: str, granularity: Granularity, block: int, start: int, stop: int) -> Tensor:
        """Float32, of the shape that `granularity` has in a QuantizedTensor, before any second level."""
        if granularity is Granularity.TENSOR:
            return self.stored.read(name).float().reshape(1, 1)
        if granularity is Granularity.BLOCK:
            scale = self.stored.read(name, start // block, -(-stop // block))
            return scale.float().reshape(scale.shape[0], -1)
        scale = self.stored.read(name, start, stop).reshape(stop - start, -1)
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            return e8m0_values(scale.view(torch.uint8))
        return scale.float()

    def _number(self, name: str) -> float:
        return self.stored.read(name).float().reshape(-1)[0].item()

    def _as_stored(self, name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape where it is one of `shapes`, else the first of them."""
        info = self.stored.tensors.get(name)
        return tuple(info.shape) if info is not None and tuple(info.shape) in shapes else shapes[0]

    def _logical_shape(self, linear: str) -> tuple[int, int]:
        info, scheme = self.stored.tensors[f"{linear}.weight"], self.scheme_of(linear)
        rows, columns = matrix_shape(info, _HINT)
        if info.dtype == torch.uint8 and scheme is not None:
            return {"e2m1": (rows, 2 * columns), "int": (2 * rows, columns)}.get(scheme.weight.number, (rows, columns))
        return (rows, columns)

    def _refuse_unreadable(self) -> None:
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "pre_quant_scale" and f"{linear}.weight" not in self.stored.tensors:
                raise CheckpointError(f"{info.file}: {name} is there, but {linear}.weight is absent", _HINT)
            if leaf.endswith("_weight_scale"):
                raise CheckpointError(
                    f"{info.file}: {name} belongs to experts that are fused into one tensor, which cannot be read",
                    "export the model so that every expert has its own matrices, or start from the 16-bit checkpoint",
                )


def _stated(quantization: dict[str, Any]) -> dict[str, Any]:
    """What either file says, under the keys of config.json, with group_size beside quant_algo."""
    nested = quantization.get("quantization")
    if nested is not None:
        if not isinstance(nested, dict):
            raise _bad("quantization", nested, "a mapping")
        return nested | {"ignore": nested.get("exclude_modules") or []}
    groups = quantization.get("config_groups")
    if groups is None:
        return quantization
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _bad("config_groups", groups, "a mapping of mappings")
    stated = dict(quantization)
    weight_only = groups and all(group.get("input_activations") is None for group in groups.values())
    if str(stated.get("quant_algo")).upper() == "NVFP4" and weight_only:
        stated["quant_algo"] = "W4A16_NVFP4"  # an early way to say it, which vLLM understands too
    weights = [group.get("weights") for group in groups.values()]
    sizes = {args["group_size"] for args in weights if isinstance(args, dict) and type(args.get("group_size")) is int}
    if len(sizes) == 1 and "group_size" not in stated:
        stated["group_size"] = sizes.pop()
    return stated


def _kv_cache(stated: dict[str, Any]) -> KVCacheScheme | None:
    """FP8 or NVFP4, a scale per tensor; None where the cache is not quantized, or in another way. config.json has
    kv_cache_scheme, a mapping for FP8 and the algorithm's name for others; hf_quant_config.json kv_cache_quant_algo."""
    scheme = stated.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        is_fp8 = scheme.get("type") == "float" and scheme.get("num_bits") == 8 and not scheme.get("dynamic")
        return kv_cache_scheme("tensor") if is_fp8 else None
    algorithm = str(scheme or stated.get("kv_cache_quant_algo")).lower()
    return KV_CACHE_SCHEMES[algorithm] if algorithm in ("fp8", "nvfp4") else None


def _check_companion(stored: Checkpoint, stated: dict[str, Any]) -> None:
    """Both files, where both are there, name one algorithm; a group size that only the other has is taken from it."""
    path = stored.folder / COMPANION
    if not path.is_file():
        return
    other = read_json_object(path).get("quantization")
    if not isinstance(other, dict):
        raise CheckpointError(f"{path}: quantization is {other!r}; a mapping is needed")
    ours, theirs = (str(each.get("quant_algo")).upper() for each in (stated, other))
    if ours != theirs and not (ours == "W4A16_NVFP4" and theirs == "NVFP4"):
        raise CheckpointError(
            f"{path}: quant_algo is {other.get('quant_algo')!r}; config.json says {stated.get('quant_algo')!r}",
            "one of the two files is of another checkpoint",
        )
    for key in ("group_size", "has_zero_point"):  # config.json leaves them out for AWQ
        if stated.get(key) is None and other.get(key) is not None:
            stated[key] = other[key]


def _layers(stated: dict[str, Any]) -> dict[str, Scheme] | None:
    """Module → scheme of a checkpoint with several; None where there is one for all."""
    if str(stated.get("quant_algo")).upper() != "MIXED_PRECISION":
        return None
    layers = stated.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise _bad("quantized_layers", layers, "a mapping with at least one layer, for MIXED_PRECISION")
    found: dict[str, Scheme] = {}
    known: dict[str, Scheme] = {}
    for name, layer in layers.items():
        if not isinstance(layer, dict):
            raise _bad(f"quantized_layers.{name}", layer, "a mapping")
        key = f"{layer.get('quant_algo')} {layer.get('group_size')}"
        if key not in known:
            known[key] = _scheme(layer, f"quantized_layers.{name}")
        found[name] = known[key]
    return found


def _scheme(stated: dict[str, Any], where: str) -> Scheme:
    """The scheme that quant_algo and group_size stand for."""
    algorithm = stated.get("quant_algo")
    scheme = _SCHEME_OF.get(str(algorithm).upper())
    if scheme is None:
        raise _bad(f"{where}.quant_algo", algorithm, f"one of {', '.join(_SCHEME_OF)}")
    group_size = stated.get("group_size")
    if stated.get("has_zero_point"):
        raise _bad(f"{where}.has_zero_point", stated["has_zero_point"], "false: no file states where they would lie")
    if scheme.weight.group_size_is_free and scheme.weight.bits == 4:
        if type(group_size) is not int or group_size < 1:
            raise _bad(f"{where}.group_size", group_size, f"a positive number of columns, for {algorithm}")
        return scheme.with_group_size(group_size)
    needed = scheme.weight.group_size
    # ModelOpt writes 0 for algorithms that have no groups.
    if group_size not in (None, 0) and needed is not None and group_size != needed:
        raise _bad(f"{where}.group_size", group_size, f"{needed}, for {algorithm}")
    return scheme


def _names(stated: dict[str, Any], key: str) -> list[str]:
    names = stated.get(key)
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) and 0 < len(name) < 1000 for name in names):
        raise _bad(key, names, "a list of module names")
    return names


def _bad(where: str, found: Any, needed: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is {str(found)[:200]!r} in what config.json or {COMPANION} says of ModelOpt; needed is {needed}",
        "start from the 16-bit checkpoint, or correct the file",
    )
