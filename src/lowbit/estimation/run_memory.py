"""Peak memory of the quantization itself, predicted from the plan.

    peak = program + max over phases

    program       interpreter, torch, verification and report (`program.py`)
    write         threads · slab · bytes of a weight in flight
    verify        the same with the verifier's slabs; of a GGUF file the largest tensor, mapped in source and output
    vocabulary    of a GGUF file: tokens and merges as Python objects
    embeddings    of a calibrated run: all of them, in source and compute dtype, before the first block
    calibrate     hidden states of the streams, what attention put out of each, and what the last linear of the MLP is
                  given + a block's weights (twice beside an unquantized stream) + H and C of its inputs + the largest
                  linear in float32 with what rounding needs + a batch of activations

The constants below were fitted to runs of SmolLM2-135M and of two Llamas of the same size; benchmarks/estimates.py
prints prediction and measurement side by side.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lowbit.architecture import Architecture
from lowbit.blockwise.memory import block_memory
from lowbit.calibrate.precision import compute_dtype
from lowbit.checkpoint.gguf_raw import RawGGUF
from lowbit.estimation.program import Kind
from lowbit.estimation.shapes import ModelShape
from lowbit.export.safetensors_writer import ASSEMBLED_BYTES
from lowbit.gguf_pipeline import PreparedGGUF
from lowbit.methods import parse_method
from lowbit.pipeline import SLAB_WEIGHTS, Prepared
from lowbit.rounding.gptq import GPTQOptions
from lowbit.settings import Settings
from lowbit.verification.gguf_subject import SLAB_WEIGHTS as VERIFIED_WEIGHTS

# Bytes of a weight in flight: source, float32 copies, codes, packed codes.
_FOLDER_WEIGHT = 16
_GGUF_WEIGHT = 10
_DECODED_WEIGHT = 8  # more, where the source is a GGUF file that is decoded to float32
# Python objects: of a token of the vocabulary with its merge (parsed, parsed and written to GGUF and read back, in a
# GGUF file's header), and of a tensor in plan, header and report.
_TOKEN_PARSED, _TOKEN_WRITTEN, _TOKEN_STORED = 1000, 2500, 500
_TENSOR = 6000


@dataclass(frozen=True)
class RunMemory:
    """parts: what → bytes; they add up."""

    parts: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def kind_of(settings: Settings) -> Kind:
    """Which program runs."""
    return "calibrated" if calibrates(settings) else "gguf" if settings.writes_gguf() else "folder"


def calibrates(settings: Settings) -> bool:
    """True where the method runs a text through the model block by block."""
    return settings.is_blockwise


def run_memory(
    prepared: Prepared | PreparedGGUF,
    settings: Settings,
    shape: ModelShape | None,
    threads: int,
    program: int,
    limit: int | None = None,
) -> RunMemory:
    """Predicted peak of resident memory, in bytes.

    shape    None where no config is known: then methods that calibrate cannot run either
    program  bytes without a model (`program.py`)
    limit    --max-memory: hidden states above it lie in a file
    """
    parts = {"program": program, "plan": _TENSOR * len(prepared.plan.tensors)}
    parts |= _vocabulary(prepared, shape)
    writing = _writing(prepared, threads)
    if not calibrates(settings) or shape is None:
        return RunMemory(parts | {"slabs being written or verified": writing})
    architecture = prepared.architecture if isinstance(prepared, PreparedGGUF) else prepared.plan.architecture
    assert architecture is not None, "calibration needs the model at Hugging Face's names"
    found = _calibration(architecture, settings, shape)
    states = found.pop("hidden states")
    room = None if limit is None else max(0, limit - sum(parts.values()) - sum(found.values()))
    found["hidden states"] = states if room is None else min(states, room)
    embedding = shape.vocab * shape.hidden * (4 if prepared.source_kind == "gguf" else 2)
    embedding += shape.vocab * shape.hidden * compute_dtype(settings.compute).itemsize
    if sum(found.values()) < embedding + found["hidden states"]:
        found = {"embeddings": embedding, "hidden states": found["hidden states"]}
    # On top, since little of what calibration held has gone back to the system when files are written.
    return RunMemory(parts | found | {"slabs being written or verified": writing})


def hidden_state_bytes(settings: Settings, shape: ModelShape) -> int:
    """Of all arrays of hidden states of a calibrated run; what does not fit in memory goes to a file of this size."""
    dtype = compute_dtype(settings.compute)
    method = parse_method(settings.method)
    # What goes into the last linear is kept, but not into experts, and not where transforms look at a whole MLP.
    last = 0 if shape.experts or (method.transforms and "gptq" not in method.roundings) else shape.intermediate
    width = shape.hidden * (4 if two_streams(settings) else 2) + last
    return settings.samples * settings.seqlen * width * dtype.itemsize


def _vocabulary(prepared: Prepared | PreparedGGUF, shape: ModelShape | None) -> dict[str, int]:
    from_gguf = prepared.source_kind == "gguf"
    to_gguf = isinstance(prepared, PreparedGGUF)
    if shape is None or not (from_gguf or to_gguf or prepared.plan.settings.is_blockwise):
        return {}
    each = _TOKEN_STORED if from_gguf else _TOKEN_WRITTEN if to_gguf else _TOKEN_PARSED
    return {"vocabulary": shape.vocab * each}


def _writing(prepared: Prepared | PreparedGGUF, threads: int) -> int:
    verifiers = os.cpu_count() or 1
    if isinstance(prepared, PreparedGGUF):
        tensors = prepared.plan.tensors
        slab = max(min(SLAB_WEIGHTS, max(t.weights for t in tensors)), max(t.columns for t in tensors))
        mapped = max(tensor.source_bytes + tensor.stored_bytes for tensor in tensors)
        copies = isinstance(prepared.checkpoint, RawGGUF)
        verifying = verifiers * min(VERIFIED_WEIGHTS, slab) * _GGUF_WEIGHT + mapped
        return max(threads * slab * (_GGUF_WEIGHT + (_DECODED_WEIGHT if copies else 0)), verifying)
    tensors = prepared.plan.tensors
    slab = max(min(SLAB_WEIGHTS, max(t.weights for t in tensors)), max((t.shape or (1,))[-1] for t in tensors))
    per_weight = _FOLDER_WEIGHT + (_DECODED_WEIGHT if prepared.source_kind == "gguf" else 0)
    # Tensors that the format stores transposed are put together before they are written.
    turned = (s.nbytes for t in prepared.plan.quantized for s in t.stored if s.shape[:1] != t.walked_shape[:1])
    return threads * (slab * per_weight + min(max(turned, default=0), ASSEMBLED_BYTES))


def two_streams(settings: Settings) -> bool:
    """True where the unquantized model runs beside the quantized one."""
    method = parse_method(settings.method)
    correction = GPTQOptions().correction if settings.correction is None else settings.correction
    return method.learns or ("gptq" in method.roundings and correction > 0)


def _calibration(architecture: Architecture, settings: Settings, shape: ModelShape) -> dict[str, int]:
    rewrites = bool(parse_method(settings.method).transforms)
    parts = block_memory(architecture, compute_dtype(settings.compute), two_streams(settings), rewrites)
    return {"hidden states": hidden_state_bytes(settings, shape), **parts}
