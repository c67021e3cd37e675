"""Tiny random models of every family as Hugging Face folders, and a checkpoint in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from lowbit.checkpoint.base import Checkpoint, TensorInfo, read_config

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip

CONFIGS = {
    "llama": LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=16, layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
    ),
}  # fmt: skip


def byte_tokenizer(add_bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token per byte (0..255), 256 BOS, 257 EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
    )


def save_model(folder: Path, family: str, seed: int = 0, add_bos: bool = False, chat_template: str | None = None):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases away from what a class initialises
            parameter.normal_(0.5 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    byte_tokenizer(add_bos, chat_template).save_pretrained(folder)
    return model


class FakeCheckpoint(Checkpoint):
    """The Checkpoint contract over tensors in memory; counts what is read to show that reading streams."""

    kind = "safetensors"

    def __init__(self, tensors: dict, folder: Path, schemes=None, input_scales=None):
        self.values = tensors
        self.folder = folder
        self.source = str(folder)
        self.metadata: dict = {}
        self.notes: list = []
        self.released: list = []
        self.largest_read = 0
        self.schemes, self._input_scales = schemes or {}, input_scales or {}
        file = next(folder.glob("*.safetensors"))
        self.tensors = {
            name: TensorInfo(name, tuple(value.shape), value.dtype, "F32", value.nbytes, file)
            for name, value in tensors.items()
        }

    def rename(self, old: str, new: str) -> None:
        self.values[new] = self.values.pop(old)
        self.tensors[new] = replace(self.tensors.pop(old), name=new)

    def config(self):

        return read_config(self.folder)

    def read(self, name, start=0, stop=None):
        value = self.values[name]
        rows = value[start:stop] if value.ndim else value
        self.largest_read = max(self.largest_read, rows.nbytes)
        return rows

    def release(self, name):
        self.released.append(name)

    def close(self):
        pass

    @property
    def input_scales(self):
        return self._input_scales
