"""A tiny random model of every model type that transformers can build, as a Hugging Face folder.

A type's config starts from its class's defaults; every size in it is made small by rules on names of keys (`RULES`),
lists with an entry per layer are cut to one layer of each kind, and what no rule can know stands in tiny_type_rows.py.
So a new transformers brings its new types along, and only those with constraints of their own need a row.

Widths are multiples of 32, so that weights can be quantized in groups of 32.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiny_type_rows import DEFAULT, OWN_CLASS, exceptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Sizes:
    """What the sizes of a config become."""

    hidden: int = 128
    intermediate: int = 192
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 4
    expert: int = 64  # intermediate size of one expert
    rank: int = 64  # of a factored projection
    layers: int = 2  # at least
    vocabulary: int = 384
    positions: int = 512

    def of_tower(self) -> Sizes:
        """A tower (vision, audio, Q-Former) is narrower than the text model, so that the two cannot be confused."""
        return replace(self, hidden=self.hidden // 2, intermediate=128, heads=2, positions=64)

    def mrope_section(self, partial_rotary_factor: float) -> list[int]:
        """How many of the rotary pairs of a head turn with the position in time, height and width."""
        pairs = int(self.head_dim * partial_rotary_factor) // 2
        height = 3 * pairs // 8
        return [pairs - 2 * height, height, height]

    @property
    def inner(self) -> int:
        """Width inside a state-space block."""
        return 2 * self.hidden


TEXT = Sizes()

# Name of a key → what an integer under it becomes at most: a number, or a field of `Sizes`. The first that matches the
# whole name counts. Keys that no rule names stay as they are.
RULES: tuple[tuple[str, int | str], ...] = (
    # Derived from others by every config class that has them.
    (r"qk_head_dim|attn_hidden_size", "derived"),
    # Widths that two parts of a model share.
    (r"(out|text|projector|projection|image_text|decoder)_hidden_size|projection_dim|.*_output_dim|output_dim"
     r"|adapter_out_dim|projector_input_dim|.*_hidden_dim|backbone_hidden_size|hidden_size_global",
     "text.hidden"),
    (r"vision_hidden_size|encoder_hidden_size|adapter_in_dim", "tower.hidden"),
    # Widths.
    (r"(.*_)?head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_size|mamba_d_head|mamba_headdim|.*_dim_head",
     "head_dim"),
    (r"(moe|expert|shared_expert|shared_experts|moe_shared_expert|expert_ffn)_(intermediate|hidden)_size"
     r"|share_expert_dim|block_multiple_of|router_hidden_size", "expert"),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|d_ff|d_inner|dff|dim_ff|n_inner|mlp_dim|ffn_hidden_size"
     r"|feed_forward_size", "intermediate"),
    (r"(q|kv|o)_lora_rank|hc_lowrank|ple_embed_dim", "rank"),
    (r"laurel_rank|adapter_rank|gated_norm_rank|.*time_step_rank|mamba_dt_rank|hidden_size_per_layer_input", 32),
    (r"mamba_d_ssm", "inner"),
    (r"(.*_)?hidden_size|adapter_input_size|d_model|n_embd|emb_dim|embed_dim|embedding_dim|(.*_)?embedding_size"
     r"|lru_width|word_embed_proj_dim|hidden_dim", "hidden"),
    (r"(.*_)?state_size|mamba_d_state|(.*_)?chunk_size|sliding_window(_size)?|local_attention|index_topk|rotary_dim",
     16),
    # Numbers of things.
    (r"(.*_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|linear_num_key_heads|n_groups|o_groups",
     "kv_heads"),
    (r"mamba_n_heads|mamba_num_heads", "mamba_heads"),
    (r"(.*_)?attention_heads|(.*_)?num_heads|(.*_)?n_heads?|linear_num_value_heads|resampler_heads"
     r"|num_attention_heads_per_layer", "heads"),
    (r"(moe_)?num_experts|num_local_experts|n_routed_experts|ffn_num_experts|zero_expert_num", "experts"),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|n_group|num_expert_group", 2),
    (r"(num_|moe_num_|n_)?shared_experts|topk_group|first_k_dense_replace|num_dense_layers", 1),
    (r"num_hidden_layers|n_layers?|num_layers|((en|de)coder_)?layers|num_(en|de)coder_layers|depth|num_global_layers"
     r"|num_blocks|num_layers_per_stack|resampler_depth", "layers"),
    (r"vocab_size(_.*)?|.*_vocab_size|num_embeddings|encoder_hash_byte_group_vocab", "vocabulary"),
    (r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(.*_)?positions|context_length|seq_length",
     "positions"),
    (r"base_channels|latent_channels", 32),
    (r"hidden_sizes|(output|ext_pw_out|depthwise_separable_out|nemo_conv|post_conv_(in|mid|out))_channels?", "hidden"),
    (r"image_token_embed_dim", "text.hidden"),
    (r"num_position_embeddings|position_embedding_size|pos_emb_(height|width)|posemb_grid_size", 16),
)  # fmt: skip

# Keys of tokens, which must lie inside the vocabulary.
TOKENS = r".*token_(id|index)|.*token_ids|im_(start|end|newline)_id|image_patch_id|unpadded_vocab_size"
# Keys of lists that name layers by their number.
LAYER_NUMBERS = r".*(_ids|_idxs|_layers|_indices|_index(es)?)"
LAYER_COUNTS = r"num_hidden_layers|n_layers?|num_layers|depth"
# Configs inside a config that describe a text model; others describe towers.
TEXT_PARTS = r"text_config|llm_config|language_config|decoder|global_config|thinker_config"
# Keys that every config has and that do not describe the model.
NOT_SIZES = ("id2label", "label2id")


def model_types() -> dict[str, str]:
    """Every model type of transformers' mappings of causal and image-text-to-text models → its model class."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    both = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return dict(sorted(both.items()))


