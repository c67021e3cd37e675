"""The bytes that would be written, from config and headers alone, by the very plan that the writer follows.

    folder, .gguf, demo:…        its headers
    Hugging Face id              config, tokenizer and headers, by HTTP ranges; no weights (`checkpoint/remote.py`)
    folder without weights       shapes of the model that transformers builds from config.json on the meta device
    a parsed config.json         the same, in memory; of GGUF files without the tokenizer's share of the header

So an estimate is exact wherever the source's tensors are known, headers included, and refuses what the run would
refuse: a scheme that the format cannot hold, an override that matches nothing, a model type that is not known.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowbit.architecture.cache import discover_once
from lowbit.calibrate.imatrix_file import read_imatrix
from lowbit.calibrate.importance import ImportanceEntry, ImportanceMatrix
from lowbit.checkpoint import open_checkpoint, refuse_remote_code
from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.demo import DEMO_PREFIX
from lowbit.checkpoint.header_copies import copy_side_files, folder_for_copies, safetensors_without_weights
from lowbit.checkpoint.hub import is_hub_id, local_copy
from lowbit.checkpoint.pickle import pickle_files
from lowbit.checkpoint.remote import remote_headers
from lowbit.checkpoint.rows import read_config
from lowbit.errors import ArchitectureError, FormatError, LowbitError
from lowbit.export.gguf_model import describe_gguf
from lowbit.export.gguf_tokenizer import tokenizer_key_values
from lowbit.export.kv_cache import FORMATS as WITH_CACHE_SCALES
from lowbit.gguf_pipeline import PreparedGGUF, calibrated_names, open_as_gguf
from lowbit.gguf_plan import plan_from_gguf, plan_from_model
from lowbit.pipeline import Prepared, described, prepare
from lowbit.plan import model_dtype
from lowbit.schemes import KV_CACHE_SCHEMES
from lowbit.settings import MEASURE, Settings, make_settings
from lowbit.text import read_text

_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# A vocabulary's share of a GGUF header: text, type, length and merge of a token. Llama 3: 7.8 MB for 128256.
_BYTES_PER_TOKEN = 61


@dataclass(frozen=True)
class Opened:
    """A model of which the headers are known.

    path     a folder or a .gguf file that opens like it
    name     what the user typed
    config   config.json, parsed; empty of a GGUF file that has no counterpart at Hugging Face
    metadata its key-values, of such a file
    made     True where tensors come from config.json, not from headers
    notes    how it was looked at
    """

    path: str | Path
    name: str
    config: dict[str, Any]
    made: bool = False
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def lacks_tokenizer(self) -> bool:
        """True of a parsed config.json, which comes without one."""
        return self.made and isinstance(self.path, Path) and not any(self.path.glob("token*"))

    def guessed_bytes(self, prepared: Prepared | PreparedGGUF) -> int:
        """The vocabulary's share of a GGUF header, where there is no tokenizer to take it from."""
        if isinstance(prepared, Prepared) or not self.lacks_tokenizer:
            return 0
        rows = next(tensor.rows for tensor in prepared.plan.tensors if tensor.name == "token_embd.weight")
        return rows * _BYTES_PER_TOKEN


@dataclass(frozen=True)
class WeightBytes:
    """files: bytes of the weight files; exact  False where a part of them is guessed, which `notes` explain."""

    files: int
    bits_per_weight: float
    exact: bool
    notes: tuple[str, ...] = ()


def weight_bytes(
    model: str | Path | dict[str, Any],
    scheme: str,
    format: str = "auto",
    options: OpenOptions | None = None,
    **settings: Any,
) -> WeightBytes:
    """Bytes of the files that `lowbit quantize` would write. model  anything it takes, or a parsed config.json.

    Raises what planning raises: UsageError, FormatError, ArchitectureError, CheckpointError.
    """
    made = make_settings(None, scheme=scheme, format=format, **settings)
    options = options or OpenOptions()
    with opened(model, options) as found:
        prepared, notes = plan_of(found, made, options)
        prepared.checkpoint.close()
        plan = prepared.plan
        guessed = found.guessed_bytes(prepared)
        if guessed:
            notes += (f"the vocabulary's share of the header is taken as {_BYTES_PER_TOKEN} bytes a token",)
        bits = plan.bits_per_weight(decoder_only=True)
        return WeightBytes(plan.file_bytes + guessed, bits, not (guessed or found.made), (*found.notes, *notes))


@contextmanager
def opened(model: str | Path | dict[str, Any], options: OpenOptions) -> Iterator[Opened]:
    """The model, ready to be planned; temporary files are gone afterwards."""
    if isinstance(model, dict):
        with _from_config(model, None, "config.json", options) as path:
            yield Opened(path, str(model.get("model_type", "a config")), model, True)
        return
    source, path = str(model), Path(model).expanduser()
    if source.startswith(DEMO_PREFIX) or path.exists() or isinstance(model, Path) or not is_hub_id(source):
        if path.is_dir() and _has_no_weights(path):
            config = read_config(path)
            with _from_config(config, path, source, options) as made:
                note = "the folder holds no weights: names and shapes are those of the model that transformers builds"
                yield Opened(made, source, config, True, (f"{note} from config.json, all in its dtype",))
        else:
            yield _with_config(model, source, options)
        return
    with remote_headers(source, options) as found:
        if found is None:
            note = ("the Hub cannot be reached: headers are those of the copy in the local cache",)
            yield _with_config(local_copy(source, options), source, options, note)
            return
        folder, fetched = found
        note = (f"no weights were downloaded: {fetched / 1e6:.2f} MB of headers were read",)
        yield _with_config(folder, source, options, note)


