"""The architecture of a model: the role of each tensor, and its place in files and in transformers."""

from lowbit.architecture.building import build_without_weights
from lowbit.architecture.cache import discover_once
from lowbit.architecture.describing import describe_checkpoint, describe_opened, model_dtype, open_described
from lowbit.architecture.discover import discover
from lowbit.architecture.families import family_of
from lowbit.architecture.structure import Architecture, Linear
from lowbit.architecture.view import canonical_view, holds_single_experts

__all__ = [
    "Architecture",
    "Linear",
    "build_without_weights",
    "canonical_view",
    "describe_checkpoint",
    "describe_opened",
    "discover",
    "discover_once",
    "family_of",
    "holds_single_experts",
    "model_dtype",
    "open_described",
]
