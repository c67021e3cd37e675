"""`generate`: load a quantized model and let it answer a prompt.

Chat models get the prompt through their chat template; `chat="raw"` continues the prompt itself. Activations are
quantized as in an engine if the scheme does. The sampling seed is local: torch's global random state stays unchanged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowbit.architecture.loading import Loader, load_tokenizer
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import CheckpointError, LowbitError, NonFiniteError, UsageError
from lowbit.evaluation.activations import simulation_of
from lowbit.text.template_limits import bounded_template

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger("lowbit")

Chat = Literal["auto", "raw"]


def generate(
    model: str | Path,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.0,
    *,
    chat: Chat = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    kv_cache: str | None = None,
    options: OpenOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to a prompt.

    temperature  0: always the most probable token
    kv_cache     int8, int4 or int2, or one of these with _hadamard: a quantized cache (`lowbit.kv.QuantizedCache`);
                 None: one in `dtype`
    chat         "auto": through the chat template if the tokenizer has one; "raw": without
    on_text      called with each piece of text as soon as it is complete
    """
    from lowbit.checkpoint import open_checkpoint

    if max_tokens < 1 or temperature < 0:
        raise UsageError(f"{max_tokens} tokens at temperature {temperature} cannot be generated")
    options = options or OpenOptions()
    checkpoint = open_checkpoint(str(model), options)
    try:
        loader = Loader(checkpoint, dtype, device, options)
        loader.fill()
        network = loader.model
        tokenizer = load_tokenizer(checkpoint, options)
        simulated = simulation_of(checkpoint)
    finally:
        checkpoint.close()
    for note in (*checkpoint.notes, *loader.notes):
        _log.warning("note: %s", note)
    refuse_without_text(network, str(model))
    ids = prompt_ids(tokenizer, prompt, chat).to(network.device)
    room = room_behind(network, ids, max_tokens, "the prompt")
    if room < max_tokens:
        _log.warning("note: stops after %d tokens, where the model's context ends", room)
    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature}
    if kv_cache is not None:
        from lowbit.kv.cache import cache_for

        settings["past_key_values"] = cache_for(kv_cache, network)
    devices = [network.device.index or 0] if network.device.type == "cuda" else []
    with simulated(network), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return _complete(network, tokenizer, ids, room, settings, on_text)


def refuse_without_text(network: PreTrainedModel, name: str) -> None:
    """UsageError for a model that makes embeddings or scores and no text."""
    if not (hasattr(network, "generate") and network.get_output_embeddings() is not None):
        raise UsageError(f"{name} is a {type(network).__name__}, which writes no text", "give a model that does")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: Chat) -> torch.Tensor:
    """The prompt as int64 [1, T], in the chat template unless raw; BOS and the like as the tokenizer adds them."""
    if chat not in ("auto", "raw"):
        raise UsageError(f"there is no chat mode {chat!r}", "choose auto or raw")
    if chat == "auto" and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        try:
            with bounded_template(tokenizer.name_or_path):
                encoded: Any = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
        except LowbitError:
            raise
        except Exception as error:  # a template may raise anything, on reading and on rendering
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its chat template fails ({type(error).__name__}: {error})",
                "repair it; `lowbit generate --raw` gives the prompt as it is",
            ) from error
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens", "give some text with -p")
    return ids.to(torch.long)


def room_behind(network: PreTrainedModel, ids: torch.Tensor, max_tokens: int, what: str) -> int:
    """How many of max_tokens the model's context has room for; UsageError where it cannot hold the prompt."""
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    room = max_tokens if longest is None else min(max_tokens, longest - ids.shape[1])
    if room < 1:
        raise UsageError(f"{what} has {ids.shape[1]} tokens; the model holds {longest}", "shorten it, or leave it out")
    return room


def finite_scores(what: str) -> LogitsProcessorList:
    """For `generate`: NonFiniteError at a NaN or inf among the scores of the next token; the most probable of these is
    token 0, again and again. what  the model writes, in the message"""
    from transformers import LogitsProcessorList

    def check(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool((scores < math.inf).all()):
            raise NonFiniteError(f"the model's likelihoods are not finite at {what}",
                                 "lowbit diagnose says where they begin")  # fmt: skip
        return scores

    return LogitsProcessorList([check])


@torch.inference_mode()
def _complete(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, max_tokens: int,
    settings: dict[str, Any], on_text: Callable[[str], None] | None,
) -> str:  # fmt: skip
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = network.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        pad_token_id=pad,
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        logits_processor=finite_scores("the prompt, or after it"),
        **settings,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