def plan_of(
    found: Opened, settings: Settings, options: OpenOptions, threads: int | None = None
) -> tuple[Prepared | PreparedGGUF, tuple[str, ...]]:
    """(the plan of a run, what is not as asked for); nothing is calibrated, whatever the settings ask for."""
    if settings.writes_gguf():
        return _prepared_gguf(found, settings, options, threads), ()
    try:
        return prepare(found.path, settings, options, threads), ()
    except (FormatError, ArchitectureError) as error:
        if settings.kv_cache is None:
            raise
        # The engine's cache may be FP8 all the same; without stored scales.
        without = settings.model_copy(update={"kv_cache": None})
        return prepare(found.path, without, options, threads), (f"no scales of the KV cache are stored: {error}",)


def stores_cache_scales(kv_cache: str | None, format: str) -> bool:
    """True where `lowbit quantize --kv-cache` would write scales for it into this format."""
    return kv_cache in KV_CACHE_SCHEMES and format in (*WITH_CACHE_SCALES, "auto")


def _prepared_gguf(found: Opened, settings: Settings, options: OpenOptions, threads: int | None) -> PreparedGGUF:
    """As `gguf_pipeline.prepare_gguf`, but a matrix that would be measured is only promised."""
    threads = threads or os.cpu_count() or 1
    raw = None if settings.is_blockwise or found.made else open_as_gguf(found.path, options)
    if raw is not None:
        shapes = {tensor.name: tensor.shape for tensor in raw.tensors}
        matrix = _matrix(settings, shapes)
        return PreparedGGUF(
            raw, found.name, "gguf", (), plan_from_gguf(raw, settings, matrix), threads, options, matrix
        )
    checkpoint = open_checkpoint(found.path, options)
    architecture, checkpoint = described(checkpoint, options, split_experts=True)
    mapped = describe_gguf(checkpoint, architecture)
    matrix = _matrix(settings, {tensor.name: tensor.shape for tensor in mapped.tensors})
    rows = next(tensor.shape[0] for tensor in mapped.tensors if tensor.name == "token_embd.weight")
    lacks = found.lacks_tokenizer
    tokenizer = None if lacks else tokenizer_key_values(checkpoint.folder, rows, settings.pre_tokenizer)
    float_type = "BF16" if model_dtype(checkpoint) is torch.bfloat16 else "F16"
    plan = plan_from_model(
        checkpoint, mapped, {} if tokenizer is None else tokenizer.key_values, settings, matrix, float_type,
        () if tokenizer is None else tuple(tokenizer.notes),
        calibrated_names(mapped, architecture) if settings.is_blockwise else frozenset(),
    )  # fmt: skip
    notes = tuple(checkpoint.notes)
    return PreparedGGUF(checkpoint, found.name, checkpoint.kind, notes, plan, threads, options, matrix, architecture)


class _PromisedMatrix(ImportanceMatrix):
    """The matrix that a run would measure: every tensor has an entry, and no value is known."""

    def importance(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        entry = self.entries.get(name)
        return None if entry is None else entry.sums


def _matrix(settings: Settings, shapes: dict[str, tuple[int, ...]]) -> ImportanceMatrix | None:
    """From a file; in place of one that is to be measured, one of the same names and widths, which takes no memory."""
    if settings.imatrix is None:
        return None
    if settings.imatrix != MEASURE:
        return read_imatrix(Path(settings.imatrix))
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    entries = {
        name: ImportanceEntry(torch.ones(1, 1).expand(math.prod(shape[:-2]), shape[-1]),
                              torch.ones(math.prod(shape[:-2]), dtype=torch.int64))
        for name, shape in sorted(matrices.items())
    }  # fmt: skip
    text = read_text(settings.calib, packaged="calibration")
    return _PromisedMatrix(entries, (text.name,), settings.samples, settings.seqlen)


def _with_config(path: str | Path, name: str, options: OpenOptions, notes: tuple[str, ...] = ()) -> Opened:
    """With config.json; of a GGUF file the rebuilt one, or its key-values where its architecture has none there."""
    try:
        checkpoint = open_checkpoint(path, options)
    except LowbitError:
        raw = open_as_gguf(path, options)
        if raw is None:
            raise
        return Opened(path, name, {}, notes=notes, metadata=raw.metadata)
    try:
        return Opened(path, name, checkpoint.config(), notes=notes)
    finally:
        checkpoint.close()


def _has_no_weights(folder: Path) -> bool:
    weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.gguf", "*.index.json"))
    return not weights and not pickle_files(folder) and (folder / "config.json").exists()


@contextmanager
def _from_config(config: dict[str, Any], folder: Path | None, source: str, options: OpenOptions) -> Iterator[Path]:
    """A folder like `folder` with a model.safetensors that has the shapes of the model, and no weights."""
    refuse_remote_code(config, source, options)
    if config.get("quantization_config"):
        raise ArchitectureError(
            f"{source}: config.json is of a quantized model, whose tensors it does not tell",
            "give the folder with its weights, the Hugging Face id, or the config.json of the 16-bit model",
        )
    architecture = discover_once(config, str(folder or source), options.trust_remote_code)
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = _STORED.get(named, "BF16")
    with folder_for_copies("config" if folder is None else folder.resolve().name) as target:
        if folder is not None:
            copy_side_files(folder, target)
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shapes = {name: (dtype, tuple(shape)) for name, shape in architecture.parameters.items()}
        safetensors_without_weights(target / "model.safetensors", shapes)
        yield target
