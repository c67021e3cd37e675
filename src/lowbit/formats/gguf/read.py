"""GGUF files (one, or a split set) as a `Checkpoint` with Hugging Face names, layouts, config and tokenizer.

`read` decodes only the requested rows: F32, F16, BF16 and integers in their own dtype, all other ggml types to
float32. Matrices that GGUF stores transposed (GPT-2) are decoded whole. Bytes: `raw`; names and layouts: `to_hf`.

On first use config.json is rebuilt from the key-values by the rows of `table`, the tokenizer by `tokenizer`. The folder
is cached under $LOWBIT_CACHE, else $XDG_CACHE_HOME/lowbit, else ~/.cache/lowbit; the key covers all inputs, and a
folder appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES
from torch import Tensor

from lowbit.checkpoint.base import (
    Checkpoint,
    TensorInfo,
    cache_root,
    find_tensor,
    read_config,
    read_json_object,
    row_range,
)
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import CheckpointError, OutputError
from lowbit.formats.gguf.header import GGUFHeader, GGUFTensor
from lowbit.formats.gguf.raw import NATIVE_DTYPE, open_raw_gguf, refuse_no_model, stored_types_note
from lowbit.formats.gguf.rope import rope_parameters
from lowbit.formats.gguf.to_hf import MappedModel, MappedTensor, map_to_hf
from lowbit.formats.gguf.tokenizer import generation_config, write_tokenizer
from lowbit.version import version_of

MAX_HEAD_DIM = 65536


class GGUFCheckpoint(Checkpoint):
    """The `Checkpoint` of a GGUF file or of all parts of a split one.

    raw     the file as it is
    scales  tensor → what each of its pieces is multiplied by, of matrices with a scale beside them
    """

    kind = "gguf"

    def __init__(self, path: Path, source: str | None = None):
        self.source = str(path) if source is None else source
        self.raw = open_raw_gguf(path)
        refuse_no_model(self.raw, self.source)
        self.metadata: dict[str, Any] = self.raw.metadata
        self._folder: Path | None = None
        self._model: MappedModel = map_to_hf(self.metadata, self.raw.tensors, str(self.raw.path))
        self._mapped = {mapped.name: mapped for mapped in self._model.tensors}
        self.scales = {mapped.name: self._scales_of(mapped) for mapped in self._model.tensors if mapped.is_scaled}
        self.tensors: dict[str, TensorInfo] = {mapped.name: self._describe(mapped) for mapped in self._model.tensors}
        config = self._model.config
        head_dim = config.get("head_dim", 0)
        if "head_dim" not in config and "hidden_size" in config and "num_attention_heads" in config:
            head_dim = config["hidden_size"] // config["num_attention_heads"]
        rope, rope_notes = rope_parameters(self._model.row, self.metadata, self._rope_factors(), head_dim)
        for part, values in rope.items():
            config = config | {part: config.get(part, {}) | values}
        self._config = config | {"dtype": _float_dtype(self.raw.tensors)}
        self.notes: list[str] = stored_types_note(self.raw.tensors)
        derived = ", ".join(tensor.name for tensor in self._model.derived.values())
        self.notes += [f"not in the Hugging Face model and left out: {derived}"] if derived else []
        if self._model.predicts:
            self.notes.append(f"left out ({self._model.predicts} tensors): blocks for multi-token prediction")
        if self._model.unread:
            self.notes.append(f"left out ({self._model.unread} tensors): keys and values of blocks that share others'")
        self.notes += rope_notes
        if self._model.left_out:
            count = len(self._model.left_out)
            self.notes.append(f"left out ({count} tensors): scales of activations, which llama.cpp does not use")

    @property
    def folder(self) -> Path:
        """config.json, generation_config.json, tokenizer and chat template, rebuilt and cached."""
        if self._folder is None:
            self._folder = rebuild_folder(self.raw.files[0], self.raw.headers[0], self._config)
        return self._folder

    def config(self) -> dict[str, Any]:
        """The rebuilt config.json, parsed."""
        return read_config(self.folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop in Hugging Face's layout; plain types alias the file, the others are decoded."""
        info = find_tensor(self.tensors, name, self.source)
        start, stop, shape = row_range(info, start, stop)
        return self._rows(self._mapped[name], start, stop).reshape(shape)

    def is_changed(self, name: str) -> bool:
        """True if the file holds a function of the values: w + 1, -exp(w)."""
        return name in self._mapped and self._mapped[name].is_changed

    def stored_names(self, name: str) -> list[str]:
        """The tensors of the file that hold a tensor."""
        return [stored.name for stored, *_ in self._mapped[name].pieces]

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        find_tensor(self.tensors, name, self.source)
        mapped = self._mapped[name]
        for stored, *_ in mapped.pieces:
            if mapped.expert is None:
                self.raw.release(stored)
            else:
                self.raw.release(stored, *_rows_of_expert(mapped))

    def close(self) -> None:
        self.raw.close()

    def _rows(self, mapped: MappedTensor, start: int, stop: int) -> Tensor:
        """Rows of a Hugging Face tensor."""
        if mapped.values is not None:
            return mapped.values.reshape(-1)[start:stop]
        raw, (stored, arranged, _) = self.raw, mapped.pieces[0]
        scales = self.scales.get(mapped.name)
        if arranged.layout.transposed and len(mapped.shape) == 2:
            values = raw.decode(stored)[:, start:stop].t().contiguous()
        elif (
            len(mapped.pieces) > 1
            or not arranged.is_plain
            or (len(mapped.shape) < 2 and mapped.expert is None and len(stored.shape) > 1)
        ):
            return self._gathered(mapped, start, stop)
        elif len(mapped.shape) < 2:  # one stored row
            values = raw.decode(stored, first := mapped.expert or 0, first + 1)[0][start:stop]
        else:
            offset = 0 if mapped.expert is None else _rows_of_expert(mapped)[0]
            values = raw.decode(stored, offset + start, offset + stop)
        return values if scales is None else values.float() * scales[0]

    def _gathered(self, mapped: MappedTensor, start: int, stop: int) -> Tensor:
        """Rows that lie in another order, or in several stored tensors."""
        scales = self.scales.get(mapped.name, (1.0,) * len(mapped.pieces))
        offset = 0 if mapped.expert is None else _rows_of_expert(mapped)[0]
        rows, values = [], []
        for (stored, arranged, _), scale in zip(mapped.pieces, scales, strict=True):

            def decode(chosen: np.ndarray, stored: GGUFTensor = stored, scale: float = scale) -> Tensor:
                decoded = self.raw.decode_rows(stored, chosen + offset)
                return decoded if scale == 1 else decoded.float() * scale

            held, part = arranged.source_rows(decode, slice(start, stop))
            rows.append(held)
            values.append(part)
        order = np.argsort(np.concatenate(rows))
        if len(order) != stop - start:
            raise CheckpointError(f"{self.source}: rows of {mapped.name} are missing from the file")
        return torch.cat(values)[torch.from_numpy(order)]

    def _scales_of(self, mapped: MappedTensor) -> tuple[float, ...]:
        """What each piece of a weight, or of one expert of it, is multiplied by."""
        scales = []
        for stored, _, scale in mapped.pieces:
            values = None if scale is None else self.raw.decode(self.raw.checked_scale(stored, scale))[0]
            index = mapped.expert or 0 if values is not None and len(values) > 1 else 0
            scales.append(1.0 if values is None else values[index].item())
        return tuple(scales)

    def _rope_factors(self) -> dict[MODEL_TENSOR, Tensor]:
        factors = {}
        for kind, stored in self._model.derived.items():
            if "rope" not in TENSOR_NAMES[kind]:
                continue
            if len(stored.shape) != 1 or stored.shape[0] > MAX_HEAD_DIM:
                raise CheckpointError(
                    f"{self.raw.file_of(stored).path}: tensor {stored.name!r} has shape {list(stored.shape)}; "
                    f"one number per rotary pair is needed"
                )
            factors[kind] = self.raw.decode(stored)[0]
        return factors

    def _describe(self, mapped: MappedTensor) -> TensorInfo:
        if mapped.values is not None:
            file = self.raw.files[0].path
            return TensorInfo(mapped.name, mapped.shape, torch.float32, stored="F32", nbytes=4, file=file)
        stored = mapped.stored
        # w + 1 is undone, and a scale applied, in float32: rounding to 16 bits would add an error of our own
        several = len({stored.type_name for stored, _, _ in mapped.pieces}) > 1
        undone = mapped.is_changed or mapped.is_scaled or several
        nbytes = sum(piece.stop - piece.start for piece, *_ in mapped.pieces)
        return TensorInfo(
            name=mapped.name,
            shape=mapped.shape,
            dtype=torch.float32 if undone else NATIVE_DTYPE.get(stored.type_name, torch.float32),
            stored=stored.type_name,
            nbytes=nbytes // (1 if mapped.expert is None else stored.shape[0]),
            file=self.raw.file_of(stored).path,
        )


