"""From an open checkpoint to its architecture and to the checkpoint under the architecture's names."""

from __future__ import annotations

from lowbit.architecture.cache import discover_once
from lowbit.architecture.structure import Architecture
from lowbit.architecture.view import canonical_view, holds_single_experts
from lowbit.checkpoint.base import Checkpoint


def describe_checkpoint(
    checkpoint: Checkpoint, trust_remote_code: bool = False, split_experts: bool = False
) -> tuple[Architecture, Checkpoint]:
    """(architecture, the checkpoint as that names things).

    split_experts  describe experts one by one also where the files hold them in one tensor (gpt-oss in 16 bits)
    """
    split = split_experts or holds_single_experts(checkpoint)
    architecture = discover_once(checkpoint.config(), str(checkpoint.folder), trust_remote_code, split)
    return architecture, canonical_view(checkpoint, architecture)
