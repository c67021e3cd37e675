"""Suggestions: commands to paste, each with its expected gain in KLD and its cost in bytes.

    gain ≈ drop · (1 − 4^(b − b'))      drop: what restoring the tensors gains; b, b' bits per weight before and after,
                                        since the KLD of a small error goes with its square
    cost = bytes of the files as planned with the override − bytes as planned without it

Both plans are dry runs, so nothing is suggested that a format cannot hold or an engine cannot run: the next wider
scheme of the table is tried, at last 16 bits. Settings come from the report, or, without one, from the checkpoint:
scheme, group size and format.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import OpenOptions
from lowbit.diagnosis.caches import cache_suggestions
from lowbit.diagnosis.evidence import Evidence
from lowbit.diagnosis.pair import Pair
from lowbit.errors import LowbitError
from lowbit.knobs import command_line
from lowbit.patterns import pattern_for
from lowbit.registry import folder_formats
from lowbit.report.diagnosis import Contribution, DiagnosisFinding, Suggestion
from lowbit.schemes import SCHEMES, WIDER
from lowbit.text import OF_MEMORY
from lowbit.train.exporting import METHOD

WIDENED = 3  # at most so many sets get a suggestion of a wider scheme
# Findings that mean damaged files.
DAMAGED = ("nonfinite", "zero", "constant", "scale", "replaced", "unquantized")


@dataclass(frozen=True)
class Recipe:
    """How the model was quantized: fields of `lowbit.settings.Settings`."""

    source: str
    output: Path
    settings: dict[str, Any]
    options: OpenOptions

    def with_override(self, pattern: str, scheme: str | None) -> Recipe:
        """With a scheme for some linears, in front of other overrides; None leaves them in 16 bits."""
        settings = dict(self.settings)
        if scheme is None:
            settings["ignore"] = (*settings.get("ignore", ()), pattern)
        else:
            others = {other: name for other, name in settings.get("overrides", {}).items() if other != pattern}
            settings["overrides"] = {pattern: scheme, **others}
        return Recipe(self.source, self.output, settings, self.options)

    def with_setting(self, name: str, value: Any) -> Recipe:
        return Recipe(self.source, self.output, {**self.settings, name: value}, self.options)

    @cached_property
    def plan(self) -> Any:
        """The plan of this recipe; LowbitError if there is none."""
        import lowbit

        return lowbit.dry_run(self.source, output=self.output, options=self.options, **self.settings).plan

    @property
    def command(self) -> str:
        return command_line("quantize", self.source, self.output, self.settings, asdict(self.options))


def suggest(
    pair: Pair, evidence: Evidence, findings: Sequence[DiagnosisFinding], text: str | None, options: OpenOptions
) -> tuple[Suggestion, ...]:
    """Commands for what was found, the most important first."""
    recipe = _recipe(pair, evidence, options)
    quantized, reference = pair.quantized.source, pair.original.source
    found: list[Suggestion] = []
    kinds = {finding.kind for finding in findings if finding.severity == "fault"}
    if kinds & set(DAMAGED):
        check = shlex.join(["lowbit", "verify", quantized, "--reference", reference])
        found.append(
            Suggestion(text="check the rest of the files against a fresh quantization of the reference", command=check)
        )
        if recipe is not None:
            lost = next((each for each in findings if each.kind in DAMAGED), None)
            found.append(Suggestion(text="quantize the reference again, with the same settings",
                                    command=recipe.command, gain=lost and lost.kld, gain_se=lost and lost.se,
                                    bytes=0))  # fmt: skip
    if kinds & {"calibration", "clipped"} and recipe is not None:
        found.append(
            Suggestion(text="calibrate on text like this one, and evaluate on a part that was held out",
                       command=recipe.with_setting("calib", text).command, bytes=0)
        )  # fmt: skip
    if recipe is not None and not kinds & set(DAMAGED):
        low = {name for finding in findings if finding.kind == "bits" for name in finding.tensors}
        found += _widened(evidence, recipe, frozenset(low))
    if _is_trained(evidence) and not kinds & set(DAMAGED):
        found.append(_trained_further(pair, evidence, options))
    found += cache_suggestions(evidence, quantized)
    if not found:
        command = ["lowbit", "evaluate", quantized, "--reference", reference]
        found.append(Suggestion(text="nothing to repair: evaluate it on more text", command=shlex.join(command)))
    return tuple(found)


def _widened(evidence: Evidence, recipe: Recipe, low: frozenset[str]) -> list[Suggestion]:
    """A wider scheme for the sets that cost most, one by one and together; the widest for tensors in too few bits."""
    try:
        base = recipe.plan
    except LowbitError:
        return []
    found: list[tuple[Suggestion, str, str | None]] = []
    for each in _changeable(evidence):
        made = _one_wider(evidence, recipe, base, each, bool(low & evidence.members[each.name]))
        if made is not None:
            found.append(made)
        if len(found) == WIDENED:
            break
    suggestions = [suggestion for suggestion, _, _ in found]
    roles = [each for each in evidence.contributions.values() if each.level == "everywhere" and each.significant]
    best = max(roles, key=lambda each: each.kld, default=None)
    if len(found) > 1:
        together = recipe
        for _, pattern, scheme in reversed(found):
            together = together.with_override(pattern, scheme)
        gain, cost = sum(each.gain or 0.0 for each in suggestions), sum(each.bytes or 0 for each in suggestions)
        suggestions.append(Suggestion(text="all of these together (their gains need not add up)",
                                      command=together.command, gain=gain, bytes=cost))  # fmt: skip
    made = None if best is None or best.kld <= 0 else _one_wider(evidence, recipe, base, best, False)
    return suggestions if made is None else [*suggestions, made[0]]


def _changeable(evidence: Evidence) -> list[Contribution]:
    """Groups that can have a scheme of their own, largest drop first; none inside another."""
    able = [each for each in evidence.contributions.values()
            if each.level in ("set", "outside") and each.significant and each.kld > 0]  # fmt: skip
    chosen: list[Contribution] = []
    for each in sorted(able, key=lambda each: -each.kld):
        members = evidence.members[each.name]
        if not any(members & evidence.members[other.name] for other in chosen):
            chosen.append(each)
    return chosen


def _one_wider(
    evidence: Evidence, recipe: Recipe, base: Any, each: Contribution, widest: bool
) -> tuple[Suggestion, str, str | None] | None:
    weights = frozenset(name for name in evidence.members[each.name] if evidence.facts[name].quantized)
    planned = {tensor.name: tensor for tensor in base.tensors if weights & set(_sources(tensor))}
    own = {tensor.stored_as for tensor in planned.values() if tensor.is_quantized}
    if not planned or not own:
        return None
    every = [tensor.name for tensor in base.tensors]
    gguf = base.format.name == "gguf"
    suffix = "" if gguf else ".weight"
    pattern = pattern_for(*([name.removesuffix(suffix) for name in names] for names in (planned, every)))
    before = _bits(planned.values())
    schemes = WIDER.get(sorted(own)[0], ())
    for scheme in (*(schemes[::-1] if widest else schemes), *(() if gguf else (None,))):
        wider = recipe.with_override(pattern, scheme)
        try:
            plan = wider.plan
        except LowbitError:
            continue
        after = _bits(tensor for tensor in plan.tensors if tensor.name in planned)
        if after <= before + 0.2:
            continue
        kept = 1 - 4.0 ** (before - after)
        shown = scheme or "16 bits"
        where = f"{each.name} in all blocks" if each.level == "everywhere" else each.name
        text = f"{where} in {shown} ({before:.1f} → {after:.1f} bits per weight)"
        suggestion = Suggestion(text=text, command=wider.command, gain=each.kld * kept, gain_se=each.se * kept,
                                bytes=plan.file_bytes - base.file_bytes)  # fmt: skip
        return suggestion, pattern, scheme
    return None


def _sources(tensor: Any) -> tuple[str, ...]:
    """Names of the Hugging Face tensors behind a planned tensor."""
    return tuple(tensor.source.names)


def _bits(tensors: Any) -> float:
    chosen = list(tensors)
    weights = sum(tensor.weights for tensor in chosen)
    return 8 * sum(tensor.stored_bytes for tensor in chosen) / weights if weights else 0.0


def _recipe(pair: Pair, evidence: Evidence, options: OpenOptions) -> Recipe | None:
    """The recipe of the quantized model; None if its scheme is not one of lowbit's, or a training chose its codes."""
    if _is_trained(evidence):
        return None
    quantized = Path(pair.quantized.source)
    gguf = pair.judged.checkpoint.kind == "gguf"
    name = f"{quantized.stem}-anew.gguf" if gguf else f"{quantized.name}-anew"
    reported = _reported(evidence.report) if evidence.report else None
    settings = reported or (_seen_gguf(pair) if gguf else _seen(pair))
    return None if settings is None else Recipe(pair.original.source, quantized.with_name(name), settings, options)


