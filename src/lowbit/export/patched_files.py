"""Files of a finished model, copied, with some tensors replaced in place."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import OutputError
from lowbit.export import Piece
from lowbit.export.atomic import write_all
from lowbit.files.hashes import file_digests


@dataclass(frozen=True)
class BytesPlace:
    """The bytes of a stored tensor: the file, the position of the first, shape and dtype."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


class PatchedFiles:
    """Copies of files; what is not written keeps its bytes.

    copies   file of the source → its copy, which must not exist
    places   stored name → its bytes in a copy
    changed  names of the tensors in which a byte changed
    digests  after `close`: file name → SHA-256 of each MiB
    """

    def __init__(self, copies: dict[Path, Path], places: dict[str, BytesPlace]):
        self._places, self.files = places, list(copies.values())
        self.digests: dict[str, bytes] = {}
        self.changed: set[str] = set()
        for source, copy in copies.items():
            shutil.copyfile(source, copy)
            os.chmod(copy, 0o644)

    def write(self, piece: Piece) -> None:
        """Put values in their place; OutputError where they do not fit it. Not for several threads."""
        place, values = self._places.get(piece.name), piece.values
        if place is None or place.dtype != values.dtype:
            raise _mismatch(piece, "nothing of that name" if place is None else f"{place.dtype}")
        first = piece.index[0] if piece.index else piece.row
        if not isinstance(first, int) or (piece.index and len(piece.index) != 1):
            raise _mismatch(piece, f"no place {piece.index}")
        rows = 1 if piece.index else values.shape[0]
        if not 0 <= first <= first + rows <= place.shape[0]:
            raise _mismatch(piece, f"{list(place.shape)}")
        descriptor = os.open(place.file, os.O_RDWR)
        try:
            start = place.start + first * place.row_bytes
            held = bytearray(os.pread(descriptor, rows * place.row_bytes, start))
            whole = torch.frombuffer(held, dtype=torch.uint8).clone().view(place.dtype)
            whole = whole.view(place.shape[1:] if piece.index else (rows, *place.shape[1:]))
            strip = whole[:, piece.column : piece.column + values.shape[1]] if values.dim() == 2 else whole
            if strip.shape != values.shape:
                raise _mismatch(piece, f"{list(place.shape)}")
            if not same_bytes(strip, values):
                strip.copy_(values)
                write_all(descriptor, whole.reshape(-1).view(torch.uint8).numpy().data, start)
                self.changed.add(piece.name)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Hash the files."""
        self.digests = {path.name: file_digests(path) for path in self.files}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """True for tensors of one dtype and shape that hold the same bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def _mismatch(piece: Piece, found: str) -> OutputError:
    return OutputError(
        f"{piece.name}: {piece.values.dtype} {list(piece.values.shape)} has no place in the file, which has {found}",
        "this is a bug of lowbit; please report it",
    )
