"""Logits of a window in slices of positions, with the model's own code.

A window of 512 tokens of a 262k vocabulary is 537 MB of float32 logits, and comparing two models needs both, twice. So
the decoder runs once per window and the head on some positions at a time: the decoder's `forward` is replaced by its
kept output, and the model's own `forward` (head, soft-capping, logit scale and all) computes only those positions,
through `logits_to_keep`. After a block-by-block run (`blockwise.py`) only the head is in memory.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.architecture.head import KeptOutput, without_decoder
from lowbit.architecture.quantized_loading import has_no_forward
from lowbit.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Comparing two models holds up to five arrays of this size at once.
LOGIT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Runner:
    """A model and the context it runs in (activation simulation, or nothing).

    head_inputs  inputs of the head, [windows, T, H], if the decoder ran before; then only the head needs its weights
    """

    model: PreTrainedModel
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    head_inputs: Tensor | None = None

    def __post_init__(self):
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            name = type(self.model).__name__
            if has_no_forward(self.model):
                raise ArchitectureError(
                    f"{name} consists of models that run apart, and takes no text itself",
                    "evaluate the part that reads text, saved as a model of its own",
                )
            raise ArchitectureError(
                f"{name}.forward has no `logits_to_keep`: its logits cannot be computed in slices",
                "upgrade transformers; its causal language models have had it since 4.45",
            )

    def decode(self, windows: Tensor, index: int) -> Decoded:
        """Run the decoder on one of the windows, int64 [windows, T], or take its kept output."""
        device = self._head.weight.device
        ids = windows[index : index + 1].to(device)
        if self.head_inputs is not None:
            return Decoded(self, ids, KeptOutput(self.head_inputs[index : index + 1].to(device)))
        with self.context():
            return Decoded(self, ids, self.model.base_model(input_ids=ids, use_cache=False))  # type: ignore[operator]

    @property
    def vocabulary(self) -> int:
        return self._head.weight.shape[0]

    @property
    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has a head"
        return head  # type: ignore[return-value]


@dataclass(frozen=True)
class Decoded:
    """A window after the decoder, before the head."""

    runner: Runner
    ids: Tensor
    output: object

    def log_probabilities(self, positions: range) -> Tensor:
        """Log-softmax of the logits at some positions, float32 [len(positions), V]."""
        model: Any = self.runner.model
        keep = torch.arange(positions.start, positions.stop, device=self.ids.device)
        with self.runner.context(), without_decoder(model, self.output):
            logits = model(input_ids=self.ids, use_cache=False, logits_to_keep=keep).logits
        return logits[0].to(torch.float32).log_softmax(-1)


def slices(positions: range, vocabulary: int) -> Iterator[range]:
    """Consecutive parts of `positions` whose float32 logits stay within LOGIT_BYTES."""
    size = max(1, LOGIT_BYTES // (4 * vocabulary))
    for start in range(positions.start, positions.stop, size):
        yield range(start, min(start + size, positions.stop))
