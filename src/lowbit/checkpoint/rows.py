"""What every reader says and checks the same way: a row range, an unknown tensor, a JSON file."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from lowbit.checkpoint.base import TensorInfo

MAX_JSON_BYTES = 100_000_000


def find_tensor(tensors: dict[str, TensorInfo], name: str, source: str) -> TensorInfo:
    """The tensor called `name`; CheckpointError names the nearest ones."""
    info = tensors.get(name)
    if info is not None:
        return info
    near = difflib.get_close_matches(name, tensors, n=3)
    raise CheckpointError(
        f"{source}: there is no tensor {name!r}", f"the nearest are {', '.join(near)}" if near else ""
    )


def row_range(info: TensorInfo, start: int, stop: int | None) -> tuple[int, int, tuple[int, ...]]:
    """(start, stop, shape) of rows start..stop, an index of dimension 0. A 0-d tensor is one row."""
    rows = info.shape[0] if info.shape else 1
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"rows {start}..{stop} of {info.name}, which has {rows}")
    return start, stop, (stop - start, *info.shape[1:]) if info.shape else ()


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, found a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder}: there is no config.json", "copy config.json and the tokenizer files of the model beside it"
        )
    return read_json_object(path)


def row_slabs(shape: tuple[int, ...], weights: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of about so many weights each, beginning at multiples of `multiple`; a scalar is one row."""
    rows = shape[0] if shape else 1
    step = max(1, weights // max(1, math.prod(shape[1:])) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
