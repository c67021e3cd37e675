"""The Hugging Face side of a GGUF file: config.json, generation_config.json, tokenizer, chat template.

config.json is made of the key-values by the rows of `gguf_table`, the tokenizer by `gguf_tokenizer`. The result is
cached under $LOWBIT_CACHE, else $XDG_CACHE_HOME/lowbit, else ~/.cache/lowbit; the key covers everything that the result
depends on, and a folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowbit.checkpoint.gguf_header import GGUFHeader
from lowbit.checkpoint.gguf_tokenizer import generation_config, write_tokenizer
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.checkpoint.rows import read_json_object
from lowbit.errors import CheckpointError, OutputError

REBUILD_VERSION = 4  # raise when this module writes something else for the same file
# About the machine that wrote them, not about the model.
_CONFIG_LEFTOVERS = ("_model_name_or_path", "_name_or_path", "quantization_config")
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def rebuild_folder(file: MappedFile, header: GGUFHeader, config: dict[str, Any]) -> Path:
    """The cached folder of a GGUF file; made now where there is none. config  config.json, but for tokens."""
    cache = cache_root() / "gguf"
    target = cache / _cache_key(file, header, config)
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
        _write_config(work, file, header, config)
        write_tokenizer(work, header.metadata, str(file.path))
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


def _cache_key(file: MappedFile, header: GGUFHeader, config: dict[str, Any]) -> str:
    digest = hashlib.sha256(file.view(0, header.data_start))
    digest.update(json.dumps([REBUILD_VERSION, version("transformers"), config], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _write_config(folder: Path, file: MappedFile, header: GGUFHeader, config: dict[str, Any]) -> None:
    """config.json, as transformers saves it, and generation_config.json."""
    from transformers import AutoConfig

    tokens: dict[str, Any] = {
        key: _token_id(header.metadata, name, config["vocab_size"]) for key, name in _TOKENS.items()
    }
    try:
        AutoConfig.for_model(**(config | tokens)).save_pretrained(folder)
    except Exception as error:  # whatever a config can make somebody else's validators raise
        raise CheckpointError(
            f"{file.path}: transformers takes no config of these key-values ({type(error).__name__}: {error})",
            "use the safetensors checkpoint of the model",
        ) from error
    written = read_json_object(folder / "config.json")
    for key in _CONFIG_LEFTOVERS:
        written.pop(key, None)
    # what save_pretrained drops because it is the class's default; and no tokens that only the class has
    written |= {key: config[key] for key in config.keys() - written.keys()} | tokens
    _write_json(folder / "config.json", written)
    _write_json(folder / "generation_config.json", generation_config(header.metadata))


def _token_id(metadata: dict[str, Any], name: str, vocabulary: int) -> int | None:
    """The id of a special token; None where the file has none, or one that no embedding stands for."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if type(value) is int and 0 <= value < vocabulary else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
