"""What serving engines do with memory beside the weights, as data: windows, blocks of tokens, overhead, with sources.

    activations   what a forward pass needs at once; a formula of the engine's defaults, see `Engine.activations`
    framework     context of the device, libraries, captured graphs: a constant, since nothing in a model says it

Every one of these is an assumption, and `assumptions` says so in words, one line each.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.estimation.shapes import ModelShape

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Engine:
    """
    name           as `lowbit verify --engine` has it
    bounds_windows the cache of a sliding layer ends at its window (and what a prefill in flight holds beside it,
                   `slack_passes` passes); False: it is kept for every token
    token_block    tokens that the cache is handed out in
    prefill        (least bytes of the device, tokens that one pass of a prompt takes), largest first; empty: the whole
                   prompt at once
    logit_rows     rows of logits that are computed at once; None: one per prompt token of that pass
    logit_bytes    per logit, copies of the sampler included
    framework      bytes
    share          of the device's memory that the engine takes by default, and what it calls that
    cache_types    names of `--kv-cache` that it takes
    """

    name: str
    bounds_windows: bool
    token_block: int
    prefill: tuple[tuple[int, int], ...]
    slack_passes: int
    logit_rows: int | None
    logit_bytes: int
    framework: int
    share: float
    share_name: str
    cache_types: tuple[str, ...]
    assumptions: tuple[str, ...]

    def pass_tokens(self, memory: int | None = None) -> int | None:
        """Tokens that one pass of a prompt takes at most, on a device of so many bytes; None for no bound."""
        if not self.prefill:
            return None
        size = _TYPICAL_DEVICE if memory is None else memory
        return next(tokens for least, tokens in self.prefill if size >= least)

    def activations(self, shape: ModelShape, context: int, batch: int, memory: int | None = None) -> int:
        """Bytes that a forward pass needs at once.

        tokens · (2 hidden + 3 MLP columns) · 2 bytes   residual, input; gate, up and their product
        rows · vocabulary · logit_bytes                 logits

        tokens are those of a pass, which engines reserve when they start, whatever the prompts are.
        """
        tokens = self.pass_tokens(memory)
        if self.name == "llama.cpp":  # its graph of one micro-batch in float32, and the attention's mask
            tokens = min(tokens or context, context)
            return tokens * self.logit_bytes * (shape.vocab + shape.hidden) + 6 * tokens * context
        tokens = context * batch if tokens is None else tokens
        rows = batch if self.logit_rows is None else self.logit_rows
        return tokens * (2 * shape.hidden + 3 * shape.widest_mlp) * 2 + rows * shape.vocab * self.logit_bytes


_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_head")
_TYPICAL_DEVICE = 80 * GIB
_CHUNK = ((0, 8192),)

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm", bounds_windows=True, token_block=16,
            prefill=((160 * GIB, 16384), (70 * GIB, 8192), (0, 2048)), slack_passes=2, logit_rows=256, logit_bytes=16,
            framework=1 * GIB, share=0.92, share_name="gpu_memory_utilization",
            cache_types=("auto", "f16", "bf16", *_FP8, "nvfp4"),
            assumptions=(
                "activations: a pass of max_num_batched_tokens (2048, 8192 from 70 GiB, 16384 from 160 GiB of device "
                "memory; the defaults of vLLM 0.32's server) and logits of 256 sequences, 16 bytes each with the "
                "sampler's copies; that is 1.27 GiB for Llama-3-8B, and vLLM logged 1.26 (its pull request 10511)",
                "framework: 1 GiB for the CUDA context, libraries and CUDA graphs; logs of single cards have 0.2 to "
                "1.8 GiB of non-torch memory and 0.1 to 0.6 GiB of graphs",
                "KV cache: in blocks of 16 tokens; a sliding layer keeps its window and two passes in flight "
                "(SlidingWindowSpec of vLLM 0.32); MLA keeps the latent",
            ),
        ),
        Engine(
            "sglang", bounds_windows=False, token_block=1, prefill=_CHUNK, slack_passes=0,
            logit_rows=256, logit_bytes=16, framework=1 * GIB, share=0.88, share_name="of the device",
            cache_types=("auto", "f16", "bf16", "fp8", "fp8_e4m3", "fp8_e5m2"),
            assumptions=(
                "activations and framework: as for vLLM, with a chunked prefill of 8192 tokens and 1 GiB; SGLang "
                "chooses mem-fraction-static by the device, 0.88 is typical",
                "KV cache: a sliding layer counts with every token, since SGLang bounds it for some models only; MLA "
                "keeps the latent",
            ),
        ),
        Engine(
            "tensorrt-llm", bounds_windows=True, token_block=32, prefill=_CHUNK, slack_passes=0,
            logit_rows=256, logit_bytes=16, framework=2 * GIB, share=0.9, share_name="free_gpu_memory_fraction",
            cache_types=("auto", "f16", "bf16", "fp8"),
            assumptions=(
                "activations: a pass of 8192 tokens (its default max_num_tokens); framework: 2 GiB for context, "
                "libraries and workspaces, a round number without a source",
                "KV cache: in blocks of 32 tokens; a sliding layer keeps its window; MLA keeps the latent",
            ),
        ),
        Engine(
            "transformers", bounds_windows=True, token_block=1, prefill=(), slack_passes=0,
            logit_rows=None, logit_bytes=8, framework=GIB // 2, share=0.95, share_name="of the device",
            cache_types=("auto", "f16", "bf16"),
            assumptions=(
                "activations: the prompts of the whole batch in one pass, attention without a matrix of scores (SDPA), "
                "logits of the last token of each",
                "framework: 0.5 GiB for the CUDA context and libraries; 0.95 of the device, since PyTorch's allocator "
                "loses some in pieces",
                "KV cache: a sliding layer keeps its window (DynamicCache); MLA keeps the latent",
            ),
        ),
        Engine(
            "llama.cpp", bounds_windows=True, token_block=256, prefill=((0, 512),), slack_passes=1,
            logit_rows=None, logit_bytes=4, framework=GIB // 2, share=0.95, share_name="of the device",
            cache_types=("auto", "f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"),
            assumptions=(
                "activations: a compute buffer for 512 tokens (n_ubatch), vocabulary and width in float32, and the "
                "mask, with flash attention; 260 MiB for Llama-3-8B at a context of 512, and llama.cpp logs 258.5",
                "framework: 0.5 GiB for the context and libraries of a GPU, less on a CPU; every layer on the device",
                "KV cache: the full context of every sequence from the start, in cells of 256 tokens; a sliding layer "
                "keeps its window and 512 tokens (without --swa-full) where llama.cpp has windows for the model",
            ),
        ),
    )
}  # fmt: skip

# Models whose sliding windows llama.cpp keeps; it attends to everything in the others. Its llama_model::load_hparams.
LLAMA_CPP_WINDOWS = ("gemma2", "gemma3", "gemma3_text", "cohere2", "gpt_oss", "olmo3")


def find_engine(name: str) -> Engine:
    """The engine called `name`, case-insensitively; UsageError names the nearest."""
    engine = ENGINES.get(name.lower())
    if engine is None:
        near = difflib.get_close_matches(name.lower(), ENGINES, n=2, cutoff=0.4) or list(ENGINES)
        raise UsageError(f"there is no engine {name!r}", f"did you mean {' or '.join(near)}?" if len(near) < 3 else
                         f"choose one of {', '.join(ENGINES)}")  # fmt: skip
    return engine


@dataclass(frozen=True)
class Overhead:
    """Bytes beside weights and cache."""

    activations: int
    framework: int
    assumptions: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.activations + self.framework


def overhead_bytes(engine: str, shape: ModelShape, context: int, batch: int = 1, memory: int | None = None) -> Overhead:
    """What an engine needs beside weights and cache, with the assumptions in words.

    context, batch  tokens of a sequence, and sequences at once
    memory          bytes of the device, where it is known; engines choose the size of a pass by it

    Raises UsageError for an unknown engine.
    """
    found = find_engine(engine)
    return Overhead(found.activations(shape, context, batch, memory), found.framework, found.assumptions)
