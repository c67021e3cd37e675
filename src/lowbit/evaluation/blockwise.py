"""Models that do not fit in memory, judged all the same: one decoder block at a time, then the heads side by side.

    for the reference, and for every variant of the quantized model:
        all windows through its blocks, one block in memory         → hidden states [windows, T, H]
        the decoder's last norm                                     → head inputs, in their place
    all heads into memory; window by window, some positions at a time: logits of both, compared and dropped

so what is kept between is the head inputs of every run, in memory up to a bound and in a file above it
(`calibrate/hidden_states.py`). A quantized model is read once per variant.
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
from lowbit.calibrate.hidden_states import HiddenStates
from lowbit.checkpoint.base import OpenOptions
from lowbit.evaluation.forward import Runner
from lowbit.evaluation.opening import Opened

Progress = Callable[[int, int], None]
# What a model runs in, made for the model that runs.
Context = Callable[[nn.Module], AbstractContextManager]


@dataclass
class Steps:
    """Progress over runs of several models: every block counts its windows, and so does the comparison behind them."""

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
        """All windows through the blocks of a model; what comes back waits for its head (`fill_head`)."""
        loader = opened.loader
        blocks = BlockRunner(opened.checkpoint, loader.dtype, loader.device, self.options, self.states_memory)
        with context(blocks.model):
            states = blocks.run(self.ids, None, lambda _, done, __: self.steps.within(done))
            kept = self._through_last_norm(blocks, states, loader.dtype)
        self.steps.finish(block_count(opened) * len(self.ids))
        return Runner(loader.model, partial(context, loader.model), kept.values)

    def _through_last_norm(self, blocks: BlockRunner, states: HiddenStates, dtype: torch.dtype) -> HiddenStates:
        """Head inputs [windows, T, H], written over the hidden states unless their width differs (OPT)."""
        windows, tokens, width = states.values.shape
        kept, start = states, 0
        for x in blocks.head_inputs(self.ids, states):
            if start == 0 and x.shape[-1] != width:
                kept = HiddenStates((windows, tokens, x.shape[-1]), dtype, self.states_memory)
            stop = start + len(x) // tokens
            kept.values[start:stop] = x.reshape(stop - start, tokens, -1)
            start = stop
        return kept


def block_count(opened: Opened) -> int:
    """Decoder blocks of a model that the table of families knows."""
    assert opened.loader.architecture is not None, "others are not run block by block"
    return len(opened.loader.architecture.blocks)


def fill_head(opened: Opened) -> None:
    """Read what a model has behind its decoder; a tied head is its embedding."""
    prefix = opened.model.base_model_prefix + "."
    opened.loader.fill(lambda name: not name.startswith(prefix))