def open_gguf(path: str | Path, source: str | None = None) -> GGUFCheckpoint:
    """Open a GGUF file; of a split one, any part. `source` is what the user typed, where that differs."""
    return GGUFCheckpoint(Path(path), source)


def _rows_of_expert(mapped: MappedTensor) -> tuple[int, int]:
    """The stored rows, of [E·N, K], that one expert has."""
    assert mapped.expert is not None
    rows = mapped.shape[0] if len(mapped.shape) > 1 else 1
    return mapped.expert * rows, (mapped.expert + 1) * rows


def _float_dtype(tensors: list[GGUFTensor]) -> str:
    """config.json's dtype: the type of most weights if that is F16 or F32, else bfloat16."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type_name] += math.prod(tensor.shape)
    most = weights.most_common(1)[0][0] if weights else "BF16"
    return {"F16": "float16", "F32": "float32"}.get(most, "bfloat16")


REBUILD_VERSION = 4  # raise when the rebuilt files of the same GGUF change
# Keys that describe the writing machine, not the model.
_CONFIG_LEFTOVERS = ("_model_name_or_path", "_name_or_path", "quantization_config")
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def rebuild_folder(file: MappedFile, header: GGUFHeader, config: dict[str, Any]) -> Path:
    """The cached folder of a GGUF file, written if it does not exist. config: config.json without token ids"""
    cache = cache_root() / "gguf"
    digest = hashlib.sha256(file.view(0, header.data_start))
    digest.update(json.dumps([REBUILD_VERSION, version_of("transformers"), config], sort_keys=True).encode())
    target = cache / digest.hexdigest()[:32]
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


def _write_config(folder: Path, file: MappedFile, header: GGUFHeader, config: dict[str, Any]) -> None:
    """config.json, as transformers saves it, and generation_config.json."""
    from transformers import AutoConfig

    tokens: dict[str, Any] = {
        key: _token_id(header.metadata, name, config["vocab_size"]) for key, name in _TOKENS.items()
    }
    try:
        AutoConfig.for_model(**(config | tokens)).save_pretrained(folder)
    except Exception as error:  # transformers' validators can raise anything
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
