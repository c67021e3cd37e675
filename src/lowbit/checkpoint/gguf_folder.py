"""The Hugging Face side of a GGUF file: config.json, generation_config.json, tokenizer, chat template.

transformers rebuilds config and tokenizer. It is not given the file itself but a skeleton made of the key-values that
our own reader has checked, without tensors: its reader trusts what it reads, and the token lists, which it does not
need for the config, take it seconds. The result is cached under $LOWBIT_CACHE, else $XDG_CACHE_HOME/lowbit, else
~/.cache/lowbit; the key covers everything that the result depends on, and a folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType

from lowbit.checkpoint.gguf_header import MAGIC, GGUFHeader
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.checkpoint.rows import read_json_object
from lowbit.errors import CheckpointError, OutputError

REBUILD_VERSION = 1  # raise when this module writes something else for the same file
# About the machine that wrote them, not about the model.
_CONFIG_LEFTOVERS = ("_model_name_or_path", "_name_or_path", "quantization_config")
_TOKENIZER_LEFTOVERS = ("is_local", "local_files_only", "name_or_path")


def rebuild_folder(file: MappedFile, header: GGUFHeader, overrides: dict[str, Any]) -> Path:
    """The cached folder of a GGUF file; made now where there is none. `overrides` go into config.json."""
    cache = cache_root() / "gguf"
    target = cache / _cache_key(file, header, overrides)
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=".building-"))
    except OSError as error:
        raise OutputError(
            f"{cache}: cannot be written ({error.strerror})", "set LOWBIT_CACHE to a folder that can"
        ) from error
    try:
        _write_config(work, file, header, overrides)
        _write_tokenizer(work, file, header)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def cache_root() -> Path:
    """Where rebuilt folders live."""
    if os.environ.get("LOWBIT_CACHE"):
        return Path(os.environ["LOWBIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


def _cache_key(file: MappedFile, header: GGUFHeader, overrides: dict[str, Any]) -> str:
    digest = hashlib.sha256(file.view(0, header.data_start))
    digest.update(json.dumps([REBUILD_VERSION, version("transformers"), overrides], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _write_config(folder: Path, file: MappedFile, header: GGUFHeader, overrides: dict[str, Any]) -> None:
    """config.json and generation_config.json."""
    from transformers import AutoConfig

    left_out = {key for key in header.metadata if key.startswith("tokenizer.") and not key.endswith("_token_id")}
    left_out.add("general.name")  # a name "mistral" would make transformers change the architecture
    vocabulary = _key_value(f"{header.metadata['general.architecture']}.vocab_size", overrides["vocab_size"])
    left_out.add(f"{header.metadata['general.architecture']}.vocab_size")
    with _Skeleton(file, header, left_out, [vocabulary]) as skeleton:
        config = _by_transformers("config", file, AutoConfig.from_pretrained, skeleton)
    config.save_pretrained(folder)
    written = read_json_object(folder / "config.json")
    for key in _CONFIG_LEFTOVERS:
        written.pop(key, None)
    written |= {"dtype": "bfloat16"} | _merge_rope(written, overrides)
    _write_json(folder / "config.json", written)
    _write_json(folder / "generation_config.json", _generation_config(header.metadata))


def _merge_rope(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides with rope_parameters merged into what transformers found (theta), for every layer type that has it."""
    scaling = overrides.get("rope_parameters")
    if scaling is None:
        return overrides
    found = config.get("rope_parameters") or {}
    if "full_attention" in found:  # Gemma 3 stretches its full-attention layers only
        merged = found | {"full_attention": found["full_attention"] | scaling}
    else:
        merged = found | scaling
    return overrides | {"rope_parameters": merged}


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Where generation begins and ends; chat models end at the end of a turn too."""
    found = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    ids = {name: value for name, value in found.items() if type(value) is int}
    ends = sorted({ids[name] for name in ("eos", "eot") if name in ids})
    generation = {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding"),
    }
    return {key: value for key, value in generation.items() if value is not None}


def _write_tokenizer(folder: Path, file: MappedFile, header: GGUFHeader) -> None:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    from transformers import PreTrainedTokenizerFast

    if "tokenizer.ggml.tokens" not in header.metadata:
        raise CheckpointError(f"{file.path}: there is no tokenizer in the file", "use another GGUF of the model")
    with _Skeleton(file, header) as skeleton:
        tokenizer = _by_transformers("tokenizer", file, PreTrainedTokenizerFast.from_pretrained, skeleton)
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = read_json_object(path)
    for key in _TOKENIZER_LEFTOVERS:
        written.pop(key, None)
    _write_json(path, written)


def _by_transformers(what: str, file: MappedFile, load, skeleton: Path):
    """Call transformers on the skeleton. Whatever it raises means that it cannot read this file."""
    try:
        return load(str(skeleton.parent), gguf_file=skeleton.name)
    except Exception as error:
        raise CheckpointError(
            f"{file.path}: transformers cannot rebuild the {what} ({type(error).__name__}: {error})",
            "use the safetensors checkpoint of the model",
        ) from error


class _Skeleton:
    """A temporary GGUF file with the same key-values and no tensors."""

    def __init__(
        self, file: MappedFile, header: GGUFHeader, left_out: Collection[str] = (), added: Collection[bytes] = ()
    ):
        kept = {key: span for key, span in header.key_spans.items() if key not in left_out}
        kept = {key: span for key, span in kept.items() if not key.startswith("split.")}
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "skeleton.gguf"
        with self._path.open("wb") as out:
            out.write(MAGIC + struct.pack("<IQQ", header.version, 0, len(kept) + len(added)))
            for start, stop in kept.values():
                out.write(file.view(start, stop))
            out.writelines(added)

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_) -> None:
        self._folder.cleanup()


def _key_value(key: str, value: int) -> bytes:
    """A GGUF key-value of type uint32."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", GGUFValueType.UINT32, value)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
