"""One setting of the table of settings: its help, its panel, and the runs that read it.

The table is the fields of `lowbit.settings.Settings` and `RunOptions`, each with a `Knob`:

    damping: Annotated[float | None, Field(gt=0, le=1), Knob("Share of mean(diag H) added to H", GPTQ_PANEL, GPTQ)]

Options of a training are a table too, of dataclasses (`Options`; `lowbit.train.options`).

The options of the command line (`lowbit.cli.options`), recipes, the settings in a report, the printer of command lines
(`command_line`) and the errors for settings that a run would not read are all derived from it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from lowbit.errors import UsageError, brief

# Sections of `lowbit quantize --help`, in order; the first holds the options that most people need.
MAKE, STORE, CALIBRATION, METHODS, GGUF_PANEL, RUNNING, TRUST = PANELS = (
    "What to make", "Scales and files", "Calibration", "GPTQ, sign-SGD and distillation", "GGUF", "Running", "Trust"
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """The facts of a run that decide which settings it reads.

    gguf           writes a GGUF file; else a folder
    copies_header  GGUF to GGUF: copies the key-values of the source
    mmproj         writes the GGUF file of a vision tower
    converts       keeps the codes of a quantized source if the output can hold them
    decodes        turns a GGUF file into a folder of 16-bit floats
    takes_scheme   the scheme is the user's, not that of a conversion's source
    rounds         rounds weights; a conversion in which every linear keeps its codes does not
    blockwise      runs a text through the model, block by block, for `roundings` or transforms
    roundings      of the method and its overrides
    learns         optimises blocks by sign-SGD
    distills       learns scales of the whole model
    turns          learns rotations
    corrects       GPTQ corrects errors of the rounded prefix
    static         some scheme stores static activation scales
    reads_text     runs a text through the model, other than for an importance matrix
    writes_text    the model writes that text
    in_order       that text is in memory, and is taken in the order given
    draws          draws random numbers
    measures       measures an importance matrix
    nests          the scales of the scheme can be quantized too
    signs          the scales of some scheme may be negative
    keeps_outliers weights can stay in 16 bits beside the codes
    searches       some scheme has ranges
    by_percentile, activations_by_percentile   choice of weight ranges, and of static activation scales
    """

    gguf: bool = False
    copies_header: bool = False
    mmproj: bool = False
    converts: bool = False
    decodes: bool = False
    takes_scheme: bool = True
    rounds: bool = True
    blockwise: bool = False
    roundings: frozenset[str] = frozenset({"rtn"})
    learns: bool = False
    distills: bool = False
    turns: bool = False
    corrects: bool = True
    static: bool = False
    reads_text: bool = False
    writes_text: bool = False
    in_order: bool = False
    draws: bool = False
    measures: bool = False
    nests: bool = False
    signs: bool = False
    keeps_outliers: bool = False
    searches: bool = True
    by_percentile: bool = False
    activations_by_percentile: bool = False


@dataclass(frozen=True)
class Reader:
    """The runs that read a setting. `who` follows "is read by", `use` is the hint."""

    who: str
    use: str
    reads: Callable[[Facts], bool]


EVERY = Reader("every run", "", lambda run: True)
SCHEME = Reader("runs that round", "a GGUF file is decoded as it is", lambda run: not run.decodes)
QUANTIZE = Reader("lowbit quantize, of language models", "a conversion keeps what its source has, and a vision tower "
                  "is of one type", lambda run: not run.converts and not run.mmproj)  # fmt: skip
METHOD = Reader(
    "quantizations (hqq: into folders)", "for GGUF files take a method that runs a text, such as gptq",
    lambda run: not run.converts and not run.mmproj and (not run.gguf or run.blockwise or run.roundings == {"rtn"}),
)  # fmt: skip
OVERRIDES = Reader(
    "methods that run a text, and folders with another rounding than rtn",
    "--method gptq uses it",
    lambda run: (
        ROUNDS_BLOCKWISE.reads(run)
        or (not run.converts and not run.gguf and not run.blockwise and run.roundings != {"rtn"})
    ),
)
GROUPS = Reader("folders (of conversions: with --scheme)", "ggml types and sources of conversions fix the group size",
                lambda run: not run.gguf and run.takes_scheme)  # fmt: skip
NESTED = Reader("the schemes NF4 and FP4", "--scheme NF4 uses it", lambda run: run.nests)
RANGES = Reader("folders whose weights are rounded within a range", "encoders of ggml types do their own search, "
                "codes that are kept keep their scales, k-means has no range, and those of blocks and whole tensors "
                "are of the largest weight",
                lambda run: not run.gguf and run.rounds and run.searches)  # fmt: skip
SIGNED = Reader("folders of weight-only integers of 2 to 4 bits without zero points", "--scheme W4A16 uses it",
                lambda run: not run.gguf and run.rounds and run.signs)  # fmt: skip
OUTLIERS = Reader("the schemes KMEANS4 and KMEANS3", "--scheme KMEANS4 uses it", lambda run: run.keeps_outliers)
RANGE_PERCENTILE = Reader("--range percentile, for folders", "--range percentile uses it",
                          lambda run: run.by_percentile and RANGES.reads(run))  # fmt: skip
FOLDERS = Reader("folders", "llama.cpp takes the type of its cache when it starts", lambda run: not run.gguf)
NAMED_FOR = Reader("folders that lowbit quantize writes", "GGUF files and conversions keep the names they have",
                   lambda run: not run.gguf and not run.converts)  # fmt: skip
READS_TEXT = Reader("runs that calibrate", "--method gptq, a static scheme such as FP8, or --kv-cache uses it",
                    lambda run: run.reads_text)  # fmt: skip
TEXT = Reader("runs that calibrate", "--method gptq, a static scheme such as FP8, --kv-cache, or --imatrix measure for "
              "GGUF uses it", lambda run: run.reads_text or run.measures)  # fmt: skip
DRAWS = Reader("sign-SGD, distillation, learned rotations, --hessian guided or kronecker, and runs that sample rows of "
               "--calib",
               "--method sign-sgd or --calib c4 uses it", lambda run: run.draws)  # fmt: skip
BLOCKWISE = Reader("methods that run a text block by block", "--method gptq, awq, smoothquant or sign-sgd uses it",
                   lambda run: run.blockwise)  # fmt: skip
ROUNDS_BLOCKWISE = Reader(BLOCKWISE.who, BLOCKWISE.use, lambda run: run.blockwise and "refine" not in run.roundings)
MEMORY = Reader(BLOCKWISE.who, BLOCKWISE.use, lambda run: run.blockwise or run.writes_text)
STATIC = Reader("schemes with static activation scales", "--scheme FP8 or W8A8_STATIC uses it", lambda run: run.static)
STATIC_PERCENTILE = Reader("--activation-range percentile, for static schemes", "--activation-range percentile uses it",
                           lambda run: run.static and run.activations_by_percentile)  # fmt: skip
GPTQ = Reader("GPTQ", "--method gptq uses it", lambda run: "gptq" in run.roundings)
TOKENS = Reader("GPTQ, SqueezeLLM and lowbit refine", "--method gptq uses it",
                lambda run: bool(run.roundings & {"gptq", "squeezellm", "refine"}))  # fmt: skip
HESSIAN = Reader(
    "GPTQ and lowbit refine", "--method gptq uses it", lambda run: bool(run.roundings & {"gptq", "refine"})
)
CORRECTION = Reader("GPTQ with a correction, without sign-SGD", "--method gptq with --correction above 0 uses it",
                    lambda run: HESSIAN.reads(run) and run.corrects and not run.learns)  # fmt: skip
REFINE = Reader("lowbit refine", "lowbit refine FILE --reference MODEL uses it", lambda run: "refine" in run.roundings)
SIGN_SGD = Reader("sign-SGD", "--method sign-sgd uses it", lambda run: run.learns)
DISTILL = Reader("distillation", "--method gptq+distill and lowbit refine --distill use it", lambda run: run.distills)
ROTATIONS = Reader("learned rotations", "--method spinquant+gptq uses it", lambda run: run.turns)
GGUF = Reader("GGUF files of language models", "-o NAME.gguf --scheme Q4_K_M uses it",
              lambda run: run.gguf and not run.mmproj)  # fmt: skip
HEADER = Reader("GGUF files of language models made of a folder",
                "a GGUF file keeps its key-values, and a folder has none",
                lambda run: run.gguf and not run.mmproj and not run.copies_header)  # fmt: skip
TOWER = Reader("GGUF files made of a folder", "-o mmproj-F16.gguf uses it", lambda run: run.mmproj)
PARTS = Reader("folders and GGUF files of language models", "llama.cpp reads a vision tower from one file",
               lambda run: not run.mmproj)  # fmt: skip


@dataclass(frozen=True)
class Knob:
    """One setting.

    help     one sentence without full stop; `Row.help` appends choices and default
    metavar  placeholder of the value; with one, the value is typed as text whatever its type ("SIZE")
    absent   description of the default None
    see      link into the documents
    choices  values that it takes, where its type does not say so
    flag     on the command line, where its name does not say it
    """

    help: str
    panel: str = MAKE
    reader: Reader = EVERY
    metavar: str | None = None
    absent: str | None = None
    see: str | None = None
    choices: tuple[str, ...] = ()
    flag: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table. `kind` is the type of one value: str, int, float, bool, dict, tuple or a Literal."""

    name: str
    kind: Any
    default: Any
    knob: Knob

    @property
    def flag(self) -> str:
        return self.knob.flag or flag_of(self.name, self.kind is dict)

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else self.knob.choices

    @property
    def help(self) -> str:
        """The sentence, the choices and the default."""
        sentence = f"{self.knob.help}{': ' + ', '.join(self.choices) if self.choices else ''}"
        stop = "" if sentence.endswith("…") else "."
        default = self.knob.absent if self.default is None else self.default
        shown = f" [default: {default}]" if is_given(default) else ""
        repeated = " Repeatable." if self.kind in (dict, tuple) else ""
        return f"{sentence}{stop}{repeated}{shown}"


