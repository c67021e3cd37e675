"""Memory of a calibrated run, and the share of it that hidden states may take.

    weights    the largest block in the compute dtype, twice if the unquantized stream runs too
    products   H (and C) of every input of its largest child, and three matrices of the largest H while it is factored;
               with weights of tokens, another H for every group of rows of every linear
    rounding   nine float32 copies of the largest linear, what the residual stream has lost in its place among them
    outputs    with feedback between rows, G of all linears of a block, and its factors
    gradients  with weights of tokens, before the first block: what autograd keeps of a batch of windows in one block
    rest       the interpreter with torch (resident now), a batch in flight

Hidden states get the rest of the limit, and go to a file above it (`blocks.HiddenStates`).
"""

from __future__ import annotations

import torch

from lowbit.architecture.structure import Architecture
from lowbit.calibrate.blocks import BATCH_TOKENS
from lowbit.measure import SHARE_OF_FREE, available_memory, resident_memory, too_little_memory
from lowbit.rounding.row_feedback import LARGEST_PART, parts_of

_IF_UNKNOWN = 4 << 30  # bytes
_COPIES_OF_A_LINEAR = 9
_BATCHES = 8  # float32 arrays of a batch, as wide as the widest linear
_GRADIENTS = 3  # float32 arrays of a batch, of what the linears of a block take and make: norms and products between
# Two streams, the attention output of each, and the inputs of the last linears of attention and MLP.
ARRAYS_OF_STATES = 6


def states_memory(
    architecture: Architecture, dtype: torch.dtype, both_streams: bool, rewrites: bool, max_memory: int | None,
    groups: int = 0, tokens: int = 0, outputs: bool = False,
) -> int:  # fmt: skip
    """Bytes that one array of hidden states may take.

    rewrites    transforms hold all linears of a block in float32 at once
    max_memory  limit of the whole run in bytes; None: a share of the free memory
    groups      of the rows of each linear with an H each; 0: one H for each input
    tokens      of the calibration text, which then have weights
    outputs     the curvature of the loss in pairs of outputs is known (`rounding.row_feedback`)

    UsageError if the rest alone exceeds the limit.
    """
    limit = memory_limit(max_memory)
    needed = {
        "the program": resident_memory(),
        **block_memory(architecture, dtype, both_streams, rewrites, groups, outputs),
    }
    if groups:
        needed["weights of tokens"] = weights_memory(architecture, groups, tokens)
    left = limit - sum(needed.values())
    if left < 0:
        instead = "take --method rtn without --quality, which needs a few hundred megabytes for any model"
        raise too_little_memory("the run", needed, limit, bool(max_memory), instead)
    return left // ARRAYS_OF_STATES


def memory_limit(max_memory: int | None) -> int:
    """Bytes that the process may take; None: what it takes now and a share of the free memory."""
    return max_memory or resident_memory() + int(SHARE_OF_FREE * (available_memory() or _IF_UNKNOWN))


def weights_memory(architecture: Architecture, groups: int, tokens: int) -> int:
    """Bytes of the weights of all tokens (`calibrate.gradients`)."""
    readers = sum(linear.block is not None and linear.expert is None for linear in architecture.linears.values())
    return 4 * tokens * readers * groups


def block_memory(
    architecture: Architecture,
    dtype: torch.dtype,
    both_streams: bool,
    rewrites: bool,
    groups: int = 0,
    outputs: bool = False,
) -> dict[str, int]:
    """Bytes of one block at a time, without hidden states and the program; arguments as above."""
    widest = largest = 0  # columns or rows; weights of one linear
    blocks: dict[int, int] = {}
    curvature: dict[int, int] = {}  # numbers in the G of the linears of a block
    channels: dict[int, int] = {}  # of a block: inputs and outputs of its linears, without experts
    inputs: dict[tuple[int, str], dict[str, int]] = {}  # of every child (attention, MLP): distinct input → its width
    weighed: dict[tuple[int, str], int] = {}  # numbers in the H of groups of rows
    for linear in architecture.linears.values():
        if linear.block is None:
            continue
        (rows, columns), size = linear.shape, linear.shape[0] * linear.shape[1]
        widest, largest = max(widest, rows, columns), max(largest, size)
        blocks[linear.block] = blocks.get(linear.block, 0) + size
        if linear.reads is not None:
            child = linear.name.removeprefix(f"{architecture.blocks[linear.block]}.").partition(".")[0]
            inputs.setdefault((linear.block, child), {})[linear.reads] = columns
            if linear.expert is None:
                key = (linear.block, child)
                weighed[key] = weighed.get(key, 0) + columns * columns * min(groups, rows)
        if linear.expert is None:
            pairs = sum((part.stop - part.start) ** 2 for part in parts_of(rows))
            curvature[linear.block] = curvature.get(linear.block, 0) + pairs
            channels[linear.block] = channels.get(linear.block, 0) + rows + columns
    weights, squares, factored = max(blocks.values(), default=0), 0, 0
    known = {"curvature of outputs": 4 * (max(curvature.values(), default=0) + 3 * LARGEST_PART**2)} if outputs else {}
    for child, widths in inputs.items():
        plain = sum(width * width for width in widths.values()) * (2 if both_streams else 1)
        squares = max(squares, plain + weighed.get(child, 0))
        factored = max(factored, *widths.values())
    return {
        "the weights of a block": weights * dtype.itemsize * (2 if both_streams else 1),
        "statistics of inputs": 4 * (squares + 3 * factored * factored),
        "rounding": 4 * (_COPIES_OF_A_LINEAR * largest + (2 * weights if rewrites else 0)),
        "a batch of activations": 4 * BATCH_TOKENS * max(
            _BATCHES * widest, _GRADIENTS * max(channels.values(), default=0) if groups else 0
        ),
    } | known  # fmt: skip
