"""What the user asked for: `Settings`, from flags, from Python or from a YAML recipe, which all say the same.

A recipe is the flags' long names in YAML:

    scheme: W4A16
    group_size: 64
    range: mse
    ignore: ['\\.0\\.mlp\\.']
    overrides: {'down_proj$': W8A16}
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lowbit.errors import UsageError
from lowbit.methods import parse_method
from lowbit.numerics.grid import RangeSearch
from lowbit.schemes import Scheme, WeightSpec, find_scheme, is_gguf_name

DEFAULT_IGNORE = r"(^|\.)lm_head$"
DEFAULT_SHARD_SIZE = 5_000_000_000
MEASURE = "measure"  # what `imatrix` says instead of a file


@dataclass(frozen=True)
class RunOptions:
    """How a run is made, as opposed to what it makes.

    device      of forward passes and rounding: "cpu", "cuda"
    max_memory  bytes that calibration may take; None: a share of what is free
    resume      go on behind the last finished block of a run that was stopped
    """

    device: str = "cpu"
    max_memory: int | None = None
    resume: bool = False


class Settings(BaseModel):
    """Everything that changes the bytes written.

    scheme      name in `lowbit.schemes.SCHEMES`
    method      transforms and roundings joined by +, see `lowbit.methods`: "rtn", "gptq", "awq+gptq" …
    method_overrides  regex → rounding, for linears to be rounded otherwise; the first that matches wins
    format      of the files; "auto": gguf for llama.cpp's types and for an output named so, bitsandbytes for its own
                schemes (NF4, FP4, INT8), compressed-tensors for others
    double_quant  NF4 and FP4: the scales are quantized too, as QLoRA has it (0.37 bits per weight less)
    calib       calibration text: a file, a folder, a hub dataset, "self" (the model writes it), or None for the
                packaged one; read only where a method, a static activation scale or a cache scale needs it
    samples, seqlen  windows of calibration text, and tokens in each
    damping, correction, refine   of GPTQ (`lowbit.rounding.gptq.GPTQOptions`); None: its defaults
    correction_samples   windows that the unquantized model is run on too, for the correction; None: all
    iterations  of sign-SGD, per block
    expert_tokens  an expert that fewer tokens reach is rounded to nearest, and the report lists it
    all_experts    measure every expert on every token, whoever the router chooses
    bias_correction  move the mean error of a linear's outputs into its bias, where it has one
    kv_cache    "fp8" or "fp8_per_head": store scales for a cache in FP8
    activation_range, activation_percentile   how static activation scales are chosen: "minmax", "percentile", "mse"
    compute     dtype of forward passes: "auto" is bfloat16 where the processor multiplies that fast
    group_size  columns per scale; -1 one scale per row; None the scheme's own, adapted where it does not divide K
    range       "auto": "wmse" for integers of 4 bits or fewer, "mse" for minifloats of 4 bits, "absmax" for NF4, FP4
                and wider codes, where a search finds nothing or does harm (measured: docs/log.md)
    ignore      regexes (searched in module names) of linears left in 16 bits; always wins
    overrides   regex → scheme name; the first that matches wins over `scheme` and over the default of leaving lm_head
    shard_size  bytes of tensors per file; None: 5 GB in folders, and no parts for GGUF

    Of GGUF files alone:

    imatrix     importance matrix that errors are weighed with: a file, or "measure" (on `calib`)
    pure        every matrix in the file type's own ggml type, without its mix
    output_type, token_embedding_type  ggml types of those two matrices
    pre_tokenizer  llama.cpp's name of the pre-tokenizer, where it cannot be told from tokenizer.json
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str = "W4A16"
    method: str = "rtn"
    method_overrides: dict[str, str] = {}
    format: Literal[
        "auto", "compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "modelopt", "mxfp4", "float", "gguf"
    ] = "auto"
    double_quant: bool = False
    group_size: int | None = None
    range: Literal["auto", "absmax", "mse", "wmse", "percentile"] = "auto"
    percentile: float = 99.9
    ignore: tuple[str, ...] = ()
    overrides: dict[str, str] = {}
    shard_size: int | None = None
    seed: int = 0
    calib: str | None = None
    samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=512, ge=4)
    damping: float | None = Field(default=None, gt=0, le=1)
    correction: float | None = Field(default=None, ge=0, le=1)
    refine: int | None = Field(default=None, ge=0)
    correction_samples: int | None = Field(default=None, ge=1)
    iterations: int = Field(default=200, ge=1)
    expert_tokens: int = Field(default=128, ge=1)
    all_experts: bool = False
    bias_correction: bool = False
    kv_cache: Literal["fp8", "fp8_per_head"] | None = None
    activation_range: Literal["minmax", "percentile", "mse"] = "minmax"
    activation_percentile: float = Field(default=99.99, gt=50, le=100)
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    imatrix: str | None = None
    pure: bool = False
    output_type: str | None = None
    token_embedding_type: str | None = None
    pre_tokenizer: str | None = None

    @field_validator("ignore")
    @classmethod
    def _regexes(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            _compiled(pattern)
        return patterns

    @field_validator("method")
    @classmethod
    def _method(cls, text: str) -> str:
        return parse_method(text).name

    @field_validator("method_overrides")
    @classmethod
    def _method_overrides(cls, overrides: dict[str, str]) -> dict[str, str]:
        for pattern, name in overrides.items():
            _compiled(pattern)
            method = parse_method(name)
            if method.transforms or method.learns:
                raise UsageError(f"linears matching {pattern!r} cannot have method {name}, which works on whole blocks",
                                 "give rtn, hqq or gptq")  # fmt: skip
        return overrides

    @field_validator("overrides")
    @classmethod
    def _override_regexes(cls, overrides: dict[str, str]) -> dict[str, str]:
        for pattern, name in overrides.items():
            _compiled(pattern)
            if not is_gguf_name(name):
                find_scheme(name)
        return overrides

    @field_validator("percentile")
    @classmethod
    def _percentile(cls, value: float) -> float:
        if not 50.0 < value <= 100.0:
            raise UsageError(f"percentile {value} is not in (50, 100]", "99.9 keeps all but one weight in a thousand")
        return value

    @field_validator("shard_size")
    @classmethod
    def _shard_size(cls, value: int | None) -> int | None:
        if value is not None and value < 1_000_000:
            raise UsageError(f"shard size {value} bytes is under 1 MB", "give it as 5GB or 500MB")
        return value

    @property
    def bytes_per_shard(self) -> int:
        """Of tensors in one file of a folder."""
        return self.shard_size or DEFAULT_SHARD_SIZE

    def writes_gguf(self, output: Path | None = None) -> bool:
        """True where a GGUF file is asked for: by format, by a scheme that is one of its types, or by its name."""
        if self.format != "auto":
            return self.format == "gguf"
        return is_gguf_name(self.scheme) or (output is not None and output.suffix == ".gguf")

    @property
    def is_blockwise(self) -> bool:
        """True where calibration text must run through the model before anything is rounded."""
        return any(parse_method(name).is_blockwise for name in (self.method, *self.method_overrides.values()))

    def base_scheme(self) -> Scheme:
        """The scheme, with the group size the user chose."""
        scheme = find_scheme(self.scheme)
        if self.double_quant:
            scheme = _with_nested_scales(scheme)
        return scheme if self.group_size is None else scheme.with_group_size(self.group_size)

    def override_for(self, linear: str) -> Scheme | None:
        """Scheme of the first override whose regex is found in the module name."""
        for pattern, name in self.overrides.items():
            if re.search(pattern, linear):
                scheme = find_scheme(name)
                if self.group_size is not None and scheme.weight.group_size_is_free:
                    scheme = scheme.with_group_size(self.group_size)
                return scheme
        return None

    def ignored_by(self, linear: str) -> str | None:
        """The user's regex that leaves this linear alone, if any."""
        return next((pattern for pattern in self.ignore if re.search(pattern, linear)), None)

    def range_search(self, weight: WeightSpec) -> RangeSearch:
        if self.range == "auto":
            if weight.bits > 4 or weight.number in ("nf4", "fp4"):
                return RangeSearch("absmax")
            return RangeSearch("wmse" if weight.number == "int" else "mse")
        return RangeSearch(self.range, percentile=self.percentile)


def _with_nested_scales(scheme: Scheme) -> Scheme:
    if scheme.weight.number not in ("nf4", "fp4"):
        raise UsageError(f"scheme {scheme.name} has no double quantization", "it is for NF4 and FP4")
    return replace(scheme, weight=replace(scheme.weight, scale_format="nested"))


def make_settings(recipe: Path | None = None, **flags: Any) -> Settings:
    """Settings from a recipe file with flags (those not None) on top; UsageError for anything it cannot mean."""
    values = {} if recipe is None else _read_recipe(recipe)
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        origin = f"{recipe}: " if recipe is not None and where.split(".")[0] not in flags else ""
        raise UsageError(
            f"{origin}{where}: {first['msg'][0].lower()}{first['msg'][1:]}",
            f"known settings: {', '.join(Settings.model_fields)}",
        ) from error


def parse_bytes(text: str) -> int:
    """ "5GB", "8GiB", "300MB", "1000000" → bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise UsageError(f"{text!r} is not a size", "write it as 5GB, 300MB or 8GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {error}", "see docs/recipes.md for an example") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of settings, found {type(values).__name__}")
    if isinstance(values.get("shard_size"), str):
        values["shard_size"] = parse_bytes(values["shard_size"])
    return {str(name): value for name, value in values.items()}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error
