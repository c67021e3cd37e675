"""From evidence to findings: one function per kind, with its rule and threshold, and the order of the findings.

Faults come first, then warnings, then notes; within each, by falling share of the KLD. A fault that restoring tensors
cannot measure (calibration) ranks with the share UNMEASURED.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Literal

from lowbit.diagnosis.caches import costly_caches
from lowbit.diagnosis.evidence import Evidence
from lowbit.diagnosis.inputs import MISMATCH_LEAST, UNSEEN, is_mismatch
from lowbit.diagnosis.pair import FACTOR, ROUNDING, TensorFacts
from lowbit.report.diagnosis import Contribution, DiagnosisFinding, Severity

UNMEASURED = 0.3
OUTSTANDING = 0.2  # share of the KLD of an outstanding group, with …
TIMES_MEDIAN = 4.0  # … this many times the median contribution of groups of its level
# Share of codes at the ends of the grid, over that of rounding again: difference and ratio.
ENDS_MORE, ENDS_TIMES = 0.05, 3.0
FEWER_BITS = 0.75  # below the decoder's linears
LOW_HEAD_BITS = 3.5  # of a head, whatever the decoder has
_RANK: dict[Severity, int] = {"fault": 0, "warning": 1, "note": 2}


def find(evidence: Evidence) -> list[DiagnosisFinding]:
    """All findings, worst first."""
    found = sorted((finding for rule in RULES for finding in rule(evidence)), key=_order)
    named: set[str] = set()
    kept = []
    for finding in found:
        if finding.kind in _WHERE and (named & set(finding.tensors) or (finding.kind == "spread" and named)):
            continue  # a finding above names it with the cause
        if finding.kld is not None:
            named |= set(finding.tensors)
        kept.append(finding)
    return kept


def _order(finding: DiagnosisFinding) -> tuple[int, float]:
    share = finding.share if finding.share is not None else UNMEASURED if finding.kind in _UNMEASURED else 0.0
    return _RANK[finding.severity], -share


_UNMEASURED = ("calibration", "nonfinite")
# Findings that tell where, not why.
_WHERE = ("sensitive", "spread")


def nonfinite(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    bad = [each for each in evidence.facts.values() if each.nonfinite]
    for each in bad:
        yield DiagnosisFinding(
            kind="nonfinite", severity="fault", tensors=(each.name,),
            title=f"{each.name} holds NaN or inf in {each.nonfinite} of {_count(each)} weights",
            detail="everything after it is NaN too; the rest was measured with the reference's weights in its place",
        )  # fmt: skip
    if not bad and evidence.total is None:
        yield DiagnosisFinding(
            kind="nonfinite", severity="fault", title="the quantized model gives NaN or inf on this text",
            detail="its weights are finite, but its activations overflow; try --dtype float32",
        )  # fmt: skip


def zeroed(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """All weights 0 where the reference's are not; an expert is named once."""
    groups: dict[str, list[str]] = {}
    for each in evidence.facts.values():
        if each.is_zeroed and not each.name.endswith(".bias"):
            groups.setdefault(expert_of(each.name) or each.name, []).append(each.name)
    for name, tensors in groups.items():
        expert = re.fullmatch(r"(.*)\.experts\.(\d+)", name)
        what = name
        if expert:
            which = ", ".join(tensor.split(".")[-2] for tensor in tensors)
            what = f"expert {expert[2]} of {expert[1]} ({which})"
        yield _measured(
            evidence, "zero", "fault", f"{what} is all zeros", tensors,
            "the reference's weights are not; the checkpoint was damaged, or quantized from a damaged one",
        )  # fmt: skip