def tiny_config(model_type: str, sizes: Sizes = TEXT) -> PretrainedConfig:
    """The config of a tiny model."""
    from transformers import AutoConfig

    changes = _Shrinking(sizes).part(AutoConfig.for_model(model_type), sizes)
    return AutoConfig.for_model(model_type, **changes)


class _Shrinking:
    """One config on its way to a tiny one; `tokens` are the ids that were given to tokens outside the vocabulary."""

    def __init__(self, text: Sizes):
        self.text = text
        self.tower = text.of_tower()
        self.exceptions = exceptions(text)
        self.tokens: dict[int, int] = {}

    def part(self, part: PretrainedConfig, sizes: Sizes) -> dict[str, Any]:
        """The keys of a config, or of a config inside one, that have to change."""
        stored = {key: value for key, value in part.to_dict().items() if key not in NOT_SIZES}
        usual = _usual(part)
        changes: dict[str, Any] = {}
        for key, value in stored.items():
            if key == "per_layer_config":
                continue
            inner = getattr(part, key) if isinstance(value, dict) else None
            if inner is not None and hasattr(inner, "to_dict"):
                inside = self.part(inner, self.text if re.fullmatch(TEXT_PARTS, key) else self.tower)
                changes[key] = {"model_type": value["model_type"], **inside}
            elif not isinstance(value, dict):
                changes[key] = self.value(key, value, stored, sizes)
        changes |= self.rope(part, stored, sizes)
        changes |= self.layers(stored, changes, sizes)
        if isinstance(stored.get("image_size"), int) and isinstance(stored.get("patch_size"), int):
            changes["image_size"] = 4 * stored["patch_size"]
        changes |= self.exceptions.get(part.model_type, {})
        return {key: value for key, value in changes.items() if value is not DEFAULT and value != usual.get(key)}

    def value(self, key: str, value: Any, stored: dict[str, Any], sizes: Sizes) -> Any:
        if isinstance(value, list):
            if re.fullmatch(LAYER_NUMBERS, key):
                return value
            return [self.value(key, item, stored, sizes) for item in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if re.fullmatch(TOKENS, key):
            return value if value < 3 else self.tokens.setdefault(value, self.text.vocabulary - 1 - len(self.tokens))
        for pattern, size in RULES:
            if re.fullmatch(pattern, key):
                return self.size(size, value, stored, sizes)
        return value

    def size(self, size: int | str, value: int, stored: dict[str, Any], sizes: Sizes) -> Any:
        if size == "derived":
            return DEFAULT
        if size == "kv_heads" and stored.get("kv_lora_rank") is not None:  # all heads share what is stored of a token
            size = "heads"
        if size == "mamba_heads":
            size = sizes.inner // sizes.head_dim
        elif isinstance(size, str):
            owner, _, field = size.rpartition(".")
            size = int(getattr(getattr(self, owner) if owner else sizes, field))
        return min(size, value)

    def rope(self, part: PretrainedConfig, stored: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Where positions have several axes, how many rotary pairs of a head belong to each."""
        rope = stored.get("rope_parameters")
        if not rope or "mrope_section" not in getattr(part, "ignore_keys_at_rope_validation", ()):
            return {}
        if "mrope_section" in rope or "rope_type" in rope:
            section = sizes.mrope_section(rope.get("partial_rotary_factor", 1.0))
            return {"rope_parameters": {**rope, "mrope_section": section}}
        return {}

    def layers(self, stored: dict[str, Any], changes: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
        """The number of layers, and every list that says something of each of them, with one layer of each kind."""
        counts = [key for key, value in stored.items() if re.fullmatch(LAYER_COUNTS, key) and isinstance(value, int)]
        if not counts:
            return {}
        total = max(stored[key] for key in counts)
        lists = {key: value for key, value in stored.items() if isinstance(value, list) and value}
        numbers = {
            key: value for key, value in lists.items()
            if re.fullmatch(LAYER_NUMBERS, key) and all(isinstance(item, int) for item in value)
            and value == sorted(set(value)) and value[-1] < total
        }  # fmt: skip
        kinds = {key: value for key, value in lists.items() if len(value) == total and key not in numbers}
        single = stored.get("per_layer_config") or {}
        single = {int(layer): config for layer, config in single.items()}
        chosen: dict[tuple, int] = {}
        for layer in range(total):
            kind = [str(value[layer]) for value in kinds.values()] + [layer in value for value in numbers.values()]
            chosen.setdefault((*kind, str(single.get(layer))), layer)
        others = [layer for layer in range(total) if layer not in chosen.values()]
        layers = sorted([*chosen.values(), *others][: max(len(chosen), min(sizes.layers, total))])
        made: dict[str, Any] = dict.fromkeys(counts, len(layers))
        for key in kinds:
            made[key] = [changes.get(key, stored[key])[layer] for layer in layers]
        for key, value in numbers.items():
            made[key] = [place for place, layer in enumerate(layers) if layer in value]
        if single:
            made["per_layer_config"] = {
                str(place): {key: self.value(key, value, stored, sizes) for key, value in single[layer].items()}
                for place, layer in enumerate(layers) if layer in single
            }  # fmt: skip
        return made


def _usual(part: PretrainedConfig) -> dict[str, Any]:
    """What the class of a config gives its keys: a config inside another may have defaults of its own."""
    try:
        return type(part)().to_dict()
    except Exception:  # whatever a class raises that cannot be made without its keys
        return part.to_dict()


def factory(config: PretrainedConfig) -> Any:
    """The auto class whose models have all parts of a config: some causal classes take only its text part."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if type(config) in AutoModelForImageTextToText._model_mapping:
        of_text: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
        if of_text is None or of_text.config_class is not type(config):
            return AutoModelForImageTextToText
    return AutoModelForCausalLM


def make_tiny(folder: Path, model_type: str, sizes: Sizes = TEXT, seed: int = 0) -> Path:
    """A tiny random model of a type in bfloat16 with a tokenizer, under the names of the hub."""
    from models import make_tokenizer

    model = build_tiny(model_type, sizes, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def build_tiny(model_type: str, sizes: Sizes = TEXT, seed: int = 0) -> Any:
    """The model in float32, with weights that bfloat16 holds and wide enough that rounding errors show in logits.

    What a class sets to a constant (norms, biases) is moved away from it, so that a lost one shows.
    """
    import transformers

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(model_type, sizes)
        own = OWN_CLASS.get(model_type)
        model = factory(config).from_config(config) if own is None else getattr(transformers, own)(config)
        model = model.eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() > 0:
                parameter.normal_(0.0, 0.06)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.06)
            parameter.copy_(parameter.bfloat16().float())
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.01)
    return model
