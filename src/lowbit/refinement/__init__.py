"""`lowbit refine`: a finished quantized file, made nearer to its reference, in its own format, types and size."""

from lowbit.refinement.run import Refined, dry_refine, refine

__all__ = ["Refined", "dry_refine", "refine"]
