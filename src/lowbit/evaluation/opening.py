"""The models of an evaluation, opened: headers, config and tokenizer are read, and no weight yet."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowbit.architecture.loading import Loader, load_tokenizer
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import LowbitError
from lowbit.evaluation.footprint import reported_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowbit.checkpoint.base import Checkpoint


@dataclass(frozen=True)
class Opened:
    """A checkpoint, and the model that its weights go into when `loader` is asked to fill it."""

    checkpoint: Checkpoint
    loader: Loader
    tokenizer: PreTrainedTokenizerBase

    @property
    def model(self) -> PreTrainedModel:
        return self.loader.model


@dataclass(frozen=True)
class Opener:
    """How models are opened; what it opens is closed with `stack`."""

    stack: contextlib.ExitStack
    dtype: torch.dtype
    device: str
    options: OpenOptions

    def open(self, path: str | Path) -> Opened:
        from lowbit.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(str(path), self.options)
        self.stack.callback(checkpoint.close)
        loader = Loader(checkpoint, self.dtype, self.device, self.options)
        return Opened(checkpoint, loader, load_tokenizer(checkpoint, self.options))


@dataclass(frozen=True)
class Reference:
    """What to compare with, who named it, and why there is none."""

    opened: Opened | None
    named_by: Literal["given", "report", "none"]
    notes: tuple[str, ...] = ()


def open_reference(given: str | Path | None, report: dict[str, Any] | None, opener: Opener) -> Reference:
    """The reference that was given must open; the one that a report names may be gone, and then a note says so."""
    if given is not None:
        return Reference(opener.open(given), "given")
    named = reported_source(report)
    if named is None:
        return Reference(None, "none")
    try:
        # The revision was the user's word on the quantized model, not on its source.
        source = replace(opener, options=replace(opener.options, revision=None))
        return Reference(source.open(named), "report")
    except LowbitError as error:
        return Reference(None, "none", (f"no reference: {named}, which the report names, does not open: {error}",))
