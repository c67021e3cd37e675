"""What to do: commands that the user can paste, with the expected gain in KLD and the cost in bytes of each.

    gain ≈ drop · (1 − 4^(b − b'))      drop: what restoring the tensors gains; b, b' bits per weight before and after,
                                        since the KLD of a small error goes with its square
    cost = bytes of the files as planned with the override − bytes as planned without it

Both plans are dry runs of the real thing, so what a format cannot hold or an engine cannot run is not suggested: the
next wider scheme of the table is tried, at last 16 bits. The settings are those that the report tells, or what can be
seen of a checkpoint without one: its scheme, group size and format.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import OpenOptions
from lowbit.diagnosis.evidence import Evidence
from lowbit.diagnosis.pair import Pair
from lowbit.diagnosis.result import Contribution, Finding, Suggestion
from lowbit.errors import LowbitError
from lowbit.schemes import SCHEMES

# Scheme → wider ones of the same engines, in the order to try.
WIDER: dict[str, tuple[str, ...]] = {
    "W2A16": ("W3A16", "W4A16", "W8A16"), "W3A16": ("W4A16", "W8A16"), "W4A16": ("W8A16",), "W4A16_ASYM": ("W8A16",),
    "W4A8": ("W8A8",), "W4AFP8": ("FP8_DYNAMIC",), "NVFP4": ("FP8_DYNAMIC",), "NVFP4A16": ("FP8_DYNAMIC", "W8A16"),
    "MXFP4": ("MXFP8", "FP8_DYNAMIC"), "MXFP4A16": ("MXFP8", "FP8_DYNAMIC", "W8A16"), "NF4": ("INT8",),
    "FP4": ("INT8",),
    "TQ1_0": ("TQ2_0", "Q2_K", "Q4_K"), "TQ2_0": ("Q2_K", "Q4_K"),
    "IQ1_S": ("IQ2_XS", "Q2_K", "Q3_K"), "IQ1_M": ("IQ2_XS", "Q2_K", "Q3_K"), "IQ2_XXS": ("IQ2_S", "Q3_K"),
    "IQ2_XS": ("IQ3_XXS", "Q3_K"), "IQ2_S": ("IQ3_XXS", "Q3_K"), "IQ3_XXS": ("IQ4_XS", "Q4_K"),
    "IQ3_S": ("IQ4_XS", "Q4_K"), "IQ4_XS": ("Q5_K", "Q6_K"), "IQ4_NL": ("Q5_0", "Q8_0"),
    "Q2_K": ("Q3_K", "Q4_K"), "Q3_K": ("Q4_K", "Q5_K"), "Q4_K": ("Q5_K", "Q6_K"), "Q5_K": ("Q6_K", "Q8_0"),
    "Q6_K": ("Q8_0",), "Q4_0": ("Q5_0", "Q8_0"), "Q4_1": ("Q5_1", "Q8_0"), "Q5_0": ("Q8_0",), "Q5_1": ("Q8_0",),
    "Q8_0": ("F16",),
}  # fmt: skip
# Sets that are suggested a wider scheme, at most.
WIDENED = 3
# Findings that mean the files are not what quantizing makes.
DAMAGED = ("nonfinite", "zero", "constant", "scale", "replaced", "unquantized")
_FORMATS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "modelopt", "mxfp4")
# Of the report's `options`: those that are flags of the command, by what they take.
_FLAGS = ("damping", "correction", "refine", "iterations", "expert_tokens", "activation_range", "compute")
_SWITCHES = ("all_experts", "bias_correction")


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
        """What would be written. LowbitError where it cannot be."""
        import lowbit

        return lowbit.dry_run(self.source, output=self.output, options=self.options, **self.settings).plan

    @property
    def command(self) -> str:
        words = ["lowbit", "quantize", self.source, "-o", str(self.output)]
        for name, value in self.settings.items():
            flag = "--" + name.replace("_", "-")
            if name == "ignore":
                words += [word for pattern in value for word in ("--ignore", pattern)]
            elif name in ("overrides", "method_overrides"):
                flag = flag.removesuffix("s")
                words += [word for pattern, scheme in value.items() for word in (flag, f"{pattern}={scheme}")]
            elif value is True:
                words.append(flag)
            elif value not in (None, False):
                words += [flag, str(value)]
        return shlex.join(words)


def suggest(
    pair: Pair, evidence: Evidence, findings: Sequence[Finding], text: str | None, options: OpenOptions
) -> tuple[Suggestion, ...]:
    """Commands for what was found, the most important first."""
    recipe = _recipe(pair, evidence, options)
    quantized, reference = pair.quantized.source, pair.original.source
    found: list[Suggestion] = []
    kinds = {finding.kind for finding in findings if finding.severity == "fault"}
    if kinds & set(DAMAGED):
        check = shlex.join(["lowbit", "verify", quantized, "--reference", reference])
        found.append(
            Suggestion(text="see what else of the files is not what quantizing the reference gives", command=check)
        )
        if recipe is not None:
            lost = next((each for each in findings if each.kind in DAMAGED), None)
            found.append(Suggestion(text="write it anew from the reference, with the same settings",
                                    command=recipe.command, gain=lost and lost.kld, gain_se=lost and lost.se,
                                    bytes=0))  # fmt: skip
    if kinds & {"calibration", "clipped"} and recipe is not None:
        found.append(
            Suggestion(text="calibrate on text like this one, and judge the result on a part that was left out",
                       command=recipe.with_setting("calib", text).command, bytes=0)
        )  # fmt: skip
    if recipe is not None and not kinds & set(DAMAGED):
        low = {name for finding in findings if finding.kind == "bits" for name in finding.tensors}
        found += _widened(evidence, recipe, frozenset(low))
    if not found:
        command = ["lowbit", "evaluate", quantized, "--reference", reference]
        found.append(Suggestion(text="nothing to repair: judge it on more text", command=shlex.join(command)))
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
    own = {tensor.scheme.name for tensor in planned.values() if tensor.scheme is not None}
    if not planned or not own:
        return None
    every = [tensor.name for tensor in base.tensors]
    gguf = base.format == "gguf"
    pattern = (
        pattern_for(list(planned), every)
        if gguf
        else pattern_for(
            [name.removesuffix(".weight") for name in planned], [name.removesuffix(".weight") for name in every]
        )
    )
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


def pattern_for(names: list[str], every: list[str]) -> str:
    """A regular expression that is found in exactly these names of all there are."""
    names = sorted(names)
    prefix = names[0] if len(names) == 1 else _common(names)
    rests = [name[len(prefix) :] for name in names]
    shorter = [f"^{re.escape(prefix)}$", f"^{re.escape(prefix)}"] if len(names) == 1 else [f"^{re.escape(prefix)}"]
    shorter += [_numbered(names), f"^{re.escape(prefix)}({'|'.join(map(re.escape, rests))})$"]
    for pattern in shorter:
        if {name for name in every if re.search(pattern, name)} == set(names):
            return pattern
    return "^(" + "|".join(map(re.escape, names)) + ")$"


def _numbered(names: list[str]) -> str:
    """The same linears of any block: numbers between dots become \\d+."""
    shapes = sorted({re.sub(r"\.\d+(?=\.)", ".#", name) for name in names})
    prefix = shapes[0] if len(shapes) == 1 else _common(shapes)
    rests = [shape[len(prefix) :] for shape in shapes]
    pattern = re.escape(prefix) + ("" if len(shapes) == 1 else f"({'|'.join(map(re.escape, rests))})")
    return f"^{pattern.replace(re.escape('#'), chr(92) + 'd+')}$"


def _common(names: list[str]) -> str:
    """What all begin with, up to a dot."""
    first, last = min(names), max(names)
    length = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first.rfind(".", 0, length) + 1]


def _sources(tensor: Any) -> tuple[str, ...]:
    """Names of the Hugging Face tensors that a planned tensor is made of."""
    source = getattr(tensor, "source", None)
    return tuple(getattr(source, "sources", None) or (tensor.name,))


def _bits(tensors: Any) -> float:
    chosen = list(tensors)
    weights = sum(tensor.weights for tensor in chosen)
    return 8 * sum(tensor.stored_bytes for tensor in chosen) / weights if weights else 0.0


def _recipe(pair: Pair, evidence: Evidence, options: OpenOptions) -> Recipe | None:
    """How the judged model was quantized, or would be again; None where its scheme is not one of lowbit's."""
    quantized = Path(pair.quantized.source)
    gguf = pair.judged.checkpoint.kind == "gguf"
    name = f"{quantized.stem}-anew.gguf" if gguf else f"{quantized.name}-anew"
    reported = _reported(evidence.report) if evidence.report else None
    settings = reported or (_seen_gguf(pair) if gguf else _seen(pair))
    return None if settings is None else Recipe(pair.original.source, quantized.with_name(name), settings, options)


