"""What a calibrated run holds at once, and what is left of the user's bound for hidden states.

    weights    of the largest block in the compute dtype, twice where the unquantized stream runs too
    products   H (and C) of every input of its largest child, and three matrices of the largest H while it is factored
    rounding   eight float32 copies of the largest linear
    rest       the interpreter with torch (what is resident now), a batch in flight

Hidden states get what remains; above that they go to a file (`calibrate/hidden_states.py`).
"""

from __future__ import annotations

import torch

from lowbit.architecture.structure import Architecture, Linear
from lowbit.calibrate.blocks import BATCH_TOKENS
from lowbit.errors import UsageError
from lowbit.measure import resident_memory

_COPIES_OF_A_LINEAR = 8
_BATCHES = 8  # float32 arrays of a batch, as wide as the widest linear
# Two streams, what attention put out of each, and what the last linears of attention and MLP are given.
_ARRAYS_OF_STATES = 6


def states_memory(
    architecture: Architecture, dtype: torch.dtype, both_streams: bool, rewrites: bool, limit: int
) -> int:
    """Bytes that one array of hidden states may take.

    rewrites  True where all linears of a block are held in float32 at once (transforms)

    Raises UsageError where the rest alone exceeds `limit`, saying what it takes.
    """
    needed = {"the program": resident_memory(), **block_memory(architecture, dtype, both_streams, rewrites)}
    left = limit - sum(needed.values())
    if left < 0:
        shown = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in needed.items())
        raise UsageError(
            f"the run needs {sum(needed.values()) / 1e9:.2f} GB ({shown}); --max-memory allows {limit / 1e9:.2f} GB",
            "allow more, or take --method rtn, which needs a few hundred megabytes for any model",
        )
    return left // _ARRAYS_OF_STATES


def block_memory(architecture: Architecture, dtype: torch.dtype, both_streams: bool, rewrites: bool) -> dict[str, int]:
    """What one block at a time takes, in bytes, hidden states and the program apart; arguments as above."""
    widest = max((max(each.shape) for each in _of_blocks(architecture)), default=0)
    return {
        "the weights of a block": _weights(architecture) * dtype.itemsize * (2 if both_streams else 1),
        "statistics of inputs": _products(architecture, both_streams),
        "rounding": _rounding(architecture, rewrites),
        "a batch of activations": _BATCHES * BATCH_TOKENS * widest * 4,
    }


def _of_blocks(architecture: Architecture) -> list[Linear]:
    return [linear for linear in architecture.linears.values() if linear.block is not None]


def _weights(architecture: Architecture) -> int:
    sizes: dict[int, int] = {}
    for linear in _of_blocks(architecture):
        assert linear.block is not None
        sizes[linear.block] = sizes.get(linear.block, 0) + linear.shape[0] * linear.shape[1]
    return max(sizes.values(), default=0)


def _products(architecture: Architecture, both_streams: bool) -> int:
    """Of the stage (attention, MLP) with the most, in bytes."""
    stages: dict[tuple, dict[str, int]] = {}
    for linear in _of_blocks(architecture):
        if linear.reads is not None:
            stage = (linear.block, "attention" in linear.reads)
            stages.setdefault(stage, {})[linear.reads] = linear.shape[1]
    squares = [sum(width * width for width in inputs.values()) for inputs in stages.values()]
    widest = max((width for inputs in stages.values() for width in inputs.values()), default=0)
    return 4 * (max(squares, default=0) * (2 if both_streams else 1) + 3 * widest * widest)


def _rounding(architecture: Architecture, rewrites: bool) -> int:
    largest = max((each.shape[0] * each.shape[1] for each in _of_blocks(architecture)), default=0)
    return 4 * (_COPIES_OF_A_LINEAR * largest + (2 * _weights(architecture) if rewrites else 0))
