"""Copies of model files that have the header and no weights, so that everything that plans from headers works on them.

A copy has the header's bytes and the size of the original; what lies between is a hole, which takes no room on the disk
and reads as zeros. So nothing may quantize such a copy: it is made in a temporary folder, for planning alone, and
removed afterwards.

    header_copy                   a file of so many bytes that begins with a header
    safetensors_without_weights   the same, with a header made of names and shapes

Refused: a file system without holes, on which the copy would take as much room as the model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lowbit.checkpoint.safetensors_header import ITEM_SIZE
from lowbit.errors import LowbitError, OutputError

# A file of so many bytes is written to learn whether holes take room.
_PROBE = 64 << 20
_SIDE_FILES = ("*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")


@contextmanager
def folder_for_copies(name: str) -> Iterator[Path]:
    """A temporary folder called `name` (which may be org/name); errors raised inside name files as if it were that one.

    Raises OutputError where a hole takes room on the disk.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-headers-") as made:
        folder = Path(made) / name
        folder.mkdir(parents=True, exist_ok=True)
        require_holes(folder)
        try:
            yield folder
        except LowbitError as error:
            error.args = tuple(str(each).replace(f"{made}{os.sep}", "") for each in error.args)
            raise


def header_copy(path: Path, head: bytes, size: int, pieces: Mapping[int, bytes] | None = None) -> None:
    """Write a file of `size` bytes: `head`, then a hole. pieces: position → bytes that are there too.

    Raises OutputError where the file system has no holes, or no files of that size.
    """
    try:
        with path.open("xb") as file:
            file.write(head)
            for position, data in (pieces or {}).items():
                file.seek(position)
                file.write(data)
            file.truncate(size)
    except OSError as error:
        raise OutputError(
            f"{path}: a file of {size} bytes cannot be made ({error.strerror or error})",
            "point TMPDIR at a file system that has holes in files, such as ext4 or tmpfs",
        ) from error


def require_holes(folder: Path) -> None:
    """OutputError where a hole takes room on the disk."""
    probe = folder / ".holes"
    header_copy(probe, b"", _PROBE)
    taken = getattr(os.stat(probe), "st_blocks", _PROBE // 512) * 512
    probe.unlink()
    if taken > _PROBE // 2:
        raise OutputError(
            f"{folder}: this file system has no holes in files; planning from headers alone needs them",
            "point TMPDIR at one that has, such as ext4 or tmpfs",
        )


def copy_side_files(source: Path, target: Path) -> None:
    """Configs, tokenizer and chat templates, without weights and their index."""
    names = {path for pattern in _SIDE_FILES for path in source.glob(pattern) if path.is_file()}
    for path in sorted(names):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def safetensors_without_weights(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file that is all header. tensors: name → (dtype as the format spells it, shape)."""
    import json

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = ITEM_SIZE[dtype]
        for length in shape:
            nbytes *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header_copy(path, len(text).to_bytes(8, "little") + text, 8 + len(text) + position)
