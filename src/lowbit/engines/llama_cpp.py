"""llama.cpp of autumn 2026. It loads GGUF files, and all rules on those are its own (`gguf`)."""

from __future__ import annotations

from lowbit.architecture.shape import ModelShape
from lowbit.engines.engine import GIB, Engine, MemoryModel, Support
from lowbit.verification.result import Loading

# Of llama-quantize's file types, those in use for whole models; the legacy ones of 5 bits and the one-bit ones are left
# out: each has another of its size that loses less.
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K_L", "Q3_K_M",
              "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_M")  # fmt: skip
# It multiplies prompts in integers or 16 bits, whichever a backend has; either way its own table has prompts of
# quantized types at 0.77 to 0.94 of the speed of F16, so nothing is gained by them: compute "16".
_DOCS = "github.com/ggml-org/llama.cpp, tools/quantize/README.md, Llama-3.1-8B: prompts no quicker than in F16"
_KINDS = ("cuda", "rocm", "metal", "cpu")


class _GraphMemory(MemoryModel):
    """Its compute buffer is the graph of one micro-batch."""

    def activations(
        self, shape: ModelShape, context: int, batch: int, memory: int | None = None, ranks: int = 1
    ) -> int:
        """tokens · (vocabulary + hidden) · logit_bytes, and the attention's mask, 6 bytes for tokens · context."""
        tokens = min(self.pass_tokens(memory) or context, context)
        return tokens * self.logit_bytes * (shape.vocab + shape.hidden) + 6 * tokens * context


_MEMORY = _GraphMemory(
    prefill=((0, 512),), logit_rows=None, logit_bytes=4, framework=GIB // 2, share=0.95, share_name="of the device",
    cache_types=("auto", "f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"),
    assumptions=(
        "activations: a compute buffer for 512 tokens (n_ubatch), vocabulary and width in float32, and the mask, with "
        "flash attention; 260 MiB for Llama-3-8B at a context of 512, and llama.cpp logs 258.5",
        "framework: 0.5 GiB for the context and libraries of a GPU, less on a CPU; every layer on the device",
        "KV cache: the full context of every sequence from the start, in cells of 256 tokens; a sliding layer keeps "
        "its window and 512 tokens (without --swa-full) where llama.cpp has windows for the model",
    ),
    token_block=256, slack_passes=1,
    # It attends to everything in the others. Its llama_model::load_hparams.
    windows_of=("gemma2", "gemma3", "gemma3_text", "cohere2", "gpt_oss", "olmo3"),
)  # fmt: skip

ENGINE = Engine(
    "llama.cpp", "llama.cpp", _KINDS,
    (Support(GGUF_TYPES, "16", "gguf", _DOCS, kinds=("cpu", "cuda", "rocm", "metal"), small_batch=8),),
    _MEMORY, Loading(rules=(), reads_gguf=True),
    serve="llama-server -m {output}", serve_load=" -c {tokens} -np {batch}",
    serve_cache=" -ctk {keys} -ctv {values}", suits="desktops",
)  # fmt: skip
