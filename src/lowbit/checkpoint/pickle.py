"""PyTorch's pickled checkpoints (`pytorch_model.bin`, `*.bin`, `*.pt`, `*.pth`): only when the user allows it.

A pickle is a program. `torch.load(weights_only=True)` runs the part of it that rebuilds tensors and refuses the rest,
which is the best that can be done short of converting the file, and the reason for the flag. Files are mapped, not
read.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.base import OpenOptions, TensorInfo, find_tensor, row_range
from lowbit.checkpoint.stated import StatedConfig
from lowbit.errors import CheckpointError, UnsafeError

PATTERNS = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
# Written beside a model by training, never part of it.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "rng_state.pth")


class PickleCheckpoint(StatedConfig):
    """The `Checkpoint` of a folder of pickles."""

    kind = "pickle"

    def __init__(self, folder: Path, source: str | None = None):
        self.folder = folder
        self.source = str(folder) if source is None else source
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        self.notes = ["read from pickles, at the user's request; only tensors were rebuilt from them"]
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        for path in pickle_files(folder):
            for name, tensor in self._load(path).items():
                if name in self.tensors:
                    raise CheckpointError(f"{path}: tensor {name!r} is also in {self.tensors[name].file.name}")
                self.tensors[name] = TensorInfo(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    stored=str(tensor.dtype).removeprefix("torch."),
                    nbytes=tensor.nbytes,
                    file=path,
                )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop, aliasing the mapped file."""
        info = find_tensor(self.tensors, name, self.source)
        start, stop, shape = row_range(info, start, stop)
        tensor = self._load(info.file)[name]
        return tensor[start:stop].contiguous() if shape else tensor

    def release(self, name: str) -> None:
        """Unmap the tensor's file, as soon as nothing read from it is in use; the next `read` maps it again."""
        self._loaded.pop(find_tensor(self.tensors, name, self.source).file, None)

    def close(self) -> None:
        self._loaded.clear()

    def _load(self, path: Path) -> dict[str, Tensor]:
        tensors = self._loaded.get(path)  # a name of our own: another thread may release the file meanwhile
        if tensors is None:
            tensors = self._loaded[path] = _load_tensors(path)
        return tensors


def pickle_files(folder: Path) -> list[Path]:
    """The pickles that hold the model's weights; pytorch_model*.bin where there are any."""
    for pattern in PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if path.name not in _NOT_WEIGHTS)
        if found:
            return found
    return []


def open_pickle(folder: str | Path, options: OpenOptions, source: str | None = None) -> PickleCheckpoint:
    """Open a folder that holds weights as pickles only; UnsafeError unless the user allowed that."""
    folder = Path(folder)
    if not options.allow_pickle:
        raise UnsafeError(
            f"{source or folder}: the weights are pickles ({pickle_files(folder)[0].name}), which can run code",
            "use a safetensors version of the model, or pass --allow-pickle if you trust where it comes from",
        )
    return PickleCheckpoint(folder, source)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of one file, mapped."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UnsafeError(
            f"{path}: holds more than tensors ({reason})", "convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # what a damaged pickle raises is unlimited
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file ({error})", "convert it to safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: a dictionary of tensors is needed", "save the state_dict of the model alone")
    return loaded
