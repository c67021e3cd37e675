"""The plan: what will happen to every tensor, and what will be written, to the byte, before any weight is read.

    architecture + headers + settings → Plan

Nothing is skipped in silence: a tensor without a scheme carries the reason, a scheme that was adapted carries a note.
Refused: settings that give linears of one fused set (q/k/v, gate/up) different schemes, since engines load such a
checkpoint and compute nonsense; a group size chosen by the user that does not divide K.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import torch

from lowbit.architecture import Architecture, Linear
from lowbit.checkpoint.base import Checkpoint, TensorInfo
from lowbit.errors import ArchitectureError, CheckpointError, ShapeError, UsageError
from lowbit.export import Exporter, find_exporter
from lowbit.export.safetensors_writer import StoredTensor, total_file_bytes
from lowbit.schemes import Scheme
from lowbit.settings import DEFAULT_IGNORE, Settings
from lowbit.tensors import Granularity

# Group sizes that the kernels of vLLM, SGLang and TensorRT-LLM take.
ENGINE_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and what becomes of it.

    linear   module name, for weights of linears; None otherwise
    scheme   None where it is copied; then `reason` says why
    notes    what was adapted: "group size 64, because 128 does not divide 576"
    stored   what is written for it
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    source: TensorInfo
    stored: tuple[StoredTensor, ...]
    linear: Linear | None = None
    scheme: Scheme | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)


@dataclass(frozen=True)
class Plan:
    tensors: tuple[PlannedTensor, ...]
    architecture: Architecture
    settings: Settings
    dtype: torch.dtype
    exporter: Exporter

    @property
    def stored(self) -> list[StoredTensor]:
        return [stored for tensor in self.tensors for stored in tensor.stored]

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return total_file_bytes(self.stored, self.settings.shard_size)

    @property
    def quantized(self) -> list[PlannedTensor]:
        return [tensor for tensor in self.tensors if tensor.scheme is not None]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Module name → scheme, of every quantized linear."""
        return {tensor.linear.name: tensor.scheme for tensor in self.tensors if tensor.linear and tensor.scheme}

    @property
    def ignored(self) -> list[str]:
        """Module names of the linears left alone, tied ones included."""
        return [name for name in self.architecture.linears if name not in self.schemes]

    def bits_per_weight(self, decoder_only: bool) -> float:
        """Stored bits ÷ weights: of the linears of the decoder blocks, or of everything in the file."""
        chosen = [t for t in self.tensors if not decoder_only or (t.linear is not None and t.block is not None)]
        weights = sum(tensor.weights for tensor in chosen)
        return 8 * sum(tensor.stored_bytes for tensor in chosen) / weights if weights else 0.0


