"""Stage 2: what each tensor of a model is for."""

from lowbit.architecture.cache import discover_once
from lowbit.architecture.describing import describe_checkpoint
from lowbit.architecture.discover import build_on_meta, discover
from lowbit.architecture.structure import Architecture, Linear
from lowbit.architecture.view import canonical_view, holds_single_experts

__all__ = [
    "Architecture",
    "Linear",
    "build_on_meta",
    "canonical_view",
    "describe_checkpoint",
    "discover",
    "discover_once",
    "holds_single_experts",
]
