"""Tiny random models of every architecture that GGUF knows, and a plain writer of what `describe_gguf` says."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch

import gguf_cases_dense
import gguf_cases_experts
import gguf_cases_hybrid
import gguf_cases_seeing
from lowbit.architecture import describe_checkpoint
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_safetensors
from lowbit.checkpoint.base import Checkpoint
from lowbit.formats.gguf.model import GGUFModel, describe_gguf
from models import make_model

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)], "original_max_position_embeddings": 256,
}  # fmt: skip
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 8}
_PLAIN = {"rope_type": "default", "rope_theta": 150000.0}

# name → (architecture of `models`, or model_type and sizes; changes to its config; general.architecture; the model_type
# that is read back, None where such a file is not read back)
Case = tuple[str | tuple[str, dict], dict, str, str | None]
CASES: dict[str, Case] = {
    "llama": ("llama", {}, "llama", "llama"),
    "llama3": ("llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}, "llama", "llama"),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}, "llama", "llama"),
    "llama_yarn": ("llama", {"rope_parameters": _YARN}, "llama", "llama"),
    "llama_yarn_attention": ("llama", {"rope_parameters": _YARN | {"attention_factor": 1.3}}, "llama", "llama"),
    "falcon3": ("falcon3", {}, "llama", "llama"),
    "mistral": ("mistral", {}, "llama", "llama"),
    "mixtral": ("mixtral", {}, "llama", "mixtral"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "qwen2", "qwen2"),
    "qwen2_moe": ("qwen2_moe", {}, "qwen2moe", "qwen2_moe"),
    "qwen3": ("qwen3", {"rope_parameters": _YARN}, "qwen3", "qwen3"),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}, "qwen3moe", "qwen3_moe"),
    "gemma": ("gemma", {"hidden_act": "gelu_pytorch_tanh"}, "gemma", "gemma"),
    "gemma2": ("gemma2", _GEMMA, "gemma2", "gemma2"),
    "gemma3_text": ("gemma3_text", _GEMMA | {"num_hidden_layers": 6}, "gemma3", "gemma3_text"),
    "gemma3_linear": ("gemma3_text", _GEMMA | {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}},
    }, "gemma3", "gemma3_text"),
    "phi3": ("phi3", {"sliding_window": 100}, "phi3", "phi3"),
    "phi3_longrope": ("phi3", {
        "rope_parameters": _LONGROPE, "original_max_position_embeddings": 256, "max_position_embeddings": 1024,
    }, "phi3", "phi3"),
    "phi4": ("phi4", {}, "phi3", "phi3"),
    "phi4_longrope": ("phi4", {
        "rope_parameters": _LONGROPE | {
            "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0] * 8, "partial_rotary_factor": 0.5,
        }, "original_max_position_embeddings": 256, "max_position_embeddings": 1024,
    }, "phi3", "phi3"),
    "olmo2": ("olmo2", {}, "olmo2", "olmo2"),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}, "smollm3", "smollm3"),
    "granite": ("granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.2}, "granite", "granite"),
    "gpt2": ("gpt2", {}, "gpt2", "gpt2"),
    "gpt_neox": ("gpt_neox", {}, "gptneox", "gpt_neox"),
    "gpt_neox_serial": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}, "gptneox",
                        "gpt_neox"),
    "gpt_oss": ("gpt_oss", {"rope_parameters": _PLAIN, "sliding_window": 8}, "gpt-oss", "gpt_oss"),
    "gpt_oss_yarn": ("gpt_oss", {"head_dim": 64}, "gpt-oss", "gpt_oss"),
    **gguf_cases_dense.CASES, **gguf_cases_experts.CASES, **gguf_cases_hybrid.CASES, **gguf_cases_seeing.CASES,
}  # fmt: skip
PUBLISHED, LLAMA_OPTIONS = gguf_cases_experts.PUBLISHED, gguf_cases_experts.LLAMA_OPTIONS
# The first case of each architecture.
ONE_OF_EACH = list({arch: case for case, (_, _, arch, _) in reversed(CASES.items())}.values())
READABLE = [case for case, (_, _, _, back) in CASES.items() if back is not None]
# Nats to transformers' log-probabilities. Everything is float32, but GELU, which llama.cpp looks up in a float16 table
# (and has no exact form of).
TOLERANCE = 2e-5
LOOSER = {case: 2e-3 for case in CASES if case.startswith(("gemma", "gpt2", "gpt_neox"))} | {
    "gpt_oss_yarn": 5e-3,  # the ends of YaRN's ramp are rounded to whole dimensions
    **gguf_cases_dense.LOOSER, **gguf_cases_experts.LOOSER, **gguf_cases_hybrid.LOOSER, **gguf_cases_seeing.LOOSER,
}  # fmt: skip


def make_case(folder: Path, case: str) -> Path:
    """The Hugging Face folder of a case, in bfloat16."""
    architecture, changes, _, _ = CASES[case]
    make_model(folder, architecture, **changes)
    if case in PUBLISHED:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | PUBLISHED[case]))
    return folder


def describe_folder(folder: Path) -> tuple[GGUFModel, Checkpoint]:
    """(what the GGUF file should hold, the checkpoint to read it from)."""
    architecture, checkpoint = describe_checkpoint(open_safetensors(folder), split_experts=True)
    return describe_gguf(checkpoint, architecture), checkpoint


def write_plain(model: GGUFModel, checkpoint: Checkpoint, path: Path) -> Path:
    """The model in F32, with a byte-level vocabulary, by the gguf package's writer."""
    writer = gguf.GGUFWriter(path, model.arch)
    for key, value in model.key_values.items():
        if key != "general.architecture":
            writer.add_key_value(key, *value)
    _add_vocabulary(writer, model.key_values[f"{model.arch}.vocab_size"][0])
    for tensor in model.tensors:
        rows = 1
        for size in tensor.shape[:-1]:
            rows *= size
        writer.add_tensor(tensor.name, tensor.read(checkpoint, 0, rows).float().reshape(tensor.shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prompt_and_logprobs(folder) -> tuple[list[int], torch.Tensor]:
    """(a random prompt, float64 log-probabilities after it); one that an ASCII letter follows, because llama.cpp holds
    back half a character and stops at the end of the text."""
    model = load_model(open_safetensors(folder))
    for seed in range(100):
        ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        if 3 <= int(logits.argmax()) < 97:
            return ids[0].tolist(), logits.double().log_softmax(-1)
    raise AssertionError("no prompt is followed by a letter")


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<unk>", *letters, "!!"]
    unused = [f"[PAD{index}]" for index in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + unused)
    writer.add_token_types([3, 3, 3] + [1] * (len(letters) + 1) + [5] * len(unused))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_add_bos_token(False)