def constant_rows(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    for each in evidence.facts.values():
        if each.constant_rows and each.quantized and not each.is_zeroed and each.bits > 1.1:
            yield _measured(
                evidence, "constant", "fault", f"{each.constant_rows} of {each.shape[0]} rows of {each.name} hold one "
                "value only", [each.name], "the reference's rows do not; their codes were lost",
            )  # fmt: skip


def scales(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """Weights that are the reference's times a factor: scales doubled, halved, of another group. One finding for the
    tensors of a block with the same factor, or for all if more than three blocks share it."""
    groups: dict[tuple[int | None, str], list[str]] = {}
    for names, factor in _factors(evidence):
        groups.setdefault((evidence.facts[names[0]].block, f"{factor:.1f}"), []).extend(names)
    by_factor = Counter(factor for _, factor in groups)
    for factor in [factor for factor, blocks in by_factor.items() if blocks > 3]:
        parts = [groups.pop(key) for key in list(groups) if key[1] == factor]
        yield _scaled(evidence, f"{sum(map(len, parts))} tensors in {len(parts)} blocks", factor,
                      [name for part in parts for name in part])  # fmt: skip
    for (block, factor), names in groups.items():
        quantized = [each for each in evidence.facts.values() if each.quantized and each.block == block]
        of = "" if len(names) == len(quantized) else f"{len(names)} of "
        shown = f"{of}the {len(quantized)} quantized linears of block {block}"
        where = " and ".join(names) if len(names) < 3 or block is None else shown
        first = evidence.facts[names[0]]
        if len(names) == 1 and first.name not in evidence.tied and 1 / FACTOR < (first.gain or 1) < FACTOR:
            where = f"{len(first.row_gains)} of {first.rows} rows of {first.name}"
        yield _scaled(evidence, where, factor, names)


def _scaled(evidence: Evidence, where: str, factor: str, names: list[str]) -> DiagnosisFinding:
    single = where == names[0]
    return _measured(
        evidence, "scale", "fault", f"{where} {'is' if single else 'are'} {factor} times what "
        f"{'it' if single else 'they'} should be", names,
        f"the decoded weights follow the reference's, times {factor}: the scales are wrong, the codes are right",
    )  # fmt: skip


def _factors(evidence: Evidence) -> Iterator[tuple[tuple[str, ...], float]]:
    """(tensors, their wrong factor), including those that a transform rewrote."""
    if evidence.other_basis:
        return
    for each in evidence.facts.values():
        if each.is_scaled and each.name not in evidence.tied and len(each.shape) > 1:
            yield (each.name,), each.factor
    off = {names: factor for names, factor in evidence.tied_factors.items()
           if factor > 0 and not 1 / FACTOR < factor < FACTOR and not evidence.facts[names[0]].nonfinite}  # fmt: skip
    for names, factor in off.items():
        # Of two tensors scaled against each other only the product is known; 4 is read as twice 2.
        both = len(names) == 2 and abs(math.log(factor)) > 2 * math.log(FACTOR) + math.log(1.2)
        yield names, math.sqrt(factor) if both else factor


def replaced(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    if evidence.other_basis:
        return
    for each in evidence.facts.values():
        if each.is_replaced and each.quantized and each.name not in evidence.tied:
            yield _measured(
                evidence, "replaced", "fault", f"{each.name} has little to do with the reference's weights",
                [each.name],
                f"⟨Ŵ, W⟩ / ⟨W, W⟩ is {each.gain:.2f} and the error {100 * each.error:.0f} % of the weight: another "
                "layer's codes, a wrong bit order, or a reference that is not the source",
            )  # fmt: skip


def changed(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """Unquantized tensors that differ from the reference without a transform to explain it."""
    if evidence.other_basis:
        return
    bad = [each for each in evidence.facts.values()
           if not each.quantized and each.error > ROUNDING and each.name not in evidence.tied
           and not each.name.endswith(".bias") and not each.is_zeroed]  # fmt: skip
    if bad:
        worst = max(bad, key=lambda each: each.error)
        yield DiagnosisFinding(
            kind="changed", severity="warning", tensors=tuple(each.name for each in bad[:20]),
            title=f"{len(bad)} tensors that are not quantized differ from the reference, {worst.name} the most",
            detail=f"by {100 * worst.error:.2g} % of its squared norm; either a transform that the report does not "
            "tell of, or another model",
        )  # fmt: skip


def low_bits(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """A tensor in fewer bits than the rest, or a head in very few, with an outstanding share of the KLD."""
    for each in evidence.culprits:
        share = evidence.share(each.kld)
        facts = [evidence.facts[name] for name in evidence.members[each.name] if evidence.facts[name].quantized]
        if share is None or share < OUTSTANDING or each.level in ("blocks", "block") or not facts:
            continue
        bits = sum(fact.bits * _count(fact) for fact in facts) / sum(_count(fact) for fact in facts)
        in_head = bool(evidence.members[each.name] & evidence.head)
        fewer = bits < evidence.median_bits - FEWER_BITS
        if fewer or (in_head and bits < LOW_HEAD_BITS):
            others = f"the decoder's linears have {evidence.median_bits:.1f}"
            because = f"it is stored in {bits:.1f} bits per weight, {others}"
            yield _finding_of(evidence, each, "bits", "fault", because)


def outstanding(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """A group that costs far more than others of its level, without a fault of its own."""
    for each in evidence.culprits:
        share = evidence.share(each.kld)
        if share is None or share < OUTSTANDING or each.level == "blocks":
            continue
        levels = ("block", "blocks") if each.level == "outside" else (each.level,)
        like = [other.kld for other in evidence.contributions.values()
                if other.level in levels and other.name != each.name]  # fmt: skip
        typical = median(like) if like else 0.0
        if each.kld > TIMES_MEDIAN * max(typical, 0.0):
            yield _finding_of(
                evidence, each, "sensitive", "warning", "far more than others of its kind, so it is sensitive"
            )


def calibration(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    found, share = evidence.mismatch, evidence.unseen
    measured = []
    if found is not None:
        measured.append(
            f"mean squares of channels differ by {found.distance:.2f} doublings (median over {found.inputs} inputs); "
            f"the two halves of the text differ by {found.halves:.2f}"
        )
    if share is not None:
        measured.append(f"{100 * share:.0f} % of the text's tokens do not occur in the calibration text")
    if is_mismatch(found, share):
        text = ((evidence.report or {}).get("settings") or {}).get("calibration") or {}
        name = text.get("name", "the calibration text")
        yield DiagnosisFinding(
            kind="calibration", severity="fault", tensors=() if found is None else (found.worst,),
            title=f"the model was calibrated on something else than this text: {name} does not look like it",
            detail="; ".join(measured),
        )  # fmt: skip
        return
    if found is None:
        return
    unclear = found.distance > MISMATCH_LEAST and share is not None and share > UNSEEN
    title = "the calibration text may differ from this one, but so do its own halves: more windows would tell" \
        if unclear else "nothing speaks against the calibration text"  # fmt: skip
    yield DiagnosisFinding(kind="calibration-fits", severity="note", title=title, detail="; ".join(measured))


def clipped(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    if evidence.clipped:
        worst = evidence.clipped[0]
        yield DiagnosisFinding(
            kind="clipped", severity="fault", tensors=tuple(each.tensor for each in evidence.clipped[:20]),
            title=f"{len(evidence.clipped)} static activation scales are too small for this text, that of "
            f"{worst.tensor} the most",
            detail=f"it reaches {worst.reach:.3g}, and the input has values up to {worst.largest:.3g}, which are "
            "clipped; calibrate on text like this one",
        )  # fmt: skip


def outliers(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    if not evidence.outliers:
        return
    worst = evidence.outliers[0]
    channels = ", ".join(map(str, worst.channels[:5])) + (" …" if len(worst.channels) > 5 else "")
    severity: Severity = "warning" if evidence.quantizes_activations else "note"
    because = "; a token's scale must span them" if evidence.quantizes_activations else ""
    yield DiagnosisFinding(
        kind="outliers", severity=severity, tensors=tuple(each.name for each in evidence.outliers[:20]),
        title=f"{len(evidence.outliers)} inputs have outlier channels, {worst.name} the largest: {worst.largest:.0f}, "
        f"{worst.ratio:.0f} times the median channel's largest value (channel {channels})",
        detail=f"rule: max |x| of at least 6, and 20 times the median over channels{because}",
    )  # fmt: skip


def saturation(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    bad = [each for each in evidence.ends if each.share > max(ENDS_TIMES * each.expected, each.expected + ENDS_MORE)]
    if bad:
        worst = max(bad, key=lambda each: each.share - each.expected)
        yield DiagnosisFinding(
            kind="saturation", severity="warning", tensors=tuple(each.name for each in bad[:20]),
            title=f"codes of {len(bad)} tensors crowd at the ends of their grid, of {worst.name} the most",
            detail=f"{100 * worst.share:.1f} % of its codes; rounding the reference to nearest gives "
            f"{100 * worst.expected:.1f} %: its scales are too small",
        )  # fmt: skip


def left_out(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """Linears in 16 bits among quantized ones, and tensors that the report calls quantized and that are not."""
    said = {entry.get("name"): entry.get("scheme") for entry in (evidence.report or {}).get("tensors", ())
            if isinstance(entry, dict)}  # fmt: skip
    wrong = [each.name for each in evidence.facts.values() if said.get(each.name) and not each.quantized]
    if wrong:
        yield DiagnosisFinding(kind="unquantized", severity="fault", tensors=tuple(wrong[:20]),
                               detail="the files are larger than they should be", title=f"{len(wrong)} tensors are in "
                               f"16 bits that the report calls quantized: {wrong[0]} …")  # fmt: skip
    roles = {each.role for each in evidence.facts.values() if each.quantized and each.block is not None}
    others = [each for each in evidence.facts.values() if each.role in roles and each.block is not None
              and not each.quantized and each.name not in wrong]  # fmt: skip
    if others:
        yield DiagnosisFinding(kind="left", severity="note", tensors=tuple(each.name for each in others[:20]),
                               title=f"{len(others)} linears are in 16 bits while others of their role are quantized",
                               detail=", ".join(each.name for each in others[:5]))  # fmt: skip


def spread(evidence: Evidence) -> Iterator[DiagnosisFinding]:
    """Where the damage is when nothing stands out."""
    if not evidence.contributions or not evidence.total:
        return
    if not evidence.culprits:
        yield DiagnosisFinding(kind="spread", severity="note", title="no part stands out of the noise",
                               detail="more windows would tell them apart: --windows")  # fmt: skip
        return
    first = [each for each in evidence.contributions.values() if each.level in ("outside", "block", "blocks")]
    noise = sum(not each.significant for each in first)
    worst = evidence.culprits[0]
    if worst.level == "blocks" and len([each for each in first if each.level != "outside"]) == 1:
        yield DiagnosisFinding(
            kind="spread", severity="note", title="the budget did not reach to tell blocks apart: --budget"
        )
        return
    found = _finding_of(evidence, worst, "spread", "note", f"the largest single part{_outlier_of(evidence, worst)}")
    aside = f"; {noise} of {len(first)} blocks and outer tensors are within noise" if noise else ""
    yield found.model_copy(update={"detail": found.detail + aside})


RULES: tuple[Callable[[Evidence], Iterator[DiagnosisFinding]], ...] = (
    nonfinite, zeroed, constant_rows, scales, replaced, low_bits, calibration, clipped, left_out,
    outstanding, saturation, outliers, costly_caches, changed, spread,
)  # fmt: skip


def verdict(evidence: Evidence, findings: list[DiagnosisFinding]) -> str:
    """One sentence: what hurts most, and why."""
    faults = [each for each in findings if each.severity == "fault"]
    if faults:
        others = f" ({len(faults) - 1} more {'fault' if len(faults) == 2 else 'faults'})" if len(faults) > 1 else ""
        return f"{faults[0].title}{_cost(faults[0])}{others}"
    if evidence.total is None:
        return "nothing could be measured"
    if evidence.total < 1e-6:
        return "the two models are the same on this text"
    named = next((each for each in findings if each.kind in ("sensitive", "spread")), None)
    where = ", unless the reference is another model" if evidence.other_basis else ""
    where += "" if named is None else f"; {named.title}"
    return f"nothing is broken: the KLD of {evidence.total:.4f} is what rounding costs{where}"


def _cost(finding: DiagnosisFinding) -> str:
    if finding.share is None or finding.kld is None or "KLD" in finding.title:
        return ""
    return f"; it costs {100 * min(1.0, max(0.0, finding.share)):.0f} % of the KLD"


def _measured(
    evidence: Evidence, kind: str, severity: Severity, title: str, tensors: Iterable[str], detail: str
) -> DiagnosisFinding:
    """A finding on tensors, with the gain of restoring them if it was measured."""
    names = tuple(tensors)
    found = evidence.contribution_of(frozenset(names))
    if found is None or not evidence.total:
        return DiagnosisFinding(kind=kind, severity=severity, title=title, detail=detail, tensors=names)
    if not evidence.is_just(found, frozenset(names)):
        detail += f"; measured with all of {found.name}"
    return DiagnosisFinding(kind=kind, severity=severity, title=title, detail=detail, tensors=names, kld=found.kld,
                            se=found.se, share=evidence.share(found.kld))  # fmt: skip


def _finding_of(
    evidence: Evidence, each: Contribution, kind: str, severity: Literal["fault", "warning", "note"], because: str
) -> DiagnosisFinding:
    share = evidence.share(each.kld) or 0.0
    tensors = tuple(sorted(name for name in evidence.members[each.name] if evidence.facts[name].quantized))
    return DiagnosisFinding(
        kind=kind, severity=severity, tensors=tensors[:20],
        title=f"{each.name} costs {100 * share:.0f} % of the KLD: {because}",
        detail=f"restoring it takes {each.kld:.5f} ± {each.se:.5f} of {evidence.total:.5f}", kld=each.kld, se=each.se,
        share=share,
    )  # fmt: skip


def _outlier_of(evidence: Evidence, each: Contribution) -> str:
    """A clause on the outlier channels of a small group's input, or ""."""
    if each.level not in ("set", "tensor"):
        return ""
    for found in evidence.outliers:
        if {f"{linear}.weight" for linear in found.linears} & evidence.members[each.name]:
            return f" (a channel of its input is {found.ratio:.0f} times the median one)"
    return ""


def expert_of(name: str) -> str | None:
    """The expert that a tensor belongs to: "model.layers.3.mlp.experts.7"."""
    found = re.match(r"(.*\.experts\.\d+)\.", name)
    return found[1] if found else None


def _count(facts: TensorFacts) -> int:
    return math.prod(facts.shape)