def _is_trained(evidence: Evidence) -> bool:
    return ((evidence.report or {}).get("settings") or {}).get("method") == METHOD


def _trained_further(pair: Pair, evidence: Evidence, options: OpenOptions) -> Suggestion:
    """Quantizing the reference anew would lose what was trained, so training goes on."""
    quantized, settings = pair.quantized.source, (_reported(evidence.report) or {}) if evidence.report else {}
    gguf = pair.judged.checkpoint.kind == "gguf"
    path = Path(quantized)
    output = path.with_name(f"{path.stem}-further.gguf" if gguf else f"{path.name}-further")
    settings = {name: value for name, value in settings.items() if name not in ("calib", "samples", "seqlen")}
    how = {"distill": True, "reference": pair.original.source}
    trust = {name: value for name, value in asdict(options).items() if name != "adapter"}
    command = command_line("finetune", quantized, output, settings, how, trust)
    text = "train it further, towards the reference: its codes were trained, and quantizing anew would lose that"
    return Suggestion(text=text, command=command)


def _reported(report: dict[str, Any]) -> dict[str, Any] | None:
    """The given settings from the report; None for a conversion, whose schemes come from its source."""
    tensors, format = report.get("tensors") or (), (report.get("output") or {}).get("format")
    if format != "gguf" and any(tensor.get("repacked") for tensor in tensors):
        return None
    settings = report["settings"]
    given = settings["given"]
    if str(given.get("calib", "")).endswith(OF_MEMORY):  # no command can name it
        given = {name: value for name, value in given.items() if name != "calib"}
    return {"scheme": settings["scheme"]} | given


def _seen(pair: Pair) -> dict[str, Any] | None:
    """The settings visible in a folder without a report."""
    schemes = pair.quantized.schemes
    common = Counter(scheme.name for scheme in schemes.values()).most_common(1)
    if not common or common[0][0] not in SCHEMES:
        return None
    name = common[0][0]
    weight = next(scheme.weight for scheme in schemes.values() if scheme.name == name)
    settings: dict[str, Any] = {"scheme": name}
    kind = pair.judged.checkpoint.kind
    if kind in folder_formats() and kind != "compressed-tensors":
        settings["format"] = kind
    if weight.group_size_is_free and weight.group_size != SCHEMES[name].weight.group_size:
        settings["group_size"] = weight.group_size
    return settings


def _seen_gguf(pair: Pair) -> dict[str, Any] | None:
    """The file type in the header of a GGUF file."""
    from lowbit.formats.gguf.mix import FILE_TYPES

    number = pair.judged.checkpoint.metadata.get("general.file_type")
    name = next((each.name for each in FILE_TYPES.values() if each.number == number), None)
    return None if name is None else {"scheme": name}
