"""A model of the Hugging Face Hub without its weights: config, tokenizer, and the headers of its files by HTTP ranges.

    list files → download config and tokenizer → of every weight file: header → a copy with a hole in place of weights

The header readers run on a `RangedFile`, which fetches what they look at, so that a header is checked by the very rules
that hold for files on the disk before anything of it is believed. A few tensors of some bytes say what shape or type
others have (quant_state of bitsandbytes, weight_shape of compressed-tensors, rope factors of a GGUF); those are fetched
too, and no others.

Refused: a server that does not answer ranges, an answer that is not what was asked for, a header above
MAX_HEADER_BYTES, repositories with pickles only (which have no header), and more files than MAX_FILES.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.header_copies import copy_side_files, folder_for_copies, header_copy
from lowbit.checkpoint.hub import choose_files, download_files, list_files, split_id
from lowbit.errors import CheckpointError, UnsafeError

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
    """A file behind HTTP of which what is looked at is fetched, in growing runs from its beginning.

    path  what errors name: org/name/model.safetensors
    Has of `MappedFile` what header readers use: path, size, view.
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

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start..stop of anywhere, once."""
        return self._get(start, stop) if start < stop else b""

    def _grow(self, wanted: int) -> None:
        if wanted > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: its header goes beyond {MAX_HEADER_BYTES} bytes",
                "download the model and look at the file",
            )
        self._head += self._get(len(self._head), wanted)

    def _get(self, start: int, stop: int) -> bytes:
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
    """(a folder, or a GGUF file, that opens like the model and has no weights; bytes that were fetched for headers).

    None where the Hub cannot be reached; the folder is gone afterwards. Raises CheckpointError and UnsafeError as the
    module says.
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
    """Make the copy of one file; bytes that were fetched."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo, name, revision=options.revision)
    file = RangedFile(url, Path(repo) / name, build_hf_headers())
    head, tensors = _read(file)
    needed = {
        start: file.read_range(start, stop)
        for tensor, start, stop in tensors
        if _NEEDED.search(tensor) and stop - start <= _NEEDED_BYTES
    }
    header_copy(folder / Path(name).name, head, file.size, needed)
    return file.fetched


def _read(file: RangedFile) -> tuple[bytes, list[tuple[str, int, int]]]:
    """(the bytes of the header, (name, start, stop) of every tensor), by the readers of files on the disk."""
    opened: Any = file  # they use path, size and view of a `MappedFile`
    if file.path.suffix == ".gguf":
        from lowbit.checkpoint.gguf_header import read_header as read_gguf

        header = read_gguf(opened)
        return bytes(file.view(0, header.data_start)), [(t.name, t.start, t.stop) for t in header.tensors]
    from lowbit.checkpoint.safetensors_header import read_header

    entries, _ = read_header(opened)
    end = 8 + int.from_bytes(file.view(0, 8), "little")
    return bytes(file.view(0, end)), [(entry.name, entry.start, entry.stop) for entry in entries]
