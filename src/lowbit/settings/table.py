"""The table of options: `Settings`, everything that changes the bytes written.

A setting is one field with its `Knob` (`lowbit.knobs`). Below the fields stand their checks, then what several of them
say together: the scheme, the rounding and the range of a linear.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lowbit import knobs
from lowbit.errors import UsageError, did_you_mean
from lowbit.knobs import CALIBRATION, GGUF_PANEL, MAKE, METHODS, STORE, Knob, Size, Table
from lowbit.methods import ROUNDINGS, Rounding, parse_method
from lowbit.patterns import compiled, user_pattern
from lowbit.registry import written_formats
from lowbit.schemes import Scheme, WeightSpec, find_scheme, is_gguf_name
from lowbit.tensors import RangeSearch

DEFAULT_IGNORE = r"(^|\.)lm_head$"
DEFAULT_SHARD_SIZE = 5_000_000_000
MEASURE = "measure"  # value of `imatrix` in place of a file
# What each level of `quality` stands for; a setting that is given beside it replaces its own.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"method": "rtn"},
    "good": {"method": "gptq", "hessian": "kronecker"},
    "best": {"method": "gptq+distill", "hessian": "kronecker"},
}
TOWER_SCHEME = "F16"  # of a vision tower (mmproj), where none is given


class Settings(Table):
    """Everything that changes the bytes written: the table of options."""

    scheme: Annotated[
        str,
        Knob("W4A16, FP8_DYNAMIC, NVFP4A16 …, or a GGUF type: Q4_K_M, IQ4_XS …", MAKE, knobs.SCHEME, "SCHEME",
             see="schemes.md"),
    ] = "W4A16"  # fmt: skip
    method: Annotated[
        str,
        Knob("rtn, hqq, gptq, squeezellm, awq, smoothquant, rotate, hadamard, spinquant, hadamard-down, sign-sgd, "
             "distill, joined by +: awq+gptq", MAKE,
             knobs.METHOD, "METHOD", see="calibration.md#methods"),
    ] = "rtn"  # fmt: skip
    quality: Annotated[
        Literal["fast", "good", "best"] | None,
        Knob("Instead of --method: fast rounds to nearest, good calibrates, best also learns scales and takes the "
             "longest", MAKE, knobs.METHOD, "LEVEL", absent="fast", see="calibration.md#levels-of-quality"),
    ] = None  # fmt: skip
    format: Annotated[
        str,
        Knob("Output format; auto: gguf for GGUF types and NAME.gguf, else compressed-tensors, or the one that holds "
             "the scheme", MAKE, metavar="FORMAT", see="formats.md", choices=("auto", *written_formats())),
    ] = "auto"  # fmt: skip
    group_size: Annotated[
        int | None,
        Knob("Weights per scale; -1 for one scale per row", MAKE, knobs.GROUPS, absent="the scheme's",
             see="recipes.md#group-sizes"),
    ] = None  # fmt: skip
    overrides: Annotated[
        dict[str, str],
        Knob("Another scheme (GGUF: type) for matching names", MAKE, knobs.QUANTIZE, "REGEX=SCHEME",
             see="recipes.md#which-linears"),
    ] = Field(default_factory=dict)  # fmt: skip
    ignore: Annotated[
        tuple[str, ...],
        Knob("Leave matching linears in 16 bits", MAKE, knobs.QUANTIZE, "REGEX", see="recipes.md#which-linears"),
    ] = ()  # fmt: skip

    range: Annotated[
        Literal["auto", "absmax", "mse", "wmse", "percentile"],
        Knob("How the quantization range of each group is chosen", STORE, knobs.RANGES, "RANGE",
             see="schemes.md#range-search"),
    ] = "auto"  # fmt: skip
    percentile: Annotated[
        float, Field(gt=50, le=100), Knob("Percentile that --range percentile clips at", STORE, knobs.RANGE_PERCENTILE)
    ] = 99.9
    double_quant: Annotated[bool, Knob("NF4 and FP4: quantize the scales too, as QLoRA does", STORE, knobs.NESTED)] = (
        False
    )
    positive_scales: Annotated[
        bool,
        Knob("Scales above 0 only, for kernels that need it; else each group of W4A16, W3A16 and W2A16 chooses a sign",
             STORE, knobs.SIGNED, see="schemes.md#signed-scales"),
    ] = False  # fmt: skip
    outliers: Annotated[
        float | None, Field(gt=0, le=5),
        Knob("KMEANS4 and KMEANS3: percent of the weights of each row that stay in 16 bits", STORE, knobs.OUTLIERS,
             "PERCENT", "none", "codebooks.md"),
    ] = None  # fmt: skip
    kv_cache: Annotated[
        Literal["fp8", "fp8_per_head", "nvfp4"] | None,
        Knob("Store scales for an FP8 or NVFP4 KV cache", STORE, knobs.FOLDERS, "TYPE", see="methods/kv-cache.md"),
    ] = None
    loader: Annotated[
        Literal["transformers"] | None,
        Knob("What a compressed-tensors folder is written for. transformers: under the names of its modules where the "
             "hub's lose tensors there, and with experts that it could not read left in 16 bits", STORE,
             knobs.NAMED_FOR, "LOADER", "vLLM and others that read the names of the hub",
             see="models.md#folders-for-transformers"),
    ] = None  # fmt: skip
    shard_size: Annotated[
        Size | None,
        Knob("Maximum size of a weight file, such as 500MB", STORE, knobs.PARTS, "SIZE", "5GB; one GGUF file"),
    ] = None

    calib: Annotated[
        str | None,
        Knob("Calibration text: a file, a folder, c4, wikitext, hub:OWNER/NAME:CONFIG:SPLIT, packaged, several in "
             "shares (c4:3,code.txt:1), or self: text generated by the model", CALIBRATION, knobs.TEXT, "TEXT",
             "the packaged text", "calibration-text.md"),
    ] = None  # fmt: skip
    samples: Annotated[int, Field(ge=1), Knob("Number of calibration windows", CALIBRATION, knobs.TEXT)] = 128
    seqlen: Annotated[int, Field(ge=4), Knob("Tokens per window", CALIBRATION, knobs.TEXT)] = 512
    seed: Annotated[
        int,
        Knob(
            "Seed for sampling calibration rows, for sign-SGD, distillation and learned rotations",
            CALIBRATION,
            knobs.DRAWS,
        ),
    ] = 0
    compute: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Knob("Dtype of forward passes; auto: bfloat16 where it is fast", CALIBRATION, knobs.READS_TEXT, "DTYPE"),
    ] = "auto"
    activation_range: Annotated[
        Literal["minmax", "percentile", "mse"],
        Knob("How static activation scales are chosen", CALIBRATION, knobs.STATIC, "RANGE"),
    ] = "minmax"
    activation_percentile: Annotated[
        float, Field(gt=50, le=100),
        Knob("Percentile that --activation-range percentile clips at", CALIBRATION, knobs.STATIC_PERCENTILE),
    ] = 99.99  # fmt: skip
    all_experts: Annotated[
        bool, Knob("Calibrate every expert on every token, not only those routed to it", CALIBRATION, knobs.BLOCKWISE)
    ] = False
    bias_correction: Annotated[
        bool,
        Knob("Subtract the mean output error of a linear from its bias, if it has one", CALIBRATION,
             knobs.ROUNDS_BLOCKWISE, see="rounding.md"),
    ] = False  # fmt: skip

    method_overrides: Annotated[
        dict[str, str],
        Knob("Another rounding (rtn, hqq, gptq, squeezellm) for matching linears", METHODS, knobs.OVERRIDES,
             "REGEX=METHOD"),
    ] = Field(default_factory=dict)  # fmt: skip
    hessian: Annotated[
        str,
        Knob("GPTQ, SqueezeLLM, refine: what a token counts in the Hessian: inputs (all alike), guided (the gradient "
             "of the loss by the outputs of each linear), guided:4 (of four groups of its outputs), kronecker (guided, "
             "and errors of rows are fed to other rows by what the loss says of pairs of outputs)", METHODS,
             knobs.TOKENS, "WEIGHTS", see="gptq.md#weights-of-tokens"),
    ] = "inputs"  # fmt: skip
    damping: Annotated[
        float | None, Field(gt=0, le=1),
        Knob("GPTQ, refine: damping added to the diagonal of H, as a fraction of mean(diag H)", METHODS, knobs.HESSIAN,
             absent="0.01", see="gptq.md"),
    ] = None  # fmt: skip
    shrinkage: Annotated[
        float | None, Field(ge=0, le=1),
        Knob("GPTQ, refine: share by which what H says of pairs of channels is taken back", METHODS, knobs.HESSIAN,
             absent="0.2", see="gptq.md#shrinkage"),
    ] = None  # fmt: skip
    correction: Annotated[
        float | None, Field(ge=0, le=1),
        Knob("GPTQ, refine: fraction of the error of preceding layers to compensate", METHODS, knobs.HESSIAN,
             absent="0.75; 0.4 with --hessian kronecker", see="gptq.md"),
    ] = None  # fmt: skip
    stream_correction: Annotated[
        float | None, Field(ge=0, le=1),
        Knob("GPTQ, refine: fraction of the error of the residual stream that the last linears of attention and MLP "
             "compensate, with --correction", METHODS, knobs.CORRECTION, absent="0.4", see="gptq.md"),
    ] = None  # fmt: skip
    correction_samples: Annotated[
        int | None, Field(ge=1),
        Knob("GPTQ, refine: windows also run through the unquantized model, for --correction", METHODS,
             knobs.CORRECTION, absent="all", see="gptq.md"),
    ] = None  # fmt: skip
    refine: Annotated[
        int | None, Field(ge=0), Knob("GPTQ: coordinate descent sweeps over the codes after rounding", METHODS,
                                      knobs.GPTQ, absent="1", see="gptq.md"),
    ] = None  # fmt: skip
    expert_tokens: Annotated[
        int, Field(ge=1),
        Knob("GPTQ, SqueezeLLM, refine: experts that see fewer tokens are rounded to nearest (refine: kept) and "
             "listed", METHODS, knobs.TOKENS),
    ] = 128  # fmt: skip
    allow_fallback: Annotated[
        bool,
        Knob("Keep the output even if every linear fell back to round-to-nearest", METHODS, knobs.ROUNDS_BLOCKWISE),
    ] = False
    sweeps: Annotated[
        int | None, Field(ge=1),
        Knob("Refine: how often all scales, then all codes, are moved", METHODS, knobs.REFINE, absent="4",
             see="refine.md"),
    ] = None  # fmt: skip
    codes_only: Annotated[
        bool, Knob("Refine: start from the codes of the file alone, not also from those of GPTQ", METHODS, knobs.REFINE,
                   see="refine.md"),
    ] = False  # fmt: skip
    iterations: Annotated[int, Field(ge=1), Knob("sign-SGD: steps per block", METHODS, knobs.SIGN_SGD)] = 200
    distill_samples: Annotated[
        int | None, Field(ge=0),
        Knob("Distillation: further windows of --calib, which only it learns from; 0: those of the calibration",
             METHODS, knobs.DISTILL, absent="as many as --samples behind methods that read the text, else 0",
             see="distill.md"),
    ] = None  # fmt: skip
    distill_steps: Annotated[
        int | None, Field(ge=1),
        Knob("Distillation: steps of about 2048 tokens", METHODS, knobs.DISTILL, absent="3 passes over the windows",
             see="distill.md"),
    ] = None  # fmt: skip
    distill_rate: Annotated[
        float | None, Field(gt=0, le=0.1),
        Knob("Distillation: relative change of a scale in a step, at the start", METHODS, knobs.DISTILL,
             absent="0.001", see="distill.md"),
    ] = None  # fmt: skip
    rotation_steps: Annotated[
        int | None, Field(ge=1),
        Knob("Learned rotations: steps of about 2048 tokens", METHODS, knobs.ROTATIONS,
             absent="3 passes over the windows", see="transforms.md#learned-rotations"),
    ] = None  # fmt: skip
    rotation_rate: Annotated[
        float | None, Field(gt=0, le=100),
        Knob("Learned rotations: largest step along the Cayley transform, at the start", METHODS, knobs.ROTATIONS,
             absent="1.5", see="transforms.md#learned-rotations"),
    ] = None  # fmt: skip

    imatrix: Annotated[
        str | None,
        Knob("Importance matrix that weights the errors: a file, or measure (on --calib)", GGUF_PANEL, knobs.GGUF,
             "FILE", see="imatrix.md"),
    ] = None  # fmt: skip
    pure: Annotated[
        bool, Knob("Store every matrix in the base type of the file type, without its mix", GGUF_PANEL, knobs.GGUF)
    ] = False
    output_type: Annotated[str | None, Knob("Type of the output head", GGUF_PANEL, knobs.GGUF, "TYPE")] = None
    token_embedding_type: Annotated[
        str | None, Knob("Type of the token embedding", GGUF_PANEL, knobs.GGUF, "TYPE")
    ] = None  # fmt: skip
    tensor_type_file: Annotated[
        str | None,
        Knob("File of REGEX = TYPE, one per line, after --override", GGUF_PANEL, knobs.GGUF, "FILE",
             see="gguf-file-types.md#rules-of-your-own"),
    ] = None  # fmt: skip
    modelfile: Annotated[
        bool, Knob("Write a Modelfile for Ollama beside the file", GGUF_PANEL, knobs.GGUF, see="ollama.md")
    ] = False
    pre_tokenizer: Annotated[
        str | None,
        Knob("llama.cpp's name for the pre-tokenizer, if tokenizer.json does not identify it", GGUF_PANEL, knobs.HEADER,
             "NAME"),
    ] = None  # fmt: skip
    no_tokenizer: Annotated[
        bool,
        Knob("Write no tokenizer: for models without one, or with one that llama.cpp does not have; programs then give "
             "token ids, not text", GGUF_PANEL, knobs.HEADER, see="gguf.md#without-a-tokenizer"),
    ] = False  # fmt: skip

    mmproj: Annotated[
        bool,
        Knob("Write the vision tower and projector for llama.cpp (mmproj) instead of the language model, as F32, F16, "
             "BF16 or Q8_0; without --scheme: F16", GGUF_PANEL, knobs.TOWER, see="gguf-vision.md"),
    ] = False  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _tower_scheme(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("format", "auto") not in ("auto", "gguf"):
            return values
        if values.get("mmproj") and values.get("scheme") is None:
            return values | {"scheme": TOWER_SCHEME}
        return values

    @model_validator(mode="before")
    @classmethod
    def _of_quality(cls, values: Any) -> Any:
        preset = QUALITIES.get(str(values.get("quality"))) if isinstance(values, dict) else None
        if preset is None:
            return values
        asked = values.get("method")
        if asked is not None and parse_method(str(asked)).name != preset["method"]:
            raise UsageError(f"--quality {values['quality']} stands for --method {preset['method']}, not for {asked}",
                             "leave one of the two out")  # fmt: skip
        return preset | {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _outputs_as_given(self) -> Settings:
        if not self.feeds_rows:
            return self
        turning = [row.name for row in parse_method(self.method).transforms if row.online is None]
        if turning:
            raise UsageError(f"--hessian kronecker knows the outputs of the model as given, which {turning[0]} changes",
                             f"take --hessian guided, or leave {turning[0]} out")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _rows_fed_by_gptq(self) -> Settings:
        roundings = {parse_method(name).rounding.name for name in (self.method, *self.method_overrides.values())}
        if self.feeds_rows and "squeezellm" in roundings and "gptq" not in roundings:
            raise UsageError("--hessian kronecker feeds the errors of rows to other rows, which GPTQ does; SqueezeLLM "
                             "rounds each row alone", "take --hessian guided, or --method gptq")  # fmt: skip
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were set; those that a level of quality stands for are not named beside it."""
        preset = QUALITIES.get(self.quality or "", {})
        return {name: value for name, value in super().given.items() if name not in preset or value != preset[name]}

    @field_validator("ignore")
    @classmethod
    def _regexes(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(user_pattern(pattern) for pattern in patterns)

    @field_validator("format")
    @classmethod
    def _format(cls, name: str) -> str:
        known = ("auto", *written_formats())
        if name not in known:
            hint = f"{did_you_mean(name, known)} formats: {', '.join(known)}".lstrip()
            raise UsageError(f"there is no format {name!r}", hint)
        return name

    @field_validator("method")
    @classmethod
    def _method(cls, text: str) -> str:
        return parse_method(text).name

    @field_validator("hessian")
    @classmethod
    def _hessian(cls, text: str) -> str:
        name, colon, groups = text.partition(":")
        counted = groups.isdecimal() and int(groups) > 0
        if text not in ("inputs", "kronecker") and (name != "guided" or (colon and not counted)):
            raise UsageError(f"there is no Hessian {text!r}",
                             "give inputs, guided, guided:4 for four groups of outputs, or kronecker")  # fmt: skip
        return text

    @field_validator("method_overrides")
    @classmethod
    def _method_overrides(cls, overrides: dict[str, str]) -> dict[str, str]:
        overrides = {user_pattern(pattern): name for pattern, name in overrides.items()}
        for pattern, name in overrides.items():
            method = parse_method(name)
            if method.transforms or method.learned or method.finish:
                alone = ", ".join(row.name for row in ROUNDINGS.values() if not row.learns)
                raise UsageError(f"linears matching {pattern!r} cannot have method {name}, which works on whole blocks",
                                 f"give one of {alone}")  # fmt: skip
        return overrides

    @field_validator("overrides")
    @classmethod
    def _override_regexes(cls, overrides: dict[str, str]) -> dict[str, str]:
        for name in overrides.values():
            if not is_gguf_name(name):
                find_scheme(name)
        return {user_pattern(pattern): name for pattern, name in overrides.items()}

    @field_validator("shard_size")
    @classmethod
    def _shard_size(cls, value: int | None) -> int | None:
        if value is not None and value < 1_000_000:
            raise UsageError(f"shard size {value} bytes is under 1 MB", "give it as 5GB or 500MB")
        return value

    @property
    def hessian_groups(self) -> int:
        """Groups of output rows with a Hessian each, of tokens weighed by gradients; 0 if tokens count alike."""
        return 0 if self.hessian == "inputs" else int(self.hessian.partition(":")[2] or 1)

    @property
    def feeds_rows(self) -> bool:
        """True if errors of rows are fed to other rows, by the curvature of the loss in pairs of outputs."""
        return self.hessian == "kronecker"

    @property
    def bytes_per_shard(self) -> int:
        """Largest weight file of a folder, in bytes of its tensors."""
        return self.shard_size or DEFAULT_SHARD_SIZE

    def writes_gguf(self, output: Path | None = None) -> bool:
        """True if a GGUF file is asked for: by format, by a scheme that is one of its types, as the file of a vision
        tower, or by its name."""
        if self.format != "auto":
            return self.format == "gguf"
        return self.mmproj or is_gguf_name(self.scheme) or (output is not None and output.suffix == ".gguf")

    @property
    def is_blockwise(self) -> bool:
        """True if calibration text must run through the model before anything is rounded."""
        return any(parse_method(name).needs_text for name in (self.method, *self.method_overrides.values()))

    @property
    def further_windows(self) -> int:
        """Windows of the calibration text behind those of the calibration, for a distillation to learn from. None are
        needed by default where nothing was fitted to the calibration's own."""
        method = parse_method(self.method)
        if not method.finish:
            return 0
        if self.distill_samples is not None:
            return self.distill_samples
        others = map(parse_method, self.method_overrides.values())
        return self.samples if any(each.needs_text for each in (replace(method, finish=None), *others)) else 0

    @property
    def learned_windows(self) -> int:
        """Windows that a distillation learns from, where the text has as many."""
        return self.further_windows or self.samples

    @property
    def copies_on_disk(self) -> int:
        """How many times the output's size a run takes until the output is there: finished blocks are kept beside it;
        of a distillation also its state, about as large, and the blocks with what it learned."""
        return 4 if parse_method(self.method).finish else 2 if self.is_blockwise else 1

    def rounding_of(self, linear: str) -> Rounding:
        """The rounding of the first method override whose regex is found in the name, else that of the method."""
        for pattern, name in self.method_overrides.items():
            if compiled(pattern).search(linear):
                return parse_method(name).rounding
        return parse_method(self.method).rounding

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme and those of the overrides, GGUF types left out."""
        names = (self.scheme, *self.overrides.values())
        return tuple(find_scheme(name) for name in names if not is_gguf_name(name))

    def base_scheme(self) -> Scheme:
        """The scheme with the user's group size, double quantization and outliers."""
        scheme = find_scheme(self.scheme)
        if self.double_quant:
            if scheme.weight.number not in ("nf4", "fp4"):
                raise UsageError(f"scheme {scheme.name} has no double quantization", "it is for NF4 and FP4")
            scheme = replace(scheme, weight=replace(scheme.weight, scale_format="nested"))
        if self.outliers is not None and all(each.weight.number != "kmeans" for each in self.schemes):
            raise UsageError(f"scheme {scheme.name} keeps no outliers", "--outliers is for KMEANS4 and KMEANS3")
        scheme = self._with_outliers(scheme)
        return scheme if self.group_size is None else scheme.with_group_size(self.group_size)

    def _with_outliers(self, scheme: Scheme) -> Scheme:
        if self.outliers is None or scheme.weight.number != "kmeans":
            return scheme
        return replace(scheme, weight=replace(scheme.weight, outliers=self.outliers))

    def override_for(self, linear: str) -> Scheme | None:
        """Scheme of the first override whose regex is found in the module name."""
        for pattern, name in self.overrides.items():
            if compiled(pattern).search(linear):
                scheme = self._with_outliers(find_scheme(name))
                if self.group_size is not None and scheme.weight.group_size_is_free:
                    scheme = scheme.with_group_size(self.group_size)
                return scheme
        return None

    def ignored_by(self, linear: str) -> str | None:
        """The user's regex that leaves this linear alone, if any."""
        return next((pattern for pattern in self.ignore if compiled(pattern).search(linear)), None)

    def range_search(self, weight: WeightSpec) -> RangeSearch:
        """The range search; "auto" searches for codes of 4 bits or fewer. For more bits, and for NF4 and FP4, a search
        gains nothing or does harm (measured: docs/log.md)."""
        if self.range == "auto":
            if weight.bits > 4 or weight.number in ("nf4", "fp4", "kmeans"):
                return RangeSearch("absmax")
            return RangeSearch("wmse" if weight.number == "int" else "mse")
        return RangeSearch(self.range, percentile=self.percentile)


# What a refinement reads: all else is the file's.
_REFINEMENT = knobs.Facts(blockwise=True, roundings=frozenset({"refine"}), reads_text=True, draws=True, distills=True)
READ_BY_REFINE = tuple(name for name, row in Settings.rows().items()
                       if row.knob.panel in (CALIBRATION, METHODS) and row.knob.reader.reads(_REFINEMENT))  # fmt: skip
