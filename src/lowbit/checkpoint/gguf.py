"""GGUF files (one, or a split set) as a `Checkpoint` with Hugging Face names, layouts, config and tokenizer.

`read` decodes only the rows that are asked for: F32, F16, BF16 and integers as they are, every other ggml type that
can be decoded to float32. Matrices that GGUF stores transposed (GPT-2) are decoded whole. Bytes: `gguf_raw`; names and
layouts: `gguf_to_hf`; config and tokenizer: `gguf_folder`, made when first asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES
from torch import Tensor

from lowbit.checkpoint.base import TensorInfo
from lowbit.checkpoint.gguf_folder import rebuild_folder
from lowbit.checkpoint.gguf_header import GGUFTensor
from lowbit.checkpoint.gguf_layout import Layout, stored_rows
from lowbit.checkpoint.gguf_raw import NATIVE_DTYPE, RawGGUF, find_parts, open_raw_gguf, split_name
from lowbit.checkpoint.gguf_rope import rope_parameters
from lowbit.checkpoint.gguf_to_hf import MappedModel, MappedTensor, map_to_hf
from lowbit.checkpoint.rows import find_tensor, read_config, row_range
from lowbit.errors import CheckpointError

__all__ = ["GGUFCheckpoint", "RawGGUF", "find_parts", "open_gguf", "open_raw_gguf", "split_name"]

MAX_HEAD_DIM = 65536


class GGUFCheckpoint:
    """The `Checkpoint` of a GGUF file or of all parts of a split one. `raw` is the file as it is."""

    kind = "gguf"

    def __init__(self, path: Path, source: str | None = None):
        self.source = str(path) if source is None else source
        self.raw = open_raw_gguf(path)
        self.metadata: dict[str, Any] = self.raw.metadata
        self._folder: Path | None = None
        self._model: MappedModel = map_to_hf(self.metadata, self.raw.tensors, str(self.raw.path))
        self._mapped = {mapped.name: mapped for mapped in self._model.tensors}
        self.tensors: dict[str, TensorInfo] = {mapped.name: self._describe(mapped) for mapped in self._model.tensors}
        rope, rope_notes = rope_parameters(
            self._model.row, self.metadata, self._rope_factors(), _head_dim(self._model.config)
        )
        self._config = self._model.config | rope | {"dtype": _float_dtype(self.raw.tensors)}
        derived = list(self._model.derived.values())
        self.notes: list[str] = [*stored_types_note(self.raw.tensors), *_derived_note(derived), *rope_notes]

    @property
    def folder(self) -> Path:
        """config.json, generation_config.json, tokenizer and chat template, rebuilt and cached."""
        if self._folder is None:
            self._folder = rebuild_folder(self.raw.files[0], self.raw.header, self._config)
        return self._folder

    def config(self) -> dict[str, Any]:
        """The rebuilt config.json, parsed."""
        return read_config(self.folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop in Hugging Face's layout; plain types alias the file, the others are decoded."""
        info = find_tensor(self.tensors, name, self.source)
        start, stop, shape = row_range(info, start, stop)
        values = self._rows(self._mapped[name], start, stop).reshape(shape)
        return values.to(info.dtype) - 1 if self._mapped[name].layout is Layout.PLUS_ONE else values

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory."""
        find_tensor(self.tensors, name, self.source)
        mapped = self._mapped[name]
        if mapped.expert is None:
            self.raw.release(mapped.stored)
        else:
            self.raw.release(mapped.stored, *_rows_of_expert(mapped))

    def close(self) -> None:
        self.raw.close()

    def _rows(self, mapped: MappedTensor, start: int, stop: int) -> Tensor:
        """Rows of a Hugging Face tensor; [rows, K], or [n] of a vector."""
        raw, stored = self.raw, mapped.stored
        if len(mapped.shape) < 2:  # one stored row
            first = mapped.expert or 0
            vector = raw.decode(stored, first, first + 1)[0]
            return vector[_stored_order(mapped, start, stop)] if mapped.layout.reorders else vector[start:stop]
        if mapped.layout is Layout.TRANSPOSED:
            return raw.decode(stored)[:, start:stop].t().contiguous()
        if mapped.layout.reorders:
            return raw.decode_rows(stored, _stored_order(mapped, start, stop))
        offset = 0 if mapped.expert is None else _rows_of_expert(mapped)[0]
        return raw.decode(stored, offset + start, offset + stop)

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
        stored = mapped.stored
        # w + 1 is undone in float32: rounding w to 16 bits again would add an error that the file does not have
        undone = mapped.layout is Layout.PLUS_ONE
        return TensorInfo(
            name=mapped.name,
            shape=mapped.shape,
            dtype=torch.float32 if undone else NATIVE_DTYPE.get(stored.type_name, torch.float32),
            stored=stored.type_name,
            nbytes=(stored.stop - stored.start) // (1 if mapped.expert is None else stored.shape[0]),
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


def _stored_order(mapped: MappedTensor, start: int, stop: int) -> np.ndarray:
    return stored_rows(mapped.layout, np.arange(start, stop), mapped.heads, mapped.dim)


def _head_dim(config: dict[str, Any]) -> int:
    if "head_dim" in config or "hidden_size" not in config:
        return config.get("head_dim", 0)
    return config["hidden_size"] // config["num_attention_heads"]


def _float_dtype(tensors: list[GGUFTensor]) -> str:
    """What config.json says the model is made of: the type of most weights of a file of floats, bfloat16 of others."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type_name] += math.prod(tensor.shape)
    most = weights.most_common(1)[0][0] if weights else "BF16"
    return {"F16": "float16", "F32": "float32"}.get(most, "bfloat16")


def stored_types_note(tensors: list[GGUFTensor]) -> list[str]:
    counts = Counter(tensor.type_name for tensor in tensors)
    quantized = [name for name in counts if name not in NATIVE_DTYPE]
    if not quantized:
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
    return [f"the source is already quantized: its tensors are stored as {listed} and decoded to float32"]


def _derived_note(tensors: list[GGUFTensor]) -> list[str]:
    if not tensors:
        return []
    return [f"not in the Hugging Face model and left out: {', '.join(tensor.name for tensor in tensors)}"]
