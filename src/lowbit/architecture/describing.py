"""Open a model by its name, as a checkpoint under the names of its architecture."""

from __future__ import annotations

from collections import Counter

import torch

from lowbit.architecture.cache import discover_once
from lowbit.architecture.families import family_of
from lowbit.architecture.inspection import inspect_source, untied
from lowbit.architecture.structure import Architecture
from lowbit.architecture.view import Changes, canonical_view, holds_single_experts
from lowbit.checkpoint import open_checkpoint, refuse_remote_code
from lowbit.checkpoint.base import CanReadCodes, Checkpoint, OpenOptions, is_decoded
from lowbit.checkpoint.companions import check_companions
from lowbit.checkpoint.opening import ModelSource
from lowbit.checkpoint.stated import refuse_absurd
from lowbit.errors import CheckpointError


def describe_checkpoint(
    checkpoint: Checkpoint, trust_remote_code: bool = False, split_experts: bool | None = False
) -> tuple[Architecture, Checkpoint]:
    """(architecture, the checkpoint as that names things), after the one look at a source that all commands take.

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
    architecture = discover_once(config, folder, trust_remote_code, split)
    view = canonical_view(checkpoint, architecture)
    found = inspect_source(view, architecture)
    new = tuple(note for note in (*notes, *found.notes) if note not in view.notes)
    changes = Changes(frozenset(found.left_out), untied(config) if found.unties else None, new)
    if found.unties:
        architecture = discover_once(untied(config), folder, trust_remote_code, split)
    return architecture, canonical_view(view, architecture, changes)


def open_described(
    model: ModelSource, options: OpenOptions, split_experts: bool | None = False
) -> tuple[Checkpoint, Architecture]:
    """An open model under the names of its architecture; experts as `describe_checkpoint` has them.

    CheckpointError where config.json quantizes a linear that the files hold in 16 bits: one of the two is wrong.
    """
    checkpoint = open_checkpoint(model, options)
    refuse_remote_code(checkpoint.config(), checkpoint.source, options)
    architecture, checkpoint = describe_checkpoint(checkpoint, options.trust_remote_code, split_experts)
    if not isinstance(checkpoint, CanReadCodes):
        return checkpoint, architecture
    for linear in architecture.linears.values():
        weight = f"{linear.name}.weight"
        if linear.block is None or weight in architecture.tied or linear.keep is not None:
            continue
        if not is_decoded(checkpoint, weight) and checkpoint.says_quantized(linear.name):
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
