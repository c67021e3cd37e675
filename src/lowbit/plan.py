"""The plan: what will happen to every tensor, and what will be written, to the byte, before any weight is read.

    architecture + headers + settings → Plan

A conversion plans in the same way, with the schemes that the source has (`fixed`).

Nothing is skipped in silence: a tensor without a scheme carries the reason, a scheme that was adapted carries a note.
Refused: settings that give linears of one fused set (q/k/v, gate/up) different schemes, since engines load such a
checkpoint and compute nonsense; experts of one block with different schemes; a group size chosen by the user that does
not divide K; a model that the output format is not for, or a mixture that it cannot say; scales of a KV cache that it
cannot store.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowbit.architecture import Architecture, Linear
from lowbit.checkpoint.base import Checkpoint, TensorInfo, is_decoded
from lowbit.errors import ArchitectureError, CheckpointError, FormatError, ShapeError, UsageError
from lowbit.export import Exporter, Piece, default_format, find_exporter
from lowbit.export.fused_experts import FUSED_EXPERTS, Share, find_shares, stores_fused_experts
from lowbit.export.kv_cache import CacheScales, state_kv_cache, state_kv_cache_beside, stored_kv_scales
from lowbit.export.safetensors_writer import StoredTensor, total_file_bytes
from lowbit.schemes import KVCacheScheme, Scheme, find_kv_cache_scheme
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
    plain    what is written for it where it is copied
    stored   what is written for it; of single experts, what they have of a tensor of all (`Plan.shares`)
    dtype    the float dtype that the exporter is given for it: of the model, or of the source's scales
    repack   True where the source's own codes and scales are written, not rounded anew
    unfit    True where its shape is the reason to leave it alone
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    source: TensorInfo
    plain: StoredTensor
    stored: tuple[StoredTensor, ...]
    linear: Linear | None = None
    scheme: Scheme | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    repack: bool = False
    unfit: bool = False

    @property
    def walked_shape(self) -> tuple[int, ...]:
        """The shape whose rows are walked: [N, K] of a linear that is quantized, though it may lie transposed."""
        return self.linear.shape if self.linear is not None and self.scheme is not None else self.shape

    @property
    def source_bytes(self) -> int:
        return self.source.nbytes

    @property
    def stored_as(self) -> str:
        """Of a tensor that is not quantized."""
        return "16 bits"

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
    """
    input_absmax  linear → the |input| to scale by, from calibration, of schemes with static activation scales
    kv_cache      how the KV cache is quantized; None where nothing is said of it
    kv_scales     what the files hold of it, layer by layer
    kv_absmax     layer → largest |K| and |V| of every head, [kv_heads], from calibration
    notes         what the user should know of the plan as a whole
    """

    tensors: tuple[PlannedTensor, ...]
    architecture: Architecture
    settings: Settings
    dtype: torch.dtype
    exporter: Exporter
    input_absmax: dict[str, float] = field(default_factory=dict)
    kv_cache: KVCacheScheme | None = None
    kv_scales: tuple[CacheScales, ...] = ()
    kv_absmax: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        return self.exporter.FORMAT

    @property
    def engine(self) -> str:
        """Whose rules the written files are verified against."""
        return self.exporter.ENGINE

    @property
    def model_class(self) -> str:
        return self.architecture.class_name

    @property
    def scheme_name(self) -> str:
        return self.settings.base_scheme().name

    @property
    def range_method(self) -> str:
        return self.settings.range_search(self.settings.base_scheme().weight).method

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the plan as a whole."""
        return self.notes

    @property
    def stored(self) -> list[StoredTensor]:
        """Every tensor of the files, once."""
        stored = (stored for tensor in self.tensors for stored in tensor.stored)
        places = [self.shares[tensor.name].stored if tensor.name in self.shares else tensor for tensor in stored]
        places += [tensor for scales in self.kv_scales for tensor in (scales.k, scales.v)]
        return list({tensor.name: tensor for tensor in places}.values())

    @property
    def needs_kv_ranges(self) -> bool:
        """True where keys and values must be measured; a conversion has the ranges of its source."""
        return self.kv_cache is not None and not self.kv_absmax

    def kv_pieces(self) -> list[Piece]:
        """The scales of the KV cache, as they lie in the files; none where it is not quantized.

        Raises ArchitectureError for a layer that was not measured.
        """
        if self.kv_cache is None:
            return []
        pieces = []
        for scales in self.kv_scales:
            if scales.layer not in self.kv_absmax:
                raise ArchitectureError(f"the keys and values of layer {scales.layer} were not measured",
                                        "leave --kv-cache out")  # fmt: skip
            pieces += scales.pieces(self.kv_cache, self.kv_absmax[scales.layer])
        return pieces

    def quantization_config(self) -> dict[str, Any]:
        """config.json's `quantization_config`; empty where the format writes none."""
        config = self.exporter.quantization_config(self.schemes, self.ignored)
        return config if self.kv_cache is None else state_kv_cache(self.format, self.kv_cache, config)

    def companion_files(self) -> dict[str, dict[str, Any]]:
        """Further JSON files of the format: name → content."""
        files = self.exporter.companion_files(self.schemes, self.ignored)
        return files if self.kv_cache is None else state_kv_cache_beside(self.format, self.kv_cache, files)

    @cached_property
    def shares(self) -> dict[str, Share]:
        """Of what is written for single experts: its place in a tensor of all experts, where the files have those."""
        if self.exporter.FORMAT not in FUSED_EXPERTS:
            return {}
        return find_shares((stored for tensor in self.tensors for stored in tensor.stored), self.architecture)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return total_file_bytes(self.stored, self.settings.bytes_per_shard)

    @property
    def quantized(self) -> list[PlannedTensor]:
        return [tensor for tensor in self.tensors if tensor.scheme is not None]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Module name → scheme, of every quantized linear."""
        return {tensor.linear.name: tensor.scheme for tensor in self.tensors if tensor.linear and tensor.scheme}

    @property
    def ignored(self) -> list[str]:
        """Names of the modules left alone: linears, tied ones and those of multi-token prediction blocks included, and
        experts that lie in one tensor."""
        left = [name for name in self.architecture.linears if name not in self.schemes]
        predicted = [tensor.name for tensor in self.tensors if self.architecture.predicts(tensor.name)]
        left += [name.removesuffix(".weight") for name in predicted if name.endswith("proj.weight")]
        experts = [name.rpartition(".")[0] for name, role in self.architecture.roles.items() if role == "experts"]
        return left + list(dict.fromkeys(experts))

    def bits_per_weight(self, decoder_only: bool) -> float:
        """Stored bits ÷ weights: of the linears of the decoder blocks, or of everything in the file."""
        chosen = [t for t in self.tensors if not decoder_only or (t.linear is not None and t.block is not None)]
        weights = sum(tensor.weights for tensor in chosen)
        return 8 * sum(tensor.stored_bytes for tensor in chosen) / weights if weights else 0.0


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    settings: Settings,
    dtype: torch.dtype,
    fixed: dict[str, Scheme] | None = None,
) -> Plan:
    """Decide for every tensor.

    fixed  linear → scheme: these schemes and no others, shapes included, whatever `settings` says

    Raises what the module docstring refuses, and CheckpointError for absent tensors.
    """
    _check_parameters(checkpoint, architecture)
    exporter = find_exporter(default_format(settings.base_scheme()) if settings.format == "auto" else settings.format)
    _check_model_type(exporter, architecture, checkpoint)
    linears = {f"{linear.name}.weight": linear for linear in architecture.linears.values()}
    common = _common_group_sizes(architecture, settings) if fixed is None else {}
    tensors = []
    for name in _in_order(checkpoint, architecture):
        info, linear = checkpoint.tensors[name], linears.get(name)
        copied = _copied(name, info, architecture, checkpoint, dtype)
        if linear is None or name in architecture.tied:
            tensors.append(copied)
            continue
        copied = replace(copied, linear=linear)
        if fixed is None:
            tensors.append(_planned_linear(copied, linear, settings, common, dtype, exporter))
        elif linear.name in fixed:
            tensors.append(_with_scheme(copied, linear, fixed[linear.name], dtype, exporter))
        else:
            tensors.append(replace(copied, reason="not quantized in the source"))
    tensors = _leave_whole_sets(tensors, architecture)
    plan = Plan(tuple(tensors), architecture, settings, dtype, exporter)
    if fixed is None:
        _check_overrides(plan)
    _check_one_scheme(plan, architecture.fused_sets, "engines load these as one matrix, and would misread it")
    _check_one_scheme(plan, architecture.expert_sets, "engines stack the experts of a block, and would misread them")
    exporter.quantization_config(plan.schemes, plan.ignored)  # refuses what the format cannot say, before anything runs
    chosen = getattr(settings, "kv_cache", None)
    return plan if chosen is None else with_kv_cache(plan, find_kv_cache_scheme(chosen), checkpoint.config())


def with_kv_cache(plan: Plan, scheme: KVCacheScheme, config: dict[str, Any]) -> Plan:
    """The plan with scales of a quantized KV cache; FormatError or ArchitectureError where they cannot be stored.

    config  config.json of the model
    """
    scales = stored_kv_scales(plan.format, scheme, plan.architecture, config)
    return replace(plan, kv_cache=scheme, kv_scales=scales)


def _check_model_type(exporter: Exporter, architecture: Architecture, checkpoint: Checkpoint) -> None:
    if exporter.FORMAT == "mxfp4" and not stores_fused_experts(architecture):
        raise FormatError(
            f"{checkpoint.source}: mxfp4 is the format of gpt-oss alone, and this is of model type "
            f"{architecture.model_type!r}",
            "--format compressed-tensors holds MXFP4A16 of any model",
        )


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The float dtype of a model: what config.json says, else what most of its weights have."""
    config = checkpoint.config()
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if named in ("bfloat16", "float16", "float32"):
        return getattr(torch, named)
    floats = Counter(info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point)
    return floats.most_common(1)[0][0] if floats else torch.bfloat16


