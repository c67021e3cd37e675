"""Memory of a distillation, known before it begins.

    embeddings and heads   everything outside the blocks, of the unquantized and of the quantized model
    a block                its weights and gradients in the compute dtype, the codes, and a linear while it is decoded
    what is learned        change, best change, gradient and Adam's two means of every parameter, float32
    inputs of blocks       hidden states before every block, for the windows of one step
    activations            of one block for a batch of windows, with what its gradient needs
    logits                 some arrays of a slice of positions

Hidden states of all windows, two arrays, get a part of the rest, and go to a file above it. If the rest also holds all
blocks with their gradients and codes, they stay loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.architecture.structure import Architecture
from lowbit.calibrate.blocks import BATCH_TOKENS
from lowbit.calibrate.memory import memory_limit
from lowbit.distillation.descent import Split, windows_per_step
from lowbit.distillation.divergence import LOGIT_BYTES
from lowbit.measure import resident_memory, too_little_memory
from lowbit.numerics.precision import compute_dtype
from lowbit.rounding.learnable import count_parameters
from lowbit.rounding.target import Target
from lowbit.settings import Settings

_COPIES_OF_A_PARAMETER = 5
_COPIES_OF_A_LINEAR = 6  # float32, while it is decoded and its gradient taken
_ARRAYS_OF_LOGITS = 5
_ACTIVATIONS = 24  # arrays of a batch as wide as the widest linear, kept for a block's gradient


@dataclass(frozen=True)
class MemoryShare:
    """states: bytes that one array of hidden states may take; resident, graphs: as of `Student`"""

    states: int
    resident: bool
    graphs: bool


@dataclass(frozen=True)
class DistillMemory:
    """
    needed    part → bytes, without the program and the hidden states of all windows
    everything  bytes of all blocks with their gradients and codes
    graphs      bytes of what the gradients of all blocks need of a step
    """

    needed: dict[str, int]
    everything: int
    graphs: int

    def share(self, limit: int | None, what: str = "distill", instead: str = "leave +distill out") -> MemoryShare:
        """What to do under a limit of the whole process, in bytes; None: a share of the free memory. UsageError if what
        is needed exceeds it."""
        program, most = resident_memory(), memory_limit(limit)
        needed = {"the program": program, **self.needed}
        left = most - sum(needed.values())
        if left < 0:
            raise too_little_memory(what, needed, most, bool(limit), instead)
        resident = self.everything <= left // 2
        left -= self.everything if resident else 0
        graphs = resident and self.graphs <= left // 2
        return MemoryShare((left - (self.graphs if graphs else 0)) // 4, resident, graphs)


def distillation_dtype(settings: Settings) -> torch.dtype:
    """The compute dtype of both models."""
    return torch.float32 if settings.compute == "auto" else compute_dtype(settings.compute)


def distill_memory(
    architecture: Architecture, targets: dict[str, Target], dtype: torch.dtype, windows: int, tokens: int
) -> DistillMemory:
    """Of a run over so many windows of so many tokens; UsageError if those are too few."""
    Split.of(windows)
    linears, parameters = architecture.linears, architecture.parameters
    inside = {name: architecture.block_of(name) for name in parameters}
    outside = sum(math.prod(shape) for name, shape in parameters.items() if inside[name] is None)
    blocks: dict[int, int] = {}
    for name, block in inside.items():
        if block is not None:
            blocks[block] = blocks.get(block, 0) + math.prod(parameters[name])
    sizes = [math.prod(linears[name].shape) for name in targets] or [0]
    widest = max((max(linears[name].shape) for name in targets), default=0)
    hidden = max((shape[-1] for name, shape in parameters.items() if architecture.roles.get(name) == "embedding"),
                 default=widest)  # fmt: skip
    learned = sum(count_parameters(target, linears[name].shape) for name, target in targets.items())
    learned += sum(math.prod(shape) for shape in parameters.values() if len(shape) == 1)
    at_once = windows_per_step(windows, tokens) * tokens
    most, whole = max(blocks.values(), default=0), sum(blocks.values())
    return DistillMemory(
        {
            "embeddings and heads": 2 * outside * dtype.itemsize,
            "a block with its gradients": most * (2 * dtype.itemsize + 1) + _COPIES_OF_A_LINEAR * 4 * max(sizes),
            "what is learned": _COPIES_OF_A_PARAMETER * 4 * learned,
            "inputs of blocks": (len(architecture.blocks) + 3) * at_once * hidden * dtype.itemsize,
            "activations": _ACTIVATIONS * min(at_once, max(BATCH_TOKENS, tokens)) * widest * dtype.itemsize,
            "logits": _ARRAYS_OF_LOGITS * LOGIT_BYTES,
        },
        everything=whole * (2 * dtype.itemsize + 1),
        graphs=_ACTIVATIONS * at_once * widest * dtype.itemsize * len(architecture.blocks),
    )
