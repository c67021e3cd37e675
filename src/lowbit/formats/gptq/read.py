"""GPTQ folders, read: the `Layout` of AutoGPTQ's version 1 and GPTQModel's version 2.

write.py pictures the layout; here scales may be any float dtype, and g_idx, the group of every column, is optional.
config.json (or quantize_config.json alone) has bits, group_size, sym, checkpoint_format ("gptq": v1, "gptq_v2"), and
`dynamic`: patterns for re.match on the module's name, the first hit wins, "-:" leaves alone, others override.

Questions that config.json leaves open:

    v1 or v2      v1 by default. Symmetric files reveal a wrong version: zeros are 2^(b−1), so stored zeros of 2^(b−1)
                  mean v2, of 2^(b−1) − 1 mean v1. CheckpointError, naming the likely version
    sym           all zeros must be 2^(b−1)
    borrow        a v1 field of all ones is a zero of 0 stored as −1, which may have damaged its neighbours. Only
                  GPTQModel's files (named in `meta`) can be repaired: it subtracts 1 from every field of a word at once
                  (3 bits: from each field separately). CheckpointError for all others
    g_idx         if every g consecutive columns are of one group, only groups are permuted: scales and zero points are
                  reordered. Otherwise the QuantizedTensor carries it
    not quantized every linear that the files hold as `L.weight`

Refused: Marlin, BitBLAS and planar layouts (5, 6, 7 bits), words other than int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import FLOATS, Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.patterns import Pattern, PatternError, compiled
from lowbit.schemes import Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity, QuantizedTensor

ROWS_PER_WORDS = {2: 16, 3: 32, 4: 8, 8: 4}  # by bits: the fewest codes that fill whole 32-bit words
VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class GPTQSettings:
    """What config.json says of one linear. group_size −1: one scale per row."""

    bits: int
    group_size: int
    sym: bool

    @property
    def half(self) -> int:
        """The zero of symmetric codes, 2^(b−1)."""
        return 1 << (self.bits - 1)

    def scheme(self) -> Scheme:
        channel = self.group_size == -1
        granularity = Granularity.CHANNEL if channel else Granularity.GROUP
        weight = WeightSpec("int", self.bits, granularity, None if channel else self.group_size, self.sym)
        return scheme_of_specs(weight, None)


class GptqLayout(Layout):
    LEAVES = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self._common = _settings(stored, quantization, "quantization_config", None)
        self._rules = _rules(stored, quantization, self._common)
        self._only = _modules_to_quantize(stored, quantization)
        self._lm_head = bool(quantization.get("lm_head", False))
        self._version = self._stated_version(quantization)
        self._borrowed_by_word = _is_by_gptqmodel(quantization)

    def linears(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, info in self.stored.tensors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "qweight":
                words, rows = matrix_shape(info)
                found[linear] = (rows, words * 32 // (self._settings_of(linear) or self._common).bits)
        return found

    def scheme_of(self, linear: str) -> Scheme | None:
        settings = self._settings_of(linear)
        return None if settings is None else settings.scheme()

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        settings = self._settings_of(linear)
        assert settings is not None, "asked only of linears that have a scheme"
        rows, columns = shape
        bits = settings.bits
        groups = 1 if settings.group_size == -1 else -(-columns // settings.group_size)
        leaves = {
            "qweight": Expected((torch.int32,), (_words(columns, bits), rows)),
            "qzeros": Expected((torch.int32,), (groups, _words(rows, bits))),
            "scales": Expected(FLOATS, (groups, rows)),
        }
        if f"{linear}.g_idx" in self.stored.tensors:
            leaves["g_idx"] = Expected((torch.int32, torch.int64), (columns,))
        return {f"{linear}.{leaf}": expected for leaf, expected in leaves.items()}

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        return ROWS_PER_WORDS[(self._settings_of(linear) or self._common).bits]

    def scale_dtype(self, linear: str) -> torch.dtype:
        return self.stored.tensors[f"{linear}.scales"].dtype

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        settings = self._settings_of(linear)
        assert settings is not None, "checked when the folder was opened"
        words = self.stored.read(f"{linear}.qweight")[:, start:stop].t().contiguous()
        codes = kernels.unpack_dense(words, settings.bits, shape[1])
        scale = self.stored.read(f"{linear}.scales")[:, start:stop].t().float()
        zeros = self._zeros(linear, settings, start, stop)
        zero_point = None if settings.sym else zeros - settings.half
        order, g_idx = self._groups(linear, settings, shape[1], scale.shape[1])
        if order is not None:
            scale = scale[:, order]
            zero_point = None if zero_point is None else zero_point[:, order]
        spec = settings.scheme().weight
        return QuantizedTensor(
            codes, scale.contiguous(), grid_for(spec, "float32"), spec.granularity, spec.columns_per_scale(shape[1]),
            None if zero_point is None else zero_point.contiguous(), g_idx=g_idx,
        )  # fmt: skip

    def _stated_version(self, quantization: dict[str, Any]) -> int:
        """1 or 2, of checkpoint_format, or `format` as GPTQModel calls it today; 1 where neither is there."""
        _refuse_other_layouts(self.stored, quantization)
        stated = {key: quantization[key] for key in ("checkpoint_format", "format") if quantization.get(key)}
        names = {str(value).lower() for value in stated.values()}
        if len(names) > 1:
            said = " and ".join(f"{key} {value!r}" for key, value in stated.items())
            raise CheckpointError(f"{self.stored.source}: config.json has {said}, which contradict each other",
                                  "keep the one that the files were written with")  # fmt: skip
        name = names.pop() if names else "gptq"
        if name not in VERSIONS:
            raise CheckpointError(
                f"{self.stored.source}: config.json: checkpoint_format is {name!r}, which lowbit cannot read",
                "it reads gptq and gptq_v2; save it as one of these with the tool that made it",
            )
        if not stated and not self._common.sym:
            self.notes.append("config.json has no checkpoint_format: zero points are read as GPTQ v1 stores them")
        return VERSIONS[name]

    def _settings_of(self, linear: str) -> GPTQSettings | None:
        if f"{linear}.weight" in self.stored.tensors and f"{linear}.qweight" not in self.stored.tensors:
            return None
        if linear == "lm_head" and not self._lm_head:
            return None
        if self._only and "." in linear and not any(part in linear for part in self._only):
            return None
        for pattern, settings in self._rules:
            if pattern.match(linear):
                return settings
        return self._common

    def _zeros(self, linear: str, settings: GPTQSettings, start: int, stop: int) -> Tensor:
        """Zeros of rows start..stop, int32 [n, G] in 0..2^b − 1; CheckpointError for those that cannot be."""
        info = self.stored.tensors[f"{linear}.qzeros"]
        bits, half = settings.bits, settings.half
        words = self.stored.read(info.name)[:, start * bits // 32 : _words(stop, bits)].contiguous()
        where = f"{info.file}: {info.name}"
        fields = kernels.unpack_dense(words, bits, stop - start, offset=0)
        if settings.sym:
            self._check_symmetric(where, fields, half)
        elif self._version == 1:
            fields = self._version_1_zeros(where, words, fields, bits)
        return fields.t().to(torch.int32)

    def _check_symmetric(self, where: str, fields: Tensor, half: int) -> None:
        wanted = half if self._version == 2 else half - 1
        if bool((fields == wanted).all()):
            return
        other = half - 1 if self._version == 2 else half
        if bool((fields == other).all()):
            seems = "gptq" if self._version == 2 else "gptq_v2"
            raise CheckpointError(
                f"{where} holds {other} everywhere, the symmetric zero point of GPTQ v{3 - self._version}, but "
                f"config.json says v{self._version}",
                f'if the files are right, set "checkpoint_format": "{seems}" in config.json and quantize_config.json',
            )
        found = int(fields[fields != wanted][0])
        raise CheckpointError(
            f"{where} holds {found}; config.json says sym, which needs {wanted} everywhere in GPTQ v{self._version}",
            'the model is asymmetric: set "sym": false in config.json, or get the right config.json',
        )

    def _version_1_zeros(self, where: str, words: Tensor, fields: Tensor, bits: int) -> Tensor:
        """Stored fields + 1. What a field of all ones means depends on who wrote it: see the module docstring."""
        ones = (1 << bits) - 1
        if not bool((fields == ones).any()):
            return fields.to(torch.int32) + 1
        if not self._borrowed_by_word:
            raise CheckpointError(
                f"{where} holds {ones}: a zero point of 0, which GPTQ v1 cannot store; its neighbours may be damaged",
                "save the model as gptq_v2 with the tool that made it",
            )
        if bits == 3:
            return (fields.to(torch.int32) + 1) & ones
        every_field = sum(1 << shift for shift in range(0, 32, bits))
        total = (words.to(torch.int64) + every_field) & 0xFFFFFFFF
        added = torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)
        return kernels.unpack_dense(added, bits, fields.shape[1], offset=0).to(torch.int32)

    def _groups(
        self, linear: str, settings: GPTQSettings, columns: int, groups: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(order of groups that makes column // g right, or None; g_idx where no order does)."""
        info = self.stored.tensors.get(f"{linear}.g_idx")
        if info is None:
            return None, None
        g_idx = self.stored.read(info.name).to(torch.int64)
        low, high = (int(g_idx.min()), int(g_idx.max())) if columns else (0, 0)
        if low < 0 or high >= groups:
            raise CheckpointError(
                f"{info.file}: {info.name} holds {low if low < 0 else high}; there are groups 0 to {groups - 1}"
            )
        group_size = columns if settings.group_size == -1 else settings.group_size
        trivial = torch.arange(columns) // group_size
        if torch.equal(g_idx, trivial):
            return None, None
        order = g_idx[::group_size]
        if torch.equal(order[trivial], g_idx):
            return order, None
        return None, g_idx.to(torch.int32)


