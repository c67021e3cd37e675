"""Training with quantized weights, in any loop, and the codes of the trained forward pass in a file.

lowbit.train.prepare(model, scheme="W4A16")     fake quantization on the linears; scales are learned
(any trainer)                                   a plain loop, transformers' Trainer
lowbit.train.export(model, "out", tokenizer=…)  the very codes and scales of the last forward pass, verified
lowbit.train.remove(model)                      a plain model again, with the decoded weights
lowbit.train.compress_gradients(ddp, bits=4)    gradients between processes in few bits, with error feedback

lowbit.train.Course, LoRA, Adapted              how `lowbit.finetune` trains, which adapters, and what comes of these
"""

from lowbit.train.adapters import LoRA
from lowbit.train.exporting import export
from lowbit.train.fake_quantize import FakeQuantize
from lowbit.train.gradients import compress_gradients
from lowbit.train.loop import Course
from lowbit.train.lora_training import Adapted
from lowbit.train.preparing import prepare, remove

__all__ = [
    "Adapted", "Course", "FakeQuantize", "LoRA", "compress_gradients", "export", "prepare", "remove",
]  # fmt: skip
