"""`evaluate`: a quantized model against its source, on the same tokens. Logits are never kept.

For every window the reference's log-probabilities are computed once, a slice of positions at a time, and every variant
of the quantized model (weights alone; with activations quantized as at run time) is compared with them on the spot.

Both models are in memory in `dtype` if they fit (`memory.py`), else they run block by block (`blockwise.py`), with the
same figures. The reference defaults to the source that the checkpoint's report names; if there is none or it does not
open, only perplexity is measured.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from lowbit.checkpoint.base import Checkpoint, OpenOptions, text_part
from lowbit.errors import NonFiniteError, UsageError
from lowbit.evaluation.activations import simulation_of
from lowbit.evaluation.blockwise import BlockwiseRuns, Context, Steps, block_count, fill_head
from lowbit.evaluation.footprint import bits_per_weight, device_peak_bytes, file_bytes, fingerprint, read_report
from lowbit.evaluation.forward import Decoded, Runner, slices
from lowbit.evaluation.memory import Way, choose_way
from lowbit.evaluation.metrics import Divergence, Scores, TokenValues
from lowbit.evaluation.opening import Opened, Opener, Reference, check_windows, open_reference
from lowbit.evaluation.result import Evaluation, GeneratedSample, TextRecord
from lowbit.evaluation.samples import MOST, TOKENS, parted, prompts, say
from lowbit.measure import Meter
from lowbit.text import Protocol, Text, Windows, cut_windows, read_text

Progress = Callable[[int, int], None]
Activations = Literal["auto", "none", "simulated"]
Variant = Literal["none", "simulated"]
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class _Comparison:
    """The variants of a model, with the context of each, on some windows; `reference` may be missing.

    models  the reference, if there is one, and the judged model
    """

    judged: Opened
    reference: Opened | None
    variants: Mapping[Variant, Context]
    windows: Windows
    progress: Progress | None

    @property
    def models(self) -> list[Opened]:
        return [self.judged] if self.reference is None else [self.reference, self.judged]


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
    max_memory: int | None = None,
    samples: int = 0,
    sample_tokens: int = TOKENS,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Perplexity of a checkpoint and its divergence from a reference, one Evaluation per variant.

    reference    the unquantized model; by default the source that the checkpoint's report names
    text         a file, a hub dataset such as `wikitext`, or the packaged text by default
    protocol     "full": every token of a window but the first is scored; "second-half": as llama.cpp does
    activations  "auto": weights alone, and a second row with activations simulated where the scheme quantizes them
    bos          "auto": each window opens with BOS where the tokenizer adds it by itself
    max_memory   memory limit of the process in bytes; models that do not fit run block by block, with a note. None:
                 most of the free memory. On CUDA, bytes of the device
    samples      number of packaged prompts (at most 6) that both models answer, `sample_tokens` tokens each; skipped,
                 with a note, when models run block by block
    progress     called with (windows done, windows in all); block by block a window counts once per block and model
    """
    if not 0 <= samples <= MOST:
        raise UsageError(f"{samples} samples were asked for", f"there are {MOST} prompts; 0 for none")
    meter = Meter()
    judged_text = read_text(text)
    with contextlib.ExitStack() as stack:
        opener = Opener(stack, dtype, device, options or OpenOptions())
        judged = opener.open(quantized)
        report = read_report(judged.checkpoint)
        variants = variants_of(judged.checkpoint, activations)
        source = open_reference(reference, report, opener)
        tokenizer = (source.opened or judged).tokenizer
        cut = cut_windows(judged_text, tokenizer, windows, window_tokens, protocol, bos)
        check_windows(judged, source.opened, cut.ids)
        asked = _Comparison(judged, source.opened, variants, cut, progress)
        runs = len(asked.models) - 1 + len(variants)
        way = choose_way([each.loader for each in asked.models], runs, max_memory)
        scores = _block_by_block(asked, way, opener.options) if way.block_by_block else _whole(asked)
        answers = () if way.block_by_block or not samples else _samples(asked, samples, sample_tokens)
        facts = _facts(judged, source, report, judged_text, cut, windows, way)
        facts |= {"protocol": protocol, "dtype": str(dtype).removeprefix("torch.")}
        if samples and way.block_by_block:
            facts["notes"] += ("no samples: models that are run block by block do not generate",)
        facts |= {"seconds": meter.seconds, "peak_memory_bytes": meter.peak_bytes + device_peak_bytes(device)}
    spoken = next(reversed(variants))  # with activations simulated, where there is that: as an engine would
    return [
        Evaluation(**facts, activations=name, **_figures(scores[name]), samples=answers if name == spoken else ())
        for name in variants
    ]


def _whole(asked: _Comparison) -> dict[Variant, Scores]:
    """Every model in memory."""
    for opened in asked.models:
        opened.loader.fill()
    base = None if asked.reference is None else Runner(asked.reference.model)
    model = asked.judged.model
    runners: dict[Variant, Runner] = {}
    for name, context in asked.variants.items():
        runners[name] = Runner(model, partial(context, model))
    return score(base, runners, asked.windows, asked.progress)


