"""`evaluate`: a quantized model against its source, on the same tokens. One pass; logits are never kept.

For every window the reference's log-probabilities are computed once, a slice of positions at a time, and every variant
of the quantized model (weights alone; with activations quantized as at run time) is compared with them on the spot.

Both models are in memory in `dtype`. Without a reference, and with none that the quantized checkpoint's report names
and that still opens, perplexity alone is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowbit.architecture.loading import load_model, load_tokenizer
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import LowbitError, NonFiniteError, UsageError
from lowbit.evaluation.activations import simulated_activations
from lowbit.evaluation.footprint import bits_per_weight, device_peak_bytes, file_bytes, read_report, reported_source
from lowbit.evaluation.forward import Decoded, Runner, slices
from lowbit.evaluation.metrics import Divergence, Scores, TokenValues
from lowbit.evaluation.result import Evaluation, TextRecord
from lowbit.measure import Meter
from lowbit.text import Protocol, Text, Windows, cut_windows, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowbit.checkpoint.base import Checkpoint

Progress = Callable[[int, int], None]
Activations = Literal["auto", "none", "simulated"]
Variant = Literal["none", "simulated"]


@dataclass(frozen=True)
class _Opened:
    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Loader:
    """How models are opened; what it opens is closed with `stack`."""

    stack: contextlib.ExitStack
    dtype: torch.dtype
    device: str
    options: OpenOptions

    def open(self, path: str | Path) -> _Opened:
        from lowbit.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(str(path), self.options)
        self.stack.callback(checkpoint.close)
        model = load_model(checkpoint, self.dtype, self.device, self.options)
        return _Opened(checkpoint, model, load_tokenizer(checkpoint, self.options))


@dataclass(frozen=True)
class _Reference:
    """What to compare with, who named it, and why there is none."""

    opened: _Opened | None
    named_by: Literal["given", "report", "none"]
    notes: tuple[str, ...] = ()


def evaluate(
    quantized: str | Path,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    *,
    windows: int = 40,
    window_tokens: int = 512,
    protocol: Protocol = "full",
    activations: Activations = "auto",
    bos: bool | Literal["auto"] = "auto",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Perplexity of a checkpoint and its divergence from a reference, one Evaluation per variant.

    reference    the unquantized model; by default the source that the checkpoint's report names
    text         a file, a hub dataset such as `wikitext`, or the packaged text by default
    protocol     "full": every token of a window but the first is scored; "second-half": as llama.cpp does
    activations  "auto": weights alone, and a second row with activations simulated where the scheme quantizes them
    bos          "auto": each window opens with BOS where the tokenizer adds it by itself
    progress     called with (windows done, windows in all)
    """
    meter = Meter()
    judged_text = read_text(text)
    with contextlib.ExitStack() as stack:
        loader = _Loader(stack, dtype, device, options or OpenOptions())
        judged = loader.open(quantized)
        report = read_report(judged.checkpoint)
        variants = _variants(judged, activations)
        source = _open_reference(reference, report, loader)
        tokenizer = (source.opened or judged).tokenizer
        cut = cut_windows(judged_text, tokenizer, windows, window_tokens, protocol, bos)
        _check_fits(judged, source.opened, cut)
        scores = score(None if source.opened is None else Runner(source.opened.model), variants, cut, progress)
        facts = _facts(judged, source, report, judged_text, cut, windows)
        facts |= {"protocol": protocol, "dtype": str(dtype).removeprefix("torch.")}
        facts |= {"seconds": meter.seconds, "peak_memory_bytes": meter.peak_bytes + device_peak_bytes(device)}
    return [Evaluation(**facts, activations=name, **_figures(scores[name])) for name in variants]


@torch.inference_mode()
def score(
    reference: Runner | None, variants: Mapping[Variant, Runner], windows: Windows, progress: Progress | None = None
) -> dict[Variant, Scores]:
    """Run every window through the reference and every variant; a summary per variant."""
    values: dict[Variant, TokenValues] = {name: TokenValues() for name in variants}
    vocabulary = next(iter(variants.values())).vocabulary
    # Position t predicts token t + 1.
    positions = range(windows.first_scored - 1, windows.ids.shape[1] - 1)
    for index, ids in enumerate(windows.ids):
        base = None if reference is None else reference.decode(ids)
        decoded: dict[Variant, Decoded] = {name: runner.decode(ids) for name, runner in variants.items()}
        for part in slices(positions, vocabulary):
            log_p = None if base is None else base.log_probabilities(part)
            for name, window in decoded.items():
                log_q = window.log_probabilities(part)
                targets = window.ids[0, part.start + 1 : part.stop + 1]
                try:
                    values[name].add(log_q, targets, log_p)
                except NonFiniteError as error:
                    raise NonFiniteError(f"window {index}: {error}", error.hint) from None
        if progress is not None:
            progress(index + 1, len(windows.ids))
    return {name: collected.summary() for name, collected in values.items()}