def flag_of(name: str, repeated: bool = False) -> str:
    """group_size → --group-size; a repeated one loses its s: overrides → --override"""
    return "--" + (name.removesuffix("s") if repeated else name).replace("_", "-")


class Table(BaseModel):
    """Settings whose fields carry a `Knob` each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def rows(cls) -> dict[str, Row]:
        """By name, in the order of the fields."""
        return {
            name: Row(name, _kind(field.annotation), None if field.default_factory else field.default,
                      next(each for each in field.metadata if isinstance(each, Knob)))
            for name, field in cls.model_fields.items()
        }  # fmt: skip

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were set, in the order of the table; `make_settings(**given)` equals self."""
        return {name: getattr(self, name) for name in type(self).model_fields
                if name in self.model_fields_set and is_given(getattr(self, name))}  # fmt: skip


class Options:
    """A dataclass whose fields carry a `Knob` each."""

    @classmethod
    def rows(cls) -> dict[str, Row]:
        """By name, in the order of the fields."""
        hints = get_type_hints(cls, include_extras=True)
        found = {}
        for field in fields(cls):  # type: ignore[arg-type]
            kind, knob = get_args(hints[field.name])
            found[field.name] = Row(field.name, _kind(kind), field.default, knob)
        return found


class HasRows(Protocol):
    """A `Table` or `Options`."""

    @classmethod
    def rows(cls) -> dict[str, Row]: ...


