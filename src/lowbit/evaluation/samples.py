"""Answers of reference and quantized model to a few prompts, cut at the first token that differs.

Both always take the most probable token (no penalties, whatever generation_config.json says), so every difference comes
from the quantization. After the first differing token the texts are not comparable; the reference's probabilities there
tell a near tie from a real change.

    tokens 0 … t − 1 equal     reference[t] ≠ quantized[t]     p_reference(reference[t]), p_reference(quantized[t])

Chat models answer through their chat template, others continue an opening. Needs both models in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.evaluation.generation import prompt_ids
from lowbit.evaluation.result import Continuation, GeneratedSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "A shop sells pens at 3 for 2 euros. How much do 12 pens cost? Show the calculation.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into French: The train leaves at seven in the morning.",
    "Name three differences between a frog and a toad.",
    "Write the first sentence of a story about a lighthouse keeper.",
)
OPENINGS = (
    "The sky is blue because",
    "Three pens cost two euros, so twelve pens cost",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    'In French, "The train leaves at seven in the morning" is',
    "A frog differs from a toad in that",
    "The old lighthouse keeper woke before dawn and",
)
MOST = len(QUESTIONS)
TOKENS = 48


@dataclass(frozen=True)
class GreedyText:
    """tokens int64 [T], the end token included; of the reference also log-probabilities float32 [T, vocabulary]."""

    tokens: list[int]
    log_probabilities: Tensor | None = None


def prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[Sequence[str], bool]:
    """(`count` packaged prompts, whether they go through the chat template)."""
    chat = bool(tokenizer.chat_template)
    return (QUESTIONS if chat else OPENINGS)[:count], chat


@torch.inference_mode()
def say(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, tokens: int,
    keep_probabilities: bool = False,
) -> GreedyText:  # fmt: skip
    """Up to `tokens` tokens after the prompt, always the most probable; fewer at the end of the model's context."""
    from transformers import GenerationConfig

    ids = prompt_ids(tokenizer, prompt, "auto" if chat else "raw").to(model.device)
    longest = getattr(model.config, "max_position_embeddings", None)
    tokens = tokens if longest is None else min(tokens, longest - ids.shape[1])
    if tokens < 1:
        return GreedyText([], torch.zeros(0, 1) if keep_probabilities else None)
    own = model.generation_config
    ends = tokenizer.eos_token_id if own is None or own.eos_token_id is None else own.eos_token_id
    config = GenerationConfig(
        do_sample=False, repetition_penalty=1.0, max_new_tokens=tokens, eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends, output_logits=keep_probabilities,
        return_dict_in_generate=True,
    )  # fmt: skip
    output: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    log_p = torch.cat(output.logits).float().log_softmax(-1) if keep_probabilities else None
    return GreedyText(output.sequences[0, ids.shape[1] :].tolist(), log_p)


def parted(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, reference: GreedyText, quantized: GreedyText
) -> GeneratedSample:
    """The two, cut where they part; `reference` has its log-probabilities."""
    ours, theirs = quantized.tokens, reference.tokens
    shared = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    text = _text(tokenizer, theirs[:shared])
    if shared == len(ours) == len(theirs):
        return GeneratedSample(prompt=prompt, chat=chat, shared=text, shared_tokens=shared)
    log_p = reference.log_probabilities
    assert log_p is not None, "the reference keeps its probabilities"
    at = log_p[shared] if shared < len(log_p) else None

    def onward(tokens: list[int]) -> Continuation:
        if shared >= len(tokens):
            return Continuation(token="", rest="", tokens=0, token_probability=0.0, ended=True)
        probability = 0.0 if at is None else min(1.0, float(at[tokens[shared]].exp()))
        piece, rest = _pieces(tokenizer, tokens, shared, text)
        return Continuation(token=piece, rest=rest, tokens=len(tokens) - shared, token_probability=probability,
                            ended=piece == "" and rest == "")  # fmt: skip

    return GeneratedSample(prompt=prompt, chat=chat, shared=text, shared_tokens=shared, reference=onward(theirs),
                           quantized=onward(ours))  # fmt: skip


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int], shared: int, text: str) -> tuple[str, str]:
    """(text of the token at `shared`, text after it); characters that a token cuts in two go to the later piece."""
    whole, begun = _text(tokenizer, tokens), _text(tokenizer, tokens[: shared + 1])
    if not (whole.startswith(begun) and begun.startswith(text)):  # a decoder that looks ahead
        return _text(tokenizer, tokens[shared : shared + 1]), _text(tokenizer, tokens[shared + 1 :])
    return begun[len(text) :], whole[len(begun) :]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Without special tokens, and without the character that the last token has only begun."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")
