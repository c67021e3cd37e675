"""Peak memory of the quantization itself, predicted from the plan, for `estimate` and `--dry-run`.

    peak = program + max over phases

    program       interpreter, torch, verification and report: below
    write         threads · slab · bytes of a weight in flight
    verify        the same with the verifier's slabs; of a GGUF file the largest tensor, mapped in source and output
    vocabulary    of a GGUF file: tokens and merges as Python objects
    embeddings    of a calibrated run: all of them, in source and compute dtype, before the first block
    distill       what `distillation.memory` counts, with two arrays of hidden states
    calibrate     hidden states of the streams, the attention output of each, and the input of the last linear of the
                  MLP + a block's weights (twice beside an unquantized stream) + H and C of its inputs + the largest
                  linear in float32 with its copies for rounding + a batch of activations

The constants were fitted to runs of SmolLM2-135M and of two Llamas of the same size; benchmarks/estimates.py prints
prediction and measurement side by side.

The program's memory without a model follows from no formula, and for small models it is most of the run. Two ways:

    Process.program    the memory of this process before it opens a model, plus the run's later imports (constants)
    measured_program   the peak of quantizing a model of 100 kB in a process of its own, kept in the cache folder
                       (LOWBIT_CACHE) per installation: versions and processors. The first process of each kind fills
                       lowbit's other caches, the second is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from lowbit.architecture.shape import ModelShape, shape_of, shape_of_gguf
from lowbit.calibrate.memory import block_memory, weights_memory
from lowbit.checkpoint.base import cache_root
from lowbit.distillation.memory import distill_memory, distillation_dtype
from lowbit.distillation.rotations import rotation_memory
from lowbit.errors import ArchitectureError, LowbitError
from lowbit.export.safetensors_writer import ASSEMBLED_BYTES
from lowbit.formats.gguf.subject import SLAB_WEIGHTS as VERIFIED_WEIGHTS
from lowbit.measure import resident_memory
from lowbit.methods import parse_method
from lowbit.numerics.precision import compute_dtype
from lowbit.plan.plan import SLAB_WEIGHTS, Prepared
from lowbit.settings import Settings
from lowbit.version import __version__

# Bytes of a weight in flight: source, float32 copies, codes, packed codes.
_FOLDER_WEIGHT = 16
_GGUF_WEIGHT = 10
_DECODED_WEIGHT = 8  # in addition, if a GGUF source is decoded to float32
# Python objects: per token of the vocabulary with its merge (parsed; parsed, written to GGUF and read back; in a GGUF
# file's header), and per tensor in plan, header and report.
_TOKEN_PARSED, _TOKEN_WRITTEN, _TOKEN_STORED = 1000, 2500, 500
_TENSOR = 6000

# The measured runs: rtn into a folder; rtn into a GGUF file, which parses a tokenizer; gptq into a folder, which builds
# and runs the transformers model.
Kind = Literal["folder", "gguf", "calibrated"]
_SETTINGS: dict[Kind, dict[str, object]] = {
    "folder": {"scheme": "W4A16"},
    "gguf": {"scheme": "Q8_0"},
    "calibrated": {"scheme": "W4A16", "method": "gptq", "samples": 2, "seqlen": 16, "allow_fallback": True},
}
_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 64,
    "max_position_embeddings": 256, "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
_RUN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
import lowbit
work, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
shapes = json.loads((work / "shapes.json").read_text())
torch.manual_seed(0)
weights = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
save_file(weights, work / "model.safetensors", {"format": "pt"})
(work / "shapes.json").unlink()
output = work.parent / sys.argv[3]
print(lowbit.quantize(work, output, **settings).report.totals.peak_memory_bytes)
"""
# Bytes that a run imports on top of lowbit's pipeline, measured with transformers 5.23 and the CPU build of torch 2.13;
# only those of "folder" once transformers' models are imported.
_LATER: dict[Kind, int] = {"folder": 15_000_000, "gguf": 95_000_000, "calibrated": 245_000_000}