def _reported(report: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that a report tells, but for those that are defaults."""
    given, output = report.get("settings"), report.get("output")
    if not isinstance(given, dict) or not isinstance(given.get("scheme"), str):
        return None
    settings: dict[str, Any] = {"scheme": given["scheme"]}
    if given.get("method") not in (None, "rtn"):
        settings["method"] = given["method"]
    if isinstance(output, dict) and output.get("format") in _FORMATS[1:]:
        settings["format"] = output["format"]
    settings |= {name: given[name] for name in ("group_size", "kv_cache", "imatrix") if given.get(name) is not None}
    if given.get("pure"):
        settings["pure"] = True
    if given.get("ignore"):
        settings["ignore"] = tuple(given["ignore"])
    for name in ("overrides", "method_overrides"):
        pairs = [text.rpartition("=") for text in given.get(name) or ()]
        if pairs:
            settings[name] = {pattern: scheme for pattern, _, scheme in pairs}
    chosen = given.get("options") or {}
    settings |= {name: chosen[name] for name in (*_FLAGS, *_SWITCHES) if chosen.get(name) not in (None, False)}
    calibration = given.get("calibration")
    if isinstance(calibration, dict):
        if not str(calibration["name"]).startswith("packaged "):
            settings["calib"] = str(calibration["name"])
        if calibration.get("samples") not in (0, 128):
            settings["samples"] = calibration["samples"]
        if calibration.get("sequence_length") not in (0, 512):
            settings["seqlen"] = calibration["sequence_length"]
    return settings


def _seen(pair: Pair) -> dict[str, Any] | None:
    """What can be seen of a folder without a report."""
    schemes = getattr(pair.quantized, "schemes", {})
    common = Counter(scheme.name for scheme in schemes.values()).most_common(1)
    if not common or common[0][0] not in SCHEMES:
        return None
    name = common[0][0]
    weight = next(scheme.weight for scheme in schemes.values() if scheme.name == name)
    settings: dict[str, Any] = {"scheme": name}
    kind = pair.judged.checkpoint.kind
    if kind in _FORMATS[1:]:
        settings["format"] = kind
    if weight.group_size_is_free and weight.group_size != SCHEMES[name].weight.group_size:
        settings["group_size"] = weight.group_size
    return settings


def _seen_gguf(pair: Pair) -> dict[str, Any] | None:
    """The file type that a GGUF file says it has."""
    from lowbit.export.gguf_mix import FILE_TYPES

    number = pair.judged.checkpoint.metadata.get("general.file_type")
    name = next((each.name for each in FILE_TYPES.values() if each.number == number), None)
    return None if name is None else {"scheme": name}
