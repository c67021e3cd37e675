"""Open a model by its name, as a checkpoint under the names of its architecture."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from lowbit.architecture.cache import discover_once
from lowbit.architecture.disk_layout import fit_rows
from lowbit.architecture.families import family_of
from lowbit.architecture.inspection import inspect_source, untied
from lowbit.architecture.own_names import discover_named
from lowbit.architecture.structure import Architecture
from lowbit.architecture.view import Changes, canonical_view, holds_single_experts
from lowbit.checkpoint import open_checkpoint, refuse_remote_code
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.checkpoint.companions import check_companions
from lowbit.checkpoint.opening import ModelSource
from lowbit.checkpoint.stated import refuse_absurd
from lowbit.errors import CheckpointError


def describe_checkpoint(
    checkpoint: Checkpoint, trust_remote_code: bool = False, split_experts: bool | None = False, unties: bool = False
) -> tuple[Architecture, Checkpoint]:
    """(architecture, the checkpoint as that names things), after the one look at a source that all commands take.

    unties         give tied tensors, the head, one of their own
    split_experts  describe experts one by one also where the files hold them in one tensor; None: unless engines read
                   them as one tensor only (gpt-oss)

    Raises CheckpointError for what `inspect_source` and `check_companions` refuse.
    """
    if split_experts is None:
        split_experts = not family_of(checkpoint.config().get("model_type")).fused_only
    split = split_experts or holds_single_experts(checkpoint)
    config, folder = checkpoint.config(), str(checkpoint.folder)
    refuse_absurd(config, checkpoint.source, [info.shape for info in checkpoint.tensors.values()])
    notes = [] if checkpoint.kind == "gguf" else check_companions(checkpoint.folder, checkpoint.source)
    architecture = discover_named(checkpoint.tensors, config, folder, trust_remote_code, split)
    view = canonical_view(checkpoint, architecture)
    architecture = _fitted(architecture, view)
    found = inspect_source(view, architecture)
    new = tuple(note for note in (*notes, *found.notes) if note not in view.notes)
    changes = Changes(frozenset(found.left_out), untied(config) if found.unties else None, new)
    if unties and architecture.tied and not found.unties:
        changes = replace(changes, config=untied(config), notes=(*new, *_tie_notes(view, architecture)),
                          copied=dict(architecture.tied))  # fmt: skip
        found.unties = True
    if found.unties:
        architecture = _fitted(discover_once(untied(config), folder, trust_remote_code, split, architecture.own_names),
                               view)  # fmt: skip
    return architecture, canonical_view(view, architecture, changes)


def _tie_notes(view: Checkpoint, architecture: Architecture) -> list[str]:
    sizes = {alias: math.prod(view.tensors[stored].shape) for alias, stored in architecture.tied.items()}
    return [f"{alias} becomes a tensor of its own, {size:,} more weights: config.json ties it to "
            f"{architecture.tied[alias]}, and a rotation gives the two different values"
            for alias, size in sizes.items()]  # fmt: skip


def _fitted(architecture: Architecture, view: Checkpoint) -> Architecture:
    """The architecture with the rows of joined tensors as these files cut them."""
    fitted = fit_rows(architecture.layout, {name: info.shape for name, info in view.tensors.items()})
    if not fitted:
        return architecture
    shapes = {name: part.shape_in(placed.shape) for placed in fitted.values() for name, part, _ in placed.pieces()}
    parameters = {name: shapes.get(name, shape) for name, shape in architecture.parameters.items()}
    return replace(architecture, parameters=parameters, layout=architecture.layout | fitted)


def open_described(
    model: ModelSource, options: OpenOptions, split_experts: bool | None = False, unties: bool = False
) -> tuple[Checkpoint, Architecture]:
    """An open model under the names of its architecture; raises what `describe_opened` does."""
    return describe_opened(open_checkpoint(model, options), options, split_experts, unties)


def describe_opened(
    checkpoint: Checkpoint, options: OpenOptions, split_experts: bool | None = False, unties: bool = False
) -> tuple[Checkpoint, Architecture]:
    """(the model under the names of its architecture, that), experts and ties as `describe_checkpoint` has them.

    CheckpointError where config.json quantizes a linear that the files hold in 16 bits: one of the two is wrong.
    """
    refuse_remote_code(checkpoint.config(), checkpoint.source, options)
    architecture, checkpoint = describe_checkpoint(checkpoint, options.trust_remote_code, split_experts, unties)
    for linear in architecture.linears.values():
        weight = f"{linear.name}.weight"
        if linear.block is None or weight in architecture.tied or linear.keep is not None:
            continue
        if weight not in checkpoint.schemes and checkpoint.says_quantized(linear.name):
            raise CheckpointError(
                f"{checkpoint.source}: config.json quantizes {linear.name}, but the files hold a plain {weight}",
                "the model is quantized in part, or config.json is of another one; list the linear as ignored there",
            )
    return checkpoint, architecture


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The float dtype of a model: what config.json says, else what most of its weights have."""
    config = checkpoint.config()
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if named in ("bfloat16", "float16", "float32"):
        return getattr(torch, named)
    floats = Counter(info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point)
    return floats.most_common(1)[0][0] if floats else torch.bfloat16
