"""What a checkpoint weighs and where it came from: file bytes, bits per weight, the source that its report names.

    bits per weight = 8 · stored bytes of the decoder's linear weights, scales and zero points included / their weights

taken from lowbit-report.json beside the weights where there is one, else computed from the tensors' stored bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lowbit.checkpoint.base import REPORT_NAME
from lowbit.checkpoint.rows import read_json_object
from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowbit.checkpoint.base import Checkpoint


def read_report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The report beside the weights, as plain JSON; None where there is none."""
    path = checkpoint.folder / REPORT_NAME
    return read_json_object(path) if path.exists() else None


def reported_source(report: dict[str, Any] | None) -> str | None:
    """What the checkpoint was made from."""
    source = (report or {}).get("source")
    model = source.get("model") if isinstance(source, dict) else None
    return model if isinstance(model, str) else None


def bits_per_weight(
    checkpoint: Checkpoint, model: PreTrainedModel, report: dict[str, Any] | None
) -> tuple[float, Literal["report", "tensors"]]:
    """(bits per weight of the decoder's linears, where the figure comes from)."""
    totals = (report or {}).get("totals")
    reported = totals.get("decoder_bits_per_weight") if isinstance(totals, dict) else None
    if isinstance(reported, int | float):
        return float(reported), "report"
    linears = set(decoder_linears(model))
    if not linears:
        raise CheckpointError(f"{checkpoint.source}: the decoder of {type(model).__name__} has no linear layers")
    stored_bytes = sum(checkpoint.tensors[f"{name}.weight"].nbytes for name in linears)
    weights = sum(torch.Size(checkpoint.tensors[f"{name}.weight"].shape).numel() for name in linears)
    return 8 * stored_bytes / weights, "tensors"


def decoder_linears(model: PreTrainedModel) -> list[str]:
    """Names of the linear modules below the head: everything of the base model."""
    prefix = f"{model.base_model_prefix}."
    return [n for n, module in model.named_modules() if n.startswith(prefix) and isinstance(module, nn.Linear)]


def file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that hold the tensors."""
    return sum(path.stat().st_size for path in {info.file for info in checkpoint.tensors.values()})


def device_peak_bytes(device: str) -> int:
    """What torch held at most on a CUDA device; 0 on the CPU, whose memory is the process's."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0
