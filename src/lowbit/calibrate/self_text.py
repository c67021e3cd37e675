"""`--calib self`: calibration text that the model writes itself, for models whose data nobody has.

LLM-QAT (Liu et al., 2023, arXiv:2305.17888, section 3.1): start from a random token of the vocabulary, take the most
likely token for the next few, so that sense comes of it, then sample from the model's own distribution.

    window  =  [BOS, where the tokenizer adds it]  first token  GREEDY_TOKENS × argmax p(· | so far)
               then  x ~ p(· | so far)  at temperature 1, from the whole vocabulary, until the window is full

First tokens are drawn without repetition (until the vocabulary is used up) among those that are not special. The end
of a text does not end a window: what the model writes behind it belongs to it, as documents do in packed text. A seed
gives the same text on the same machine with the same dtype and number of windows in a batch, which the notes say.

Refused: a model that does not fit in memory whole, windows longer than its context, logits that are not finite.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.architecture.loading import load_model, load_tokenizer
from lowbit.calibrate.blocks import Progress
from lowbit.calibrate.precision import compute_dtype
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import NonFiniteError, UsageError
from lowbit.text import CalibrationWindows, check_context, context_length, wants_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GREEDY_TOKENS = 4
# Enough windows for reading the weights to be shared by many, few enough for logits over a large vocabulary.
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
    """Windows that the model writes; always as many as asked for.

    dtype       None: bfloat16 on a GPU and on processors that multiply it in hardware, float32 elsewhere
    max_memory  bytes that weights and the cache of keys and values may take; None: no bound
    progress    called with ("writing calibration text", tokens done, tokens in all)
    """
    check_context(windows, window_tokens, context_length(checkpoint.config()))
    dtype = dtype or compute_dtype("auto", device)
    weights = sum(_elements(info.shape) for info in checkpoint.tensors.values()) * dtype.itemsize
    _check_fits(checkpoint.source, weights, max_memory)
    model = load_model(checkpoint, dtype, device, options)
    tokenizer = load_tokenizer(checkpoint, options)
    per_window = _cache_bytes(model, dtype) * window_tokens
    batch = min(windows, BATCH_WINDOWS)
    if max_memory is not None:
        _check_fits(checkpoint.source, weights + per_window, max_memory)
        batch = min(batch, (max_memory - weights) // max(per_window, 1))
    watch = _Watch(checkpoint.source, windows * window_tokens, progress)
    with _own_generator(device), torch.inference_mode():
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
            f"{source} needs {needed / 2**30:.2f} GiB to write its own calibration text, more than the "
            f"{max_memory / 2**30:.2f} GiB of --max-memory: unlike calibrating, it runs the whole model at once",
            "leave --calib out for the packaged text, give a text, or raise --max-memory",
        )


def _written(model: PreTrainedModel, start: Tensor, window_tokens: int, watch: _Watch) -> Tensor:
    """int64 [windows, window_tokens] that begin with `start` [windows, 1 or 2]."""
    greedy = min(GREEDY_TOKENS, window_tokens - start.shape[1])
    ids = _continued(model, start, greedy, watch, do_sample=False)
    rest = window_tokens - ids.shape[1]
    if rest:
        ids = _continued(model, ids, rest, watch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    watch.windows_done(ids)
    return ids


def _continued(model: PreTrainedModel, ids: Tensor, tokens: int, watch: _Watch, **sampling: Any) -> Tensor:
    from transformers import GenerationConfig, LogitsProcessorList

    # The model's own settings would fill in what is not said here: penalties, an end of text that stops.
    model.generation_config = GenerationConfig(max_new_tokens=tokens, use_cache=True, **sampling)
    generate: Any = model.generate
    return generate(ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([watch]))


class _Watch:
    """A logits processor that changes nothing: refuses what is not finite, and reports progress."""

    def __init__(self, source: str, total: int, progress: Progress | None):
        self._source, self._total, self._progress = source, total, progress
        self._done = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores).all():
            raise NonFiniteError(
                f"{self._source}: the logits are not finite while it writes its calibration text",
                "run it in float32, look for damage with `lowbit evaluate`, or give a text",
            )
        self._report(self._done + ids.numel())
        return scores

    def windows_done(self, ids: Tensor) -> None:
        self._done += ids.numel()
        self._report(self._done)

    def _report(self, tokens: int) -> None:
        if self._progress is not None:
            self._progress("writing calibration text", tokens, self._total)


def _starts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: int) -> Tensor:
    """int64 [windows, 1 or 2]: BOS where the tokenizer adds it, and a token that is not special."""
    known = min(len(tokenizer), _text_config(model).vocab_size)
    special = set(tokenizer.all_special_ids)
    usable = torch.tensor([token for token in range(known) if token not in special])
    rounds = -(-windows // len(usable))
    drawn = torch.cat([usable[torch.randperm(len(usable))] for _ in range(rounds)])[:windows, None]
    if not wants_bos(tokenizer, "auto"):
        return drawn
    return torch.cat([torch.full_like(drawn, int(tokenizer.bos_token_id)), drawn], dim=1)  # type: ignore[arg-type]


def _own_generator(device: str) -> Any:
    """Inside, seeding and drawing leave the generators of the caller as they were."""
    chosen = torch.device(device)
    return torch.random.fork_rng([chosen] if chosen.type == "cuda" else [])


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _cache_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of keys and values for one token, as if every block kept every head."""
    config = _text_config(model)
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kept * width * dtype.itemsize


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