def _words(codes: int, bits: int) -> int:
    """32-bit words that hold so many dense codes."""
    return -(-codes * bits // 32)


def _settings(stored: Checkpoint, said: dict[str, Any], where: str, common: GPTQSettings | None) -> GPTQSettings:
    """bits, group_size and sym of a config or an override; what an override leaves out is as in `common`."""
    if common is None:
        for key in ("bits", "group_size"):
            if key not in said:
                raise CheckpointError(
                    f"{stored.source}: config.json: {where} has no {key}",
                    "get config.json or quantize_config.json again from where the model is from",
                )
    # AutoGPTQ's own defaults, where files of its first releases leave a key out
    bits = said.get("bits", common and common.bits)
    group_size = said.get("group_size", common and common.group_size)
    sym = said.get("sym", True if common is None else common.sym)
    if isinstance(bits, bool) or bits not in (2, 3, 4, 8):
        raise CheckpointError(
            f"{stored.source}: config.json: {where} has bits {bits!r}; GPTQ files of 2, 3, 4 and 8 bits are read",
            "5, 6 and 7 bits are GPTQModel's planar layout, which lowbit does not read",
        )
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"{stored.source}: config.json: {where} has group_size {group_size!r}; -1 or a positive number is needed"
        )
    if not isinstance(sym, bool):
        raise CheckpointError(f"{stored.source}: config.json: {where} has sym {sym!r}; true or false is needed")
    return GPTQSettings(int(bits), group_size, sym)


