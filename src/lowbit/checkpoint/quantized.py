"""Quantized safetensors folders as a `Checkpoint`: one view for every format, one `Layout` per format.

Every quantized linear appears under its Hugging Face name, `L.weight`, with its logical shape [N, K]: `read` unpacks
and decodes just the rows asked for (float32), `read_quantized` gives the codes and scales themselves. Other tensors
appear as they are stored. A format is a subclass of `Layout` and a row in `registry.FORMATS`; the bit order and the
meaning of config.json are known to the subclass alone.

Refused, with the tensor named: an unknown quant_method; a linear that the files hold quantized and config.json does
not; tensors that are absent, of another dtype, or of a shape that does not fit the bits and group size declared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.base import Checkpoint, TensorInfo, read_json_object
from lowbit.checkpoint.kv_cache import kv_cache_names, read_kv_cache
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.checkpoint.stated import stated_quantization, without_quantization
from lowbit.checkpoint.unreadable import MLX, find_unreadable, is_mlx
from lowbit.errors import CheckpointError
from lowbit.numerics.column_scales import InputBasis
from lowbit.registry import FORMATS, load
from lowbit.schemes import KVCacheScheme, Scheme
from lowbit.tensors import QuantizedTensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

KINDS = tuple(row.name for row in FORMATS.values() if row.read is not None)  # of `Checkpoint.kind`


@dataclass(frozen=True)
class Expected:
    """A required tensor. Loaders convert between float dtypes, so several may be allowed."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


