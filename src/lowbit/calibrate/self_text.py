"""`--calib self`: calibration text that the model writes itself, for models whose training data is not public.

LLM-QAT (Liu et al., 2023, arXiv:2305.17888, section 3.1): start from a random token of the vocabulary, take the most
likely token for the next few so that the text makes sense, then sample from the model's own distribution.

    window  =  [BOS, where the tokenizer adds it]  first token  GREEDY_TOKENS × argmax p(· | so far)
               then  x ~ p(· | so far)  at temperature 1, from the whole vocabulary, until the window is full

First tokens are drawn without repetition (until the vocabulary is used up) from the non-special tokens. An end-of-text
token does not end a window; the model writes on, as in packed text. A seed gives the same text on the same machine with
the same dtype and windows per batch, which the notes name.

Refused: a model that does not fit in memory whole, windows longer than its context, logits that are not finite.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.architecture.loading import load_model, load_tokenizer
from lowbit.calibrate.blocks import Progress
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import NonFiniteError, UsageError
from lowbit.measure import human_bytes
from lowbit.numerics.precision import compute_dtype
from lowbit.text import CalibrationWindows, check_context, context_length, wants_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GREEDY_TOKENS = 4
# Enough windows to share each read of the weights, few enough for the logits of a large vocabulary.
BATCH_WINDOWS = 32
NAME = "self"


def generate_windows(
    checkpoint: Checkpoint,
    windows: int,
    window_tokens: int,
    *,
    seed: int = 0,
    options: OpenOptions | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> CalibrationWindows:
    """`windows` windows that the model writes.

    dtype       None: bfloat16 on GPUs and on processors with bfloat16 hardware, float32 elsewhere
    max_memory  bytes for weights and the KV cache; None: no limit
    progress    called with ("writing calibration text", tokens done, tokens in all)
    """
    check_context(windows, window_tokens, context_length(checkpoint.config()))
    dtype = dtype or compute_dtype("auto", device)
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values()) * dtype.itemsize
    _check_fits(checkpoint.source, weights, max_memory)
    model = load_model(checkpoint, dtype, device, options)
    tokenizer = load_tokenizer(checkpoint, options)
    per_window = _cache_bytes(model, dtype) * window_tokens
    batch = min(windows, BATCH_WINDOWS)
    if max_memory is not None:
        _check_fits(checkpoint.source, weights + per_window, max_memory)
        batch = min(batch, (max_memory - weights) // max(per_window, 1))
    watch = _Watch(checkpoint.source, windows * window_tokens, progress)
    generator_of = torch.device(device)
    forked = torch.random.fork_rng([generator_of] if generator_of.type == "cuda" else [])  # restores the caller's
    with forked, torch.inference_mode():
        torch.manual_seed(seed)
        starts = _starts(model, tokenizer, windows)
        pieces = [_written(model, part.to(device), window_tokens, watch).cpu() for part in starts.split(batch)]
    ids = torch.cat(pieces)
    note = (
        f"calibration text written by the model itself: {windows} windows of {window_tokens} tokens, seed {seed}, "
        f"temperature 1, {str(dtype).removeprefix('torch.')}, {batch} windows in a batch"
    )
    digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationWindows(ids, NAME, digest, ids.numel(), windows, (note,))


def _check_fits(source: str, needed: int, max_memory: int | None) -> None:
    if max_memory is not None and needed > max_memory:
        raise UsageError(
            f"{source} needs {human_bytes(needed)} to write its own calibration text, more than the "
            f"{human_bytes(max_memory)} of --max-memory: unlike calibrating, it runs the whole model at once",
            "omit --calib for the packaged text, give a text, or raise --max-memory",
        )


def _written(model: PreTrainedModel, start: Tensor, window_tokens: int, watch: _Watch) -> Tensor:
    """int64 [windows, window_tokens] that begin with `start` [windows, 1 or 2]."""
    greedy = min(GREEDY_TOKENS, window_tokens - start.shape[1])
    ids = _continued(model, start, greedy, watch, do_sample=False)
    rest = window_tokens - ids.shape[1]
    if rest:
        ids = _continued(model, ids, rest, watch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    watch.done += ids.numel()
    watch.report(watch.done)
    return ids


def _continued(model: PreTrainedModel, ids: Tensor, tokens: int, watch: _Watch, **sampling: Any) -> Tensor:
    from transformers import GenerationConfig, LogitsProcessorList

    # Replaces the model's own defaults: penalties, stopping at the end of a text.
    model.generation_config = GenerationConfig(max_new_tokens=tokens, use_cache=True, **sampling)
    generate: Any = model.generate
    return generate(ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([watch]))


class _Watch:
    """A logits processor that changes nothing, reports progress and raises NonFiniteError on NaN and inf."""

    def __init__(self, source: str, total: int, progress: Progress | None):
        self._source, self._total, self._progress = source, total, progress
        self.done = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores).all():
            raise NonFiniteError(
                f"{self._source}: the logits are not finite while it writes its calibration text",
                "run it in float32, look for damage with `lowbit evaluate`, or give a text",
            )
        self.report(self.done + ids.numel())
        return scores

    def report(self, tokens: int) -> None:
        if self._progress is not None:
            self._progress("writing calibration text", tokens, self._total)


def _starts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: int) -> Tensor:
    """int64 [windows, 1 or 2]: BOS if the tokenizer adds it, and a token that is not special."""
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    special = set(tokenizer.all_special_ids)
    usable = torch.tensor([token for token in range(known) if token not in special])
    rounds = -(-windows // len(usable))
    drawn = torch.cat([usable[torch.randperm(len(usable))] for _ in range(rounds)])[:windows, None]
    if not wants_bos(tokenizer, "auto"):
        return drawn
    return torch.cat([torch.full_like(drawn, int(tokenizer.bos_token_id)), drawn], dim=1)  # type: ignore[arg-type]


def _cache_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of keys and values for one token, as if every block kept every head."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kept * width * dtype.itemsize