def peak_memory(
    prepared: Prepared, program: int, max_memory: int | None = None
) -> dict[str, int]:  # fmt: skip
    """Part → bytes; they add up to the run's peak of resident memory.

    program     bytes without a model (`Process.program`, `measured_program`)
    max_memory  --max-memory: hidden states above it go to a file
    """
    settings, shape = prepared.plan.settings, source_shape(prepared)
    parts = {"program": program, "plan": _TENSOR * len(prepared.plan.tensors)}
    from_gguf, to_gguf = prepared.checkpoint.kind == "gguf", prepared.plan.format.suffix is not None
    if shape is not None and (from_gguf or to_gguf or settings.is_blockwise):
        per_token = _TOKEN_STORED if from_gguf else _TOKEN_WRITTEN if to_gguf else _TOKEN_PARSED
        parts["vocabulary"] = shape.vocab * per_token
    writing = {"slabs being written or verified": _writing(prepared)}
    architecture = prepared.plan.architecture
    if not settings.is_blockwise or shape is None or architecture is None:
        return parts | writing
    rewrites, compute = bool(parse_method(settings.method).transforms), compute_dtype(settings.compute)
    groups = settings.hessian_groups
    block = block_memory(architecture, compute, two_streams(settings), rewrites, groups, settings.feeds_rows)
    states = hidden_state_bytes(settings, shape)
    if groups:
        parts["weights of tokens"] = weights_memory(architecture, groups, settings.samples * settings.seqlen)
    if max_memory is not None:
        states = min(states, max(0, max_memory - sum(parts.values()) - sum(block.values())))
    method = parse_method(settings.method)
    if method.finish or method.learns_rotations:
        exact, samples = distillation_dtype(settings), settings.learned_windows if method.finish else settings.samples
        memory = rotation_memory if method.learns_rotations else distill_memory
        learning = memory(architecture, prepared.plan.targets, exact, samples, settings.seqlen).needed
        held = 2 * samples * settings.seqlen * shape.hidden * exact.itemsize
        if sum(learning.values()) + held > sum(block.values()) + states:
            return parts | learning | {"hidden states": held} | writing
    embedding = shape.vocab * shape.hidden * ((4 if from_gguf else 2) + compute.itemsize)
    # Calibration returns little memory to the system before files are written, so the slabs add to it.
    if sum(block.values()) < embedding:
        return parts | {"embeddings": embedding, "hidden states": states} | writing
    return parts | block | {"hidden states": states} | writing


def source_shape(prepared: Prepared) -> ModelShape | None:
    """The dimensions from the source's config; None if they are unknown; then calibrated methods cannot run."""
    config = prepared.checkpoint.config()  # empty of a GGUF file under its own names
    try:
        return shape_of(config) if config else shape_of_gguf(prepared.checkpoint.metadata)
    except ArchitectureError:
        return None


def hidden_state_bytes(settings: Settings, shape: ModelShape) -> int:
    """Bytes of all hidden states of a calibrated run; those that do not fit in memory go to a file."""
    dtype = compute_dtype(settings.compute)
    method = parse_method(settings.method)
    # The input of the last linear is kept, except for experts and if transforms measure a whole MLP at once.
    last = 0 if shape.experts or (method.transforms and not method.rounding.needs_hessian) else shape.intermediate
    width = shape.hidden * (4 if two_streams(settings) else 2) + last
    if settings.hessian_groups:  # the inputs of all blocks come before the streams, and are gone when these are there
        width = max(width, shape.layers * shape.hidden)
    return settings.samples * settings.seqlen * width * dtype.itemsize


def two_streams(settings: Settings) -> bool:
    """True if the unquantized model runs beside the quantized one."""
    method = parse_method(settings.method)
    needs_drift = method.rounding.needs_hessian and method.rounding.options_of(settings).needs_drift
    return method.learned is not None or needs_drift


