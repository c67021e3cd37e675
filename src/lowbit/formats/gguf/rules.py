"""The rules of llama.cpp: does it load this GGUF file, and is every weight right?

They follow llama.cpp's loader (src/llama-model-loader.cpp, llama-model.cpp, llama-vocab.cpp) and, for the values, its
--check-tensors. Names and shapes are checked against the table of architectures in llama.cpp's `gguf` package. Given
the source, every tensor is decoded and compared.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gguf.constants import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    MODEL_TENSORS,
    TENSOR_NAMES,
)

from lowbit.formats.gguf.mmproj.rules import RULES as TOWER_RULES
from lowbit.formats.gguf.names import missing_tokens
from lowbit.formats.gguf.nearest_codes import check_nearest
from lowbit.formats.gguf.stated_shapes import denied_shape, named_pattern
from lowbit.formats.gguf.stated_values import check_same_computation
from lowbit.formats.gguf.table import DERIVED, ROWS
from lowbit.formats.gguf.tokenizer import NO_TOKENIZER
from lowbit.formats.gguf.weight_scales import applies_scale, why_not_applied
from lowbit.numerics.ggml import TYPES
from lowbit.verification.checksums import check_checksums, error_bound
from lowbit.verification.result import GGUF, GGUF_FILES, Finding, Rule

if TYPE_CHECKING:
    from lowbit.formats.gguf.header import GGUFTensor
    from lowbit.formats.gguf.subject import GGUFSubject

# What the loader takes and the package's table lacks: the output of rerankers.
_LOADED_TOO = {"qwen3": (MODEL_TENSOR.CLS_OUT,)}
_ARCHITECTURES: dict[str, MODEL_ARCH] = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
# The package is older than some architectures, and lacks tensors of others that the loader takes.
_ROWS: dict[str, set[MODEL_TENSOR]] = {}
for _row in ROWS:
    _ROWS.setdefault(_row.arch, set()).update(kind for kind, _ in _row.places)
_NEEDED_KEYS = ("context_length", "embedding_length", "block_count")
_TOKENIZER_MODELS = ("llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4")
_MERGING = ("gpt2", "gemma4")
_TOKEN_ID = re.compile(r"tokenizer\.ggml\.[a-z_]+_token_id")
# ‖W − Ŵ‖ / ‖W‖ by bits per weight: far above what encoding costs, far below what foreign weights do (√2)
_LARGEST_ERROR = ((2.2, 1.0), (3.2, 0.85), (4.6, 0.7), (5.6, 0.5), (6.6, 0.35), (8.6, 0.15), (16.0, 0.02), (33.0, 1e-6))
# A requantized GGUF has its names and key-values from the source, so these rules may fail because of the source.
INHERITED = ("gguf-architecture", "gguf-tensors", "gguf-shapes", "gguf-scales", "gguf-tokenizer")


def check_file(subject: GGUFSubject) -> Finding:
    """The container parses: magic, version, counts, alignment, no overlaps, nothing beyond the end, all parts."""
    raw = subject.raw
    parts = f"{len(raw.files)} parts" if len(raw.files) > 1 else "one file"
    return Finding([], f"{len(raw.tensors)} tensors in {parts}")


def check_written_bytes(subject: GGUFSubject) -> Finding:
    """The files are, to the bit, those that lowbit wrote."""
    return check_checksums(subject.folder.parent, subject.checksums, subject.raw.holders)


def check_architecture(subject: GGUFSubject) -> Finding:
    """general.architecture is one that llama.cpp knows, and the numbers it always needs are there."""
    arch, metadata = subject.arch, subject.raw.metadata
    if arch not in _ARCHITECTURES and arch not in _ROWS:
        return Finding([f"general.architecture is {arch!r}, which llama.cpp does not know"], "")
    missing = [f"{arch}.{key}" for key in _NEEDED_KEYS if not isinstance(metadata.get(f"{arch}.{key}"), int)]
    return Finding([f"{key} is missing, or no number" for key in missing], f"{arch}, {subject.block_count} blocks")


def check_tensors(subject: GGUFSubject) -> Finding:
    """Every tensor has a name of this architecture, every block has the same ones, none is missing outside."""
    if subject.arch not in _ARCHITECTURES and subject.arch not in _ROWS:
        return Finding([], "nothing to compare with: the architecture is not known")
    kinds = set(_LOADED_TOO.get(subject.arch, ())) | _ROWS.get(subject.arch, set())
    kinds |= set(MODEL_TENSORS[_ARCHITECTURES[subject.arch]]) if subject.arch in _ARCHITECTURES else DERIVED
    known = {TENSOR_NAMES[kind] for kind in kinds}
    problems, blocks = [], {}
    for tensor in subject.raw.tensors:
        pattern, block = named_pattern(tensor.name)
        if pattern not in known:
            problems.append(
                f"{tensor.name}: {subject.arch} has no such tensor; llama.cpp loads none it does not expect"
            )
        if block is not None:
            blocks.setdefault(block, set()).add(pattern)
    if len(blocks) != subject.block_count or any(block >= len(blocks) for block in blocks):
        problems.append(f"tensors are of blocks {_brief(sorted(blocks))}, block_count is {subject.block_count}")
    names = {tensor.name for tensor in subject.raw.tensors}
    for needed in ("token_embd.weight", "output_norm.weight"):
        if needed.removesuffix(".weight") in known and needed not in names:
            problems.append(f"{needed} is missing")
    return Finding(problems, f"{len(names)} tensors, all of them names of {subject.arch}")


def check_shapes(subject: GGUFSubject) -> Finding:
    """The embedding and what reads the hidden state are as wide as embedding_length; heads and MLPs are as large as the
    key-values state."""
    metadata, problems = subject.raw.metadata, []
    width = metadata.get(f"{subject.arch}.embedding_length")
    if not isinstance(width, int):
        return Finding([], "nothing to compare with: embedding_length is not stated")
    for tensor in subject.raw.tensors:
        pattern, block = named_pattern(tensor.name)
        if not tensor.name.endswith(".weight"):
            continue
        reads_hidden = pattern in ("token_embd", "output", "blk.{bid}.attn_q", "blk.{bid}.ffn_up", "blk.{bid}.ffn_gate")
        if reads_hidden and tensor.shape[-1:] != (width,):
            problems.append(f"{tensor.name}: rows of {tensor.shape[-1]}, embedding_length is {width}")
        denied = denied_shape(subject.arch, metadata, pattern, block, tensor.shape) if subject.arch in _ROWS else ""
        problems += [f"{tensor.name}: {denied}"] if denied else []
    return Finding(problems, f"widths, heads and MLPs are those stated; embedding_length {width}")


def check_types(subject: GGUFSubject) -> Finding:
    """Types are ones that llama.cpp has kernels for; files with quantized ones state their version."""
    known = set(TYPES) | {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}
    problems = [f"{t.name}: {t.type_name}" for t in subject.raw.tensors if t.type_name not in known]
    quantized = [t for t in subject.raw.tensors if t.type_name in TYPES and TYPES[t.type_name].family != "plain"]
    version = subject.raw.metadata.get("general.quantization_version")
    if quantized and version != GGML_QUANT_VERSION:
        problems.append(
            f"general.quantization_version is {version!r}; {GGML_QUANT_VERSION} is what these blocks are of"
        )
    used = sorted({tensor.type_name for tensor in subject.raw.tensors})
    return Finding(problems, f"types: {', '.join(used)}")


def check_scales(subject: GGUFSubject) -> Finding:
    """Scales of NVFP4 matrices are ones that llama.cpp's graph of the architecture multiplies by."""
    raw, names = subject.raw, {tensor.name for tensor in subject.raw.tensors}
    problems = [
        f"{scale.name}: {why_not_applied(subject.arch, weight)}"
        for weight, scale in raw.weight_scales.items()
        if not applies_scale(subject.arch, weight, names)
    ]
    return Finding(problems, f"{len(raw.weight_scales)} NVFP4 matrices have a scale")


