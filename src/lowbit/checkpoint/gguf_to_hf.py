"""GGUF names and layouts ↔ Hugging Face names and layouts, as data.

llama.cpp's converter renames every tensor and changes two kinds of values; both are undone here:

  rotary rows   arch `llama` (Llama, Mistral): rows of q and k are stored so that the two halves of a rotary pair are
                neighbours. Within a head of d rows, GGUF row 2i + h is Hugging Face row h·d/2 + i, with h in {0, 1}.
  norms         Gemma: stored as w + 1

Refused: architectures without a row in `ARCHITECTURES`, mixture-of-experts variants of those with one, a tensor that
has no place in the Hugging Face model, a layer with a tensor missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

from lowbit.checkpoint.gguf_header import GGUFTensor
from lowbit.errors import ArchitectureError, CheckpointError

T = MODEL_TENSOR

_DECODER = {
    T.TOKEN_EMBD: "model.embed_tokens",
    T.OUTPUT: "lm_head",
    T.OUTPUT_NORM: "model.norm",
    T.ATTN_NORM: "model.layers.{bid}.input_layernorm",
    T.ATTN_Q: "model.layers.{bid}.self_attn.q_proj",
    T.ATTN_K: "model.layers.{bid}.self_attn.k_proj",
    T.ATTN_V: "model.layers.{bid}.self_attn.v_proj",
    T.ATTN_OUT: "model.layers.{bid}.self_attn.o_proj",
    T.FFN_GATE: "model.layers.{bid}.mlp.gate_proj",
    T.FFN_UP: "model.layers.{bid}.mlp.up_proj",
    T.FFN_DOWN: "model.layers.{bid}.mlp.down_proj",
}
_PRE_NORM = _DECODER | {T.FFN_NORM: "model.layers.{bid}.post_attention_layernorm"}
_QK_NORM = {
    T.ATTN_Q_NORM: "model.layers.{bid}.self_attn.q_norm",
    T.ATTN_K_NORM: "model.layers.{bid}.self_attn.k_norm",
}
_SANDWICH_NORM = _DECODER | {
    T.ATTN_POST_NORM: "model.layers.{bid}.post_attention_layernorm",
    T.FFN_PRE_NORM: "model.layers.{bid}.pre_feedforward_layernorm",
    T.FFN_POST_NORM: "model.layers.{bid}.post_feedforward_layernorm",
}
_GEMMA_NORMS = frozenset(
    {T.ATTN_NORM, T.OUTPUT_NORM, T.ATTN_POST_NORM, T.FFN_PRE_NORM, T.FFN_POST_NORM, T.ATTN_Q_NORM, T.ATTN_K_NORM}
)
_QKV = frozenset({T.ATTN_Q, T.ATTN_K, T.ATTN_V})
_MLP = frozenset({T.FFN_GATE, T.FFN_UP, T.FFN_DOWN})

# Derived from the config, so the Hugging Face model has no such tensor.
DERIVED = frozenset({T.ROPE_FREQS, T.ATTN_ROT_EMBD})


def positive(metadata: dict[str, Any], key: str, where: str) -> int:
    """A key-value that must be one positive integer (some files hold one per layer, which has no counterpart)."""
    value = metadata.get(key)
    if type(value) is not int or value < 1:
        raise ArchitectureError(f"{where}: {key} is {str(value)[:80]}; one positive number is needed")
    return value


def _gemma3_config(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    """llama.cpp scales attention by 1/√head_dim, but in the 27B model (62 layers) by 1/√(width / heads)."""
    if metadata["gemma3.block_count"] != 62:
        return {"query_pre_attn_scalar": positive(metadata, "gemma3.attention.key_length", where)}
    width = positive(metadata, "gemma3.embedding_length", where)
    return {"query_pre_attn_scalar": width // positive(metadata, "gemma3.attention.head_count", where)}


@dataclass(frozen=True)
class GGUFArchitecture:
    """One row: how a GGUF architecture is spelled in Hugging Face.

    model_class    what config.json's `architectures` says
    names          tensor → Hugging Face module; `.weight` / `.bias` is kept
    biases         which tensors have a bias, in every layer → what config.json must say then
    rotary_pairs   tensors whose rows are permuted within a head
    plus_one       norms stored as w + 1
    config         what llama.cpp derives from the key-values and transformers would not
    """

    model_class: str
    names: dict[MODEL_TENSOR, str]
    biases: dict[frozenset[MODEL_TENSOR], dict[str, Any]]
    rotary_pairs: frozenset[MODEL_TENSOR] = frozenset()
    plus_one: frozenset[MODEL_TENSOR] = frozenset()
    config: Callable[[dict[str, Any], str], dict[str, Any]] = lambda metadata, where: {}


ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        "LlamaForCausalLM",
        _PRE_NORM,
        rotary_pairs=frozenset({T.ATTN_Q, T.ATTN_K}),
        biases={
            frozenset(): {},
            _QKV | {T.ATTN_OUT}: {"attention_bias": True},
            _MLP: {"mlp_bias": True},
            _QKV | {T.ATTN_OUT} | _MLP: {"attention_bias": True, "mlp_bias": True},
        },
    ),
    "qwen2": GGUFArchitecture("Qwen2ForCausalLM", _PRE_NORM, biases={_QKV: {}}),
    "qwen3": GGUFArchitecture(
        "Qwen3ForCausalLM",
        _PRE_NORM | _QK_NORM,
        biases={frozenset(): {}, _QKV | {T.ATTN_OUT}: {"attention_bias": True}},
    ),
    "gemma3": GGUFArchitecture(
        "Gemma3ForCausalLM",
        _SANDWICH_NORM | _QK_NORM,
        biases={frozenset(): {}},
        plus_one=_GEMMA_NORMS,
        config=_gemma3_config,
    ),
}


@dataclass(frozen=True)
class MappedTensor:
    """A stored tensor under its Hugging Face name, and what to undo on reading.

    hf_row_to_stored  which stored rows hold Hugging Face rows start..stop, int64 [stop - start]; None: the same rows
    minus_one         subtract 1
    """

    name: str
    stored: GGUFTensor
    hf_row_to_stored: Callable[[int, int], np.ndarray] | None = None
    minus_one: bool = False


@dataclass(frozen=True)
class MappedModel:
    architecture: GGUFArchitecture
    tensors: list[MappedTensor]
    derived: list[GGUFTensor]
    tied: bool
    config: dict[str, Any]  # what the tensors say about config.json


def map_to_hf(metadata: dict[str, Any], tensors: list[GGUFTensor], where: str) -> MappedModel:
    """Hugging Face names and layouts of every tensor; see the module's docstring for what is refused."""
    arch_name = metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(arch_name) if isinstance(arch_name, str) else None
    if architecture is None:
        raise ArchitectureError(
            f"{where}: GGUF architecture {arch_name!r} cannot be read",
            f"readable are {', '.join(ARCHITECTURES)}; for others use the safetensors checkpoint of the model",
        )
    experts = metadata.get(f"{arch_name}.expert_count", 0)
    if type(experts) is not int or experts > 0:
        raise ArchitectureError(
            f"{where}: {arch_name} with {experts} experts cannot be read from GGUF",
            "use the safetensors checkpoint of the model",
        )
    mapped: dict[tuple[MODEL_TENSOR, int | None, str], MappedTensor] = {}
    derived: list[GGUFTensor] = []
    kinds = {TENSOR_NAMES[kind]: kind for kind in DERIVED | architecture.names.keys()}
    for tensor in tensors:
        kind, layer, suffix = _parse_name(tensor.name, kinds)
        if kind in DERIVED:
            derived.append(tensor)
        elif kind is None:
            raise ArchitectureError(
                f"{where}: tensor {tensor.name!r} has no place in {architecture.model_class}",
                "use the safetensors checkpoint of the model",
            )
        else:
            mapped[kind, layer, suffix] = _undo_conversion(architecture, metadata, tensor, kind, layer, suffix, where)
    biased = frozenset(kind for kind, _, suffix in mapped if suffix == "bias")
    if biased not in architecture.biases:
        names = ", ".join(sorted(kind.name for kind in biased)) or "nothing"
        raise ArchitectureError(f"{where}: biases on {names}, which is not how {architecture.model_class} is built")
    _require_all_layers(architecture, biased, metadata.get(f"{arch_name}.block_count"), mapped, where)
    tied = (T.OUTPUT, None, "weight") not in mapped
    config = {"architectures": [architecture.model_class], "tie_word_embeddings": tied}
    config["vocab_size"] = mapped[T.TOKEN_EMBD, None, "weight"].stored.shape[0]
    config |= architecture.biases[biased] | architecture.config(metadata, where)
    if f"{arch_name}.attention.key_length" in metadata:
        config["head_dim"] = positive(metadata, f"{arch_name}.attention.key_length", where)
    return MappedModel(architecture, list(mapped.values()), derived, tied, config)