def _kind(annotation: Any) -> Any:
    """The type of one value, of the type of a field."""
    if NoneType in get_args(annotation):
        annotation = next(each for each in get_args(annotation) if each is not NoneType)
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) if get_origin(annotation) in (dict, tuple) else annotation


def value_refused(error: ValidationError) -> str:
    """What the first refused value is, and what it should be: "percentile is 40: input should be greater than 50"."""
    first = error.errors()[0]
    where, wanted = ".".join(map(str, first["loc"])), f"{first['msg'][0].lower()}{first['msg'][1:]}"
    return f"{where} is {brief(repr(first['input']))}: {wanted}"


def is_given(value: Any) -> bool:
    """False for empty values: None, a switch that is off, an empty list of patterns."""
    return value is not None and value is not False and value not in ((), {}, [])


def command_line(command: str, source: str, output: str | Path, *options: Mapping[str, Any]) -> str:
    """The command line: "lowbit quantize SOURCE -o OUTPUT --scheme …".

    options  name → value, such as `Settings.given`; empty values (None, False) are omitted
    """
    words = ["lowbit", command, source, "-o", str(output)]
    for name, value in ((name, value) for group in options for name, value in group.items() if is_given(value)):
        flag = flag_of(name, isinstance(value, dict))
        if value is True:
            words.append(flag)
        elif isinstance(value, dict):
            words += [word for pattern, chosen in value.items() for word in (flag, f"{pattern}={chosen}")]
        else:
            values = value if isinstance(value, (tuple, list)) else (value,)
            words += [word for each in values for word in (flag, str(each))]
    return shlex.join(words)


def parse_bytes(text: str) -> int:
    """ "5GB", "8GiB", "300MB", "1000000" → bytes."""
    import re

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise UsageError(f"{text!r} is not a size", "write it as 5GB, 300MB or 8GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


# Bytes, or text such as "5GB".
Size = Annotated[int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value)]