def check_tokenizer(subject: GGUFSubject) -> Finding:
    """The tokenizer is of a known kind; its lists agree with each other and with the rows of the embedding."""
    metadata = subject.raw.metadata
    model = metadata.get("tokenizer.ggml.model")
    embedding = next((t for t in subject.raw.tensors if t.name == "token_embd.weight"), None)
    if model in NO_TOKENIZER:
        return _without_tokenizer(metadata.get(f"{subject.arch}.vocab_size"), embedding)
    if model not in _TOKENIZER_MODELS:
        return Finding([f"tokenizer.ggml.model is {model!r}, which llama.cpp does not know"], "")
    problems, count = [], _length(metadata.get("tokenizer.ggml.tokens"))
    for key in ("scores", "token_type"):
        found = metadata.get(f"tokenizer.ggml.{key}")
        if found is not None and _length(found) < count:
            problems.append(f"tokenizer.ggml.{key} has {_length(found)} entries for {count} tokens")
    if model in _MERGING and "tokenizer.ggml.merges" not in metadata:
        problems.append("tokenizer.ggml.merges is missing")
    for key, value in metadata.items():
        if _TOKEN_ID.fullmatch(key) and (type(value) is not int or not 0 <= value < max(1, count)):
            problems.append(f"{key} is {value!r}, there are {count} tokens")
    if embedding is not None and embedding.shape[0] != count:
        problems.append(f"token_embd.weight has {embedding.shape[0]} rows for {count} tokens")
    return Finding(problems, f"{model}, {count} tokens")


def _without_tokenizer(stated: Any, embedding: GGUFTensor | None) -> Finding:
    """A file that takes token ids alone: the stated size of the vocabulary is that of the embedding."""
    rows = None if embedding is None else embedding.shape[0]
    wrong = rows is not None and stated != rows
    problem = f"token_embd.weight has {rows} rows, the stated vocab_size is {stated!r}, and there is no tokenizer"
    return Finding([problem] if wrong else [], "there is none, and the size of the vocabulary is stated")