def _parse_name(name: str, kinds: dict[str, MODEL_TENSOR]) -> tuple[MODEL_TENSOR | None, int | None, str]:
    """(which tensor, or None where the architecture has no such name; layer or None; "weight" or "bias")."""
    stem, _, suffix = name.rpartition(".")
    layer = re.match(r"blk\.(0|[1-9]\d{0,5})\.", stem)
    pattern = stem if layer is None else f"blk.{{bid}}.{stem[layer.end() :]}"
    known = suffix in ("weight", "bias")
    return (kinds.get(pattern) if known else None), int(layer[1]) if layer else None, suffix


def _undo_conversion(
    architecture: GGUFArchitecture,
    metadata: dict[str, Any],
    tensor: GGUFTensor,
    kind: MODEL_TENSOR,
    layer: int | None,
    suffix: str,
    where: str,
) -> MappedTensor:
    name = f"{architecture.names[kind].format(bid=layer)}.{suffix}"
    dims = 1 if suffix == "bias" or "norm" in TENSOR_NAMES[kind] else 2
    if len(tensor.shape) != dims:
        raise CheckpointError(f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}; {dims}-d is needed")
    rows = None
    if kind in architecture.rotary_pairs:
        heads = _head_count(metadata, kind, where)
        if tensor.shape[0] % (2 * heads):
            raise CheckpointError(f"{where}: tensor {tensor.name!r} {list(tensor.shape)} is not {heads} heads of pairs")
        rows = _rotary_rows(tensor.shape[0] // heads)
    return MappedTensor(name, tensor, rows, minus_one=kind in architecture.plus_one)


def _rotary_rows(head_dim: int) -> Callable[[int, int], np.ndarray]:
    """Hugging Face rows start..stop → stored rows: h·d/2 + i of a head is stored at 2i + h."""

    def stored_rows(start: int, stop: int) -> np.ndarray:
        row = np.arange(start, stop)
        head, row_in_head = np.divmod(row, head_dim)
        half, pair = np.divmod(row_in_head, head_dim // 2)
        return head * head_dim + 2 * pair + half

    return stored_rows


def _head_count(metadata: dict[str, Any], kind: MODEL_TENSOR, where: str) -> int:
    """Heads of q or k; without grouped queries a file may leave the number for k out."""
    key = f"{metadata['general.architecture']}.attention.head_count"
    return positive(metadata, f"{key}_kv" if kind is T.ATTN_K and f"{key}_kv" in metadata else key, where)


def _require_all_layers(
    architecture: GGUFArchitecture, biased: frozenset[MODEL_TENSOR], block_count: Any, mapped: dict, where: str
) -> None:
    """Every weight and bias must be there for every layer, and no layer beyond the last."""
    layers = {layer for _, layer, _ in mapped if layer is not None}
    if type(block_count) is not int or layers != set(range(len(layers))) or len(layers) != block_count:
        raise CheckpointError(
            f"{where}: block_count is {block_count!r}, but tensors of {len(layers)} layers are in the file",
            "download the file again",
        )
    weights = [(kind, "weight") for kind in architecture.names if kind is not T.OUTPUT]
    for kind, suffix in weights + [(kind, "bias") for kind in biased]:
        for layer in sorted(layers) if "{bid}" in TENSOR_NAMES[kind] else [None]:
            if (kind, layer, suffix) not in mapped:
                missing = f"{TENSOR_NAMES[kind].format(bid=layer)}.{suffix}"
                raise CheckpointError(f"{where}: tensor {missing!r} is missing", "download the file again")