def _in_order(checkpoint: Checkpoint, architecture: Architecture) -> list[str]:
    """The checkpoint's tensors in the order of the model, then those it does not have, by name: the same model gives
    the same files however its source was cut and ordered."""
    known = [name for name in architecture.parameters if name in checkpoint.tensors]
    return known + sorted(checkpoint.tensors.keys() - architecture.parameters.keys())


def _check_parameters(checkpoint: Checkpoint, architecture: Architecture) -> None:
    for name, shape in architecture.parameters.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{checkpoint.source}: tensor {name} {list(shape)} is absent",
                "the files are incomplete, or config.json is of another model",
            )
        linear = architecture.linears.get(name.removesuffix(".weight"))
        if linear is not None and linear.transposed and is_decoded(checkpoint, name):
            shape = linear.shape
        if tuple(info.shape) != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json says {list(shape)}",
                "the files and config.json do not belong together",
            )


def _copied(name: str, info: TensorInfo, architecture: Architecture, checkpoint: Checkpoint, dtype) -> PlannedTensor:
    decoded = info.dtype.is_floating_point and (checkpoint.kind == "gguf" or is_decoded(checkpoint, name))
    stored = StoredTensor(name, dtype if decoded else info.dtype, tuple(info.shape))
    role = architecture.roles.get(name, "other")
    reason = _COPIED_BECAUSE.get(role, "not the weight of a linear layer")
    if name in architecture.tied:
        reason = f"tied to {architecture.tied[name]}"
    elif name not in architecture.parameters:
        reason = "not a parameter of the transformers model; copied as it is"
    shape = tuple(info.shape)
    block = architecture.block_of(name)
    return PlannedTensor(name, role, block, shape, info, stored, (stored,), reason=reason, dtype=dtype)


