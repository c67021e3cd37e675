"""`Subject`: the checkpoint under examination, opened step by step, as every rule sees it.

Nothing here knows how the files were written: they are opened anew, config.json is parsed anew, and the architecture
is built from it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.architecture import Architecture, discover_once
from lowbit.checkpoint.base import REPORT_NAME, Checkpoint, OpenOptions
from lowbit.checkpoint.compressed_tensors_config import CompressedTensorsConfig, Group, parse_quantization_config
from lowbit.checkpoint.rows import read_config, read_json_object
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.verification.layout import Expected, expected_tensors, plain_tensor

if TYPE_CHECKING:
    from lowbit.verification.survey import Progress, Survey


@dataclass
class Subject:
    """source    the original checkpoint, where there is one to compare with
    nearest   True where every code must be the nearest one: the weights were rounded without error feedback
    """

    folder: Path
    engine: str
    source: Checkpoint | None
    nearest: bool
    options: OpenOptions
    progress: Progress | None = None

    @cached_property
    def checkpoint(self) -> SafetensorsCheckpoint:
        return SafetensorsCheckpoint(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @property
    def quantization(self) -> dict[str, Any]:
        """config.json's quantization_config, not parsed."""
        stated = self.config.get("quantization_config")
        return stated if isinstance(stated, dict) else {}

    @cached_property
    def parsed(self) -> CompressedTensorsConfig:
        return parse_quantization_config(self.config)

    @cached_property
    def architecture(self) -> Architecture:
        return discover_once(self.config, str(self.folder), self.options.trust_remote_code)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The float dtype that config.json promises."""
        named = str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return {"float16": torch.float16, "float32": torch.float32}.get(named, torch.bfloat16)

    @cached_property
    def stored_linears(self) -> list[str]:
        """Linears with a weight of their own; an output layer tied to the embedding has none."""
        return [name for name in self.architecture.linears if f"{name}.weight" not in self.architecture.tied]

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Linear → its group, by compressed-tensors' rules, of every linear that config.json says is quantized."""
        found = {name: self.parsed.group_of(name) for name in self.stored_linears}
        return {name: group for name, group in found.items() if group is not None}

    @cached_property
    def misfiled(self) -> dict[str, str]:
        """Linears that are quantized in config.json or in the files, but not in both, with what is wrong."""
        wrong = {}
        for name in self.stored_linears:
            leaves = [leaf for leaf in ("weight_packed", "weight_scale") if f"{name}.{leaf}" in self.checkpoint.tensors]
            info = self.checkpoint.tensors.get(f"{name}.weight")
            plain = info is not None and info.dtype in (torch.bfloat16, torch.float16, torch.float32) and not leaves
            if name in self.groups and plain:
                group = self.groups[name]
                wrong[name] = f"{name}: config.json quantizes it ({group.name}), the files hold a plain .weight"
            elif name not in self.groups and leaves:
                wrong[name] = f"{name}: config.json leaves it unquantized, the files hold .{leaves[0]}"
        return wrong

    @cached_property
    def expected(self) -> dict[str, Expected]:
        """Stored name → what must lie under it, of every tensor that the architecture needs."""
        expected = {}
        for name, shape in self.architecture.parameters.items():
            linear = name.removesuffix(".weight")
            if name.endswith(".weight") and linear in self.groups:
                expected |= expected_tensors(linear, (shape[0], shape[1]), self.groups[linear])
            else:
                expected[name] = plain_tensor(shape)
        return expected

    def expected_names(self, linear: str) -> list[str]:
        """Stored names of a quantized linear's own tensors."""
        return list(expected_tensors(linear, self.architecture.linears[linear].shape, self.groups[linear]))

    @cached_property
    def survey(self) -> Survey:
        """One pass over every weight; the rules on values read their findings from it."""
        from lowbit.verification.survey import take_survey

        return take_survey(self, self.progress)

    def is_sound(self, name: str) -> bool:
        """True where a stored tensor is there with a dtype and shape that can be decoded."""
        info, expected = self.checkpoint.tensors.get(name), self.expected[name]
        return info is not None and info.dtype in expected.dtypes and tuple(info.shape) == expected.shape

    def close(self) -> None:
        if "checkpoint" in self.__dict__:
            self.checkpoint.close()


def rounded_to_nearest(folder: Path) -> bool:
    """True where the checkpoint's own report says that its codes are the nearest ones."""
    if not (folder / REPORT_NAME).is_file():
        return False
    settings = read_json_object(folder / REPORT_NAME).get("settings")
    return isinstance(settings, dict) and settings.get("method") == "rtn"
