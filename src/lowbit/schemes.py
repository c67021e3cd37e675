"""Schemes, by the field's names: `W4A16`, `FP8_DYNAMIC`, `NVFP4` …

A scheme defines how weights are stored (`WeightSpec`) and how activations are quantized at run time (`ActivationSpec`,
None for weight-only); file format and rounding method are separate choices. `SCHEMES` is the table; a new scheme is a
new row. Any scheme combines with any of `KV_CACHE_SCHEMES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from lowbit.errors import UsageError, did_you_mean
from lowbit.tensors import Granularity

if TYPE_CHECKING:
    from torch import Tensor

# Storage of a scale. "model": a 16- or 32-bit float, as the file format has it. "nested": 8-bit codes of bitsandbytes'
# double quantization. "qoq": such a float, which is an integer of 1 to 16 times one float per row (QServe).
ScaleFormat = Literal["model", "e8m0", "e4m3", "nested", "qoq"]
Number = Literal["int", "e4m3", "e5m2", "e2m1", "nf4", "fp4", "ternary", "kmeans", "log", "hqq"]
# Numbers whose table of values is fitted to the weights; no engine's own format holds them.
FITTED_NUMBERS = ("kmeans", "log")


@dataclass(frozen=True)
class WeightSpec:
    """How a weight [N, K] is stored.

    number        "int", a minifloat "e4m3" "e5m2" "e2m1", or a codebook of bitsandbytes "nf4" "fp4";
                  "ternary": −1, 0, 1, with the mean |w| of the matrix for a scale (BitNet b1.58)
                  "kmeans": 2^b values of a row or group, found by k-means (SqueezeLLM); there is no scale
                  "log": 0 and ±base^−e, the base chosen for each group
                  "hqq": integers whose zero point is a float, between codes (HQQ); read only
    bits          of one code
    symmetric     False: an integer zero point per scale
    granularity   which weights share a scale
    group_size    columns per scale (GROUP) or side of the square (BLOCK); None for TENSOR and CHANNEL
    scale_format  "model" float, "e8m0" power of two (MX), "e4m3" with one float32 per tensor (NVFP4), "nested", "qoq"
    narrow        integers without their most negative code: scale · (2^(b−1) − 1) is the largest weight exactly
    ranged        True: beside the group scales lies one float32 per tensor, its largest weight over 448 or above: an
                  engine that multiplies in FP8 divides the weights by it (ModelOpt's W4A8_AWQ)
    outliers      percent of the weights of every row that are kept in 16 bits beside the codes; 0 for none
    """

    number: Number
    bits: int
    granularity: Granularity
    group_size: int | None = None
    symmetric: bool = True
    scale_format: ScaleFormat = "model"
    narrow: bool = False
    ranged: bool = False
    outliers: float = 0.0

    @property
    def searches_range(self) -> bool:
        """False where scales follow from the weights alone: of blocks and whole tensors, and where there is none."""
        return self.number != "kmeans" and self.granularity not in (Granularity.BLOCK, Granularity.TENSOR)

    @property
    def two_level(self) -> bool:
        """True where group scales are themselves scaled by one float32 per tensor."""
        return self.scale_format == "e4m3"

    @property
    def group_size_is_free(self) -> bool:
        """MX and NVFP4 fix the group size; so does a square block."""
        grouped = self.granularity is Granularity.GROUP
        return self.has_free_groups and grouped

    @property
    def has_free_groups(self) -> bool:
        """True where --group-size may say how many columns share a scale or table."""
        return self.number in ("int", *FITTED_NUMBERS) and self.scale_format in ("model", "qoq") and not self.narrow

    @property
    def is_fitted(self) -> bool:
        """True if the values of codes are fitted to the weights."""
        return self.number in FITTED_NUMBERS

    def outliers_per_row(self, columns: int) -> int:
        """The nearest whole number of weights to the share of `outliers`, at least 1; 0 without any."""
        return max(1, round(columns * self.outliers / 100)) if self.outliers else 0

    @property
    def block_rows(self) -> int:
        """Rows that share a scale: g where scales are of g × g blocks, else 1."""
        return self.group_size or 1 if self.granularity is Granularity.BLOCK else 1

    def columns_per_scale(self, columns: int) -> int:
        """g, with K where one scale spans the row."""
        return columns if self.group_size is None else self.group_size


@dataclass(frozen=True)
class ActivationSpec:
    """How the input of a linear is quantized at run time.

    per      "token": one scale per row of activations; "tensor": one for all; "group": g channels of a token
    dynamic  True: the engine measures the range; False: a static scale from calibration is stored;
             "local": group scales are measured, the float32 above them is stored (NVFP4)
    """

    number: Literal["int", "e4m3", "e2m1"]
    bits: int
    per: Literal["token", "tensor", "group"]
    dynamic: bool | Literal["local"] = True
    group_size: int | None = None
    scale_format: ScaleFormat = "model"
    symmetric: bool = True

    @property
    def needs_calibration(self) -> bool:
        return self.dynamic is not True

    def unfit(self, columns: int) -> str | None:
        """Why engines cannot quantize an input of so many columns; None where they can."""
        if self.per != "group" or not self.group_size or columns % self.group_size == 0:
            return None
        return f"engines quantize its input in groups of {self.group_size}, which do not divide {columns} in_features"


@dataclass(frozen=True)
class Scheme:
    name: str
    weight: WeightSpec
    activation: ActivationSpec | None
    summary: str

    @property
    def rounds_inputs(self) -> bool:
        """True if an engine multiplies by rounded inputs: LLM.int8() too, which no file states."""
        return self.activation is not None or self.weight.narrow

    @property
    def may_sign_scales(self) -> bool:
        """True for weight-only integers of 2 to 4 bits without zero points: their scales may be negative, by which each
        group chooses the side that gets the extra code. Kernels that round activations too rescale the scales
        themselves, and of more bits the extra code gains nothing."""
        weight = self.weight
        plain = weight.number == "int" and weight.symmetric and not weight.narrow and weight.scale_format == "model"
        return plain and weight.bits <= 4 and self.activation is None

    def with_group_size(self, group_size: int) -> Scheme:
        """The same scheme with g columns per scale, or one scale per row for -1; groups of integer activations follow.

        Raises UsageError where the scheme fixes its group size.
        """
        if group_size != -1 and group_size < 1:
            raise UsageError(f"group size {group_size} is not a positive number of columns", "use -1 for one per row")
        weight = self.weight
        if weight.group_size == group_size:
            return self
        if weight.outliers and group_size != -1:
            raise UsageError("--outliers are chosen for a row with one table, not for groups of it",
                             "leave --group-size or --outliers out")  # fmt: skip
        if not weight.has_free_groups:
            fixed = "one scale per row" if weight.group_size is None else f"group size {weight.group_size}"
            raise UsageError(f"scheme {self.name} has {fixed} by definition; {group_size} was asked for",
                             "leave --group-size out, or choose an integer scheme such as W4A16")  # fmt: skip
        activation = self.activation
        if activation is not None and activation.number == "int" and activation.per == "group":
            per, size = ("token", None) if group_size == -1 else ("group", group_size)
            activation = replace(activation, per=per, group_size=size)
        if group_size == -1:
            weight = replace(weight, granularity=Granularity.CHANNEL, group_size=None)
        else:
            weight = replace(weight, granularity=Granularity.GROUP, group_size=group_size)
        return replace(self, weight=weight, activation=activation)


def _int_group(bits: int, symmetric: bool = True) -> WeightSpec:
    return WeightSpec("int", bits, Granularity.GROUP, group_size=128, symmetric=symmetric)


_INT8_CHANNEL = WeightSpec("int", 8, Granularity.CHANNEL)
_INT8_TENSOR = WeightSpec("int", 8, Granularity.TENSOR)
_FP8_TENSOR = WeightSpec("e4m3", 8, Granularity.TENSOR)
_FP8_CHANNEL = WeightSpec("e4m3", 8, Granularity.CHANNEL)
_FP8_BLOCK = WeightSpec("e4m3", 8, Granularity.BLOCK, group_size=128)
_NVFP4 = WeightSpec("e2m1", 4, Granularity.GROUP, group_size=16, scale_format="e4m3")
_MXFP4 = WeightSpec("e2m1", 4, Granularity.GROUP, group_size=32, scale_format="e8m0")
_MXFP8 = WeightSpec("e4m3", 8, Granularity.GROUP, group_size=32, scale_format="e8m0")
_NF4 = WeightSpec("nf4", 4, Granularity.GROUP, group_size=64)
_FP4 = WeightSpec("fp4", 4, Granularity.GROUP, group_size=64)
_INT4_RANGED = WeightSpec("int", 4, Granularity.GROUP, group_size=128, ranged=True)
_INT4_QOQ = WeightSpec("int", 4, Granularity.GROUP, group_size=128, scale_format="qoq")
_TERNARY = WeightSpec("ternary", 2, Granularity.TENSOR)


def _log(bits: int) -> WeightSpec:
    return WeightSpec("log", bits, Granularity.GROUP, group_size=128)


def _kmeans(bits: int) -> WeightSpec:
    return WeightSpec("kmeans", bits, Granularity.CHANNEL)


_LLM_INT8 = WeightSpec("int", 8, Granularity.CHANNEL, narrow=True)

_INT8_TOKEN = ActivationSpec("int", 8, "token")
_INT8_TOKEN_ASYM = ActivationSpec("int", 8, "token", symmetric=False)
_INT8_STATIC = ActivationSpec("int", 8, "tensor", dynamic=False)
_INT8_STATIC_ASYM = ActivationSpec("int", 8, "tensor", dynamic=False, symmetric=False)
_INT4_TOKEN = ActivationSpec("int", 4, "token")
_INT4_GROUP = ActivationSpec("int", 4, "group", group_size=128, symmetric=False)
_FP8_TOKEN = ActivationSpec("e4m3", 8, "token")
_FP8_STATIC = ActivationSpec("e4m3", 8, "tensor", dynamic=False)
_FP8_GROUP = ActivationSpec("e4m3", 8, "group", group_size=128)
_NVFP4_LOCAL = ActivationSpec("e2m1", 4, "group", dynamic="local", group_size=16, scale_format="e4m3")
_MXFP4_GROUP = ActivationSpec("e2m1", 4, "group", group_size=32, scale_format="e8m0")
_MXFP8_GROUP = ActivationSpec("e4m3", 8, "group", group_size=32, scale_format="e8m0")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("W8A16", _int_group(8), None, "8-bit integers, symmetric, group 128; weight-only"),
        Scheme("W7A16", _int_group(7), None, "7-bit integers, symmetric, group 128; weight-only"),
        Scheme("W6A16", _int_group(6), None, "6-bit integers, symmetric, group 128; weight-only"),
        Scheme("W5A16", _int_group(5), None, "5-bit integers, symmetric, group 128; weight-only"),
        Scheme("W4A16", _int_group(4), None, "4-bit integers, symmetric, group 128; weight-only"),
        Scheme("W4A16_ASYM", _int_group(4, symmetric=False), None, "4-bit integers with zero points, group 128"),
        Scheme("W3A16", _int_group(3), None, "3-bit integers, symmetric, group 128; weight-only"),
        Scheme("W2A16", _int_group(2), None, "2-bit integers, symmetric, group 128; weight-only"),
        Scheme("W8A8", _INT8_CHANNEL, _INT8_TOKEN, "8-bit integers per row; activations 8-bit per token, dynamic"),
        Scheme("W8A8_ASYM", _INT8_CHANNEL, _INT8_TOKEN_ASYM,
               "8-bit integers per row; activations 8-bit with a zero point per token, dynamic"),
        Scheme("W8A8_TENSOR", _INT8_TENSOR, _INT8_TOKEN,
               "8-bit integers per tensor; activations 8-bit per token, dynamic"),
        Scheme("W8A8_STATIC", _INT8_CHANNEL, _INT8_STATIC,
               "8-bit integers per row; activations 8-bit per tensor, static"),
        Scheme("W8A8_STATIC_ASYM", _INT8_CHANNEL, _INT8_STATIC_ASYM,
               "8-bit integers per row; activations 8-bit with a zero point per tensor, static"),
        Scheme("W4A8", _int_group(4), _INT8_TOKEN, "4-bit integers, group 128; activations 8-bit per token, dynamic"),
        Scheme("W4A8_QOQ", _INT4_QOQ, _INT8_TOKEN,
               "4-bit integers, group 128, scales int8 below one per row (QoQ); activations 8-bit per token, dynamic"),
        Scheme("W4A4", _int_group(4), _INT4_TOKEN, "4-bit integers, group 128; activations 4-bit per token, dynamic"),
        Scheme("W4A4_GROUP", _int_group(4), _INT4_GROUP,
               "4-bit integers, group 128; activations 4-bit with a zero point per 128 of a token, dynamic"),
        Scheme("W4AFP8", _int_group(4), _FP8_TOKEN, "4-bit integers, group 128; activations FP8 per token, dynamic"),
        Scheme("W4AFP8_STATIC", _INT4_RANGED, _FP8_STATIC,
               "4-bit integers, group 128; activations FP8 per tensor, static"),
        Scheme("FP8", _FP8_TENSOR, _FP8_STATIC, "FP8 E4M3 per tensor; activations FP8 per tensor, static"),
        Scheme("FP8_DYNAMIC", _FP8_CHANNEL, _FP8_TOKEN, "FP8 E4M3 per row; activations FP8 per token, dynamic"),
        Scheme("FP8_BLOCK", _FP8_BLOCK, _FP8_GROUP, "FP8 E4M3 per 128×128 block; activations FP8 per 128, dynamic"),
        Scheme("NVFP4", _NVFP4, _NVFP4_LOCAL, "FP4 E2M1 in 16s with E4M3 scales; activations the same"),
        Scheme("NVFP4A16", _NVFP4, None, "FP4 E2M1 in 16s with E4M3 scales; weight-only"),
        Scheme("MXFP4", _MXFP4, _MXFP4_GROUP, "FP4 E2M1 in 32s with power-of-two scales; activations the same"),
        Scheme("MXFP4A16", _MXFP4, None, "FP4 E2M1 in 32s with power-of-two scales; weight-only"),
        Scheme("MXFP8", _MXFP8, _MXFP8_GROUP, "FP8 E4M3 in 32s with power-of-two scales; activations the same"),
        Scheme("NF4", _NF4, None, "4-bit NormalFloat codebook in 64s, as bitsandbytes (QLoRA) has it; weight-only"),
        Scheme("FP4", _FP4, None, "bitsandbytes' 4-bit float codebook in 64s; weight-only"),
        Scheme("INT8", _LLM_INT8, None, "8-bit integers per row, LLM.int8() of bitsandbytes"),
        Scheme("TERNARY", _TERNARY, _INT8_TOKEN,
               "-1, 0, 1 with one scale per tensor, as BitNet b1.58; activations 8-bit per token; for training"),
        Scheme("KMEANS4", _kmeans(4), None, "16 values per row, found by k-means (SqueezeLLM); weight-only"),
        Scheme("KMEANS3", _kmeans(3), None, "8 values per row, found by k-means (SqueezeLLM); weight-only"),
        Scheme("LOG4", _log(4), None, "4-bit logarithmic: 0 and powers of a base, chosen in 128s; weight-only"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class KVCacheScheme:
    """How an engine stores keys and values, static and symmetric: scale = largest |value| / `reach`.

    per    "tensor": one scale for K and one for V of a layer; "head": one of each for every key-value head
    reach  the largest value that a scale of 1 covers: 448 of FP8 E4M3; 6 · 448 of NVFP4, whose blocks of 16 have scales
           in E4M3 below this one
    """

    name: str
    per: Literal["tensor", "head"]
    summary: str
    reach: float = 448.0

    @property
    def label(self) -> str:
        return "FP8" if self.reach == _FP8_MAX else "NVFP4"

    def scales(self, absmax: Tensor) -> Tensor:
        """float32 [1] or [kv_heads], of the largest |value| of every head, [kv_heads] of any float dtype. Above 0."""
        largest = absmax.double().reshape(-1)
        if self.per == "tensor":
            largest = largest.amax(dim=0, keepdim=True)
        return (largest / self.reach).float().clamp(min=_SMALLEST_CACHE_SCALE)


_FP8_MAX = 448.0
_SMALLEST_CACHE_SCALE = 1e-9  # of a head that is always 0; engines take a scale of 0 for an absent one

KV_CACHE_SCHEMES: dict[str, KVCacheScheme] = {
    scheme.name: scheme
    for scheme in (
        KVCacheScheme("fp8", "tensor", "FP8 E4M3, one scale per layer for keys and one for values"),
        KVCacheScheme("fp8_per_head", "head", "FP8 E4M3, a scale per layer and key-value head"),
        KVCacheScheme("nvfp4", "tensor", "FP4 E2M1 in 16s with E4M3 scales, above them one scale per layer", 6 * 448.0),
    )
}


def find_kv_cache_scheme(name: str) -> KVCacheScheme:
    """The KV-cache scheme called `name`, case-insensitively; UsageError lists all of them."""
    scheme = KV_CACHE_SCHEMES.get(name.lower())
    if scheme is None:
        raise UsageError(f"there is no KV-cache scheme {name!r}", f"choose one of {', '.join(KV_CACHE_SCHEMES)}")
    return scheme


def find_scheme(name: str) -> Scheme:
    """The scheme called `name`, case-insensitively; UsageError names the nearest ones."""
    scheme = SCHEMES.get(name.upper())
    if scheme is not None:
        return scheme
    if is_gguf_name(name):
        raise UsageError(f"{name.upper()} is a type of GGUF files only", "write one: -o NAME.gguf")
    if "E5M2" in name.upper():
        raise UsageError(f"there is no scheme {name!r}: no engine's format has linears in E5M2",
                         "take FP8_DYNAMIC; lowbit evaluate --kv-cache fp8_e5m2 measures a cache in it")  # fmt: skip
    hint = did_you_mean(name.upper(), (*SCHEMES, *gguf_names()), f"choose one of {', '.join(SCHEMES)}", 3, 0.5)
    raise UsageError(f"there is no scheme {name!r}", hint)


# File types that are llama.cpp's but for embeddings and output (formats/gguf/mix_table.py has them).
_WIDE_ENDS = ("Q6_K_L", "Q5_K_L", "Q4_K_L", "Q3_K_XL", "Q2_K_L")


@lru_cache(maxsize=1)
def gguf_names() -> tuple[str, ...]:
    """Values of `--scheme` for GGUF files: llama.cpp's file types, and the ggml types."""
    from gguf.constants import GGMLQuantizationType, LlamaFileType

    prefixed = (name.removeprefix("ALL_").removeprefix("MOSTLY_") for name in LlamaFileType.__members__)
    return tuple(dict.fromkeys([*prefixed, *GGMLQuantizationType.__members__, *_WIDE_ENDS]))


def is_gguf_name(name: str) -> bool:
    """True for names that only GGUF files have; MXFP4 and NVFP4 are schemes of other formats too."""
    return name.upper() not in SCHEMES and name.upper() in gguf_names()


def scheme_of_specs(weight: WeightSpec, activation: ActivationSpec | None) -> Scheme:
    """The scheme of the table that stores and computes the same, with this group size; else an unnamed one."""
    for scheme in SCHEMES.values():
        own, inputs = scheme.weight, scheme.activation
        if own.group_size_is_free:
            own = replace(own, granularity=weight.granularity, group_size=weight.group_size)
        if own.number in ("nf4", "fp4"):
            own = replace(own, scale_format=weight.scale_format, group_size=weight.group_size)
        if own.is_fitted:
            own = replace(own, granularity=weight.granularity, group_size=weight.group_size, outliers=weight.outliers)
        if inputs is not None and inputs.number == "int" and inputs.per == "group" and activation is not None:
            inputs = replace(inputs, group_size=activation.group_size)
        if own == weight and inputs == activation:
            return replace(scheme, weight=weight, activation=activation)
    if weight.number == "e4m3" and activation is None:
        return Scheme("FP8A16", weight, None, "FP8 E4M3, weight-only")
    activation_bits = 16 if activation is None else activation.bits
    name = f"W{weight.bits}A{activation_bits}" + ("" if weight.symmetric else "_ASYM")
    return Scheme(name, weight, activation, "as the checkpoint states it")


# Scheme → wider ones of the same engines, in the order to try.
WIDER: dict[str, tuple[str, ...]] = {
    "W2A16": ("W3A16", "W4A16", "W8A16"), "W3A16": ("W4A16", "W8A16"), "W4A16": ("W8A16",), "W4A16_ASYM": ("W8A16",),
    "W4A8": ("W8A8",), "W4A8_QOQ": ("W8A8",), "W4AFP8": ("FP8_DYNAMIC",), "W4AFP8_STATIC": ("FP8",),
    "KMEANS3": ("KMEANS4",), "KMEANS4": ("W8A16",), "LOG4": ("W8A16",),
    "NVFP4": ("FP8_DYNAMIC",), "NVFP4A16": ("FP8_DYNAMIC", "W8A16"),
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
