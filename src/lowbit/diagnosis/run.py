"""`diagnose`: locates the damage of a quantized model.

    open both → compare every tensor with the reference's → a pass of each model with statistics of inputs
              → contributions, in sweeps → findings → commands

One block of weights is in memory at a time. Activations that an engine rounds at run time are not simulated
(`lowbit evaluate` does that).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.summary import InputSummary, unpack_vocabulary, unseen_share
from lowbit.checkpoint.base import OpenOptions, report_path
from lowbit.diagnosis.contributions import ContributionSearch, Progress, Sweeper
from lowbit.diagnosis.evidence import Evidence, FlipCollector
from lowbit.diagnosis.findings import expert_of, find, verdict
from lowbit.diagnosis.inputs import InputStats, Mismatch, calibration_mismatch, clipped_inputs, observe, outlier_inputs
from lowbit.diagnosis.pair import ROUNDING, Pair, TensorFacts, codes_at_ends, look_at_tensors
from lowbit.diagnosis.suggestions import suggest
from lowbit.diagnosis.tree import Tree, tied_factors, transform_ties
from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.blockwise import fill_head
from lowbit.evaluation.footprint import read_report, reported_source
from lowbit.evaluation.metrics import standard_error
from lowbit.evaluation.opening import Opened, Opener, check_windows
from lowbit.evaluation.result import TextRecord
from lowbit.measure import Meter
from lowbit.report import schema
from lowbit.report.diagnosis import Diagnosis, Suggestion
from lowbit.text import Windows, cut_windows, read_text
from lowbit.version import __version__

MOST_SUSPECTS = 16  # groups that are measured in any case


def diagnose(
    quantized: str | Path,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    *,
    windows: int = 8,
    window_tokens: int = 256,
    budget: float = 40.0,
    reverse: bool = False,
    bos: bool | Literal["auto"] = "auto",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Locate the damage of a quantized model, its cause, and commands against it.

    reference  the model that was quantized; by default the source that the report names
    text       a file, a hub dataset, or the packaged text by default; windows of it are cut as `evaluate` cuts them
    budget     forward passes of all windows that contributions may cost
    reverse    contributions by quantizing one group at a time, instead of restoring one
    progress   called with (what, done, in all)
    """
    meter, options = Meter(), options or OpenOptions()
    judged_text = read_text(text)
    with contextlib.ExitStack() as stack:
        opener = Opener(stack, dtype, device, options)
        judged = opener.open(quantized)
        report, notes = _report(judged)
        source, adapter = reported_source(read_report(judged.checkpoint))
        if reference is not None:
            source, adapter = str(reference), options.adapter
        if source is None:
            raise UsageError("no reference was given, and no report names one", "add --reference MODEL")
        pair = Pair(judged, opener.open(source, adapter))
        cut = cut_windows(judged_text, pair.reference.tokenizer, windows, window_tokens, "full", bos)
        check_windows(pair.judged, pair.reference, cut.ids)
        facts = {each.name: each for each in look_at_tensors(pair, progress)}
        run = _Measuring(pair, cut, facts, report, budget, reverse, options, progress)
        run.notes += notes
        evidence, flips, passes = run.measure()
        findings = find(evidence)
        suggestions = suggest(
            pair, evidence, findings, None if text is None else str(text), replace(options, adapter=adapter)
        )
        if evidence.total is not None and evidence.total < 1e-6 and not any(f.severity == "fault" for f in findings):
            suggestions = ()
        return Diagnosis(
            verdict=verdict(evidence, findings),
            healthy=not any(each.severity == "fault" for each in findings),
            model=pair.judged.checkpoint.source,
            reference=pair.reference.checkpoint.source,
            text=TextRecord(name=judged_text.name, sha256=judged_text.sha256, tokens=cut.text_tokens),
            windows=len(cut.ids),
            window_tokens=cut.ids.shape[1],
            scored_tokens=cut.scored_tokens,
            dtype=str(dtype).removeprefix("torch."),
            kld=evidence.total,
            kld_se=None if evidence.total is None else standard_error(evidence.base),
            same_top1=flips.same_top1 if evidence.total is not None else None,
            findings=tuple(findings),
            contributions=tuple(evidence.contributions.values()),
            flips=flips.worst(),
            suggestions=tuple[Suggestion, ...](suggestions),
            forward_passes=passes,
            seconds=meter.seconds,
            peak_memory_bytes=meter.peak_bytes,
            versions={"lowbit": __version__} | {name: metadata.version(name) for name in ("torch", "transformers")},
            notes=tuple(run.notes),
        )