def make_plan(checkpoint: Checkpoint, architecture: Architecture, settings: Settings, dtype: torch.dtype) -> Plan:
    """Decide for every tensor. Raises what the module docstring refuses, and CheckpointError for absent tensors."""
    _check_parameters(checkpoint, architecture)
    exporter = find_exporter(settings.format)
    linears = {f"{linear.name}.weight": linear for linear in architecture.linears.values()}
    common = _common_group_sizes(architecture, settings)
    tensors = []
    for name, info in checkpoint.tensors.items():
        linear = linears.get(name)
        if linear is None or name in architecture.tied:
            tensors.append(_copied(name, info, architecture, checkpoint, dtype))
        else:
            copied = replace(_copied(name, info, architecture, checkpoint, dtype), linear=linear)
            tensors.append(_planned_linear(copied, linear, settings, common, dtype, exporter))
    tensors = _leave_cut_blocks(tensors, architecture, checkpoint, dtype)
    plan = Plan(tuple(tensors), architecture, settings, dtype, exporter)
    _check_overrides(plan)
    _check_fused_sets(plan)
    return plan


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The float dtype of a model: what config.json says, else what most of its weights have."""
    config = checkpoint.config()
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if named in ("bfloat16", "float16", "float32"):
        return getattr(torch, named)
    floats = Counter(info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point)
    return floats.most_common(1)[0][0] if floats else torch.bfloat16


def _check_parameters(checkpoint: Checkpoint, architecture: Architecture) -> None:
    for name, shape in architecture.parameters.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{checkpoint.source}: tensor {name} {list(shape)} is absent",
                "the files are incomplete, or config.json is of another model",
            )
        if tuple(info.shape) != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json says {list(shape)}",
                "the files and config.json do not belong together",
            )


def _copied(name: str, info: TensorInfo, architecture: Architecture, checkpoint: Checkpoint, dtype) -> PlannedTensor:
    decoded = checkpoint.kind == "gguf" and info.dtype.is_floating_point
    stored = StoredTensor(name, dtype if decoded else info.dtype, tuple(info.shape))
    role = architecture.roles.get(name, "other")
    reason = _COPIED_BECAUSE.get(role, "not the weight of a linear layer")
    if name in architecture.tied:
        reason = f"tied to {architecture.tied[name]}"
    elif name not in architecture.parameters:
        reason = "not a parameter of the transformers model; copied as it is"
    return PlannedTensor(name, role, architecture.block_of(name), tuple(info.shape), info, (stored,), reason=reason)


_COPIED_BECAUSE = {
    "embedding": "embeddings are looked up, not multiplied; engines keep them in 16 bits",
    "norm": "norms are a vector each, and sensitive",
    "bias": "biases are a vector each",
}


def _common_group_sizes(architecture: Architecture, settings: Settings) -> dict[Scheme, int]:
    """Scheme → the group size that all its linears can have, for schemes whose own divides only some of them.

    One size for all keeps one group in the config, which every loader reads alike; `_fit_to_shape` adapts layer by
    layer where there is no such size.
    """
    columns: dict[Scheme, set[int]] = {}
    for linear in architecture.linears.values():
        scheme, _ = _choose(linear, settings)
        if scheme is not None and scheme.weight.group_size_is_free:
            columns.setdefault(scheme, set()).add(linear.shape[1])
    common = {}
    for scheme, widths in columns.items():
        own = scheme.weight.group_size or 1
        fitting = [size for size in ENGINE_GROUP_SIZES if size <= own and all(width % size == 0 for width in widths)]
        if fitting and any(width % own for width in widths):
            common[scheme] = fitting[0]
    return common


def _planned_linear(copied: PlannedTensor, linear: Linear, settings: Settings, common: dict[Scheme, int],
                    dtype: torch.dtype, exporter: Exporter) -> PlannedTensor:  # fmt: skip
    info = copied.source
    scheme, reason = _choose(linear, settings)
    if scheme is None:
        return replace(copied, reason=reason)
    if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        raise CheckpointError(f"{info.file}: tensor {info.name} is {info.stored}, not a 16- or 32-bit float",
                              "this checkpoint is quantized already; start from the original one")  # fmt: skip
    scheme, notes, reason = _fit_to_shape(linear, scheme, settings, common)
    if reason is not None:
        return replace(copied, reason=reason)
    stored = tuple(exporter.stored_tensors(linear.name, linear.shape, scheme, dtype))
    return replace(copied, scheme=scheme, reason=None, notes=notes, stored=stored)


def _choose(linear: Linear, settings: Settings) -> tuple[Scheme | None, str | None]:
    """Scheme, or the reason for none: the user's ignore, then overrides, then the default ignore, then the scheme."""
    pattern = settings.ignored_by(linear.name)
    if pattern is not None:
        return None, f"matches --ignore {pattern}"
    override = settings.override_for(linear.name)
    if override is not None:
        return override, None
    if linear.block is None:
        if re.search(DEFAULT_IGNORE, linear.name):
            return None, "the output layer stays in 16 bits by default; --override 'lm_head=SCHEME' quantizes it"
        return None, "outside the decoder blocks"
    return settings.base_scheme(), None


