"""Training with quantized weights, in any loop, and the codes of the trained forward pass in a file.

lowbit.train.prepare(model, scheme="W4A16")     fake quantization on the linears; scales are learned
(any trainer)                                   a plain loop, transformers' Trainer
lowbit.train.export(model, "out", tokenizer=…)  the very codes and scales of the last forward pass, verified
lowbit.train.remove(model)                      a plain model again, with the decoded weights
lowbit.train.compress_gradients(ddp, bits=4)    gradients between processes in few bits, with error feedback

lowbit.train.Course, LoRA, Adapted              how `lowbit.finetune` trains, which adapters, and what comes of these
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Adapted": "lora_training", "Course": "options", "FakeQuantize": "fake_quantize", "LoRA": "options",
    "compress_gradients": "gradients", "export": "exporting", "prepare": "preparing", "remove": "preparing",
}  # fmt: skip

__all__ = [*_NAMES]

if TYPE_CHECKING:
    from lowbit.train.exporting import export as export
    from lowbit.train.fake_quantize import FakeQuantize as FakeQuantize
    from lowbit.train.gradients import compress_gradients as compress_gradients
    from lowbit.train.lora_training import Adapted as Adapted
    from lowbit.train.options import Course as Course
    from lowbit.train.options import LoRA as LoRA
    from lowbit.train.preparing import prepare as prepare
    from lowbit.train.preparing import remove as remove


def __getattr__(name: str) -> Any:
    """Loaded when it is first used: the options of a training are read without torch."""
    if name not in _NAMES:
        raise AttributeError(f"module 'lowbit.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lowbit.train.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
