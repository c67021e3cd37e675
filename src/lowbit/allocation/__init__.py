"""`lowbit allocate`: which type each tensor of an output gets, by what it costs the model."""

from lowbit.allocation.run import Allocation, allocate

__all__ = ["Allocation", "allocate"]
