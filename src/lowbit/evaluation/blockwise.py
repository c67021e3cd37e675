"""Evaluation of models that do not fit in memory: one decoder block at a time, then the heads side by side.

    for the reference, and for every variant of the quantized model:
        all windows through its blocks, one block in memory         → hidden states [windows, T, H]
        the decoder's last norm                                     → head inputs, in their place
    all heads into memory; window by window, some positions at a time: compare the logits of both

Between the two steps the head inputs of every run are kept, in memory up to a limit, then in a file
(`calibrate.blocks.HiddenStates`). The quantized model is read once per variant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.calibrate.blocks import BlockRunner
from lowbit.checkpoint.base import OpenOptions
from lowbit.evaluation.forward import Runner
from lowbit.evaluation.opening import Opened

Progress = Callable[[int, int], None]
# Makes the context that a model runs in.
Context = Callable[[nn.Module], AbstractContextManager]


@dataclass
class Steps:
    """Progress over runs of several models: windows per block, then the windows compared."""

    total: int
    report: Progress | None
    done: int = field(default=0, init=False)

    def within(self, done: int) -> None:
        if self.report is not None:
            self.report(self.done + done, self.total)

    def finish(self, count: int) -> None:
        self.done += count


@dataclass(frozen=True)
class BlockwiseRuns:
    """states_memory  bytes of hidden states of one run that stay in memory"""

    ids: Tensor
    states_memory: int
    options: OpenOptions
    steps: Steps

    @torch.inference_mode()
    def run(self, opened: Opened, context: Context = contextlib.nullcontext) -> Runner:
        """All windows through the blocks of a model; the Runner needs its head next (`fill_head`)."""
        loader = opened.loader
        blocks = BlockRunner(opened.checkpoint, loader.dtype, loader.device, self.options, self.states_memory)
        with context(blocks.model):
            states = blocks.run(self.ids, None, lambda _, done, __: self.steps.within(done))
            kept = blocks.through_last_norm(self.ids, states)
        self.steps.finish(block_count(opened) * len(self.ids))
        return Runner(loader.model, partial(context, loader.model), kept.values)


def block_count(opened: Opened) -> int:
    """Decoder blocks of a model that the table of families knows."""
    assert opened.loader.architecture is not None, "others are not run block by block"
    return len(opened.loader.architecture.blocks)


def fill_head(opened: Opened) -> None:
    """Read the weights after the decoder; a tied head is the embedding."""
    prefix = opened.model.base_model_prefix + "."
    opened.loader.fill(lambda name: not name.startswith(prefix))