def _writing(prepared: Prepared) -> int:
    """Bytes of the slabs in flight, the larger of writing and verifying."""
    plan, threads, tensors = prepared.plan, prepared.threads, prepared.plan.tensors
    slab = max(min(SLAB_WEIGHTS, max(t.weights for t in tensors)), max(t.columns for t in tensors))
    from_gguf = prepared.checkpoint.kind == "gguf"
    if plan.format.suffix is not None:
        mapped = max(tensor.source_bytes + tensor.stored_bytes for tensor in tensors)
        decoded = _DECODED_WEIGHT if from_gguf and plan.architecture is None else 0
        verifying = (os.cpu_count() or 1) * min(VERIFIED_WEIGHTS, slab) * _GGUF_WEIGHT + mapped
        return max(threads * slab * (_GGUF_WEIGHT + decoded), verifying)
    per_weight = _FOLDER_WEIGHT + (_DECODED_WEIGHT if from_gguf else 0)
    # Tensors that the format stores transposed are put together before they are written.
    turned = (s.nbytes for t in plan.quantized for s in t.stored if s.shape[:1] != t.rows_shape[:1])
    return threads * (slab * per_weight + min(max(turned, default=0), ASSEMBLED_BYTES))


class NotMeasuredError(LowbitError):
    """The measurement did not run."""


@dataclass(frozen=True)
class Process:
    """The memory of this process before it opens a model.

    resident  bytes
    models    True if transformers' models are already imported
    """

    resident: int
    models: bool

    @classmethod
    def now(cls) -> Process:
        return cls(resident_memory(), "transformers.modeling_utils" in sys.modules)

    def program(self, prepared: Prepared) -> int:
        """Peak resident bytes of the run in this process, without its model."""
        return self.resident + _LATER["folder" if self.models else _kind(prepared)]


def measured_program(prepared: Prepared) -> int:
    """The same for a process of its own, measured on first use; NotMeasuredError if the small run fails."""
    path, kind = cache_root() / "program-memory.json", _kind(prepared)
    known = _known(path)
    versions = [metadata.version(name) for name in ("torch", "transformers")]
    python = ".".join(map(str, sys.version_info[:2]))
    key = " ".join((kind, __version__, python, *versions, str(os.cpu_count())))
    if key not in known:
        _run(kind)
        known = _known(path) | {key: _run(kind)}
        _keep(path, known)
    return known[key]


def _kind(prepared: Prepared) -> Kind:
    if prepared.plan.settings.is_blockwise:
        return "calibrated"
    return "folder" if prepared.plan.format.suffix is None else "gguf"


def _run(kind: Kind) -> int:
    with tempfile.TemporaryDirectory(prefix="lowbit-program-") as made:
        work = Path(made) / "model"
        work.mkdir()
        _write_model(work)
        output = "out.gguf" if kind == "gguf" else "out"
        command = [sys.executable, "-c", _RUN, str(work), json.dumps(_SETTINGS[kind]), output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = done.stdout.strip().rpartition("\n")[2]
        if done.returncode or not last.isdigit():
            said = done.stderr.strip().rpartition("\n")[2]
            raise NotMeasuredError(f"the memory of the program itself could not be measured: {said}")
        return int(last)


def _write_model(work: Path) -> None:
    """config.json, tokenizer and shapes of a model of 100 kB. One token is new every time, so that the tokenizer does
    not come from the cache."""
    hidden = 128
    block = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": [320, hidden], "model.norm.weight": [hidden],
        **{f"{block}{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")},
        **{f"{block}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"},
        **{f"{block}mlp.{name}_proj.weight": [hidden, hidden] for name in ("gate", "up", "down")},
    }  # fmt: skip
    # Code points that stand for the bytes 0..255 in a byte-level vocabulary, as GPT-2 has them.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(point) for point in (*printable, *range(256, 512 - len(printable)))]
    new = f"<{Path(work).parent.name}>"
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", new, *letters])}
    added = [
        {"id": vocabulary[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for text in ("<s>", "</s>", new)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level, "truncation": None, "padding": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    files = {"shapes.json": shapes, "config.json": _CONFIG, "tokenizer.json": tokenizer, "tokenizer_config.json": about}
    for name, content in files.items():
        (work / name).write_text(json.dumps(content), encoding="utf-8")


def _known(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if type(v) is int} if isinstance(found, dict) else {}


def _keep(path: Path, known: dict[str, int]) -> None:
    """Write to a temporary file, then rename; on failure the next call measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known, file)
        os.replace(beside, path)
    except OSError:
        return
