"""Stage 2: what each tensor of a model is for."""

from lowbit.architecture.cache import discover_once
from lowbit.architecture.discover import Architecture, Linear, build_on_meta, discover

__all__ = ["Architecture", "Linear", "build_on_meta", "discover", "discover_once"]
