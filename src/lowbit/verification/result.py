"""The result of a verification: one `Check` per rule, and the rules that could not be checked, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lowbit.checkpoint.quantized import KINDS
from lowbit.records import Record
from lowbit.registry import ENGINES, load

if TYPE_CHECKING:
    from lowbit.verification.left_out import EngineUnit
    from lowbit.verification.subject import Subject

PLAIN = "plain"  # a folder of 16-bit weights, without quantization_config
QUANTIZED: tuple[str, ...] = KINDS
ALL: tuple[str, ...] = (PLAIN, *KINDS)  # of folders
GGUF = "gguf"
MMPROJ = "mmproj"  # the GGUF file of a vision tower
GGUF_FILES = (GGUF, MMPROJ)

# Checking order: files, config.json, its parsing, the model, the format, each layer, kernels of the engine, values.
Stage = Literal["files", "config", "parse", "model", "format", "layers", "limits", "values"]
STAGES: tuple[Stage, ...] = ("files", "config", "parse", "model", "format", "layers", "limits", "values")
# What comes of a rule that fails: the engine does not load the files; it loads them and computes something else; all is
# well but for speed or size.
Outcome = Literal["refuses", "misreads", "costs"]
OUTCOMES: dict[Outcome, str] = {
    "refuses": "refuses to load it",
    "misreads": "loads it and computes something else",
    "costs": "is slower with it, or it is larger, than was meant",
}
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Outcome of a rule. problems name tensor, actual and required value; summary is for a rule without problems."""

    problems: list[str]
    summary: str


@dataclass(frozen=True)
class Rule:
    """One condition of an engine.

    formats       quant_method of the folders that it applies to; "plain" for unquantized folders
    follows       the place in a loader's source, or another basis
    gate          True if later rules cannot be checked after it fails
    limit         True if it is about kernels or loaders of the engine, not about the files: a checkpoint that fails it
                  is sound, and other engines (or cards) may run it
    reads_values  True if it looks at stored numbers, which a plan does not have yet
    needs_source  True if it compares with the original model
    compares_weights  True if it compares weights with the original's, which a method may have rewritten
    needs_nearest True if it applies only to codes rounded to nearest
    needs_checksums True if it compares with the checksums of the report
    then          what comes of a failure; None: "misreads" for values, "refuses" for all others
    """

    name: str
    stage: Stage
    formats: tuple[str, ...]
    summary: str
    check: Callable[[Any], Finding] = field(repr=False)  # of a `Subject`, or a `GGUFSubject`
    follows: str
    gate: bool = False
    limit: bool = False
    reads_values: bool = False
    needs_source: bool = False
    compares_weights: bool = False
    needs_nearest: bool = False
    needs_checksums: bool = False
    then: Outcome | None = None

    @property
    def outcome(self) -> Outcome:
        return self.then or ("misreads" if self.stage == "values" else "refuses")


@dataclass(frozen=True)
class Loading:
    """The loader of an engine.

    rules        its rules beyond `table.COMMON` and those of formats
    reads_gguf   True if it loads GGUF files, False if it loads folders
    no_loader    format → why it cannot load it
    gpt_oss_only format → why it loads it for gpt-oss alone
    dtypes_refused  format → model dtypes that its kernels refuse
    leaves_out   format → test of whether it leaves a unit unquantized (None: some members only, which it refuses);
                 other formats are not matched by name
    fuses        True if it builds one matrix of q, k and v, and one of gate and up
    fused_names  last part of a fused set's name → the engine's name for it, where it differs
    quant_algos  algorithms of ModelOpt that it loads
    cache_scales format → KV-cache schemes whose stored scales it reads; None: not known, and not checked
    """

    rules: tuple[Rule, ...]
    reads_gguf: bool = False
    no_loader: Mapping[str, str] = field(default_factory=dict)
    gpt_oss_only: Mapping[str, str] = field(default_factory=dict)
    dtypes_refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leaves_out: Mapping[str, Callable[[Subject, EngineUnit], bool | None]] = field(default_factory=dict)
    fuses: bool = True
    fused_names: Mapping[str, str] = field(default_factory=dict)
    quant_algos: tuple[str, ...] = ()
    cache_scales: Mapping[str, tuple[str, ...]] | None = None


def loading_of(engine: str) -> Loading:
    """The loader of an engine by name."""
    return load(ENGINES[engine]).loading


class Check(Record):
    """The outcome of one rule. limit, outcome: as in `Rule`; not part of the report"""

    rule: str
    passed: bool
    detail: str = ""
    limit: bool = Field(default=False, exclude=True)
    outcome: Outcome = Field(default="refuses", exclude=True)


class Verification(Record):
    """All outcomes; `ok` is true exactly when every check passed. The report keeps `ok`, engine and checks.

    engine     the engine whose rules were applied
    checks     in the order of the rules
    folder     the verified folder or file
    unchecked  rule → why it was not checked; does not count against `ok`, except after a failed gate
    format     quant_method of the folder, "plain" for an unquantized one, "" if unknown
    """

    ok: bool
    engine: str
    checks: tuple[Check, ...]
    folder: str = Field(default="", exclude=True)
    unchecked: dict[str, str] = Field(default={}, exclude=True)
    format: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _ok_means_all_passed(self) -> Verification:
        if self.checks and self.ok == bool(self.failed):
            raise ValueError("ok contradicts the checks")
        return self

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def broken(self) -> list[Check]:
        """Failed checks that are about the files, not about kernels or loaders of the engine."""
        return [check for check in self.failed if not check.limit]


def verdict(verification: Verification | None, details: bool = False) -> str:
    """What comes of it all in one line: how many rules hold, or what the engine does, by which rules (or details)."""
    if verification is None:
        return "not verified"
    if verification.ok:
        return f"{len(verification.checks)} rules of {verification.engine} hold"
    parts = []
    for outcome, words in OUTCOMES.items():
        failed = [check for check in verification.failed if check.outcome == outcome]
        if failed:
            said = [check.detail for check in failed] if details else [check.rule for check in failed]
            parts.append(f"{words}: {'; '.join(said) if details else ', '.join(said)}")
    sound = "" if verification.broken else "the files are sound, but "
    return f"{sound}{verification.engine} {'; and '.join(parts)}"


def shortened(problems: list[str]) -> str:
    """The first few problems, and how many more there are."""
    shown = "; ".join(problems[:_SHOWN])
    return shown if len(problems) <= _SHOWN else f"{shown}; and {len(problems) - _SHOWN} more"
