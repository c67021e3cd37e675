"""`Checkpoint`: named tensors on disk, lazily.

Opening reads headers only: every name, shape and dtype is known, no weight is. `read` returns rows of one tensor;
`release` tells the operating system that its pages may go, so that walking through a model of any size keeps the
resident memory of one slab.

Below are the checks that all readers share: row ranges, unknown tensors, JSON files, and models with their own Python
code (reading tensors never runs it; building the model would).
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lowbit.errors import CheckpointError, UnsafeError
from lowbit.files.regular import kind_of, read_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowbit.checkpoint.kv_cache import StoredKVCache
    from lowbit.numerics.column_scales import InputBasis
    from lowbit.schemes import Scheme
    from lowbit.tensors import QuantizedTensor

# The report beside the weights; `--overwrite` takes it as the mark of lowbit's own outputs.
REPORT_NAME = "lowbit-report.json"
HTML_NAME = "report.html"

# `Checkpoint.kind` of a model in memory, which has no files of weights.
IN_MEMORY = "memory"

_PART = re.compile(r"-\d{5}-of-\d{5}$")
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_name(path: Path) -> str:
    """The common name of the parts of a split GGUF; the file name of others."""
    match = SPLIT.fullmatch(path.name)
    return path.name if match is None else f"{match['stem']} of {match['count']}"


def is_gguf(path: Path) -> bool:
    """True for a GGUF file, by its name or by its first bytes: ollama's files are called sha256-…"""
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def first_part(path: Path) -> Path:
    """The path, or, where there is no such file, the first part of the split GGUF of that name (x-00001-of-….gguf for
    x.gguf), or another part of it where that is what there is."""
    if path.suffix != ".gguf" or path.exists() or not path.parent.is_dir():
        return path
    split = SPLIT.fullmatch(path.name)
    stem = path.stem if split is None else split["stem"]
    parts = [other for other in path.parent.iterdir()
             if (found := SPLIT.fullmatch(other.name)) and found["stem"] == stem
             and (split is None or found["count"] == split["count"])]  # fmt: skip
    return min(parts, default=path)


def report_path(output: Path, name: str = REPORT_NAME) -> Path:
    """Path of an output's report (or page, `HTML_NAME`): in the folder, or x.lowbit-report.json beside x.gguf."""
    if output.suffix != ".gguf" and not output.is_file():
        return output / name
    return output.with_name(f"{_PART.sub('', output.stem)}.{name}")


