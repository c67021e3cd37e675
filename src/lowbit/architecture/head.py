"""The output head of a transformers model without its decoder; soft-capping and logit scale are the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowbit.architecture.blocks import find_blocks
from lowbit.architecture.discover import decoder_of
from lowbit.architecture.trace import replaced_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KeptOutput:
    """A decoder's output with a known last hidden state [1, T, H]; other parts (caches, attentions, router logits) are
    None."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def inner_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that holds the decoder blocks: the model's base, or its decoder (OPT, vision models)."""
    base: Any = model.base_model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if decoder is model:  # Llama 4 has no module of the name that its class gives the base
        return model.get_submodule(decoder_of(model, find_blocks(model)[0]))
    return decoder


@contextmanager
def without_decoder(model: PreTrainedModel, output: object) -> Iterator[None]:
    """Inside, the decoder of `model` returns `output`, whether the model calls its base or the inner decoder."""
    with ExitStack() as stack:
        for decoder in {model.base_model, inner_decoder(model)} - {model}:
            stack.enter_context(replaced_forward(decoder, lambda *_args, **_kwargs: output))
        yield
