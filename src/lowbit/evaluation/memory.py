"""Whether the models of an evaluation fit in memory whole, or are run block by block, or not at all.

    whole           every weight of every model in the compute dtype
    block by block  max(largest of: one decoder block, what surrounds the blocks; all output heads together)

each plus WORKING_BYTES and what the process holds already. Weights are counted from the headers, on models whose
parameters are on the meta device. The bound is --max-memory, or else AUTOMATIC_SHARE of what the machine has left: the
least of MemAvailable (/proc/meminfo) and of what the control groups of the process allow (memory.max − memory.current,
page cache that can go counted as free; version 1 of control groups likewise). On CUDA, where the weights lie, it is the
free memory of the device. Where nothing tells, models are held whole.

A limit that the user gave and that cannot be kept is an error; on the automatic one the run goes on, with a note.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbit.errors import UsageError
from lowbit.evaluation.forward import inner_decoder
from lowbit.measure import resident_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowbit.architecture.loading import Loader

# Activations of some windows, slabs of weights that are being decoded, slices of logits.
WORKING_BYTES = 256 * 1024 * 1024
AUTOMATIC_SHARE = 0.8
# "No limit" in version 1 of control groups is a number near 2^63.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights in the compute dtype: all, the largest part that block by block must be there at once,
    and the output head."""

    whole: int
    largest_part: int
    head: int


@dataclass(frozen=True)
class Way:
    """How the models are run.

    states_memory  bytes of hidden states of one run that stay in memory; the rest goes to a file
    """

    block_by_block: bool
    states_memory: int = 0
    notes: tuple[str, ...] = ()


def choose_way(loaders: Sequence[Loader], runs: int, max_memory: int | None) -> Way:
    """How to run these models; `runs` is how many sets of hidden states there will be (a model may run twice).

    Raises UsageError where `max_memory` cannot be kept.
    """
    device = loaders[0].device
    free = free_memory(max_memory, device)
    weights = [weigh(loader.model, loader.dtype) for loader in loaders]
    whole = sum(each.whole for each in weights)
    if free is None or whole + WORKING_BYTES <= free:
        return Way(False)
    too_much = f"{_gb(whole)} of weights do not fit in {_gb(free)}"
    unknown = [str(loader.model.config.model_type) for loader in loaders if loader.architecture is None]
    if unknown:
        why = f"model type {unknown[0]!r} is not known to lowbit and cannot be run block by block"
        if max_memory is not None:
            raise UsageError(
                f"{too_much} that --max-memory leaves, and {why}",
                f"allow {_gb(_least_limit(whole, device))}, or compute in bfloat16",
            )
        return Way(False, notes=(f"held whole although {too_much}: {why}",))
    least = max(*(each.largest_part for each in weights), sum(each.head for each in weights))
    notes = (f"run block by block: {too_much}",)
    if least + WORKING_BYTES > free:
        if max_memory is not None:
            raise UsageError(
                f"{too_much} that --max-memory leaves, nor does the least that is needed block by block: {_gb(least)} "
                f"and {_gb(WORKING_BYTES)} to work with",
                f"allow {_gb(_least_limit(least, device))}, or compute in bfloat16",
            )
        notes += (f"even block by block {_gb(least + WORKING_BYTES)} are needed; this machine may run out of memory",)
    host = free if torch.device(device).type == "cpu" else int(AUTOMATIC_SHARE * (available_memory() or free))
    return Way(True, max(0, host - least - WORKING_BYTES) // runs, notes)


def free_memory(max_memory: int | None, device: str = "cpu") -> int | None:
    """Bytes that weights may take, beside what the process holds; None where the machine does not say."""
    on_gpu = torch.device(device).type == "cuda"
    if max_memory is not None:
        return max(0, max_memory - (torch.cuda.memory_allocated(device) if on_gpu else resident_memory()))
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    return None if available is None else int(AUTOMATIC_SHARE * available)


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


def available_memory() -> int | None:
    """Bytes that this process can still take without anything being swapped out or killed; None if nothing tells."""
    found = [_meminfo_available(), _left_in_control_groups()]
    known = [count for count in found if count is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _meminfo_available(path: Path = Path("/proc/meminfo")) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_control_groups(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes left under the tightest memory limit of the process's control groups and their parents; None without one.

    A line of /proc/self/cgroup is `0::/path` (version 2) or `n:controllers:/path` (version 1).
    """
    left = []
    for line in _lines(groups):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.strip().lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                left.append(max(0, limit - max(0, used - _inactive_file(folder / "memory.stat"))))
    return min(left, default=None)


def _inactive_file(path: Path) -> int:
    """Page cache that the kernel would drop first."""
    for line in _lines(path):
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def _number(path: Path) -> int | None:
    """None for a file that is not there, and for "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _least_limit(weights: int, device: str) -> int:
    """The --max-memory under which these weights fit."""
    held = resident_memory() if torch.device(device).type == "cpu" else torch.cuda.memory_allocated(device)
    return held + weights + WORKING_BYTES


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
