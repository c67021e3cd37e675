"""The two models of a refinement: the finished file, and the reference that it was made of."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit.architecture import Architecture, describe_opened, open_described
from lowbit.architecture.own_names import under_own_names
from lowbit.architecture.view import holds_single_experts
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.checkpoint.quantized import KINDS
from lowbit.errors import UsageError
from lowbit.formats.gguf.plan import PLAIN

_IS_REFERENCE = "--reference is the 16-bit model that the file was made of"


@dataclass(frozen=True)
class TwoModels:
    """Both under the names of one architecture; experts one by one where the file has them so."""

    file: Checkpoint
    reference: Checkpoint
    architecture: Architecture

    def close(self) -> None:
        self.file.close()
        self.reference.close()


def open_pair(file: str | Path, reference: str | Path, options: OpenOptions) -> TwoModels:
    """Open both; headers only. UsageError for a reference that is quantized, or another model than the file.

    options  of the reference; the file takes no adapter and no revision
    """
    if os.path.exists(file) and os.path.exists(reference) and os.path.samefile(file, reference):
        raise UsageError(f"{reference} is the file itself", _IS_REFERENCE)
    own = replace(options, adapter=None, revision=None)
    opened = open_checkpoint(file, own)
    is_gguf = opened.kind == "gguf"
    present, present_architecture = describe_opened(opened, own, is_gguf)
    split = is_gguf or holds_single_experts(present)
    source, architecture = open_described(reference, options, split)
    _refuse_quantized(source, architecture)
    if present_architecture.own_names:
        architecture, source = under_own_names(source, architecture, options.trust_remote_code, split)
    _refuse_another_model(present, present_architecture, source, architecture)
    return TwoModels(present, source, architecture)


def _refuse_quantized(reference: Checkpoint, architecture: Architecture) -> None:
    codes = reference.kind in KINDS
    types = {reference.tensors[f"{name}.weight"].stored for name in architecture.linears
             if f"{name}.weight" in reference.tensors}  # fmt: skip
    if codes or (reference.kind == "gguf" and not types.issubset(PLAIN)):
        form = reference.kind if codes else ", ".join(sorted(types.difference(PLAIN)))
        raise UsageError(f"the reference {reference.source} is quantized itself ({form})", _IS_REFERENCE)


def _refuse_another_model(
    file: Checkpoint, its: Architecture, reference: Checkpoint, architecture: Architecture
) -> None:
    """UsageError where the two differ in architecture, vocabulary, blocks or shapes."""
    if its.model_type != architecture.model_type:
        raise UsageError(
            f"{file.source} is a model of type {its.model_type!r}, {reference.source} one of type "
            f"{architecture.model_type!r}",
            _IS_REFERENCE,
        )
    if len(its.blocks) != len(architecture.blocks):
        raise UsageError(
            f"{file.source} has {len(its.blocks)} blocks, {reference.source} {len(architecture.blocks)}", _IS_REFERENCE
        )
    embeddings = [name for name, role in architecture.roles.items() if role == "embedding"]
    for name in (*embeddings, *architecture.parameters):
        ours, theirs = its.parameters.get(name), architecture.parameters[name]
        if ours is None or tuple(ours) == tuple(theirs):
            continue
        what = f"a vocabulary of {ours[0]} tokens" if name in embeddings else f"{name} {list(ours)}"
        other = f"one of {theirs[0]}" if name in embeddings else f"{list(theirs)}"
        raise UsageError(f"{file.source} has {what}, {reference.source} {other}", _IS_REFERENCE)