def _rules(
    stored: Checkpoint, quantization: dict[str, Any], common: GPTQSettings
) -> list[tuple[Pattern, GPTQSettings | None]]:
    """`dynamic`, compiled, in order; None for "-:"."""
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{stored.source}: config.json: dynamic is {dynamic!r}; a mapping is needed")
    rules = []
    for key, override in dynamic.items():
        where = f"dynamic[{key!r}]"
        try:
            pattern = compiled(key[2:] if key.startswith(("+:", "-:")) else key)
        except PatternError as error:
            raise CheckpointError(
                f"{stored.source}: config.json: {where} is no regular expression ({error})"
            ) from error
        if not isinstance(override, dict):
            raise CheckpointError(f"{stored.source}: config.json: {where} is {override!r}; a mapping is needed")
        rules.append((pattern, None if key.startswith("-:") else _settings(stored, override, where, common)))
    return rules


def _modules_to_quantize(stored: Checkpoint, quantization: dict[str, Any]) -> list[str]:
    """modules_in_block_to_quantize, flat; nothing where every linear is quantized."""
    said = quantization.get("modules_in_block_to_quantize") or []
    parts = said if isinstance(said, list) else [None]
    flat: list[Any] = [name for part in parts for name in (part if isinstance(part, list) else [part])]
    if not all(isinstance(name, str) for name in flat):
        raise CheckpointError(
            f"{stored.source}: config.json: modules_in_block_to_quantize is no list of module names",
            "it is a list of names, or a list of such lists",
        )
    return flat


def _refuse_other_layouts(stored: Checkpoint, quantization: dict[str, Any]) -> None:
    if quantization.get("is_marlin_format"):
        raise CheckpointError(f"{stored.source}: config.json: is_marlin_format is set; lowbit cannot read Marlin's own "
                              "layout", "start from the GPTQ files that it was made from")  # fmt: skip
    words = quantization.get("pack_dtype") or "int32"
    if str(words).removeprefix("torch.") != "int32":
        raise CheckpointError(f"{stored.source}: config.json: pack_dtype is {words!r}; lowbit reads int32 words",
                              "save it with pack_dtype int32 with the tool that made it")  # fmt: skip


def _is_by_gptqmodel(quantization: dict[str, Any]) -> bool:
    """True where `meta` names GPTQModel as what quantized the model."""
    meta = quantization.get("meta")
    said = meta.get("quantizer") if isinstance(meta, dict) else None
    makers = said if isinstance(said, list) else [said]
    return any(isinstance(maker, str) and maker.split(":")[0].lower() == "gptqmodel" for maker in makers)
