"""The plan of a safetensors folder: the scheme of every linear, its stored tensors, the config files.

    architecture + headers + settings → FolderPlan

A conversion plans in the same way, with the schemes of its source (`fixed`).

Refused: different schemes within a fused set (q/k/v, gate/up), since engines load such a checkpoint and compute
nonsense; different schemes among the experts of a block; a group size of the user's that does not divide K; a model, a
mixture of schemes or KV-cache scales that the output format cannot express.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.architecture import Architecture, describe_opened, holds_single_experts, model_dtype
from lowbit.architecture.own_names import under_own_names
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.companions import find_companions, has_tokenizer
from lowbit.checkpoint.quantized import KINDS
from lowbit.checkpoint.stated import without_quantization
from lowbit.errors import ArchitectureError, FormatError, UsageError
from lowbit.export import Exporter, Piece, default_format, find_exporter
from lowbit.export.atomic import atomic_folder, refuse_existing
from lowbit.export.fused_experts import Share, find_shares, stores_fused_experts
from lowbit.export.kv_cache import CacheScales, state_kv_cache, state_kv_cache_beside, stored_kv_scales
from lowbit.export.rotations import stated_rotations
from lowbit.export.safetensors_writer import SafetensorsWriter, StoredTensor, file_sizes
from lowbit.files.claim import Claim
from lowbit.methods import parse_method
from lowbit.numerics.hadamard import Rotation
from lowbit.patterns import check_patterns
from lowbit.plan.linears import LinearPlanner, StoredRows, common_group_sizes
from lowbit.plan.plan import Making, Plan, PlannedTensor, Prepared, Request, output_format
from lowbit.registry import Format
from lowbit.rounding.error import squared_error
from lowbit.rounding.target import Sums
from lowbit.schemes import ActivationSpec, KVCacheScheme, Scheme, find_kv_cache_scheme
from lowbit.settings import Settings
from lowbit.tensors import Granularity, InputRange, QuantizedTensor
from lowbit.transform.online import online_rotations

if TYPE_CHECKING:
    from lowbit.calibrate.input_ranges import Ranges


@dataclass(frozen=True)
class FolderPlan(Plan):
    """
    input_ranges  linear → range of its input in calibration, for schemes with static activation scales
    kv_cache      scheme of the KV cache; None if it is not quantized
    kv_scales     the stored scales of the KV cache, layer by layer
    kv_absmax     layer → largest |K| and |V| of every head, [kv_heads], from calibration
    """

    input_ranges: dict[str, InputRange] = field(default_factory=dict)
    kv_cache: KVCacheScheme | None = None
    kv_scales: tuple[CacheScales, ...] = ()
    kv_absmax: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def exporter(self) -> Exporter:
        return find_exporter(self.format.name)

    @property
    def described(self) -> Architecture:
        """The architecture, which every folder has."""
        assert self.architecture is not None
        return self.architecture

    @property
    def engine(self) -> str:
        return self.settings.loader or self.exporter.engine_of(self.schemes) or self.format.engine

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """Linear → scheme, of every quantized linear."""
        return {tensor.linear.name: tensor.scheme for tensor in self.tensors if tensor.linear and tensor.scheme}

    @property
    def is_decoded_on_loading(self) -> bool:
        """True for a folder for transformers of which it must decode the weights as it loads: its class initializes or
        ties layers by weights that packed ones do not have. It decodes all by one group."""
        if self.settings.loader != "transformers" or len({scheme.weight for scheme in self.schemes.values()}) != 1:
            return False
        stored = {tensor.name for tensor in self.stored}
        packed = {f"{name}.weight" for name in self.schemes if f"{name}.weight" not in stored}
        tied = {*self.described.tied, *self.described.tied.values()}
        return bool(packed & tied) or (bool(packed) and self.described.needs_weights is not None)

    @property
    def ignored(self) -> list[str]:
        """Unquantized modules, in the spelling of the files and in that of transformers: linears, including tied ones,
        every matrix of multi-token prediction blocks, and experts that lie in one tensor."""
        architecture = self.described
        left = [name for name in architecture.linears if name not in self.schemes]
        beside = [t.name.removesuffix(".weight") for t in self.tensors
                  if t.linear is None and t.name.endswith(".weight") and len(t.shape) == 2
                  and architecture.roles.get(t.name, "other") not in ("embedding", "norm")
                  and (architecture.predicts(t.name) or architecture.block_of(t.name) is not None)]  # fmt: skip
        left += [name for name in beside if name not in architecture.linears]
        left += architecture.expert_containers
        # vLLM looks for the names of the files, transformers for those of its modules
        joined = [name for name in architecture.loaded_names if f"{name}.weight" not in architecture.parameters]
        return left + [loaded for name in left + joined for loaded in architecture.loaded_names.get(name, ())]

    @cached_property
    def shares(self) -> dict[str, Share]:
        """Tensor of a single expert → its place in a tensor of all experts, in formats that fuse them."""
        if not self.format.fused_experts:
            return {}
        return find_shares((stored for tensor in self.tensors for stored in tensor.stored), self.described)

    @property
    def stored(self) -> list[StoredTensor]:
        """Every tensor of the files, once."""
        stored = (stored for tensor in self.tensors for stored in tensor.stored)
        places = [self.shares[tensor.name].stored if tensor.name in self.shares else tensor for tensor in stored]
        places += [tensor for scales in self.kv_scales for tensor in (scales.k, scales.v)]
        return list({tensor.name: tensor for tensor in places}.values())

    @property
    def file_bytes(self) -> int:
        return sum(self._file_sizes)

    @cached_property
    def _file_sizes(self) -> list[int]:
        return file_sizes(self.stored, self.settings.bytes_per_shard)

    @property
    def activations(self) -> dict[str, ActivationSpec]:
        return {name: scheme.activation for name, scheme in self.schemes.items() if scheme.activation is not None}

    @cached_property
    def rotations(self) -> dict[str, Rotation]:
        return online_rotations(parse_method(self.settings.method), self.described,
                                [name.removesuffix(".weight") for name in self.targets])  # fmt: skip

    @property
    def static_inputs(self) -> set[str]:
        return {n for n, spec in self.activations.items() if spec.needs_calibration} - self.input_ranges.keys()

    @property
    def needs_kv_ranges(self) -> bool:
        """False for a conversion, which takes over the ranges of its source."""
        return self.kv_cache is not None and not self.kv_absmax

    def with_ranges(self, ranges: Ranges) -> FolderPlan:
        return replace(
            self,
            input_ranges=self.input_ranges | ranges.inputs,
            kv_absmax=self.kv_absmax if ranges.cache is None else ranges.cache.absmax(),
            notes=(*self.notes, *ranges.notes),
        )

    def pack(self, tensor: PlannedTensor, rows: QuantizedTensor | Tensor, first: int) -> list[Piece]:
        linear, scheme = tensor.linear, tensor.scheme
        if isinstance(rows, QuantizedTensor):
            assert linear is not None
            assert scheme is not None
            covered = self.input_ranges.get(linear.name)
            planned = {stored.name for stored in tensor.stored}
            pieces = self.exporter.pack(linear.name, rows, scheme, first, linear.shape, tensor.dtype, covered)
            pieces = [piece for piece in pieces if piece.name in planned]
            if linear.transposed and self.format.name == "float":  # the model class stores it as [K, N]
                pieces = [replace(piece, values=piece.values.t(), row=0, column=first) for piece in pieces]
        else:
            pieces = [Piece(tensor.name, rows.to(tensor.plain_dtype), first)]
        return [self.shares[piece.name].place(piece) if piece.name in self.shares else piece for piece in pieces]

    def packing_error(self, tensor: PlannedTensor, rows: QuantizedTensor | Tensor) -> Sums:
        if self.format.name != "float":
            return super().packing_error(tensor, rows)
        assert isinstance(rows, QuantizedTensor)
        return squared_error(rows.decode().to(tensor.dtype), rows)

    def pieces_beside(self) -> list[Piece]:
        """Scales of the KV cache; ArchitectureError for a layer that was not measured."""
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
        """config.json's `quantization_config`; empty for the format "float"."""
        config = self.exporter.quantization_config(self.schemes, self.ignored)
        if self.rotations:
            config["transform_config"] = stated_rotations(self.rotations, self.described)
        return config if self.kv_cache is None else state_kv_cache(self.format.name, self.kv_cache, config)

    def refuse_existing(self, output: Path, overwrite: bool) -> None:
        refuse_existing(output, overwrite)

    def workplace(self, output: Path, overwrite: bool, claim: Claim | None = None) -> AbstractContextManager[Path]:
        return atomic_folder(output, overwrite, claim)

    def places(self, output: Path) -> list[Path]:
        return [output]

    @property
    def largest_file(self) -> int:
        return max(self._file_sizes)

    def container(self, work: Path, output: Path) -> SafetensorsWriter:
        return SafetensorsWriter(work, self.stored, self.settings.bytes_per_shard)

    def complete(self, work: Path, checkpoint: Checkpoint) -> None:
        """Write config.json and the format's own JSON files; copy tokenizer, licence and the like."""
        for name, content in self.json_files(checkpoint).items():
            (work / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in find_companions(checkpoint.folder):
            (work / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.folder / path, work / path)

    def json_files(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """config.json and the format's own JSON files: name → content."""
        config = without_quantization(checkpoint.config())
        if config.get("dtype") == "float64" or config.get("torch_dtype") == "float64":
            config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
        if not ("dtype" in config or "torch_dtype" in config):
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        quantization = self.quantization_config()
        if quantization:
            config["quantization_config"] = quantization | ({"dequantize": True} if self.is_decoded_on_loading else {})
        beside = self.exporter.companion_files(self.schemes, self.ignored)
        if self.kv_cache is not None:
            beside = state_kv_cache_beside(self.format.name, self.kv_cache, beside)
        return {"config.json": config} | beside

    def inherited_rules(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The source's own tokenizer is copied as it is: none at all, or one with more tokens than the embedding."""
        return ("token-ids",) if has_tokenizer(checkpoint.folder) else ("token-ids", "tokenizer")


def prepare_folder(request: Request) -> Prepared:
    """Open a model and plan the folder; see `plan.prepare`."""
    threads, settings = request.worker_threads, request.settings
    format = output_format(settings)
    split = True if format.fused_experts else False if format.name == "float" else None
    opened = open_checkpoint(request.model, request.options)
    checkpoint, architecture = describe_opened(opened, request.options, split, request.unties)
    if settings.loader == "transformers":
        checkpoint, architecture = _for_transformers(request, format, opened, checkpoint, architecture)
    if checkpoint.kind in KINDS:
        checkpoint.notes.append(f"the source is quantized already ({checkpoint.kind}); its error comes on top")
    dtype = model_dtype(checkpoint)

    def plan_again(others: Settings) -> FolderPlan:
        return make_plan(checkpoint, architecture, others, dtype)

    source = request.name or checkpoint.source
    return Prepared(checkpoint, plan_again(settings), threads, plan_again, request.options, source)


def _for_transformers(
    request: Request, format: Format, opened: Checkpoint, checkpoint: Checkpoint, architecture: Architecture
) -> tuple[Checkpoint, Architecture]:
    """The model as transformers reads it quantized: experts that it would merge of no tensors that it knows in one
    tensor, and under the names of its modules where its rules would lose something.

    opened  the model as its files name things; checkpoint: the same, under the names of the architecture
    """
    if format.name != "compressed-tensors":
        raise UsageError(f"--loader transformers writes compressed-tensors folders, not {format.name}",
                         "leave --format out")  # fmt: skip
    fused = any(placed.fused for placed in architecture.layout.values())
    if fused and format.name not in architecture.replaced_experts:
        checkpoint, architecture = describe_opened(opened, request.options, False, request.unties)
    trust, single = request.options.trust_remote_code, holds_single_experts(checkpoint)
    architecture, checkpoint = under_own_names(checkpoint, architecture, trust, single)
    return checkpoint, architecture


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    settings: Settings,
    dtype: torch.dtype,
    fixed: dict[str, Scheme] | None = None,
) -> FolderPlan:
    """The plan of every tensor; raises what the module docstring refuses, and CheckpointError for absent tensors.

    fixed  linear → scheme: exactly these are quantized, without regard to the settings or to shapes
    """
    format = output_format(settings)
    exporter = find_exporter(format.name)
    if format.name == "mxfp4" and not stores_fused_experts(architecture):
        raise FormatError(
            f"{checkpoint.source}: mxfp4 is the format of gpt-oss alone, and this is of model type "
            f"{architecture.model_type!r}",
            "--format compressed-tensors holds MXFP4A16 of any model",
        )
    linears = {f"{linear.name}.weight": linear for linear in architecture.linears.values()}
    common = common_group_sizes(architecture, settings) if fixed is None else {}
    planner = LinearPlanner(checkpoint, settings, dtype, exporter, common)
    tensors = []
    # In the order of the model, then other tensors by name: the files do not depend on how the source was split.
    known = [name for name in architecture.parameters if name in checkpoint.tensors]
    for name in known + sorted(checkpoint.tensors.keys() - architecture.parameters.keys()):
        linear = linears.get(name)
        tensor = _copied(name, checkpoint, architecture, dtype)
        if linear is not None and name not in architecture.tied:
            tensor = replace(tensor, linear=linear, in_decoder=tensor.block is not None)
            if fixed is None:
                tensor = planner.planned(tensor, linear)
            elif linear.name in fixed:
                tensor = planner.with_scheme(tensor, linear, fixed[linear.name])
            else:
                tensor = replace(tensor, reason="not quantized in the source")
        tensors.append(tensor)
    base = settings.base_scheme()
    plan = FolderPlan(
        tuple(_leave_whole_sets(tensors, architecture)), settings, format, architecture.class_name, base.name,
        "none" if base.weight.number == "kmeans" else settings.range_search(base.weight).method, dtype, architecture,
    )  # fmt: skip
    if fixed is None:
        _check_overrides(plan)
        plan = replace(plan, notes=(*plan.notes, *_bits_as_codes(plan)))
    _check_one_scheme(plan, architecture.fused_sets, "engines load these as one matrix, and would misread it")
    _check_one_scheme(plan, architecture.expert_sets, "engines stack the experts of a block, and would misread them")
    exporter.quantization_config(plan.schemes, plan.ignored)  # FormatError before anything runs
    if settings.kv_cache is None:
        return plan
    return with_kv_cache(plan, find_kv_cache_scheme(settings.kv_cache), checkpoint.config())


def _bits_as_codes(plan: FolderPlan) -> tuple[str, ...]:
    """Of a folder of decoded weights, a note on what their codes, scales and tables would take."""
    decoded = [(t.linear, t.scheme) for t in plan.tensors if t.linear is not None and t.scheme is not None]
    if plan.format.name != "float" or not decoded:
        return ()
    weights = stored = 0
    for linear, scheme in decoded:
        exporter = find_exporter(default_format(scheme))
        stored += sum(s.nbytes for s in exporter.stored_tensors(linear.name, linear.shape, scheme, plan.dtype))
        weights += linear.shape[0] * linear.shape[1]
    holders = ", ".join(dict.fromkeys(default_format(scheme) for _, scheme in decoded))
    return (f"decoded to 16-bit floats; as codes (--format {holders}) the quantized linears take "
            f"{8 * stored / weights:.3f} bits per weight",)  # fmt: skip


def with_kv_cache(plan: FolderPlan, scheme: KVCacheScheme, config: dict[str, Any]) -> FolderPlan:
    """The plan with scales of a quantized KV cache; FormatError or ArchitectureError where they cannot be stored."""
    return replace(plan, kv_cache=scheme, kv_scales=stored_kv_scales(plan.format, scheme, plan.described, config))


def _copied(name: str, checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype) -> PlannedTensor:
    info = checkpoint.tensors[name]
    decoded = name in checkpoint.schemes
    floats = info.dtype.is_floating_point and (checkpoint.kind == "gguf" or decoded)
    stored = StoredTensor(name, dtype if floats else info.written or info.dtype, tuple(info.shape))
    role = architecture.roles.get(name, "other")
    reason = _COPIED_BECAUSE.get(role, "not the weight of a linear layer")
    if name in architecture.tied:
        reason = f"tied to {architecture.tied[name]}"
    elif architecture.predicts(name):
        reason = "of a block for multi-token prediction, which a text does not calibrate; declared as unquantized"
    elif name not in architecture.parameters:
        reason = "not a parameter of the transformers model; copied as it is"
    return PlannedTensor(
        name, role, architecture.block_of(name), stored.shape, StoredRows(name), info.nbytes, Making.copied, (stored,),
        reason=reason, dtype=dtype, plain_dtype=stored.dtype,
        multiple=checkpoint.row_multiple(name),
    )  # fmt: skip


_COPIED_BECAUSE = {
    "embedding": "embeddings are looked up, not multiplied; engines keep them in 16 bits",
    "norm": "norms are a vector each, and sensitive",
    "bias": "biases are a vector each",
    "router": "routers choose experts, and are small",
    "convolution": "convolutions are small, and no engine quantizes them",
    "experts": "loaders read the experts of this model as one tensor only (those of gpt-oss also in its own MXFP4: "
    "--scheme MXFP4A16 --format mxfp4)",
}


def _leave_whole_sets(tensors: list[PlannedTensor], architecture: Architecture) -> list[PlannedTensor]:
    """Leave a whole fused set, or all experts of a block, in 16 bits where the shape of one member does not fit."""
    by_linear = {tensor.linear.name: tensor for tensor in tensors if tensor.linear is not None}
    left: dict[str, str] = {}
    for members in (*architecture.fused_sets.values(), *architecture.expert_sets.values()):
        reasons = [_why_unfit(by_linear[member], member != members[-1]) for member in members if member in by_linear]
        reason = next((reason for reason in reasons if reason), None)
        if reason is not None:
            left.update(dict.fromkeys(members, reason))
    return [
        replace(
            t, scheme=None, target=None, making=Making.copied, source=StoredRows(t.name), reason=left[t.linear.name],
            notes=(), stored=(StoredTensor(t.name, t.plain_dtype, t.shape),),
        ) if t.scheme is not None and t.linear is not None and t.linear.name in left else t
        for t in tensors
    ]  # fmt: skip


def _why_unfit(tensor: PlannedTensor, has_next: bool) -> str | None:
    """Why the fused set of a linear stays in 16 bits: its shape, or a block that straddles it and the next member."""
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


def _check_overrides(plan: FolderPlan) -> None:
    names, settings = list(plan.described.linears), plan.settings
    for option, patterns in (("--override", settings.overrides), ("--ignore", settings.ignore),
                             ("--method-override", settings.method_overrides)):  # fmt: skip
        check_patterns(option, patterns, names)
    for tied in plan.described.tied:
        linear = tied.removesuffix(".weight")
        if linear in plan.described.linears and plan.settings.override_for(linear) is not None:
            raise UsageError(f"--override asks to quantize {linear}, which is tied to {plan.described.tied[tied]}",
                             "a tied output layer is the embedding, which stays in 16 bits")  # fmt: skip
    if not plan.quantized:
        _refuse_nothing(plan)


def _refuse_nothing(plan: FolderPlan) -> None:
    """ArchitectureError for a plan that quantizes no linear, by what kept most of them in 16 bits."""
    kept = [tensor for tensor in plan.tensors if tensor.linear is not None and tensor.linear.block is not None]
    reasons = Counter(tensor.reason for tensor in kept if tensor.reason)
    why = "".join(f": {reason} ({count} linears)" for reason, count in reasons.most_common(1))
    unfit = any(tensor.unfit for tensor in kept)
    hint = "choose another scheme, or another --group-size where the scheme has groups" if unfit else "loosen --ignore"
    raise ArchitectureError(f"no linear is left to quantize{why}", hint)


def _check_one_scheme(plan: FolderPlan, sets: dict[str, tuple[str, ...]], why: str) -> None:
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
