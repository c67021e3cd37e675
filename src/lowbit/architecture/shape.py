"""`ModelShape`: the numbers of a config.json that determine memory and speed.

Names differ between model families (n_embd, n_layer, ffn_dim …) and hub configs omit defaults, so transformers' own
configuration class parses the config, if there is one; that builds no model and loads no weight. Configs of other model
types are read directly.

Refused: a config without the number of layers, the width or the number of heads; numbers that are not positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint.base import as_transformers_has_it, transformers_config
from lowbit.checkpoint.stated import MOST_WIDE, refuse_absurd
from lowbit.errors import ArchitectureError

# what → the names that config.json files have for it, the common one first
SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_head_kv", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    "window": ("sliding_window",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
    "expert_intermediate": ("moe_intermediate_size",),
    "shared_experts": ("n_shared_experts",),
    "latent_rank": ("kv_lora_rank",),
    "rope_dim": ("qk_rope_head_dim",),
    "nope_dim": ("qk_nope_head_dim",),
    "value_dim": ("v_head_dim",),
}
_MAXIMUM = 1 << 40
_TOKENS_OR_BLOCKS = ("context_length", "attention.sliding_window", "block_count")  # bounded elsewhere, or by nothing
_MOST_LAYERS = 10_000  # a shape has an entry for each; models have at most some hundreds


@dataclass(frozen=True)
class ModelShape:
    """
    hidden, heads, kv_heads, head_dim, intermediate, vocab   widths, in elements
    layers            decoder blocks
    tied              the output layer shares the embedding
    max_positions     the model's context length; None if config.json does not state it
    window            tokens that sliding layers look back; None where there are none
    layer_types       of every layer: "full_attention", "sliding_attention", "chunked_attention"
    chunk             tokens of a chunk, of chunked layers
    latent_rank, rope_dim, nope_dim, value_dim   of multi-head latent attention (MLA); None of other attention
    experts, experts_per_token, expert_intermediate, shared_experts   of mixtures; 0 in dense models
    dense_layers      number of dense layers before the mixtures
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    max_positions: int | None = None
    window: int | None = None
    layer_types: tuple[str, ...] = ()
    chunk: int | None = None
    latent_rank: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    value_dim: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_experts: int = 0
    dense_layers: int = 0

    @property
    def is_latent(self) -> bool:
        """True for multi-head latent attention."""
        return self.latent_rank is not None and self.rope_dim is not None

    @property
    def widest_mlp(self) -> int:
        """Columns of the widest MLP that one token goes through, in elements."""
        routed = self.expert_intermediate * (self.experts_per_token + self.shared_experts)
        return max(self.intermediate if self.dense_layers or not self.experts else 0, routed)


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape of a model, from its parsed config.json; of one that sees images, of its text model.

    Raises ArchitectureError where the numbers are absent or no positive integers, CheckpointError where no model is so
    large.
    """
    values = _complete(config)
    found: dict[str, Any] = {what: _number(values, names) for what, names in SPELLINGS.items()}
    refuse_absurd(config, "this model")
    for what in ("hidden", "layers", "heads"):
        if found[what] is None:
            raise ArchitectureError(
                f"config.json has no {SPELLINGS[what][0]}", "is it the config.json of a language model?"
            )
    hidden, heads, layers = found["hidden"], found["heads"], found["layers"]
    found["kv_heads"] = 1 if values.get("multi_query") else found["kv_heads"] or heads
    found["head_dim"] = found["head_dim"] or hidden // heads
    found["intermediate"] = found["intermediate"] or 4 * hidden
    found["vocab"] = found["vocab"] or 0
    experts = found["experts"] or 0
    return ModelShape(
        model_type=str(values.get("model_type") or config.get("model_type") or "unknown"),
        tied=bool(values.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        layer_types=_layer_types(values, layers, found["window"]),
        chunk=_number(values, ("attention_chunk_size",)),
        **{name: found[name] for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab",
                                         "max_positions", "window", "latent_rank", "rope_dim", "nope_dim",
                                         "value_dim")},
        experts=experts,
        experts_per_token=found["experts_per_token"] or 0 if experts else 0,
        expert_intermediate=(found["expert_intermediate"] or found["intermediate"]) if experts else 0,
        shared_experts=found["shared_experts"] or 0,
        dense_layers=_number(values, ("first_k_dense_replace",)) or 0,
    )  # fmt: skip


def shape_of_gguf(metadata: dict[str, Any]) -> ModelShape:
    """The shape of a model, from the key-values of its GGUF file, whatever its architecture.

    Where layers differ in heads the most of them count for all, and windows count where the file says which layers
    have them. Raises ArchitectureError where the numbers are absent, and for recurrent layers.
    """
    arch = str(metadata.get("general.architecture", ""))
    found = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    if any(key.startswith("ssm.") for key in found):
        raise ArchitectureError(f"{arch} has recurrent layers, whose state is no cache of keys and values")
    hidden, layers = _gguf_number(found, "embedding_length"), _gguf_number(found, "block_count")
    heads = _gguf_number(found, "attention.head_count")
    if not (hidden and layers and heads):
        raise ArchitectureError(f"{arch}: embedding_length, block_count and attention.head_count are needed")
    if layers > _MOST_LAYERS:
        raise ArchitectureError(
            f"block_count is {layers}; no model has so many layers",
            "the file is damaged; get it again from where it comes",
        )
    keys = _gguf_number(found, "attention.key_length") or hidden // heads
    values = _gguf_number(found, "attention.value_length") or keys
    rank = _gguf_number(found, "attention.kv_lora_rank") or None
    window = _gguf_number(found, "attention.sliding_window") or None
    experts = _gguf_number(found, "expert_count")
    intermediate = _gguf_number(found, "feed_forward_length") or 4 * hidden
    return ModelShape(
        arch, hidden, layers, heads, _gguf_number(found, "attention.head_count_kv") or heads, (keys + values) // 2,
        intermediate, len(metadata.get("tokenizer.ggml.tokens") or ()),
        max_positions=_gguf_number(found, "context_length") or None, window=window,
        layer_types=_gguf_layer_types(found, layers, window), latent_rank=rank,
        rope_dim=_gguf_number(found, "rope.dimension_count") if rank else None, experts=experts,
        experts_per_token=_gguf_number(found, "expert_used_count") if experts else 0,
        expert_intermediate=(_gguf_number(found, "expert_feed_forward_length") or intermediate) if experts else 0,
    )  # fmt: skip


def _gguf_number(found: dict[str, Any], key: str) -> int:
    """A number, the largest of a list of them, or 0."""
    value = found.get(key, 0)
    listed = list(value) if hasattr(value, "__len__") and not isinstance(value, str) else [value]
    numbers = [int(each) for each in listed if not isinstance(each, str | bool)]
    largest = max(numbers, default=0)
    if not 0 <= largest <= (_MAXIMUM if key in _TOKENS_OR_BLOCKS else MOST_WIDE):
        wrong = "no model has so many" if largest > 0 else "a positive integer is needed"
        raise ArchitectureError(f"{key} is {largest}; {wrong}", "the file is damaged; get it again from where it comes")
    return largest


def _gguf_layer_types(found: dict[str, Any], layers: int, window: int | None) -> tuple[str, ...]:
    full, sliding = "full_attention", "sliding_attention"
    pattern = found.get("attention.sliding_window_pattern")
    if window is None or pattern is None:
        return (full,) * layers
    if hasattr(pattern, "__len__"):
        slides = [bool(each) for each in pattern]
        return tuple(sliding if slides[layer % len(slides)] else full for layer in range(layers))
    period = max(1, int(pattern))  # every so many layers, the last one attends to everything
    return tuple(full if layer % period == period - 1 else sliding for layer in range(layers))


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's config with the defaults of its class, where transformers has one."""
    config = as_transformers_has_it(config)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    text = plain.get("text_config") if isinstance(plain.get("text_config"), dict) else None
    raw = {**plain, **(text or {})}
    try:
        parsed = transformers_config(plain).get_text_config(decoder=True)
        complete = parsed.to_dict()
    except Exception:  # a model type that transformers does not know, or whatever its validators raise
        return raw
    return {**complete, **({"multi_query": True} if getattr(parsed, "multi_query", False) else {})}


def _number(values: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAXIMUM:
            raise ArchitectureError(f"config.json: {name} is {value!r}; a positive integer is needed")
        if value:
            return value
    return None


def _layer_types(values: dict[str, Any], layers: int, window: int | None) -> tuple[str, ...]:
    """The attention type of each layer; by the rules of `transformers.cache_utils` if config.json lists none."""
    listed = values.get("layer_types")
    if isinstance(listed, list) and listed and all(isinstance(each, str) for each in listed):
        return tuple((listed * -(-layers // len(listed)))[:layers])
    if window is not None:
        return ("sliding_attention",) * layers
    if values.get("attention_chunk_size"):
        return ("chunked_attention",) * layers
    return ("full_attention",) * layers