def _samples(asked: _Comparison, count: int, tokens: int) -> tuple[GeneratedSample, ...]:
    """Both models on the packaged prompts, the judged one in its last variant; none without a reference."""
    if asked.reference is None:
        return ()
    *_, context = asked.variants.values()
    reference, judged, tokenizer = asked.reference.model, asked.judged.model, asked.reference.tokenizer
    questions, chat = prompts(tokenizer, count)
    answers = []
    for prompt in questions:
        wanted = say(reference, tokenizer, prompt, chat, tokens, keep_probabilities=True)
        with context(judged):
            got = say(judged, tokenizer, prompt, chat, tokens)
        answers.append(parted(tokenizer, prompt, chat, wanted, got))
    return tuple(answers)


def _block_by_block(asked: _Comparison, way: Way, options: OpenOptions) -> dict[Variant, Scores]:
    """One block in memory at a time, then the heads."""
    ids = asked.windows.ids
    blocks = sum(
        block_count(opened) * (len(asked.variants) if opened is asked.judged else 1) for opened in asked.models
    )
    steps = Steps((blocks + 1) * len(ids), asked.progress)
    runs = BlockwiseRuns(ids, way.states_memory, options, steps)
    base = None if asked.reference is None else runs.run(asked.reference)
    runners: dict[Variant, Runner] = {name: runs.run(asked.judged, context) for name, context in asked.variants.items()}
    for opened in asked.models:
        fill_head(opened)
    return score(base, runners, asked.windows, lambda done, _: steps.within(done))


@torch.inference_mode()
def score(
    reference: Runner | None, variants: Mapping[Name, Runner], windows: Windows, progress: Progress | None = None
) -> dict[Name, Scores]:
    """Run every window through the reference and every variant; a summary per variant."""
    values: dict[Name, TokenValues] = {name: TokenValues() for name in variants}
    vocabulary = next(iter(variants.values())).vocabulary
    # Position t predicts token t + 1.
    positions = range(windows.first_scored - 1, windows.ids.shape[1] - 1)
    for index in range(len(windows.ids)):
        base = None if reference is None else reference.decode(windows.ids, index)
        decoded: dict[Name, Decoded] = {name: runner.decode(windows.ids, index) for name, runner in variants.items()}
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


def variants_of(checkpoint: Checkpoint, activations: Activations) -> dict[Variant, Context]:
    """The requested variants that exist, with the context of each: "none" for weights alone, "simulated"."""
    if activations not in ("auto", "none", "simulated"):
        raise UsageError(f"there is no activations mode {activations!r}", "choose one of auto, none, simulated")
    quantizes_activations = any(scheme.rounds_inputs for scheme in checkpoint.schemes.values())
    if activations == "simulated" and not quantizes_activations:
        raise UsageError(
            f"{checkpoint.source}: no layer quantizes its activations, so there is nothing to simulate",
            "use --activations auto",
        )
    variants: dict[Variant, Context] = {} if activations == "simulated" else {"none": contextlib.nullcontext}
    if quantizes_activations and activations != "none":
        variants["simulated"] = simulation_of(checkpoint)
    return variants


def _doubts(judged: Checkpoint, source: Reference) -> tuple[str, ...]:
    """Notes on a reference that is hardly the model that was quantized."""
    if source.opened is None or source.named_by == "report":
        return ()
    reference = source.opened.checkpoint
    if os.path.realpath(judged.source) == os.path.realpath(reference.source):
        return ("the reference is the model itself: a divergence of 0 says nothing of what was quantized",)
    texts = [text_part(config) or config for config in (judged.config(), reference.config())]
    for key in ("num_hidden_layers", "hidden_size"):
        ours, theirs = (text.get(key) for text in texts)
        if None not in (ours, theirs) and ours != theirs:
            return (f"the reference is another model (its {key} is {theirs}, here {ours}): the divergence is not what "
                    "quantization cost",)  # fmt: skip
    return ()


def _facts(
    judged: Opened, source: Reference, report: dict[str, Any] | None, text: Text, cut: Windows, windows_asked: int,
    way: Way,
) -> dict[str, Any]:  # fmt: skip
    """The fields of an Evaluation that all its variants share."""
    schemes = {scheme.name for scheme in judged.checkpoint.schemes.values()}
    bits, bits_from = bits_per_weight(judged.checkpoint, report)
    notes = (*judged.checkpoint.notes, *source.notes, *way.notes)
    if source.opened is not None and source.opened.checkpoint.notes:
        notes += tuple(f"reference: {note}" for note in source.opened.checkpoint.notes)
    notes += _doubts(judged.checkpoint, source)
    if len(cut.ids) < windows_asked:
        notes += (f"{len(cut.ids)} windows of the {windows_asked} asked for: the text has {cut.text_tokens} tokens",)
    return {
        "model": judged.checkpoint.source,
        "reference": None if source.opened is None else source.opened.checkpoint.source,
        "reference_from": source.named_by,
        "reference_sha256": None if source.opened is None else fingerprint(source.opened.checkpoint),
        "scheme": " + ".join(sorted(schemes)) or None,
        "text": TextRecord(name=text.name, sha256=text.sha256, tokens=cut.text_tokens),
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
