"""Output bytes from config and headers alone, by the same plan that the writer follows.

    folder, .gguf, demo:…        its headers
    Hugging Face id              config, tokenizer and headers, by HTTP ranges; no weights (`checkpoint/remote.py`)
    folder without weights       shapes of the model that transformers builds from config.json on the meta device
    a parsed config.json         the same, in memory; of GGUF files without the tokenizer's share of the header

So an estimate is exact, headers included, if the source's tensors are known, and raises the errors of the run: a scheme
that the format cannot hold, an override that matches nothing, an unknown model type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowbit.architecture.cache import discover_once
from lowbit.checkpoint import open_checkpoint, refuse_remote_code
from lowbit.checkpoint.base import OpenOptions, read_config
from lowbit.checkpoint.hub import DEMO_PREFIX, is_hub_id, local_copy
from lowbit.checkpoint.opening import find_gguf
from lowbit.checkpoint.pickle import pickle_files
from lowbit.checkpoint.remote import copy_side_files, folder_for_copies, remote_headers, safetensors_without_weights
from lowbit.checkpoint.stated import refuse_absurd, stated_quantization
from lowbit.errors import ArchitectureError, FormatError, LowbitError
from lowbit.formats.gguf.raw import RawGGUF, refuse_no_model
from lowbit.plan.plan import Prepared, Request, prepare
from lowbit.settings import RunOptions, Settings, make_settings, refuse_unread

_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# A vocabulary's share of a GGUF header: text, type, length and merge of a token. Llama 3: 7.8 MB for 128256.
_BYTES_PER_TOKEN = 61


@dataclass(frozen=True)
class ModelHeaders:
    """A model with known headers.

    path     a folder or a .gguf file that opens like the model
    name     as typed by the user
    config   config.json, parsed; empty for a GGUF file without a counterpart at Hugging Face
    metadata the key-values of such a file
    from_config  True if tensors come from config.json, not from headers
    notes    on how the headers were read
    """

    path: str | Path
    name: str
    config: dict[str, Any]
    from_config: bool = False
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def lacks_tokenizer(self) -> bool:
        """True for a parsed config.json, which has no tokenizer."""
        return self.from_config and isinstance(self.path, Path) and not any(self.path.glob("token*"))

    def guessed_bytes(self, prepared: Prepared) -> int:
        """Estimated bytes of the vocabulary in a GGUF header, without a tokenizer."""
        if prepared.plan.format.suffix is None or not self.lacks_tokenizer:
            return 0
        tokens = next(tensor.shape[0] for tensor in prepared.plan.tensors if tensor.name == "token_embd.weight")
        return tokens * _BYTES_PER_TOKEN


@dataclass(frozen=True)
class WeightBytes:
    """files: bytes of the weight files; exact  False if a part of them is guessed, which `notes` explain."""

    files: int
    bits_per_weight: float
    exact: bool
    notes: tuple[str, ...] = ()


def weight_bytes(
    model: str | Path | dict[str, Any], scheme: str, format: str = "auto", options: OpenOptions | None = None,
    **settings: Any,
) -> WeightBytes:  # fmt: skip
    """Bytes of the files that `lowbit quantize` would write. model  anything it takes, or a parsed config.json.

    Raises what planning raises: UsageError, FormatError, ArchitectureError, CheckpointError.
    """
    settings_of_run = make_settings(None, scheme=scheme, format=format, **settings)
    options = options or OpenOptions()
    with open_headers(model, options) as headers:
        prepared, notes = plan_of(headers, settings_of_run, options)
        prepared.checkpoint.close()
        guessed = 0 if settings_of_run.no_tokenizer else headers.guessed_bytes(prepared)
        if guessed:
            notes += (f"the vocabulary's share of the header is taken as {_BYTES_PER_TOKEN} bytes a token",)
        bits = prepared.plan.bits_per_weight(decoder_only=True)
        exact = not (guessed or headers.from_config)
        return WeightBytes(prepared.plan.file_bytes + guessed, bits, exact, (*headers.notes, *notes))


@contextmanager
def open_headers(model: str | Path | dict[str, Any], options: OpenOptions) -> Iterator[ModelHeaders]:
    """The model, ready to plan; temporary files are deleted on exit."""
    if isinstance(model, dict):
        with _from_config(model, None, "config.json", options) as path:
            yield ModelHeaders(path, str(model.get("model_type", "a config")), model, True)
        return
    source, path = str(model), Path(model).expanduser()
    if source.startswith(DEMO_PREFIX) or path.exists() or isinstance(model, Path) or not is_hub_id(source):
        if path.is_dir() and _has_no_weights(path):
            config = read_config(path)
            with _from_config(config, path, source, options) as folder:
                note = "the folder holds no weights: names and shapes are those of the model that transformers builds"
                yield ModelHeaders(folder, source, config, True, (f"{note} from config.json, all in its dtype",))
        else:
            yield _with_config(model, source, options)
        return
    with remote_headers(source, options) as fetched:
        if fetched is None:
            note = ("the Hub cannot be reached: headers are those of the copy in the local cache",)
            yield _with_config(local_copy(source, options), source, options, note)
            return
        folder, count = fetched
        note = (f"no weights were downloaded: {count / 1e6:.2f} MB of headers were read",)
        yield _with_config(folder, source, options, note)


def plan_of(
    headers: ModelHeaders, settings: Settings, options: OpenOptions, threads: int | None = None,
    max_memory: int | None = None,
) -> tuple[Prepared, tuple[str, ...]]:  # fmt: skip
    """(the plan of a run, notes on deviations from the settings); nothing is calibrated."""
    refuse_unread(settings, RunOptions(max_memory=max_memory))
    request = Request(
        headers.path, settings, options, threads, preview=True, name=headers.name,
        lacks_tokenizer=headers.lacks_tokenizer,
    )  # fmt: skip
    try:
        return prepare(request), ()
    except (FormatError, ArchitectureError) as error:
        if settings.kv_cache is None:
            raise
        # The engine's cache may still be FP8, without stored scales.
        without = replace(request, settings=settings.model_copy(update={"kv_cache": None}))
        return prepare(without), (f"no scales of the KV cache are stored: {error}",)


def _with_config(path: str | Path, name: str, options: OpenOptions, notes: tuple[str, ...] = ()) -> ModelHeaders:
    """Headers with config.json, rebuilt for a GGUF file; its key-values if its architecture has no config.json."""
    try:
        checkpoint = open_checkpoint(path, options)
    except LowbitError:
        file = find_gguf(path, options)
        if file is None:
            raise
        raw = RawGGUF(file)
        refuse_no_model(raw, name)
        return ModelHeaders(path, name, {}, notes=notes, metadata=raw.metadata)
    try:
        return ModelHeaders(path, name, checkpoint.config(), notes=notes)
    finally:
        checkpoint.close()


def _has_no_weights(folder: Path) -> bool:
    weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.gguf", "*.index.json"))
    return not weights and not pickle_files(folder) and (folder / "config.json").exists()


@contextmanager
def _from_config(config: dict[str, Any], folder: Path | None, source: str, options: OpenOptions) -> Iterator[Path]:
    """A folder like `folder` with a model.safetensors that has the shapes of the model, and no weights."""
    refuse_remote_code(config, source, options)
    refuse_absurd(config, source)
    if stated_quantization(config) is not None:
        raise ArchitectureError(
            f"{source}: config.json is of a quantized model and does not describe its tensors",
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
