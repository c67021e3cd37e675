"""Gemma 3n: four streams of states of which blocks compute one (AltUp), a low-rank residual beside attention (LAuReL),
embeddings for every block, keys and values that later blocks share.

llama.cpp has the sizes built in: four streams, a rank of 64, 256 numbers per block and token, twenty blocks with keys
and values of their own, ten with sparse activations. Their cut is mean + 1.645 std; llama.cpp takes the deviation of a
sample, n - 1, where transformers takes n.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families.common import (
    BOOL,
    FLOAT,
    KEYS,
    MLP,
    NO_ATTENTION_BIAS,
    O_PROJ,
    QK_NORM,
    QKV_PLACES,
)
from lowbit.formats.gguf.keys import FULL, PATTERN, SLIDING
from lowbit.formats.gguf.layout import Lookup, RowLayout
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope

_OWN_KEYS, _SPARSE, _PERIOD = 20, 10, 5  # blocks with keys and values, with sparse activations, from full to full
# transformers saves the text model alone under these names too.
_STEM = "model.language_model."


def _built_in(get: Lookup) -> dict[str, Any]:
    blocks, widths = get("num_hidden_layers"), get("intermediate_size")
    sparse = min(blocks, _SPARSE)
    built_in = {
        "num_kv_shared_layers": max(blocks - _OWN_KEYS, 0),
        "activation_sparsity_pattern": [0.95] * sparse + [0.0] * (blocks - sparse),
        "layer_types": [FULL if block % _PERIOD == _PERIOD - 1 else SLIDING for block in range(blocks)],
    }
    return built_in | ({"intermediate_size": [widths[0]] * blocks} if isinstance(widths, list) else {})


def _cuts(get: Lookup) -> list[float]:
    """How many standard deviations above the mean an activation is cut; the least number where none is, for -inf."""
    shares = torch.tensor(get("activation_sparsity_pattern"), dtype=torch.float32)
    cuts = torch.distributions.Normal(0.0, 1.0).icdf(shares)
    return cuts.clamp(min=torch.finfo(torch.float32).min).tolist()


def _shared_blocks(get: Lookup) -> dict[str, tuple[int, ...]]:
    """Keys and values of blocks that share those of others: the loader asks for them, nothing is computed with them."""
    width, head = get("hidden_size"), get("head_dim")
    rows, blocks = get("num_key_value_heads") * head, get("num_hidden_layers")
    shapes = {"attn_k": (rows, width), "attn_v": (rows, width), "attn_k_norm": (head,)}
    shared = range(blocks - get("num_kv_shared_layers"), blocks)
    return {f"blk.{block}.{name}.weight": shape for block in shared for name, shape in shapes.items()}


def _every_token(get: Lookup, count: int) -> np.ndarray:
    """Tokens beyond the table, those of images and sounds, have its first row."""
    tokens = get("vocab_size")
    if count > tokens:
        raise ValueError(f"{count} rows are more than the {tokens} tokens of the vocabulary")
    return np.concatenate([np.arange(count), np.zeros(tokens - count, np.int64)])


def _of_file(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"vocab_size_per_layer_input": len(metadata.get("tokenizer.ggml.tokens", ()))}


def _streams_beside_the_first(get: Lookup) -> int:
    return get("altup_num_inputs") - 1


_GEMMA3N_TEXT = GGUFArchitecture(
    "gemma3n_text", "Gemma3nForCausalLM", "gemma3n", f"{_STEM}layers",
    {
        f"{_STEM}embed_tokens": Place(T.TOKEN_EMBD),
        f"{_STEM}norm": Place(T.OUTPUT_NORM),
        "lm_head": Place(T.OUTPUT),
        f"{_STEM}altup_projections.*": Place(T.ALTUP_PROJ, count=_streams_beside_the_first),
        f"{_STEM}altup_unembed_projections.*": Place(T.ALTUP_UNEMBD_PROJ, count=_streams_beside_the_first),
        f"{_STEM}embed_tokens_per_layer": Place(
            T.PER_LAYER_TOKEN_EMBD, RowLayout("a row for every token", rows=_every_token)
        ),
        f"{_STEM}per_layer_model_projection": Place(T.PER_LAYER_MODEL_PROJ),
        f"{_STEM}per_layer_projection_norm": Place(T.PER_LAYER_PROJ_NORM),
    },
    {
        "input_layernorm": Place(T.ATTN_NORM), **QKV_PLACES, **O_PROJ, **QK_NORM,
        "post_attention_layernorm": Place(T.ATTN_POST_NORM),
        "pre_feedforward_layernorm": Place(T.FFN_PRE_NORM), **MLP,
        "post_feedforward_layernorm": Place(T.FFN_POST_NORM),
        "per_layer_input_gate": Place(T.PER_LAYER_INP_GATE),
        "per_layer_projection": Place(T.PER_LAYER_PROJ),
        "post_per_layer_input_norm": Place(T.PER_LAYER_POST_NORM),
        "altup.correction_coefs": Place(T.ALTUP_CORRECT_COEF),
        "altup.correct_output_scale": Place(T.ALTUP_CORRECT_SCALE, bare=True),
        "altup.prediction_coefs": Place(T.ALTUP_PREDICT_COEF),
        "altup.modality_router": Place(T.ALTUP_ROUTER),
        "altup.router_norm": Place(T.ALTUP_ROUTER_NORM),
        "laurel.linear_left": Place(T.LAUREL_L),
        "laurel.linear_right": Place(T.LAUREL_R),
        "laurel.post_laurel_norm": Place(T.LAUREL_POST_NORM),
    },
    (*(key for key in KEYS if key.name != "feed_forward_length"),
     Key("feed_forward_length", "intermediate_size", one_of_all=True),
     # llama.cpp has these built in; Ollama reads them
     Key("altup.active_idx", "altup_active_idx", default=0, zero=True),
     Key("altup.num_inputs", "altup_num_inputs", default=4),
     Key("embedding_length_per_layer_input", "hidden_size_per_layer_input", default=256),
     Key("attention.shared_kv_layers", value=lambda get: get("num_kv_shared_layers")),
     Key("activation_sparsity_scale", value=_cuts, kind=FLOAT),
     Key(PATTERN, value=lambda get: [kind == SLIDING for kind in get("layer_types")], kind=BOOL)),
    biases=NO_ATTENTION_BIAS,
    fixed={"hidden_activation": ("gelu_pytorch_tanh", "gelu_new"), "altup_active_idx": (0,), "altup_num_inputs": (4,),
           "altup_correct_scale": (True,), "laurel_rank": (64,), "hidden_size_per_layer_input": (256,),
           "final_logit_softcapping": (30.0,)},
    implied=_built_in, rope=Rope(("default",), local=True), window_period=_PERIOD, window_default=512,
    from_file=_of_file, unread=_shared_blocks,
)  # fmt: skip
_GEMMA3N = replace(
    _GEMMA3N_TEXT, model_type="gemma3n", model_class="Gemma3nForConditionalGeneration", read_back=False,
    left_out=("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
)  # fmt: skip

ROWS = (_GEMMA3N_TEXT, _GEMMA3N)