_COPIED_BECAUSE = {
    "embedding": "embeddings are looked up, not multiplied; engines keep them in 16 bits",
    "norm": "norms are a vector each, and sensitive",
    "bias": "biases are a vector each",
    "router": "routers choose experts, and are small",
    "experts": "loaders read the experts of this model as one tensor only, in 16 bits or in its own MXFP4 (--scheme "
    "MXFP4A16 --format mxfp4)",
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
    if exporter.FORMAT == "mxfp4" and linear.expert is None and settings.override_for(linear.name) is None:
        scheme, reason = None, reason or "mxfp4 holds experts only; loaders expect everything else in 16 bits"
    if scheme is None:
        return replace(copied, reason=reason)
    if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        raise CheckpointError(f"{info.file}: tensor {info.name} is {info.stored}, not a 16- or 32-bit float",
                              "this checkpoint is quantized already; start from the original one")  # fmt: skip
    scheme, notes, reason = _fit_to_shape(linear, scheme, settings, common)
    if reason is not None:
        return replace(copied, reason=reason, unfit=True)
    return replace(_with_scheme(copied, linear, scheme, dtype, exporter), notes=notes)


def _with_scheme(
    copied: PlannedTensor, linear: Linear, scheme: Scheme, dtype: torch.dtype, exporter: Exporter
) -> PlannedTensor:
    exporter.storage_format(scheme)  # FormatError where the format has no such numbers
    reason = exporter.unfit(linear.shape, scheme)
    if reason is not None:
        return replace(copied, reason=f"{exporter.FORMAT} cannot hold it: {reason}", unfit=True)
    stored = tuple(exporter.stored_tensors(linear.name, linear.shape, scheme, dtype))
    if linear.transposed and exporter.FORMAT == "float":  # goes back as the model class wants it
        stored = tuple(replace(tensor, shape=tensor.shape[::-1]) for tensor in stored)
    return replace(copied, scheme=scheme, reason=None, stored=stored, dtype=dtype)


def _choose(linear: Linear, settings: Settings) -> tuple[Scheme | None, str | None]:
    """Scheme, or the reason for none: the user's ignore, then overrides, then the default ignore, then the scheme."""
    if linear.keep is not None:
        return None, linear.keep
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


def _leave_whole_sets(tensors: list[PlannedTensor], architecture: Architecture) -> list[PlannedTensor]:
    """Leave fused sets, and all experts of a block, in 16 bits as a whole where the shape of one member asks for it."""
    by_linear = {tensor.linear.name: tensor for tensor in tensors if tensor.linear is not None}
    left: dict[str, str] = {}
    for members in (*architecture.fused_sets.values(), *architecture.expert_sets.values()):
        reasons = [_why_unfit(by_linear[member], member != members[-1]) for member in members if member in by_linear]
        reason = next((reason for reason in reasons if reason), None)
        if reason is not None:
            left.update(dict.fromkeys(members, reason))
    return [_left_alone(t, left[t.linear.name]) if t.linear and t.linear.name in left else t for t in tensors]


def _why_unfit(tensor: PlannedTensor, has_next: bool) -> str | None:
    """Why the fused set of a linear stays in 16 bits: its own shape, or blocks that straddle it and its sibling."""
    if tensor.unfit:
        return tensor.reason
    scheme = tensor.scheme
    block = scheme.weight.group_size if scheme and scheme.weight.granularity is Granularity.BLOCK else None
    if tensor.linear is None or tensor.linear.fused is None or not block or not has_next:
        return None
    rows = tensor.linear.shape[0]
    if rows % block == 0:
        return None
    return f"engines stack it with its siblings, and {rows} rows of {tensor.linear.name} cut a block of {block}"


def _left_alone(tensor: PlannedTensor, reason: str) -> PlannedTensor:
    if tensor.scheme is None:
        return tensor
    return replace(tensor, scheme=None, reason=reason, notes=(), stored=(tensor.plain,))


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


def _check_one_scheme(plan: Plan, sets: dict[str, tuple[str, ...]], why: str) -> None:
    schemes = plan.schemes
    for name, members in sets.items():
        chosen = {member: schemes.get(member) for member in members}
        if len(set(chosen.values())) > 1:
            shown = list(chosen.items())[:4]
            named = ", ".join(f"{member.rsplit('.', 1)[-1]} {s.name if s else '16 bits'}" for member, s in shown)
            raise UsageError(
                f"{name} would mix schemes ({named}); {why}",
                "write --ignore and --override patterns that cover the whole set, such as '(q|k|v)_proj$'",
            )
