"""Bytes on disk → lazy named tensors: safetensors, GGUF and, when asked for, pickles.

    open_checkpoint("org/name" | folder | file.gguf | "demo:smollm2") -> Checkpoint

Importing this package does not import torch; opening does.
"""

from lowbit.checkpoint.base import Checkpoint, OpenOptions, TensorInfo, refuse_remote_code, requires_remote_code
from lowbit.checkpoint.opening import open_checkpoint, open_gguf, open_safetensors

__all__ = [
    "Checkpoint",
    "OpenOptions",
    "TensorInfo",
    "open_checkpoint",
    "open_gguf",
    "open_safetensors",
    "refuse_remote_code",
    "requires_remote_code",
]