def check_text(subject: GGUFSubject) -> Finding:
    """There is a tokenizer. llama.cpp's library loads a file without one, and its programs stop at the first text."""
    if subject.raw.metadata.get("tokenizer.ggml.model") not in NO_TOKENIZER:
        return Finding([], "llama-server and llama-cli take text")
    return Finding(["there is no tokenizer, and llama-server and llama-cli stop without one; programs that call the "
                    "library with token ids can use it"], "")  # fmt: skip


def check_name(subject: GGUFSubject) -> Finding:
    """The vocabulary has the tokens that llama.cpp looks up because of general.name (phi3, modern-bert)."""
    name, tokens = str(subject.raw.metadata.get("general.name", "")), subject.raw.metadata.get("tokenizer.ggml.tokens")
    missing = missing_tokens(name, tokens if isinstance(tokens, list) else None)
    problem = f"general.name is {name!r}, for which llama.cpp looks up {missing!r}, and there is no such token"
    return Finding([] if missing is None else [problem], "it makes llama.cpp look up no token that is absent")


def check_finite(subject: GGUFSubject) -> Finding:
    """No scale and no weight is NaN or inf."""
    return Finding(subject.survey.not_finite, f"{len(subject.raw.tensors)} tensors decoded")


def check_weights(subject: GGUFSubject) -> Finding:
    """The relative error of every decoded tensor is within the bound of its bits."""
    problems, errors = [], subject.survey.relative_errors
    for name, error in errors.items():
        kind = TYPES.get(subject.type_of(name))
        bound = next(limit for bits, limit in _LARGEST_ERROR if kind is None or kind.bits_per_weight <= bits)
        bound = error_bound(bound, subject.errors_left.get(name))
        if not error <= bound:
            problems.append(
                f"{name}: relative error {error:.3g} of the weights; at most {bound:.3g} in {kind and kind.name}"
            )
    problems += [f"{name}: is not in the source" for name in subject.survey.without_source]
    worst = max(errors, key=lambda name: errors[name], default="")
    return Finding(problems, f"{len(errors)} tensors; the worst is {worst}, {100 * errors.get(worst, 0):.3g} % off")


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") and not isinstance(value, str) else 0


def _brief(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]} ({len(numbers)})" if numbers else "none"


RULES: tuple[Rule, ...] = (
    Rule("gguf-file", "files", GGUF_FILES, "the container parses; all parts are there, whole, and nothing overlaps",
         check_file, "gguf_init_from_file_impl of ggml/src/gguf.cpp; llama-model-loader.cpp", gate=True),
    Rule("gguf-checksums", "files", GGUF_FILES, "the files are, to the bit, those that lowbit wrote",
         check_written_bytes, "our own: SHA-256 of each MiB, in the report", needs_checksums=True, then="misreads"),
    Rule("gguf-architecture", "model", (GGUF,), "the architecture is known and its sizes are stated",
         check_architecture, "load_arch, load_hparams of llama-model.cpp"),
    Rule("gguf-tensors", "format", (GGUF,), "tensors are those of the architecture, in every block", check_tensors,
         "done_getting_tensors of llama-model-loader.cpp"),
    Rule("gguf-shapes", "format", (GGUF,), "widths, heads and MLPs are those that are stated", check_shapes,
         "check_tensor_dims of llama-model-loader.cpp"),
    Rule("gguf-types", "format", GGUF_FILES, "types are known and the version of quantization is stated", check_types,
         "ggml.h, enum ggml_type; GGML_QNT_VERSION"),
    Rule("gguf-scales", "format", (GGUF,), "scales beside NVFP4 matrices are ones that the graph applies", check_scales,
         "build_lora_mm of llama-graph.cpp and its callers in src/models", then="misreads"),
    Rule("gguf-tokenizer", "format", (GGUF,), "the tokenizer's lists agree, and with the embedding", check_tokenizer,
         "llama_vocab::impl::load of llama-vocab.cpp"),
    Rule("gguf-name", "format", (GGUF,), "the name asks for no token that the vocabulary lacks", check_name,
         "llama_vocab::impl::load of llama-vocab.cpp: token_to_id.at"),
    Rule("gguf-text", "limits", (GGUF,), "there is a tokenizer, which llama.cpp's programs need", check_text,
         "GGML_ASSERT(type != LLAMA_VOCAB_TYPE_NONE) of token_to_piece, llama-vocab.cpp", limit=True),
    Rule("gguf-key-values", "values", GGUF_FILES, "key-values state the computation of the source",
         check_same_computation, "our own: no weight shows another rope_theta", needs_source=True),
    Rule("gguf-finite", "values", GGUF_FILES, "no weight is NaN or inf", check_finite,
         "ggml_validate_row_data (--check-tensors)"),
    Rule("gguf-weights", "values", GGUF_FILES, "every tensor is as near to its source as its bits allow", check_weights,
         "our own: what no format allows", needs_source=True, compares_weights=True),
    Rule("gguf-nearest-codes", "values", (GGUF,), "every code is the nearest one to the source's weight", check_nearest,
         "our own: round to nearest", needs_source=True, needs_nearest=True),
    *TOWER_RULES,
)  # fmt: skip
