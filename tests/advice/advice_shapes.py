"""Shapes of well-known dense models and of one mixture, for tests of advice."""

from __future__ import annotations

from lowbit.architecture.shape import ModelShape

LLAMA_3B = ModelShape("llama", 3072, 28, 24, 8, 128, 8192, 128256, tied=True)
MISTRAL_7B = ModelShape("mistral", 4096, 32, 32, 8, 128, 14336, 32768)
LLAMA_8B = ModelShape("llama", 4096, 32, 32, 8, 128, 14336, 128256)
QWEN3_14B = ModelShape("qwen3", 5120, 40, 40, 8, 128, 17408, 151936)
QWEN3_32B = ModelShape("qwen3", 5120, 64, 64, 8, 128, 25600, 151936)
LLAMA_70B = ModelShape("llama", 8192, 80, 64, 8, 128, 28672, 128256)
QWEN3_30B_A3B = ModelShape("qwen3_moe", 2048, 48, 32, 4, 128, 6144, 151936, experts=128, experts_per_token=8,
                           expert_intermediate=768)  # fmt: skip

# From 7 to 32 billion weights: where the field's advice is given, and where it is tested.
COMMON = {"7B": MISTRAL_7B, "8B": LLAMA_8B, "14B": QWEN3_14B, "32B": QWEN3_32B}
