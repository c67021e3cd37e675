"""A model of the Hugging Face Hub without its weights: config, tokenizer, and the headers of its files by HTTP ranges.

    list files → download config and tokenizer → of every weight file: header → a copy with a hole in place of weights

The header readers run on a `RangedFile`, which fetches the bytes that they read, so remote headers pass the same checks
as local ones. Besides headers only small tensors that describe others are fetched (quant_state of bitsandbytes,
weight_shape of compressed-tensors, rope factors of a GGUF).

Refused: a server without range requests, a response with other bytes, a header above MAX_HEADER_BYTES, repositories
with pickles only (which have no header), and more files than MAX_FILES.

A copy has the header's bytes and the size of the original, with a hole in place of the weights, which takes no disk
space and reads as zeros. Copies serve planning only: they live in a temporary folder and are removed afterwards.

    header_copy                   a file of so many bytes that begins with a header
    safetensors_without_weights   the same, with a header made of names and shapes

Refused: a file system without holes, on which the copy would take as much room as the model.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.hub import choose_files, download_files, list_files, split_id
from lowbit.checkpoint.safetensors_header import ITEM_SIZE
from lowbit.errors import CheckpointError, LowbitError, OutputError, UnsafeError
from lowbit.registry import FORMATS, load

MAX_HEADER_BYTES = 256 << 20  # a GGUF's holds the vocabulary; safetensors' own limit is below it
MAX_FILES = 2000
_FIRST_FETCH = 64 << 10
_LARGEST_FETCH = 16 << 20
# Small tensors that headers alone do not replace, and how large each may be.
_NEEDED = re.compile(
    r"(\.quant_state\.bitsandbytes__\w+|\.(nested_)?quant_map|\.weight_format|\.weight_shape|"
    r"\.[kv](_proj)?(\.[kv])?_scale|(^|\.)rope_\w+\.weight)$"
)
_NEEDED_BYTES = 1 << 16
_CONTENT_RANGE = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<size>\d+)")


@dataclass
class RangedFile:
    """A remote file, fetched in growing runs from its beginning; header readers use it like a `MappedFile`.

    path  for error messages: org/name/model.safetensors
    """

    url: str
    path: Path
    headers: dict[str, str]
    size: int = -1
    fetched: int = 0  # bytes over the wire
    _head: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self._grow(_FIRST_FETCH)

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes start..stop, of the beginning of the file."""
        if stop > len(self._head):
            step = min(max(len(self._head), _FIRST_FETCH), _LARGEST_FETCH)
            self._grow(min(max(stop, len(self._head) + step), self.size))
        return memoryview(bytes(self._head[start:stop]))

    def _grow(self, wanted: int) -> None:
        if wanted > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: its header goes beyond {MAX_HEADER_BYTES} bytes",
                "download the model and look at the file",
            )
        self._head += self.fetch(len(self._head), wanted)

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes start..stop; fewer where the file ends before. CheckpointError for any other answer."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        asked = {**self.headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        try:
            with get_session().stream("GET", self.url, headers=asked, follow_redirects=True) as response:
                if response.status_code == 416:
                    return b""
                hf_raise_for_status(response)
                match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if response.status_code != 206 or match is None or int(match["first"]) != start:
                    raise CheckpointError(
                        f"{self.path}: the server does not answer ranges (status {response.status_code}, "
                        f"{response.headers.get('Content-Range', 'no Content-Range')!r})",
                        "download the model and give its folder",
                    )
                self.size = int(match["size"])
                expected = min(stop, self.size) - start
                for chunk in response.iter_bytes():
                    data += chunk
                    self.fetched += len(chunk)
                    if len(data) > expected:
                        break
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: bytes {start} to {stop} cannot be fetched ({type(error).__name__}: {error})",
                "try again; `hf auth login` if the repository is private",
            ) from error
        if len(data) != expected:
            raise CheckpointError(f"{self.path}: {len(data)} bytes came where {expected} were asked for", "try again")
        return bytes(data)


@contextmanager
def remote_headers(model: str, options: OpenOptions) -> Iterator[tuple[Path, int] | None]:
    """(a folder or GGUF file that opens like the model, without weights; bytes fetched for headers).

    None where the Hub cannot be reached; the folder is removed afterwards. Raises CheckpointError and UnsafeError as in
    the module docstring.
    """
    repo, file = split_id(model)
    files = list_files(repo, options)
    if files is None:
        yield None
        return
    chosen = choose_files(repo, files, file, options)
    weights = [name for name in chosen if name.endswith((".safetensors", ".gguf"))]
    if not weights:
        raise UnsafeError(
            f"{repo}: the weights are pickles, which have no header to read", "download it and give the folder"
        )
    if len(weights) > MAX_FILES:
        raise CheckpointError(f"{repo}: {len(weights)} weight files; at most {MAX_FILES} are looked at")
    with folder_for_copies(repo) as folder:
        side = [name for name in chosen if name not in weights]
        if side:
            copy_side_files(download_files(repo, options, side), folder)
        fetched = sum(_copy_header(repo, name, options, folder) for name in weights)
        gguf = sorted(name for name in weights if name.endswith(".gguf"))
        yield (folder / Path(gguf[0]).name if gguf else folder), fetched


def _copy_header(repo: str, name: str, options: OpenOptions, folder: Path) -> int:
    """Copy the header of one file; return the number of bytes fetched."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo, name, revision=options.revision)
    file = RangedFile(url, Path(repo) / name, build_hf_headers())
    head, tensors = _read(file)
    needed = {
        start: file.fetch(start, stop) if start < stop else b""
        for tensor, start, stop in tensors
        if _NEEDED.search(tensor) and stop - start <= _NEEDED_BYTES
    }
    header_copy(folder / Path(name).name, head, file.size, needed)
    return file.fetched


def _read(file: RangedFile) -> tuple[bytes, list[tuple[str, int, int]]]:
    """(the bytes of the header, (name, start, stop) of every tensor), by the readers of files on the disk."""
    opened: Any = file  # they use path, size and view of a `MappedFile`
    for row in FORMATS.values():
        if row.header is None or file.path.suffix != row.suffix:
            continue
        header = load(row.header)(opened)
        return bytes(file.view(0, header.data_start)), [(t.name, t.start, t.stop) for t in header.tensors]
    from lowbit.checkpoint.safetensors_header import read_header

    entries, _ = read_header(opened)
    end = 8 + int.from_bytes(file.view(0, 8), "little")
    return bytes(file.view(0, end)), [(entry.name, entry.start, entry.stop) for entry in entries]


# A file of so many bytes is written to learn whether holes take room.
_PROBE = 64 << 20
_SIDE_FILES = ("*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")


@contextmanager
def folder_for_copies(name: str) -> Iterator[Path]:
    """A temporary folder called `name` (which may be org/name); errors raised inside name files relative to its parent.

    Raises OutputError where holes take disk space.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-headers-") as made:
        folder = Path(made) / name
        folder.mkdir(parents=True, exist_ok=True)
        require_holes(folder)
        try:
            yield folder
        except LowbitError as error:
            error.args = tuple(str(arg).replace(f"{made}{os.sep}", "") for arg in error.args)
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


def safetensors_without_weights(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], described: Mapping[str, bytes] | None = None
) -> None:
    """A safetensors file that is all header. tensors: name → (dtype as the format spells it, shape); described: name →
    bytes that are there all the same."""
    import json

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = ITEM_SIZE[dtype]
        for length in shape:
            nbytes *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    pieces = {start + header[name]["data_offsets"][0]: data for name, data in (described or {}).items()}
    header_copy(path, len(text).to_bytes(8, "little") + text, start + position, pieces)
