"""One look at a source before any work, the same for every output and every command.

    inspect_source(checkpoint, architecture) → what to leave out, whether the tie holds, notes

Refused, with the file, the tensor, and what config.json says: a tensor that is absent, or of another shape; weights
that are no floats; an adapter that was not merged; tensors that the model has no place for.

Left out with a note: tensors without elements, biases of zeros that the model lacks, blocks beyond those that
config.json counts, and the copy of a tied tensor. Where config.json ties two tensors and the files hold different ones,
both are meant: training untied them, and the flag was left behind. The two are compared; config.json is then read as if
it did not tie them, and an output says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit.architecture.structure import Architecture
from lowbit.checkpoint.base import Checkpoint, TensorInfo, row_slabs
from lowbit.checkpoint.companions import beyond_embedding
from lowbit.checkpoint.quantized import is_of_codes
from lowbit.errors import CheckpointError

# Causal masks that old GPT-2 and GPT-NeoX files store.
MASKS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")
_ADAPTER = re.compile(r"(\.|_)(lora|hada|lokr|vera|oft|ia3|boft|dora)_|\.base_layer\.|\.(modules_to_save|lora)\.")
_PREDICTION = re.compile(r"(model\.)?mtp\.")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SLAB_WEIGHTS = 8_000_000
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
ENLARGE = "the tokenizer is of another model, or was extended: enlarge the embedding (resize_token_embeddings)"


@dataclass
class Inspection:
    """left_out: names to leave out; unties: True where tied tensors differ; notes: for the user"""

    left_out: set[str] = field(default_factory=set)
    unties: bool = False
    notes: list[str] = field(default_factory=list)

    def leave_out(self, names: list[str], why: str) -> None:
        if names:
            self.left_out.update(names)
            self.notes.append(f"left out: {_some(names)}, {why}")


def inspect_source(checkpoint: Checkpoint, architecture: Architecture) -> Inspection:
    """Check an open checkpoint, under the architecture's names, against its config.json; reads tied tensors only."""
    found = Inspection()
    _check_unexpected(checkpoint, architecture, found)
    _check_parameters(checkpoint, architecture)
    rows = embedding_rows(checkpoint.tensors)
    beyond = None if rows is None or checkpoint.kind == "gguf" else beyond_embedding(checkpoint.folder, rows)
    if beyond is not None:
        found.notes.append(f"{beyond}: an engine fails on a text that has it; {ENLARGE}")
    for name, stored in architecture.tied.items():
        if name in checkpoint.tensors and stored in checkpoint.tensors:
            if _are_equal(checkpoint, name, stored):
                found.leave_out([name], f"equal to {stored}, which config.json ties it to")
            else:
                found.unties = True
                found.notes.append(
                    f"config.json ties {name} to {stored}, but the files hold two different tensors: both are kept, "
                    f"as with tie_word_embeddings false"
                )
    return found


def embedding_rows(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Rows of the input embedding, one per token id; None where no tensor has a name of one."""
    return next((info.shape[0] for name, info in tensors.items() if name.endswith(_EMBEDDINGS) and info.shape), None)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with tie_word_embeddings false wherever it may stand."""
    return {
        key: untied(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in (config | {"tie_word_embeddings": False}).items()
    }


def _are_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """True for two tensors of the same values; reads no further than the first difference."""
    shape = checkpoint.tensors[one].shape
    if shape != checkpoint.tensors[other].shape:
        return False
    try:
        for start, stop in row_slabs(shape, _SLAB_WEIGHTS, 128):
            a, b = checkpoint.read(one, start, stop), checkpoint.read(other, start, stop)
            if not torch.equal(a.float(), b.float()):
                return False
    finally:
        checkpoint.release(one)
        checkpoint.release(other)
    return True


def _check_parameters(checkpoint: Checkpoint, architecture: Architecture) -> None:
    for name, shape in architecture.parameters.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{checkpoint.source}: tensor {name} {list(shape)} is absent", _why_absent(name, architecture)
            )
        linear = architecture.linears.get(name.removesuffix(".weight"))
        if linear is not None and linear.transposed and name in checkpoint.schemes:
            shape = linear.shape
        if tuple(info.shape) != tuple(shape):
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json says {list(shape)}",
                "the files and config.json do not belong together",
            )
        if info.dtype not in _FLOATS and architecture.roles.get(name) != "other":
            raise CheckpointError(
                f"{info.file}: tensor {name} is {info.stored}, not a 16- or 32-bit float", why_no_float(info)
            )


