"""Decides whether the models of an evaluation run whole or block by block.

    whole           every weight of every model in the compute dtype
    block by block  max(largest of: one decoder block, what surrounds the blocks; all output heads together)

each plus WORKING_BYTES and the process's current memory. Weights are counted on models whose parameters are on the meta
device. The limit is --max-memory, or SHARE_OF_FREE of the free memory (`measure.available_memory`), on CUDA that of
the device. If the free memory is unknown, models run whole.

A limit given by the user that cannot be kept is an error; with the automatic one the run goes on, with a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbit.architecture.head import inner_decoder
from lowbit.measure import SHARE_OF_FREE, available_memory, human_bytes, resident_memory, too_little_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowbit.architecture.loading import Loader

# Activations of some windows, slabs of weights that are being decoded, slices of logits.
WORKING_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights in the compute dtype: all, the largest part block by block, the head."""

    whole: int
    largest_part: int
    head: int


@dataclass(frozen=True)
class Way:
    """Block by block or not; states_memory: bytes of one run's hidden states in memory, the rest goes to a file."""

    block_by_block: bool
    states_memory: int = 0
    notes: tuple[str, ...] = ()


def choose_way(loaders: Sequence[Loader], runs: int, max_memory: int | None) -> Way:
    """The way to run these models; runs: sets of hidden states, one per variant. UsageError if `max_memory` cannot be
    kept."""
    device = loaders[0].device
    free = free_memory(max_memory, device)
    weights = [weigh(loader.model, loader.dtype) for loader in loaders]
    whole = sum(each.whole for each in weights)
    if free is None or whole + WORKING_BYTES <= free:
        return Way(False)
    held = resident_memory() if torch.device(device).type == "cpu" else torch.cuda.memory_allocated(device)
    program, room = {"the program": held}, {"a batch of windows": WORKING_BYTES}
    too_much = f"{human_bytes(whole)} of weights do not fit in {human_bytes(free)}"
    unknown = [str(loader.model.config.model_type) for loader in loaders if loader.architecture is None]
    if unknown:
        why = f"model type {unknown[0]!r} is not known to lowbit and cannot be run block by block"
        if max_memory is not None:
            needed = program | {"weights": whole} | room
            raise too_little_memory("the evaluation", needed, max_memory, True, "compute in bfloat16", why)
        return Way(False, notes=(f"held whole although {too_much}: {why}",))
    least = max(*(each.largest_part for each in weights), sum(each.head for each in weights))
    notes = (f"run block by block: {too_much}",)
    if least + WORKING_BYTES > free:
        if max_memory is not None:
            needed = program | {"the largest part of the weights": least} | room
            raise too_little_memory("the evaluation, block by block,", needed, max_memory, True, "compute in bfloat16")
        notes += (f"even block by block {human_bytes(least + WORKING_BYTES)} are needed; this machine may run out of "
                  "memory",)  # fmt: skip
    host = free if torch.device(device).type == "cpu" else int(SHARE_OF_FREE * (available_memory() or free))
    return Way(True, max(0, host - least - WORKING_BYTES) // runs, notes)


def free_memory(max_memory: int | None, device: str = "cpu") -> int | None:
    """Bytes available for weights; None if unknown."""
    on_gpu = torch.device(device).type == "cuda"
    if max_memory is not None:
        return max(0, max_memory - (torch.cuda.memory_allocated(device) if on_gpu else resident_memory()))
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    return None if available is None else int(SHARE_OF_FREE * available)


def weigh(model: PreTrainedModel, dtype: torch.dtype) -> Weights:
    """The weights of a model, whose parameters may be on the meta device; tied ones count once."""
    decoder = inner_decoder(model)
    blocks = [block for each in decoder.children() if isinstance(each, nn.ModuleList) for block in each]
    in_blocks = [_count(block) for block in blocks]
    outside = _count(decoder) - sum(in_blocks)
    prefix = model.base_model_prefix + "."
    head = sum(
        parameter.numel()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(prefix)
    )
    size = dtype.itemsize
    return Weights(size * _count(model), size * max(outside, *in_blocks, 0), size * head)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