class Layout(ABC):
    """How one format keeps quantized linears. `linear` is a module name, `shape` its logical [N, K].

    LEAVES          endings of the stored names of a quantized linear, optional ones included
    HAS_KV_CACHE    the format can state a quantized KV cache
    kv_cache        the stated scheme of it; None where there is none, or none that lowbit knows
    int8_threshold  |x| from which LLM.int8() multiplies a column of inputs in 16 bits
    notes           for the user: "zero points are stored as GPTQ v1 stores them"
    """

    LEAVES: ClassVar[tuple[str, ...]] = ()
    HAS_KV_CACHE: ClassVar[bool] = False
    kv_cache: KVCacheScheme | None = None
    int8_threshold: float = 6.0

    def __init__(self, stored: Checkpoint):
        self.stored = stored
        self.notes: list[str] = []

    @abstractmethod
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear that the files hold quantized, in file order, with its logical shape, from headers alone."""

    @abstractmethod
    def scheme_of(self, linear: str) -> Scheme | None:
        """The scheme that config.json gives a linear; None where it stays unquantized, or is not mentioned."""

    def quantized_scheme(self, linear: str) -> Scheme:
        """The scheme of a linear that `QuantizedCheckpoint` found quantized."""
        scheme = self.scheme_of(linear)
        assert scheme is not None, "checked when the folder was opened"
        return scheme

    @abstractmethod
    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        """Stored name → dtype and shape that it must have, of a linear that has a scheme."""

    def beside(self) -> list[str]:
        """Stored tensors that are neither of a linear nor parameters of the model: matrices of transforms."""
        return []

    def owned(self, linear: str) -> list[str]:
        """The tensors of the files that belong to a quantized linear."""
        return [f"{linear}.{leaf}" for leaf in self.LEAVES if f"{linear}.{leaf}" in self.stored.tensors]

    @abstractmethod
    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        """Codes and scales of rows start..stop; start divides by `row_multiple`."""

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        """Reads begin at multiples of this many rows."""
        return 1

    @abstractmethod
    def scale_dtype(self, linear: str) -> torch.dtype:
        """The float dtype of the stored scales (of the second level, where the first is no float)."""

    def rotation(self, linear: str, columns: int, quantized: bool = True) -> InputBasis | None:
        """How the loader rotates, or scales, the input of a linear as the model runs; None where it does not.

        quantized  False for a float matrix, which need not be the weight of a linear
        """
        return None

    def input_scale(self, linear: str) -> float | None:
        """The static activation scale, a multiplier; None where none is stored."""
        return None

    def input_zero_point(self, linear: str) -> int | None:
        """The signed code of a static activation scale that stands for 0; None where none is stored."""
        return None


class QuantizedCheckpoint(Checkpoint):
    """The decoded view of an open safetensors folder; `tensors` lists logical weights."""

    def __init__(self, stored: Checkpoint, layout: Layout, kind: str):
        self.stored, self.layout, self.kind = stored, layout, kind
        self.source, self.folder, self.metadata = stored.source, stored.folder, stored.metadata
        self.notes = [*stored.notes, *layout.notes]
        self.schemes: dict[str, Scheme] = {}  # weight name → scheme
        self.int8_threshold = layout.int8_threshold
        self.tensors: dict[str, TensorInfo] = {}
        self._owned: dict[str, list[str]] = {}
        shapes = layout.linears()
        self._owners: dict[str, list[str]] = {}  # stored name → linears; several where experts share a tensor
        for linear, shape in shapes.items():
            self._check(linear, shape)
            owned = self._owned[f"{linear}.weight"] = layout.owned(linear)
            for name in owned:
                self._owners.setdefault(name, []).append(linear)
        beside: set[str] = set(layout.beside())
        if layout.HAS_KV_CACHE:
            beside |= set(kv_cache_names(stored))
            self.kv_cache, notes = read_kv_cache(stored, layout.kv_cache)
            self.notes += notes
        for name, info in stored.tensors.items():
            if name not in self._owners and name not in beside:
                if name in self._owned:
                    raise CheckpointError(f"{info.file}: {name} and {self._owned[name][0]} are both there: a linear "
                                          "has floats or codes", "remove the one that is left over")  # fmt: skip
                self.tensors[name] = info
            for linear in self._owners.get(name, ()):
                if f"{linear}.weight" not in self.tensors:
                    self._add(linear, shapes[linear])
        self.rotations: dict[str, InputBasis] = {}
        for name, info in self.tensors.items():
            if name.endswith(".weight") and len(info.shape) == 2:
                quantized = name in self.schemes
                rotation = layout.rotation(name.removesuffix(".weight"), info.shape[1], quantized)
                if rotation is not None:
                    self.rotations[name] = rotation

    def config(self) -> dict[str, Any]:
        """config.json without its quantization, which `schemes` has."""
        return without_quantization(self.stored.config())

    @property
    def files(self) -> Any:
        return self.stored

    @property
    def input_scales(self) -> dict[str, float]:
        found = {weight: self.layout.input_scale(weight.removesuffix(".weight")) for weight in self.schemes}
        return {weight: scale for weight, scale in found.items() if scale is not None}

    @property
    def input_zero_points(self) -> dict[str, int]:
        found = {weight: self.layout.input_zero_point(weight.removesuffix(".weight")) for weight in self.schemes}
        return {weight: zero_point for weight, zero_point in found.items() if zero_point is not None}

    def says_quantized(self, linear: str) -> bool:
        return self.layout.scheme_of(linear) is not None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        values = self._stored_values(name, start, stop)
        rotation = self.rotations.get(name)
        return values if rotation is None else rotation.back(values.float()).to(values.dtype)

    def _stored_values(self, name: str, start: int, stop: int | None) -> Tensor:
        if name not in self.schemes:
            return self.stored.read(name, start, stop)
        linear, info = name.removesuffix(".weight"), self.tensors[name]
        stop = info.shape[0] if stop is None else stop
        shape = (info.shape[0], info.shape[1])
        first = start - start % self.layout.row_multiple(linear, shape)
        return self.layout.read(linear, shape, first, stop).decode()[start - first :]

    def read_quantized(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        rows, columns = self.tensors[name].shape
        return self.layout.read(name.removesuffix(".weight"), (rows, columns), start, rows if stop is None else stop)

    def row_multiple(self, name: str) -> int:
        if name not in self.schemes:
            return 1
        rows, columns = self.tensors[name].shape
        return self.layout.row_multiple(name.removesuffix(".weight"), (rows, columns))

    def scale_dtype(self, name: str) -> torch.dtype:
        return self.layout.scale_dtype(name.removesuffix(".weight"))

    def release(self, name: str) -> None:
        for stored in self._owned.get(name, [name]):
            self.stored.release(stored)

    def close(self) -> None:
        self.stored.close()

    def _check(self, linear: str, shape: tuple[int, int]) -> None:
        if self.layout.scheme_of(linear) is None:
            some = self.layout.owned(linear)[0]
            raise CheckpointError(
                f"{self.stored.tensors[some].file}: {some} is part of a quantized weight, but config.json does not say "
                f"how {linear} is quantized",
                "the files and config.json do not belong together, or quantization_config leaves this linear out",
            )
        problem = tensor_problem(self.stored.tensors, self.layout.expected(linear, shape))
        if problem is not None:
            raise CheckpointError(
                f"{self.source}: {problem}; config.json says {self.kind}, {self.layout.scheme_of(linear).name}",  # type: ignore[union-attr]
                "the files and config.json do not belong together, or a download is incomplete",
            )

    def _add(self, linear: str, shape: tuple[int, int]) -> None:
        name, scheme = f"{linear}.weight", self.layout.scheme_of(linear)
        assert scheme is not None, "checked"
        infos = [self.stored.tensors[stored] for stored in self._owned[name]]
        self.schemes[name] = scheme
        stored = f"{infos[0].stored} ({scheme.name})"
        nbytes = sum(info.nbytes // len(self._owners[info.name]) for info in infos)
        self.tensors[name] = TensorInfo(name, shape, torch.float32, stored, nbytes, infos[0].file)


def matrix_shape(info: TensorInfo, hint: str = "") -> tuple[int, int]:
    """The stored shape of a matrix; CheckpointError for other tensors."""
    if len(info.shape) != 2:
        raise CheckpointError(f"{info.file}: {info.name} has shape {list(info.shape)}; a matrix is needed", hint)
    return (info.shape[0], info.shape[1])


def tensor_problem(tensors: dict[str, TensorInfo], expected: dict[str, Expected]) -> str | None:
    """The first required tensor that is absent or has another dtype or shape, in words; None where all fit."""
    for name, needed in expected.items():
        info = tensors.get(name)
        if info is None:
            return f"{name} {list(needed.shape)} is absent"
        if info.dtype not in needed.dtypes:
            dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in needed.dtypes)
            return f"{name} is {str(info.dtype).removeprefix('torch.')}; {dtypes} is needed"
        if tuple(info.shape) != needed.shape:
            return f"{name} has shape {list(info.shape)}; {list(needed.shape)} is needed"
    return None


def quantization_of(stored: Checkpoint) -> dict[str, Any] | None:
    """config.json's `quantization_config`, else the content of the format's own config file; None without either."""
    if not (stored.folder / "config.json").exists():
        return None
    if is_mlx(stored.tensors):  # what it states under `quantization` names no method, and one of its source may be left
        return {"quant_method": MLX}
    stated = stated_quantization(stored.config())
    if stated is not None:
        if not isinstance(stated, dict):
            raise CheckpointError(
                f"{stored.folder}: config.json: quantization_config is {str(stated)[:80]}; a mapping is needed"
            )
        return stated
    # Config files of old tools; one may be left over beside unquantized weights.
    for row in FORMATS.values():
        if row.beside is not None:
            path, mark = stored.folder / row.beside[0], row.beside[1]
            if path.is_file() and any(tensor.endswith(mark) for tensor in stored.tensors):
                return {"quant_method": row.name} | read_json_object(path)
    return None


def open_quantized(stored: SafetensorsCheckpoint) -> Checkpoint:
    """The decoded view of a quantized folder; an unquantized one as it is.

    A quantization that config.json states over plain floats is dropped with a note: tools that decode a model, or merge
    an adapter into it, leave the statement behind.
    """
    quantization = quantization_of(stored)
    if quantization is None:
        return stored
    if not holds_codes(stored):
        method = quantization.get("quant_method") or "an unnamed method"
        stored.restate(
            without_quantization(stored.config()),
            f"config.json states a quantization ({method}), but all tensors are plain floats: they were taken as they "
            f"are, and the statement was dropped",
        )
        return stored
    method = find_method(stored, quantization)
    return QuantizedCheckpoint(stored, open_layout(stored, quantization), method)


def holds_codes(stored: Checkpoint) -> bool:
    """True if a tensor is of a quantized linear or of a quantized KV cache, by its dtype or its name."""
    for name, info in stored.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if is_of_codes(name):
            return True
        coded = info.dtype not in FLOATS and info.dtype is not torch.float64
        is_mask = leaf == "bias" and owner.endswith(("attn", "attention"))
        if coded and not is_mask and leaf not in ("position_ids", "masked_bias"):
            return True
        if leaf.endswith(("_blocks", "_scales")):
            return True
    return bool(kv_cache_names(stored))


def is_of_codes(name: str) -> bool:
    """True for the name of a tensor that only quantized linears have."""
    leaf = name.rpartition(".")[2]
    return leaf in _QUANTIZED_LEAVES or leaf.startswith(("absmax", "quant_map", "quant_state", "_weight_"))


_QUANTIZED_LEAVES = {
    "weight_packed", "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_zero_point", "weight_global_scale",
    "qweight", "qzeros", "scales", "SCB", "W_q", "input_scale", "pre_quant_scale", "table",
}  # fmt: skip


def open_layout(stored: Checkpoint, quantization: dict[str, Any]) -> Layout:
    """The layout of a quantized folder; CheckpointError for an unknown quant_method."""
    read = FORMATS[find_method(stored, quantization)].read
    assert read is not None, "find_method knows what can be read"
    return load(read)(stored, quantization)


# Other tools' names of a quant_method.
_SPELLINGS = {
    "modelopt_fp4": "modelopt", "gptqmodel": "gptq", "compressed_tensors": "compressed-tensors",
    "auto_round": "auto-round", "intel/auto-round": "auto-round", "lowbit-codebook": "codebook", "amd-quark": "quark",
}  # fmt: skip


def usual_name(method: str) -> str:
    """The name of the format that config.json's quant_method means, in the registry's spelling; others as they are."""
    return _SPELLINGS.get(method.lower(), method.lower())


def find_method(stored: Checkpoint, quantization: dict[str, Any]) -> str:
    """quant_method, other tools' spellings included; CheckpointError for an unknown one."""
    stated = quantization.get("quant_method")
    method = str(stated).lower() if stated is not None else "none"
    if stated is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"
    method = usual_name(method)
    unreadable = find_unreadable(method)
    if unreadable is not None:
        laid_out = is_mlx(stored.tensors)
        known = "the files are MLX's and" if laid_out else f"config.json says {stated}, whose files"
        raise CheckpointError(f"{stored.source}: {known} cannot be read: {unreadable.why}", unreadable.instead)
    if method not in KINDS:
        said = "no quant_method" if stated is None else f"the quant_method {stated!r}, which lowbit cannot read"
        raise CheckpointError(
            f"{stored.source}: config.json states {said}",
            f"it reads {', '.join(KINDS)}; else start from the original checkpoint",
        )
    return method