def _why_absent(name: str, architecture: Architecture) -> str:
    linear = architecture.linears.get(name.removesuffix(".weight"))
    if linear is not None and linear.block is None:
        return (
            'set "tie_word_embeddings": true in config.json if the model shares it with its embedding; else the files '
            "are incomplete"
        )
    return "the files are incomplete, or config.json is of another model"


def why_no_float(info: TensorInfo) -> str:
    """The hint for a weight that is stored as something else than a 16- or 32-bit float."""
    if info.dtype is torch.bool:
        return "a mask was saved in place of the weight; save the model again"
    if info.dtype.is_floating_point:
        return (
            "no scale was found beside it; cast it to bfloat16 if its values are the weights, or start from the "
            "original checkpoint"
        )
    if info.dtype in (torch.int16, torch.uint16):
        return (
            "bits of 16-bit floats were saved as integers, as numpy does with bfloat16; save them as what they are "
            "(tensor.view(torch.bfloat16) or torch.float16), or start from the original checkpoint"
        )
    if info.dtype in (torch.int64, torch.uint64):
        return "no format of weights holds such integers; something else was saved under its name: save the model again"
    return "this checkpoint is quantized already, and nothing says how; start from the original one"


def _check_unexpected(checkpoint: Checkpoint, architecture: Architecture, found: Inspection) -> None:
    known = architecture.parameters.keys() | architecture.tied.keys()
    surplus = [name for name in checkpoint.tensors if name not in known
               and not architecture.stands_beside(name) and not MASKS.search(name)]  # fmt: skip
    adapters = [name for name in surplus if _ADAPTER.search(name)]
    if adapters:
        raise CheckpointError(
            f"{checkpoint.source}: holds an adapter that was not merged: {_some(adapters)}",
            "merge it with the library that trained it (peft: merge_and_unload), and save the result",
        )
    empty = [name for name in surplus if math.prod(checkpoint.tensors[name].shape) == 0]
    found.leave_out(empty, "without elements")
    blocks, surplus = len(architecture.blocks), [name for name in surplus if name not in empty]
    beyond = [name for name in surplus if (architecture.block_of(name) or 0) >= blocks]
    found.leave_out(beyond, f"of blocks beyond the {blocks} that config.json counts (num_hidden_layers)")
    predicts = [name for name in surplus if _PREDICTION.match(name)]
    found.leave_out(predicts, "of multi-token prediction, which transformers does not run")
    surplus = [name for name in surplus if name not in {*beyond, *predicts}]
    biases = [name for name in surplus if name.endswith(".bias") and f"{name[:-5]}.weight" in known]
    zeros = [name for name in biases if not checkpoint.read(name).any().item()]
    found.leave_out(zeros, f"biases of zeros, which {architecture.class_name} does not have")
    nonzero = [name for name in biases if name not in zeros]
    if nonzero:
        flags = (flag for part, flag in _BIAS_FLAGS.items() if part in nonzero[0])
        flag = next((flag for flag in flags if _knows(architecture.model_type, flag)), "")
        raise CheckpointError(
            f"{checkpoint.source}: {_some(nonzero)}: {architecture.class_name} has no such bias"
            f"{f' unless config.json sets {flag}' if flag else ''}",
            f"set {flag} if the model was trained with it, else remove these tensors"
            if flag
            else "remove these tensors from the files, or check that config.json is of this model",
        )
    unknown = [name for name in surplus if name not in biases]
    codes = [name for name in unknown if is_of_codes(name)]
    if codes and checkpoint.kind in ("safetensors", "pickle"):
        raise CheckpointError(
            f"{checkpoint.source}: {codes[0]} is part of a quantized weight, and config.json states no quantization",
            "get config.json again from where the model is from: its quantization_config says how to read the weights",
        )
    if unknown:
        raise CheckpointError(
            f"{checkpoint.source}: {architecture.class_name} has no place for {_some(unknown)}",
            "config.json is of another model, or the files hold something beside it: remove what is not the model's",
        )


_BIAS_FLAGS = {"attn": "attention_bias", "attention": "attention_bias", "mlp": "mlp_bias"}


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _knows(model_type: str, key: str) -> bool:
    """True if transformers' config of a type has a key."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[model_type], key)
