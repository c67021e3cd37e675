"""`Subject`: the folder under verification, opened lazily, step by step; `Verified`: that, or a GGUF file.

It is independent of how the files were written: it opens the files, parses config.json and builds the architecture
itself. Details of a format come from its `Layout`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.architecture import Architecture, Linear, canonical_view, describe_checkpoint, holds_single_experts
from lowbit.architecture.own_names import discover_named, under_own_names
from lowbit.checkpoint.base import (
    IN_MEMORY,
    Checkpoint,
    OpenOptions,
    read_config,
    read_json_object,
    report_path,
    text_part,
)
from lowbit.checkpoint.quantized import (
    FLOATS,
    Expected,
    Layout,
    find_method,
    open_layout,
    quantization_of,
    tensor_problem,
)
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.checkpoint.stated import refuse_absurd
from lowbit.errors import CheckpointError, LowbitError
from lowbit.methods import parse_method
from lowbit.schemes import Scheme
from lowbit.verification.checksums import kept_checksums, stated_errors
from lowbit.verification.result import PLAIN, Loading, loading_of

if TYPE_CHECKING:
    from lowbit.checkpoint.compressed_tensors_config import CompressedTensorsConfig, Group
    from lowbit.checkpoint.transform_config import RunTimeTransforms
    from lowbit.verification.survey import Progress, Survey


@dataclass(kw_only=True)
class Verified(ABC):
    """An output under verification.

    folder    the folder, or the GGUF file
    source    the original checkpoint, for comparison; None without one
    nearest   True if every code must be the nearest one: the weights were rounded without error feedback
    errors    tensor → ‖W − Ŵ‖² / ‖W‖² that rounding left; None: as the report states
    """

    folder: Path
    engine: str
    source: Checkpoint | None = None
    nearest: bool = False
    progress: Progress | None = None
    errors: Mapping[str, float] | None = None

    @property
    @abstractmethod
    def known_format(self) -> str | None:
        """The format, by which rules are chosen; None where it cannot be told."""

    @abstractmethod
    def close(self) -> None: ...

    @cached_property
    def errors_left(self) -> Mapping[str, float]:
        return stated_errors(self.folder) if self.errors is None else self.errors

    @cached_property
    def checksums(self) -> dict[str, tuple[int, bytes]]:
        """File → (bytes, digests) by the report; empty without one."""
        return kept_checksums(self.folder)


@dataclass(kw_only=True)
class Subject(Verified):
    """A folder under verification."""

    options: OpenOptions

    @cached_property
    def loading(self) -> Loading:
        """The engine's loader."""
        return loading_of(self.engine)

    @cached_property
    def stored(self) -> SafetensorsCheckpoint:
        """The files, as they are."""
        return SafetensorsCheckpoint(self.folder)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The files, plain tensors under the names of the architecture."""
        return canonical_view(self.stored, self.architecture)

    @cached_property
    def original(self) -> Checkpoint | None:
        """The source under the names of the architecture."""
        if self.source is None:
            return None
        if not self.architecture.own_names:
            return canonical_view(self.source, self.architecture)
        trust, single = self.options.trust_remote_code, holds_single_experts(self.stored)
        hub, source = describe_checkpoint(self.source, trust, single)
        return under_own_names(source, hub, trust, single)[1]

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The raw quantization_config of config.json, or the content of the format's own file; empty without one."""
        return quantization_of(self.stored) or {}

    @cached_property
    def format(self) -> str:
        """quant_method of the folder, or "plain"; CheckpointError for one that is not known."""
        read_config(self.folder)
        quantization = quantization_of(self.stored)
        return PLAIN if quantization is None else find_method(self.stored, quantization)

    @property
    def known_format(self) -> str | None:
        try:
            return self.format
        except LowbitError:
            return None

    @cached_property
    def layout(self) -> Layout:
        """How the format keeps its linears."""
        return open_layout(self.stored, self.quantization)

    @property
    def parsed(self) -> CompressedTensorsConfig:
        """The quantization_config of a compressed-tensors folder."""
        return self.layout.parsed  # type: ignore[attr-defined]

    @property
    def transforms(self) -> RunTimeTransforms:
        """What a loader of the folder does to activations, of a compressed-tensors folder."""
        return self.layout.transforms  # type: ignore[attr-defined]

    @cached_property
    def architecture(self) -> Architecture:
        """Experts are described one by one where the files hold blocks, single experts, or decoded floats."""
        refuse_absurd(self.config, str(self.folder), [info.shape for info in self.stored.tensors.values()])
        split = self.known_format in ("mxfp4", PLAIN) or holds_single_experts(self.stored)
        return discover_named(self.stored.tensors, self.config, str(self.folder), self.options.trust_remote_code, split)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The float dtype of config.json."""
        named = str(self.stated_dtype or "bfloat16").removeprefix("torch.")
        return {"float16": torch.float16, "float32": torch.float32}.get(named, torch.bfloat16)

    @property
    def stated_dtype(self) -> Any:
        for config in (self.config, text_part(self.config)):
            if config.get("dtype") or config.get("torch_dtype"):
                return config.get("dtype") or config.get("torch_dtype")
        return None

    @cached_property
    def stored_linears(self) -> list[str]:
        """Linears with a weight of their own; an output layer tied to the embedding has none."""
        return [name for name in self.architecture.linears if f"{name}.weight" not in self.architecture.tied]

    @cached_property
    def decoder(self) -> list[Linear]:
        """The linears of the decoder blocks."""
        return [linear for linear in self.architecture.linears.values() if linear.block is not None]

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Linear → its group of config_groups, of a compressed-tensors folder."""
        if self.format != "compressed-tensors":
            return {}
        found = {name: self.parsed.group_of(name) for name in self.stored_linears}
        return {name: group for name, group in found.items() if group is not None}

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """Linear → scheme, of every linear that config.json quantizes; in formats whose loaders look at the files
        (GPTQ, AWQ, bitsandbytes …), of the linears that the files hold quantized and config.json does not exclude."""
        if self.format == PLAIN:
            return {}
        by_files = self.format in ("gptq", "awq", "auto-round", "bitsandbytes", "bitnet", "mxfp4", "torchao", "hqq")
        names = self.linears_in_files if by_files else set(self.stored_linears)
        found = {name: self.layout.scheme_of(name) for name in self.stored_linears if name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    @cached_property
    def linears_in_files(self) -> set[str]:
        """Linears that the files hold quantized, by their layout."""
        return set(self.layout.linears())

    @cached_property
    def plain_modules(self) -> list[str]:
        """Names of modules whose stored tensors are all floats."""
        tensors = self.stored.tensors
        coded = {name.rpartition(".")[0] for name, info in tensors.items() if info.dtype not in FLOATS}
        return [owner for owner in dict.fromkeys(name.rpartition(".")[0] for name in tensors) if owner not in coded]

    def is_plain(self, linear: str) -> bool:
        """True if the files hold a float weight of a linear and no tensors of a quantized one."""
        info = self.checkpoint.tensors.get(f"{linear}.weight")
        return info is not None and info.dtype in FLOATS and not self.quantized_parts(linear)

    def quantized_parts(self, linear: str) -> list[str]:
        """Stored tensors that only a quantized linear has."""
        return [f"{linear}.{leaf}" for leaf in _QUANTIZED_LEAVES if f"{linear}.{leaf}" in self.stored.tensors]

    @cached_property
    def misfiled(self) -> dict[str, str]:
        """Linear → problem, where only one of config.json and the files quantizes it."""
        wrong = {}
        for name in self.stored_linears:
            parts = self.quantized_parts(name)
            if name in self.schemes and self.is_plain(name):
                group = self.groups.get(name)
                stated = self.schemes[name].name if group is None else group.name
                wrong[name] = f"{name}: config.json quantizes it ({stated}), the files hold a plain .weight"
            elif name not in self.schemes and parts:
                leaf = parts[0].removeprefix(f"{name}.")
                wrong[name] = f"{name}: config.json leaves it unquantized, the files hold .{leaf}"
        return wrong

    @cached_property
    def expected(self) -> dict[str, Expected]:
        """Stored name → required dtype and shape, of every tensor that the architecture needs."""
        expected = {}
        for name, shape in self.architecture.parameters.items():
            linear = name.removesuffix(".weight")
            if name.endswith(".weight") and linear in self.schemes:
                expected |= self.expected_of(linear)
            else:
                info = self.stored.tensors.get(name)
                table = (
                    info is not None and not info.dtype.is_floating_point and linear not in self.architecture.linears
                )
                dtypes = (info.dtype,) if table and info is not None else FLOATS  # a table of ids, say
                expected[name] = Expected(dtypes, tuple(shape))
        return expected

    def expected_of(self, linear: str) -> dict[str, Expected]:
        """The stored tensors of a quantized linear, without biases."""
        return self._expected_by_linear[linear]

    @cached_property
    def _expected_by_linear(self) -> dict[str, dict[str, Expected]]:
        linears = self.architecture.linears
        return {linear: self.layout.expected(linear, linears[linear].shape) for linear in self.schemes}

    @cached_property
    def optional(self) -> set[str]:
        """Stored tensors that a format permits but does not need: a trivial g_idx, the JSON of a quant_state."""
        if self.format == "compressed-tensors":
            return set(self.layout.beside())
        owned = {name for linear in self.schemes for name in self.layout.owned(linear)}
        return {name for name in owned if not name.endswith(".weight")}

    def unsound(self, linear: str) -> str | None:
        """Why a quantized linear cannot be decoded; None where it can."""
        return tensor_problem(self.stored.tensors, self.expected_of(linear))

    @cached_property
    def survey(self) -> Survey:
        """The pass over every weight that the rules on values use."""
        from lowbit.verification.survey import take_survey

        return take_survey(self, self.progress)

    def is_sound(self, name: str) -> bool:
        """True where a stored tensor is there with a dtype and shape that can be decoded."""
        info, expected = self.checkpoint.tensors.get(name), self.expected[name]
        return info is not None and info.dtype in expected.dtypes and tuple(info.shape) == expected.shape

    def close(self) -> None:
        if "stored" in self.__dict__:
            self.stored.close()


_QUANTIZED_LEAVES = (
    "weight_packed", "weight_scale", "qweight", "scales", "weight_scale_inv", "weight_scale_2", "SCB", "weight.absmax",
    "weight.quant_map", "W_q", "_weight_qdata",
)  # fmt: skip


# `Checkpoint.kind` of models whose weights nothing has rounded.
_FLOAT_KINDS = {"safetensors", "pickle", IN_MEMORY}


def rewritten_by(output: Path) -> str:
    """The parts of the method of an output's report that changed weights before or after they were rounded, joined by
    +: transforms, and distillation; "" where there are none, or no report says so. Without rotations by the engine:
    config.json states these, and they are taken back.
    """
    path = report_path(output)
    try:
        report: Any = read_json_object(path) if path.is_file() else {}
        method = parse_method(report["settings"]["method"])
    except (LowbitError, KeyError, TypeError, AttributeError):
        return ""
    rewriting = [each.name for each in method.transforms if each.online is None]
    return "+".join([*rewriting, *([] if method.finish is None else ["distill"])])


def rounded_to_nearest(output: Path, source: Checkpoint | None, options: OpenOptions) -> bool:
    """True if the report of an output states that all its codes were rounded to nearest, and from such a source.

    Not so: codes of a method that --method-override names, and those of another source: of the Q8_0 or GPTQ model that
    the output was made of, where `source` is the 16-bit model. A damaged report states nothing.
    """
    path = report_path(output)
    try:
        report: Any = read_json_object(path) if path.is_file() else {}
        if report["settings"]["method"] != "rtn":
            return False
        stated = report.get("source")
        if any(entry.get("method") not in (None, "rtn") for entry in report.get("tensors", ())):
            return False
        if source is None or stated is None:  # nothing to compare with, or nothing that speaks of another source
            return True
        if (stated.get("adapter") is None) != (options.adapter is None):
            return False
        if {stated["kind"], source.kind} <= _FLOAT_KINDS:
            return True
        return os.path.realpath(stated["model"]) == os.path.realpath(source.source)
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError):
        return False
