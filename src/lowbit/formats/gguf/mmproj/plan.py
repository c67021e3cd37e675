"""The plan of an mmproj file: the ggml type of each tensor of the vision tower, and every byte of the header.

    model + F32, F16, BF16 or Q8_0 → GGUFPlan

Types are those that llama.cpp's converter gives (`row.stored_type`). A row that Q8_0 does not divide is F16.

Refused: another type; a GGUF file as the model.
"""

from __future__ import annotations

import math

import torch
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType

from lowbit.architecture import open_described
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.opening import find_gguf
from lowbit.errors import UsageError
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.formats.gguf.mix import find_file_type
from lowbit.formats.gguf.mmproj.model import MmprojModel, TowerTensor, describe_mmproj
from lowbit.formats.gguf.mmproj.row import CLIP, stored_type
from lowbit.formats.gguf.mmproj.table import require_tower
from lowbit.formats.gguf.plan import PLAIN, GGUFPlan
from lowbit.formats.gguf.raw import rows_and_columns
from lowbit.formats.gguf.write import packed, packed_key_values
from lowbit.numerics.ggml import TYPES
from lowbit.plan.plan import Making, PlannedTensor, Prepared, Request
from lowbit.registry import FORMATS
from lowbit.rounding.target import GgmlTarget
from lowbit.settings import Settings

MMPROJ_TYPES = (*PLAIN, "Q8_0")


def prepare_mmproj(request: Request) -> Prepared:
    """Open a model and plan the file of its vision tower; see `plan.prepare`."""
    threads = request.worker_threads
    _check_type(request.settings.scheme)
    if find_gguf(request.model, request.options) is not None:
        raise UsageError(
            f"{request.model} is a GGUF file of a language model, which holds no vision tower",
            "give the Hugging Face folder or id that it was made of",
        )
    opened = open_checkpoint(request.model, request.options)
    require_tower(opened.config(), opened.source)  # before transformers is asked to make the model
    checkpoint, architecture = open_described(request.model, request.options, split_experts=True)
    mapped = describe_mmproj(checkpoint, architecture)
    return Prepared(
        checkpoint, _plan(mapped, checkpoint, request.settings), threads,
        lambda others: _plan(mapped, checkpoint, others), request.options, request.name or checkpoint.source,
    )  # fmt: skip


def _check_type(name: str) -> None:
    if name not in MMPROJ_TYPES:
        raise UsageError(
            f"a vision tower is not stored as {name}: llama.cpp's own files have {', '.join(MMPROJ_TYPES)}",
            "--scheme F16 is what most engines expect; Q8_0 is half of its size",
        )


def _plan(mapped: MmprojModel, checkpoint: Checkpoint, settings: Settings) -> GGUFPlan:
    _check_type(settings.scheme)
    file_type = find_file_type(settings.scheme)
    key_values = packed_key_values(mapped.key_values) | {
        "general.file_type": packed(file_type.number, GGUFValueType.UINT32),
        "general.quantization_version": packed(GGML_QUANT_VERSION, GGUFValueType.UINT32),
    }
    tensors = tuple(_planned(tensor, checkpoint, file_type.name) for tensor in mapped.tensors)
    return GGUFPlan(
        tensors, settings, FORMATS["gguf"], CLIP, file_type.name, "search", torch.float32, None, mapped.notes,
        key_values,
    )  # fmt: skip


def _planned(tensor: TowerTensor, checkpoint: Checkpoint, asked: str) -> PlannedTensor:
    name, why = stored_type(tensor.target, tensor.name, tensor.shape, asked)
    rows, columns = rows_and_columns(tensor.shape)
    if columns % TYPES[name].weights:
        why, name = f"F16, because rows of {columns} do not divide by {TYPES[name].weights} ({name})", "F16"
    kind = TYPES[name]
    return PlannedTensor(
        tensor.name, tensor.role, tensor.target.block, tensor.shape, tensor,
        math.ceil(checkpoint.tensors[tensor.source].nbytes * tensor.share), Making.rounded,
        (StoredTensor(tensor.name, torch.uint8, (rows, kind.row_bytes(columns))),),
        target=GgmlTarget(name),
        reason=(why or f"stored as {name}") if name in PLAIN else None,
        dtype=torch.float32,
        plain_dtype=torch.float32,
        in_decoder=tensor.target.block is not None and len(tensor.shape) > 1,
    )  # fmt: skip
