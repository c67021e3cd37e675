"""Size and origin of a checkpoint: file bytes, bits per weight, the source that its report names.

    bits per weight = 8 · stored bytes of the decoder's linear weights, scales and zero points included / their weights

from lowbit-report.json beside the weights if there is one, else from the tensors' stored bytes.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowbit.architecture import describe_checkpoint
from lowbit.checkpoint.base import read_json_object, report_path
from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from lowbit.checkpoint.base import Checkpoint


def read_report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The report beside the weights, as plain JSON; None if there is none."""
    path = report_path(Path(checkpoint.source) if checkpoint.kind == "gguf" else checkpoint.folder)
    return read_json_object(path) if path.exists() else None


def reported_source(report: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """(source of the checkpoint, adapter that was merged into it), from its report; None for what it does not name."""
    source = (report or {}).get("source")
    named = (source.get(key) if isinstance(source, dict) else None for key in ("model", "adapter"))
    model, adapter = (each if isinstance(each, str) else None for each in named)
    return model, adapter


def bits_per_weight(
    checkpoint: Checkpoint, report: dict[str, Any] | None, trust_remote_code: bool = False
) -> tuple[float, Literal["report", "tensors"]]:
    """(bits per weight of the decoder's linears, where the figure comes from)."""
    totals = (report or {}).get("totals")
    reported = totals.get("decoder_bits_per_weight") if isinstance(totals, dict) else None
    if isinstance(reported, int | float):
        return float(reported), "report"
    architecture, checkpoint = describe_checkpoint(checkpoint, trust_remote_code)
    tensors = checkpoint.tensors
    decoder = [f"{linear.name}.weight" for linear in architecture.linears.values() if linear.block is not None]
    stored = [tensors[name] for name in decoder if name in tensors]
    weights = sum(math.prod(info.shape) for info in stored)
    if not weights:
        raise CheckpointError(f"{checkpoint.source}: the decoder of {architecture.class_name} has no linear layers")
    return 8 * sum(info.nbytes for info in stored) / weights, "tensors"


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over names and shapes of all tensors and the first row of 32 of them, evenly spaced, in float32.

    Tells models apart, fine-tunes of one another included, without reading them whole.
    """
    names = sorted(checkpoint.tensors)
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {list(checkpoint.tensors[name].shape)}\n".encode())
    for name in names[:: max(1, len(names) // 32)]:
        if checkpoint.tensors[name].shape:
            rows = checkpoint.read(name, 0, 1).float().contiguous()
            digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def state_of_files(checkpoint: Checkpoint) -> str:
    """Of the files that answers depend on: name, size and time of each, the tokenizer's and the templates' too.

    For what is kept of a run that was stopped: a file that was written anew since makes another model.
    """
    weights = {info.file for info in checkpoint.tensors.values()}
    beside = {path for path in checkpoint.folder.glob("*") if path.suffix in (".json", ".jinja", ".model", ".txt")}
    found = []
    for path in sorted(weights | (set() if checkpoint.kind == "gguf" else beside)):
        state = path.stat()
        if not path.name.startswith("lowbit-report"):
            found.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode("utf-8", "surrogateescape")).hexdigest()


def file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that hold the tensors."""
    return sum(path.stat().st_size for path in {info.file for info in checkpoint.tensors.values()})


def device_peak_bytes(device: str) -> int:
    """Peak of torch's memory on a CUDA device; 0 on the CPU, which counts in the process."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0