class _Measuring:
    """Measures the pair, and collects `notes` on the way."""

    def __init__(
        self, pair: Pair, windows: Windows, facts: Mapping[str, TensorFacts], report: dict[str, Any] | None,
        budget: float, reverse: bool, options: OpenOptions, progress: Progress | None,
    ):  # fmt: skip
        self.pair, self.windows, self.facts, self.report = pair, windows, facts, report
        self.budget, self.reverse, self.options, self.progress = budget, reverse, options, progress
        self.notes: list[str] = [f"reference: {note}" for note in pair.reference.checkpoint.notes]

    def measure(self) -> tuple[Evidence, FlipCollector, float]:
        """(the evidence, the flipped tokens, forward passes)."""
        pair, ids = self.pair, self.windows.ids
        loader = pair.judged.loader
        judged = BlockRunner(pair.judged.checkpoint, loader.dtype, loader.device, self.options)
        reference = BlockRunner(pair.reference.checkpoint, loader.dtype, loader.device, self.options)
        head_inputs, of_reference = observe(reference, ids)
        broken = frozenset(name for name, each in self.facts.items() if each.nonfinite)
        of_judged = {} if broken else observe(judged, ids)[1]
        for opened in (pair.judged, pair.reference):
            fill_head(opened)
        sweeper = Sweeper(pair, self.windows, judged, reference, head_inputs, broken, self.reverse, self.progress)
        tree = self._tree(sweeper)
        search = ContributionSearch(sweeper, tree, self.budget)
        flips = FlipCollector(ids, pair.judged.tokenizer)
        basis = self._other_basis()
        if basis:
            self.notes.append(
                "most weights have nothing to do with the reference's: the residual stream is rotated (a Hadamard "
                "transform), or the reference is another model. No tensor can be exchanged: contributions were not "
                "measured"
            )
        search.run(self._suspects(), flips, contributions=not basis)
        if search.stopped:
            self.notes.append(f"the budget of {self.budget:g} forward passes left groups unsplit: --budget")
        evidence = self._evidence(search, of_reference, of_judged)
        return evidence, flips, sweeper.forward_passes + 1 + (not broken)

    def _evidence(
        self, search: ContributionSearch, of_reference: Mapping[str, InputStats], of_judged: Mapping[str, InputStats]
    ) -> Evidence:
        pair, ties = self.pair, search.tree.tied.values()
        schemes, scales = pair.quantized.schemes, pair.quantized.input_scales
        rounds_activations = any(scheme.activation is not None for scheme in schemes.values())
        if rounds_activations:
            self.notes.append("activations are quantized at run time: not simulated here (lowbit evaluate does)")
        ends = (codes_at_ends(pair, name) for name in schemes if name in self.facts)
        return Evidence(
            facts=self.facts,
            contributions=search.found,
            members=search.tensors,
            total=float(search.base.mean()) if np.isfinite(search.base).all() else None,
            head=search.tree.head,
            tied=frozenset().union(*(tie.tensors for tie in ties)),
            tied_factors=tied_factors(pair, ties),
            other_basis=self._other_basis(),
            mismatch=self._mismatch(of_reference, of_judged),
            unseen=self._unseen(),
            outliers=tuple(outlier_inputs(of_reference.values())),
            clipped=tuple(clipped_inputs(of_reference.values(), schemes, scales, pair.quantized.input_zero_points)),
            ends=tuple(each for each in ends if each is not None),
            quantizes_activations=rounds_activations,
            report=self.report,
            base=search.base,
        )

    def _tree(self, sweeper: Sweeper) -> Tree:
        transforms = [each for each in (self.report or {}).get("transforms") or () if isinstance(each, dict)]
        applied = {str(each.get("point")) for each in transforms if each.get("applied")}
        norms = {name for name, each in self.facts.items() if each.role == "norm" and each.error > ROUNDING}
        ties = {} if self._other_basis() else transform_ties(self.pair, applied, norms, bool(self.report))
        if ties:
            self.notes.append(
                f"a transform moved scales at {len(ties)} places: what it rewrote together is restored together"
            )
        quantized = frozenset(name for name, each in self.facts.items() if each.quantized)
        return Tree(self.pair, quantized, ties, sweeper.head_names)

    def _other_basis(self) -> bool:
        """True if most quantized weights have nothing to do with the reference's: a rotated residual stream."""
        gains = [abs(each.gain) for each in self.facts.values() if each.quantized and each.gain is not None]
        return bool(gains) and median(gains) < 0.5

    def _suspects(self) -> list[frozenset[str]]:
        """Tensors whose weights are wrong; those of one expert together."""
        bad = [each.name for each in self.facts.values()
               if each.is_zeroed or each.constant_rows or each.is_scaled or each.is_replaced]  # fmt: skip
        groups: dict[str, list[str]] = {}
        for name in bad:
            groups.setdefault(expert_of(name) or name, []).append(name)
        return [frozenset(group) for group in list(groups.values())[:MOST_SUSPECTS]]

    def _mismatch(self, *streams: Mapping[str, InputStats]) -> Mismatch | None:
        recorded = [InputSummary(**each) for each in self._calibration().get("inputs") or ()]
        if self._calibration() and not recorded:
            self.notes.append("the report has no statistics of the calibration text: it was not compared with this one")
        if recorded and len(self.windows.ids) < 2:
            self.notes.append("one window has no halves to compare: the calibration text was not judged")
        return calibration_mismatch(recorded, [stats for stats in streams if stats])

    def _unseen(self) -> float | None:
        text = self._calibration().get("vocabulary")
        if not isinstance(text, str):
            return None
        seen = unpack_vocabulary(text, self.pair.judged.vocabulary)
        return unseen_share(self.windows.ids, seen)

    def _calibration(self) -> dict[str, Any]:
        settings = (self.report or {}).get("settings")
        found = settings.get("calibration") if isinstance(settings, dict) else None
        return found if isinstance(found, dict) else {}


def _report(judged: Opened) -> tuple[dict[str, Any] | None, list[str]]:
    """(the report beside the weights, checked, as plain values; why it is not used)."""
    if read_report(judged.checkpoint) is None:
        return None, []
    checkpoint = judged.checkpoint
    path = report_path(Path(checkpoint.source) if checkpoint.kind == "gguf" else checkpoint.folder)
    try:
        return schema.load(path).model_dump(mode="json", by_alias=True), []
    except CheckpointError as error:
        return None, [f"the report beside the weights was not used: {error}"]
