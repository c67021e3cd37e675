"""Tiny random models of every known family, as Hugging Face folders, for tests."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import torch

# Sizes: in_features 64, 128 and 192 so that group 128 divides some and not others.
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 384, "max_position_embeddings": 256,
}  # fmt: skip
# A text of 6 kB. The packaged one is 420 kB, and tokenizing it takes longer than calibrating a tiny model with it.
# One block whose every shape fits every format: 256 divides all.
FITS_ALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 128}  # fmt: skip
SHORT_TEXT = str(Path(__file__).parent / "data" / "short.txt")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

_NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
_PLAIN = {"vocab_size": 384, "max_position_embeddings": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
          "hidden_size": 128}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 64, "first_k_dense_replace": 1, "topk_group": 1,
}  # fmt: skip
_EYE = {"hidden_size": 64, "intermediate_size": 128}

# Every architecture: name → (model_type, what its config has beside or instead of SIZES).
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SIZES),
    "falcon3": ("llama", {**SIZES, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "mistral": ("mistral", SIZES),
    "qwen2": ("qwen2", _NO_HEAD_DIM),
    "qwen2_moe": ("qwen2_moe", {**_NO_HEAD_DIM, **_EXPERTS, "shared_expert_intermediate_size": 128}),
    "qwen3": ("qwen3", SIZES),
    "qwen3_moe": ("qwen3_moe", {**SIZES, **_EXPERTS}),
    "gemma": ("gemma", SIZES),
    "gemma2": ("gemma2", SIZES),
    "gemma3_text": ("gemma3_text", SIZES),
    "gemma3": ("gemma3", {
        "text_config": SIZES, "mm_tokens_per_image": 4,
        "vision_config": {**_EYE, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }),
    "phi3": ("phi3", {**_NO_HEAD_DIM, "pad_token_id": 0}),
    "phi4": ("phi3", {**_NO_HEAD_DIM, "pad_token_id": 0, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", _NO_HEAD_DIM),
    "smollm3": ("smollm3", {**_NO_HEAD_DIM, "pad_token_id": 0}),
    "granite": ("granite", {**_NO_HEAD_DIM, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "glm": ("glm", {**SIZES, "pad_token_id": 0}),
    "glm4": ("glm4", {**SIZES, "pad_token_id": 0}),
    "cohere2": ("cohere2", _NO_HEAD_DIM),
    "stablelm": ("stablelm", {**_NO_HEAD_DIM, "use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {**_NO_HEAD_DIM, "use_parallel_residual": True, "qk_layernorm": True}),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4}),
    "deepseek_v2": ("deepseek_v2", {**_NO_HEAD_DIM, **_MLA, "n_group": 1}),
    "deepseek_v2_lite": ("deepseek_v2", {**_NO_HEAD_DIM, **_MLA, "n_group": 1, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {
        **_NO_HEAD_DIM, **_MLA, "n_group": 2, "num_nextn_predict_layers": 1, "topk_method": "noaux_tc",
    }),
    "gpt_oss": ("gpt_oss", {**SIZES, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 384, "n_positions": 256}),
    "opt": ("opt", {**_PLAIN, "ffn_dim": 256, "word_embed_proj_dim": 64}),
    "gpt_neox": ("gpt_neox", {**_PLAIN, "intermediate_size": 256}),
    "bloom": ("bloom", {"hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": 384}),
    "qwen2_5_vl": ("qwen2_5_vl", {
        "text_config": {**_NO_HEAD_DIM, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6],
                                                            "rope_theta": 10000.0}},
        "vision_config": {**_EYE, "depth": 1, "num_heads": 2, "out_hidden_size": 128, "patch_size": 14},
    }),
}  # fmt: skip


def config_of(architecture: str, **changes) -> dict:
    """config.json of a tiny model, parsed."""
    from transformers import AutoConfig

    model_type, sizes = ARCHITECTURES[architecture]
    return AutoConfig.for_model(model_type, **{**sizes, **changes}).to_dict()


# Models kept for copies → the state of torch's generator behind each.
_RANDOM_AFTER: dict[Path, torch.Tensor] = {}


def make_model(folder: Path, architecture: str | tuple[str, dict] = "llama", seed: int = 0,
               dtype: torch.dtype = torch.bfloat16, shard_size: str = "5GB", **changes) -> Path:  # fmt: skip
    """A random model whose weights are wide enough to tell rounding errors apart, saved with a tokenizer.

    Norms and biases are away from what a class gives them, so that a lost one shows.

    architecture  a key of `ARCHITECTURES`, or (model_type, what its config has)

    A process that has made the same model before copies it, where `LOWBIT_TEST_MODELS` names a folder to keep it in.
    """
    kept = os.environ.get("LOWBIT_TEST_MODELS")
    if kept is None or (folder.exists() and any(folder.iterdir())):
        return _made(folder, architecture, seed, dtype, shard_size, changes)
    name = sha256(repr((architecture, seed, dtype, shard_size, changes)).encode()).hexdigest()[:16]
    original = Path(kept) / f"{os.getpid()}-{name}"
    if original not in _RANDOM_AFTER:
        _made(original, architecture, seed, dtype, shard_size, changes)
        _RANDOM_AFTER[original] = torch.get_rng_state()
    torch.set_rng_state(_RANDOM_AFTER[original])  # what is drawn after a model does not depend on who made it first
    shutil.copytree(original, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return folder


def _made(folder: Path, architecture: str | tuple[str, dict], seed: int, dtype: torch.dtype, shard_size: str,
          changes: dict) -> Path:  # fmt: skip
    from transformers import AutoConfig

    from lowbit.architecture.building import auto_class

    torch.manual_seed(seed)
    model_type, sizes = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    model = auto_class(config).from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.06)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.06)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.01)
    model.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 bytes and three special tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