def _fit_to_shape(
    linear: Linear, scheme: Scheme, settings: Settings, common: dict[Scheme, int]
) -> tuple[Scheme, tuple[str, ...], str | None]:
    """The scheme with a group size that divides K, notes on what changed, or the reason why none fits."""
    weight = scheme.weight
    columns = linear.shape[1]
    if scheme in common and settings.group_size is None:
        note = f"group size {common[scheme]} in all layers, because {weight.group_size} does not divide some of them"
        return scheme.with_group_size(common[scheme]), (note,), None
    if weight.granularity is not Granularity.GROUP or weight.group_size is None or columns % weight.group_size == 0:
        return scheme, (), None
    if not weight.group_size_is_free:
        return scheme, (), f"in_features {columns} is not a multiple of {weight.group_size}, which {scheme.name} fixes"
    divisor = _nearest_divisor(columns, weight.group_size)
    if settings.group_size is not None:
        raise ShapeError(
            f"{linear.name}: in_features {columns} is not a multiple of group size {weight.group_size}",
            f"choose --group-size {divisor}, or leave it out to have it chosen for each layer",
        )
    note = f"group size {divisor}, because {weight.group_size} does not divide in_features {columns}"
    return scheme.with_group_size(divisor), (note,), None


def _nearest_divisor(columns: int, wanted: int) -> int:
    """The largest group size ≤ wanted that engines take and that divides K; any nearest divisor where none does."""
    for size in ENGINE_GROUP_SIZES:
        if size <= wanted and columns % size == 0:
            return size
    divisors = [size for size in range(2, columns + 1) if columns % size == 0]
    return min(divisors, key=lambda size: abs(size - wanted), default=columns)


def _leave_cut_blocks(tensors: list[PlannedTensor], architecture: Architecture, checkpoint: Checkpoint,
                      dtype: torch.dtype) -> list[PlannedTensor]:  # fmt: skip
    """Leave fused sets in 16 bits whose square blocks would straddle two members once an engine has stacked them."""
    by_linear = {tensor.linear.name: tensor for tensor in tensors if tensor.linear is not None}
    cut: dict[str, str] = {}
    for members in architecture.fused_sets.values():
        for member in members[:-1]:
            scheme = by_linear[member].scheme
            block = scheme.weight.group_size if scheme and scheme.weight.granularity is Granularity.BLOCK else None
            rows = by_linear[member].shape[0]
            if block and rows % block:
                reason = f"engines stack it with its siblings, and {rows} rows of {member} cut a block of {block}"
                cut.update(dict.fromkeys(members, reason))
    return [
        replace(_copied(tensor.name, tensor.source, architecture, checkpoint, dtype), linear=tensor.linear,
                reason=cut[tensor.linear.name])
        if tensor.linear is not None and tensor.linear.name in cut else tensor
        for tensor in tensors
    ]  # fmt: skip


def _check_overrides(plan: Plan) -> None:
    names = list(plan.architecture.linears)
    for option, patterns in (("--override", plan.settings.overrides), ("--ignore", plan.settings.ignore)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise UsageError(f"{option} {pattern!r} matches no linear of the model",
                                 f"names look like {names[0]}; `lowbit inspect` lists them")  # fmt: skip
    for tied in plan.architecture.tied:
        linear = tied.removesuffix(".weight")
        if linear in plan.architecture.linears and plan.settings.override_for(linear) is not None:
            raise UsageError(f"--override asks to quantize {linear}, which is tied to {plan.architecture.tied[tied]}",
                             "a tied output layer is the embedding, which stays in 16 bits")  # fmt: skip
    if not plan.quantized:
        raise ArchitectureError("no linear is left to quantize", "loosen --ignore")


def _check_fused_sets(plan: Plan) -> None:
    schemes = plan.schemes
    for fused, members in plan.architecture.fused_sets.items():
        chosen = {member: schemes.get(member) for member in members}
        if len(set(chosen.values())) > 1:
            named = ", ".join(f"{name.rsplit('.', 1)[-1]} {s.name if s else '16 bits'}" for name, s in chosen.items())
            raise UsageError(
                f"{fused} would mix schemes ({named}); engines load these as one matrix, and would misread it",
                "write --ignore and --override patterns that cover the whole set, such as '(q|k|v)_proj$'",
            )
