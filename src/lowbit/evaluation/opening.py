"""The models of an evaluation, opened: headers, config and tokenizer are read, and no weight yet."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowbit.architecture.loading import Loader, load_tokenizer
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import LowbitError, UsageError
from lowbit.evaluation.footprint import reported_source
from lowbit.evaluation.forward import Runner

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

    @property
    def vocabulary(self) -> int:
        """Tokens that the head distinguishes."""
        return Runner(self.model).vocabulary


def check_windows(judged: Opened, reference: Opened | None, ids: torch.Tensor) -> None:
    """UsageError unless both models have one vocabulary, which holds `ids` [windows, T], and see a whole window."""
    vocabulary = judged.vocabulary
    if reference is not None and reference.vocabulary != vocabulary:
        raise UsageError(
            f"{judged.checkpoint.source} has a vocabulary of {vocabulary} tokens, "
            f"its reference {reference.checkpoint.source} one of {reference.vocabulary}",
            "the reference must be the model that was quantized",
        )
    if int(ids.max()) >= vocabulary:
        raise UsageError(f"the tokenizer makes token {int(ids.max())}; the model has {vocabulary}")
    longest = getattr(judged.model.config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise UsageError(f"windows of {ids.shape[1]} tokens; the model was trained for {longest}",
                         f"--window-tokens {longest}")  # fmt: skip


@dataclass(frozen=True)
class Opener:
    """How models are opened; what it opens is closed with `stack`. An adapter of the options is of a reference."""

    stack: contextlib.ExitStack
    dtype: torch.dtype
    device: str
    options: OpenOptions

    def open(self, path: str | Path, adapter: str | None = None) -> Opened:
        from lowbit.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(str(path), replace(self.options, adapter=adapter))
        self.stack.callback(checkpoint.close)
        loader = Loader(checkpoint, self.dtype, self.device, self.options)
        return Opened(loader.checkpoint, loader, load_tokenizer(checkpoint, self.options))


@dataclass(frozen=True)
class Reference:
    """The model to compare with, who named it, and notes on why there is none."""

    opened: Opened | None
    named_by: Literal["given", "report", "none"]
    notes: tuple[str, ...] = ()


def open_reference(given: str | Path | None, report: dict[str, Any] | None, opener: Opener) -> Reference:
    """The reference that was given must open; the one that a report names may be gone, and then a note says so."""
    if given is not None:
        return Reference(opener.open(given, opener.options.adapter), "given")
    named, adapter = reported_source(report)
    if named is None:
        return Reference(None, "none")
    try:
        # --revision names that of the quantized model, not of its source.
        source = replace(opener, options=replace(opener.options, revision=None))
        return Reference(source.open(named, adapter), "report")
    except LowbitError as error:
        return Reference(None, "none", (f"no reference: {named}, which the report names, does not open: {error}",))