def cache_root() -> Path:
    """The cache folder: $LOWBIT_CACHE, else lowbit in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("LOWBIT_CACHE"):
        return Path(os.environ["LOWBIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, by the header.

    name    Hugging Face's, whatever the name in the file
    shape   in torch's order: [N, K] for a linear
    dtype   of the tensors that `read` returns; float32 for ggml types, which are decoded
    stored  the file's name of the stored type: "BF16", "Q4_1"
    nbytes  in the file
    file    the file that holds it; of a model in memory a name for messages, and no file
    written dtype of an output's copy, where that is not `dtype`: of sums with an adapter, read in float32
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str
    nbytes: int
    file: Path
    written: torch.dtype | None = None


class Checkpoint(ABC):
    """An open model: tensors, and a Hugging Face folder with its config and tokenizer.

    `read` and `release` may be called from several threads at once. What concerns quantized linears has an answer for
    models without any: there are no schemes, no scales and no rotations.

    source     what the user typed
    kind       "safetensors", "gguf", "pickle", "memory", or the quant_method of a quantized folder, which is decoded
    tensors    in file order
    metadata   GGUF key-values, or the safetensors __metadata__
    notes      for the user: "tensors are stored as Q4_1 …"
    hub_names  False for a GGUF file under its own names
    schemes    weight name → scheme, of the weights that `read` decodes, [N, K], from codes in the files
    rotations  weight name → rotation (or scales) of its input at run time, of those that have one. `read` takes it back
               out of the weight, so that the model computes the same without it; `read_quantized` gives the codes as
               they are
    kv_cache   scales of a quantized KV cache, which are not in `tensors`
    int8_threshold  |x| from which LLM.int8() multiplies a column of inputs in 16 bits
    """

    source: str
    kind: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any]
    notes: list[str]
    hub_names: bool = True
    schemes: Mapping[str, Scheme] = MappingProxyType({})
    rotations: Mapping[str, InputBasis] = MappingProxyType({})
    kv_cache: StoredKVCache | None = None
    int8_threshold: float | None = None
    folder: Path  # of config.json, tokenizer files and so on; for GGUF a rebuilt one without weights

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json, parsed."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a tensor, on the CPU, C-contiguous. May alias the mapped file: never write into it."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory. Slices returned by `read` stay valid (they fault back in)."""

    @abstractmethod
    def close(self) -> None: ...

    @property
    def files(self) -> Any:
        """The checkpoint of the files as they are, below all views: `SafetensorsCheckpoint`, `GGUFCheckpoint`, …"""
        return self

    @property
    def input_scales(self) -> dict[str, float]:
        """Weight name → static activation scale (multiplier), for schemes that store one."""
        return {}

    @property
    def input_zero_points(self) -> dict[str, int]:
        """Weight name → zero point of its input, a signed code, for static schemes that store one."""
        return {}

    def read_quantized(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        """Codes and scales of rows start..stop of one of `schemes`, rotated as stored; start divides by
        `row_multiple`. KeyError for other tensors."""
        raise KeyError(f"{self.source} has no codes of {name}")

    def row_multiple(self, name: str) -> int:
        """Slabs of a tensor begin at multiples of this many rows."""
        return 1

    def scale_dtype(self, name: str) -> torch.dtype:
        """The float dtype of the stored scales of one of `schemes`. KeyError for other tensors."""
        raise KeyError(f"{self.source} has no scales of {name}")

    def says_quantized(self, linear: str) -> bool:
        """True if config.json quantizes a linear, whatever the files hold."""
        return False


class CheckpointView(Checkpoint):
    """Another checkpoint, shown in another way: what a subclass does not override is the other's.

    stored  the other one
    """

    def __init__(self, stored: Checkpoint):
        self.stored = stored
        self.source, self.kind, self.metadata, self.notes = stored.source, stored.kind, stored.metadata, stored.notes
        self.tensors, self.hub_names = stored.tensors, stored.hub_names
        self.schemes, self.rotations = stored.schemes, stored.rotations
        self.kv_cache, self.int8_threshold = stored.kv_cache, stored.int8_threshold

    def _stored_name(self, name: str) -> str:
        """What `stored` calls a tensor that is a whole one of it."""
        return name

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def files(self) -> Any:
        return self.stored.files

    @property
    def input_scales(self) -> dict[str, float]:
        return self.stored.input_scales

    @property
    def input_zero_points(self) -> dict[str, int]:
        return self.stored.input_zero_points

    def config(self) -> dict[str, Any]:
        return self.stored.config()

    def release(self, name: str) -> None:
        self.stored.release(self._stored_name(name))

    def close(self) -> None:
        self.stored.close()

    def read_quantized(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        return self.stored.read_quantized(self._stored_name(name), start, stop)

    def row_multiple(self, name: str) -> int:
        return self.stored.row_multiple(self._stored_name(name))

    def scale_dtype(self, name: str) -> torch.dtype:
        return self.stored.scale_dtype(self._stored_name(name))

    def says_quantized(self, linear: str) -> bool:
        return self.stored.says_quantized(linear)


@dataclass(frozen=True)
class OpenOptions:
    """How a source is opened, and how far the user trusts it.

    allow_pickle       read .bin / .pt files, which can run code
    trust_remote_code  let transformers import modelling code of the model
    revision           of a hub id
    adapter            a LoRA adapter that is merged into the weights as they are read: folder or hub id
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    adapter: str | None = None


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


_JSON_NAMES: dict[type, str] = {type(None): "null", bool: "true or false", str: "a string", list: "a list"}


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path} is {kind_of(path.stat().st_mode)}, and a file is needed")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read")
        value = json.loads(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, found {_JSON_NAMES.get(type(value), 'a number')}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder}: there is no config.json", "copy config.json and the tokenizer files of the model beside it"
        )
    config = read_json_object(path)
    refuse_half_pairs(path, config)
    return config


def refuse_half_pairs(path: Path, document: Any, what: str = "a text") -> None:
    """CheckpointError where a text of a JSON document has half of a surrogate pair, which JSON can spell and UTF-8
    cannot."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: half of a surrogate pair stands in {what}, which no file can hold", "download the file again"
        ) from error


def row_slabs(shape: tuple[int, ...], weights: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of about `weights` weights, beginning at multiples of `multiple`; a scalar is one row."""
    rows = shape[0] if shape else 1
    step = max(1, weights // max(1, math.prod(shape[1:])) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


# Model types of files whose config.json names code of its own (`auto_map`) → the model type of transformers that has
# the same parameters and computes the same.
_OWN_CODE_OF = {"kimi_k2": "deepseek_v3", "kimi_k25": "kimi_k25", "kimi_linear": "kimi_linear"}


def as_transformers_has_it(config: dict[str, Any]) -> dict[str, Any]:
    """config.json for transformers' own classes, where the model comes with code for what transformers has too."""
    known = _OWN_CODE_OF.get(str(config.get("model_type")))
    if known is None:
        return config
    parts = {key: as_transformers_has_it(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in parts.items() if key != "auto_map"} | {"model_type": known}


def transformers_config(config: dict[str, Any]) -> Any:
    """config.json as an object of transformers' class, of what `as_transformers_has_it` gives. Its validators can raise
    anything; it warns of spellings that it will drop, of which the user need not know."""
    from transformers import AutoConfig, PretrainedConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # infinity is written {"__float__": "Infinity"}
        return AutoConfig.for_model(**PretrainedConfig._decode_special_floats(config))


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json states of the text model of a model of several parts; empty without one."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def requires_remote_code(config: dict[str, Any]) -> bool:
    """True if config.json names modelling code of the checkpoint (`auto_map`), at any depth, and it is needed."""
    config = as_transformers_has_it(config)
    if config.get("auto_map"):
        return True
    return any(requires_remote_code(value) for value in config.values() if isinstance(value, dict))


def refuse_remote_code(config: dict[str, Any], source: str, options: OpenOptions) -> None:
    """UnsafeError where building the model would run its own code without the user's permission."""
    if requires_remote_code(config) and not options.trust_remote_code:
        raise UnsafeError(
            f"{source}: config.json asks to run Python code that comes with the model (auto_map)",
            "read that code, then pass --trust-remote-code",
        )
