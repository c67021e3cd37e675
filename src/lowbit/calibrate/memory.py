"""Memory of a calibrated run, and the share of it that hidden states may take.

    weights    the largest block in the compute dtype, twice if the unquantized stream runs too
    products   H (and C) of every input of its largest child, and three matrices of the largest H while it is factored
    rounding   eight float32 copies of the largest linear
    rest       the interpreter with torch (resident now), a batch in flight

Hidden states get the rest of the limit, and go to a file above it (`blocks.HiddenStates`).
"""

from __future__ import annotations

import torch

from lowbit.architecture.structure import Architecture
from lowbit.calibrate.blocks import BATCH_TOKENS
from lowbit.errors import UsageError
from lowbit.measure import available_memory, resident_memory

_SHARE_OF_FREE = 0.8  # without --max-memory
_IF_UNKNOWN = 4 << 30  # bytes
_COPIES_OF_A_LINEAR = 8
_BATCHES = 8  # float32 arrays of a batch, as wide as the widest linear
# Two streams, the attention output of each, and the inputs of the last linears of attention and MLP.
_ARRAYS_OF_STATES = 6


def states_memory(
    architecture: Architecture, dtype: torch.dtype, both_streams: bool, rewrites: bool, max_memory: int | None
) -> int:
    """Bytes that one array of hidden states may take.

    rewrites    transforms hold all linears of a block in float32 at once
    max_memory  limit of the whole run in bytes; None: a share of the free memory

    UsageError if the rest alone exceeds the limit.
    """
    limit = memory_limit(max_memory)
    needed = {"the program": resident_memory(), **block_memory(architecture, dtype, both_streams, rewrites)}
    left = limit - sum(needed.values())
    if left < 0:
        shown = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in needed.items())
        raise UsageError(
            f"the run needs {sum(needed.values()) / 1e9:.2f} GB ({shown}); --max-memory allows {limit / 1e9:.2f} GB",
            "allow more, or take --method rtn, which needs a few hundred megabytes for any model",
        )
    return left // _ARRAYS_OF_STATES


def memory_limit(max_memory: int | None) -> int:
    """Bytes that the process may take; None: what it takes now and a share of the free memory."""
    return max_memory or resident_memory() + int(_SHARE_OF_FREE * (available_memory() or _IF_UNKNOWN))


def block_memory(architecture: Architecture, dtype: torch.dtype, both_streams: bool, rewrites: bool) -> dict[str, int]:
    """Bytes of one block at a time, without hidden states and the program; arguments as above."""
    widest = largest = 0  # columns or rows; weights of one linear
    blocks: dict[int, int] = {}
    inputs: dict[tuple[int, str], dict[str, int]] = {}  # of every child (attention, MLP): distinct input → its width
    for linear in architecture.linears.values():
        if linear.block is None:
            continue
        (rows, columns), size = linear.shape, linear.shape[0] * linear.shape[1]
        widest, largest = max(widest, rows, columns), max(largest, size)
        blocks[linear.block] = blocks.get(linear.block, 0) + size
        if linear.reads is not None:
            child = linear.name.removeprefix(f"{architecture.blocks[linear.block]}.").partition(".")[0]
            inputs.setdefault((linear.block, child), {})[linear.reads] = columns
    weights, squares, factored = max(blocks.values(), default=0), 0, 0
    for widths in inputs.values():
        squares = max(squares, sum(width * width for width in widths.values()))
        factored = max(factored, *widths.values())
    return {
        "the weights of a block": weights * dtype.itemsize * (2 if both_streams else 1),
        "statistics of inputs": 4 * (squares * (2 if both_streams else 1) + 3 * factored * factored),
        "rounding": 4 * (_COPIES_OF_A_LINEAR * largest + (2 * weights if rewrites else 0)),
        "a batch of activations": _BATCHES * BATCH_TOKENS * widest * 4,
    }