def _open_reference(given: str | Path | None, report: dict[str, Any] | None, loader: _Loader) -> _Reference:
    """The reference that was given must open; the one that a report names may be gone, and then a note says so."""
    if given is not None:
        return _Reference(loader.open(given), "given")
    named = reported_source(report)
    if named is None:
        return _Reference(None, "none")
    try:
        # The revision was the user's word on the quantized model, not on its source.
        source = replace(loader, options=replace(loader.options, revision=None))
        return _Reference(source.open(named), "report")
    except LowbitError as error:
        return _Reference(None, "none", (f"no reference: {named}, which the report names, does not open: {error}",))


def _variants(judged: _Opened, activations: Activations) -> dict[Variant, Runner]:
    """The variants that were asked for and exist: "none" for weights alone, "simulated"."""
    if activations not in ("auto", "none", "simulated"):
        raise UsageError(f"there is no activations mode {activations!r}", "choose one of auto, none, simulated")
    schemes = getattr(judged.checkpoint, "schemes", {})
    quantizes_activations = any(scheme.activation is not None for scheme in schemes.values())
    if activations == "simulated" and not quantizes_activations:
        raise UsageError(
            f"{judged.checkpoint.source}: no layer quantizes its activations, so there is nothing to simulate",
            "use --activations auto",
        )
    variants: dict[Variant, Runner] = {} if activations == "simulated" else {"none": Runner(judged.model)}
    if quantizes_activations and activations != "none":
        input_scales = getattr(judged.checkpoint, "input_scales", {})
        context = partial(simulated_activations, judged.model, schemes, input_scales)
        variants["simulated"] = Runner(judged.model, context)
    return variants


def _check_fits(judged: _Opened, reference: _Opened | None, cut: Windows) -> None:
    """Both models speak of the same tokens, and can see a whole window."""
    vocabulary = Runner(judged.model).vocabulary
    if reference is not None:
        expected = Runner(reference.model).vocabulary
        if vocabulary != expected:
            raise UsageError(
                f"{judged.checkpoint.source} has a vocabulary of {vocabulary} tokens, "
                f"its reference {reference.checkpoint.source} one of {expected}",
                "the reference must be the model that was quantized",
            )
    if int(cut.ids.max()) >= vocabulary:
        raise UsageError(f"the tokenizer makes token {int(cut.ids.max())}; the model has {vocabulary}")
    longest = getattr(judged.model.config, "max_position_embeddings", None)
    if longest is not None and cut.ids.shape[1] > longest:
        raise UsageError(f"windows of {cut.ids.shape[1]} tokens; the model was trained for {longest}")


def _facts(
    judged: _Opened,
    source: _Reference,
    report: dict[str, Any] | None,
    text: Text,
    cut: Windows,
    windows_asked: int,
) -> dict[str, Any]:
    """The fields of an Evaluation that all its variants share."""
    schemes = {scheme.name for scheme in getattr(judged.checkpoint, "schemes", {}).values()}
    bits, bits_from = bits_per_weight(judged.checkpoint, report)
    notes = (*judged.checkpoint.notes, *source.notes)
    if source.opened is not None and source.opened.checkpoint.notes:
        notes += tuple(f"reference: {note}" for note in source.opened.checkpoint.notes)
    if len(cut.ids) < windows_asked:
        notes += (f"{len(cut.ids)} windows of the {windows_asked} asked for: the text has {cut.text_tokens} tokens",)
    return {
        "model": judged.checkpoint.source,
        "reference": None if source.opened is None else source.opened.checkpoint.source,
        "reference_from": source.named_by,
        "scheme": " + ".join(sorted(schemes)) or None,
        "text": TextRecord(text.name, text.sha256, cut.text_tokens),
        "windows": len(cut.ids),
        "windows_asked": windows_asked,
        "window_tokens": cut.ids.shape[1],
        "bos": cut.bos,
        "scored_tokens": cut.scored_tokens,
        "file_bytes": file_bytes(judged.checkpoint),
        "bits_per_weight": bits,
        "bits_from": bits_from,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "notes": notes,
    }


def _figures(scores: Scores) -> dict[str, Any]:
    divergence = scores.divergence
    fields = dict.fromkeys(Divergence.__dataclass_fields__) if divergence is None else asdict(divergence)
    return {"ppl": scores.ppl, "ppl_se": scores.ppl_se, **fields}
