"""Cache types: what each engine can keep keys and values in, how it rounds them, and where that is written.

`CACHE_TYPES` is the table: a row per type, by the name that the engine has for it where it has one. llama.cpp chooses
keys and values apart: `q8_0/q4_0` (or k=q8_0,v=q4_0) is a pair of its types. `find_cache_type` reads such names.

Sources, read in 2026: vLLM 0.32 (CacheDType of vllm/config/cache.py), llama.cpp of autumn 2026, LMDeploy 0.10 and
0.16, TGI 3.3, transformers 5.23 (cache_utils.py), and the code that goes with the papers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lowbit.errors import UsageError, did_you_mean
from lowbit.kv.codecs import (
    Affine,
    BlockFloat4,
    Codec,
    GgmlBlock,
    LloydMax,
    Minifloat,
    NonUniform,
    PerTokenHead,
    Plain,
    RotatedInt4,
)

Granularity = Literal["none", "layer", "head", "token and head", "block of 16", "block of 32", "group", "channel"]


@dataclass(frozen=True)
class Window:
    """Tokens that stay in 16 bits: those behind the last quantized one.

    With t tokens before the one that attends, quantized are the first
        "chunk"    floor(t / tokens) · tokens                      all that are there, each time `tokens` have come
        "rolling"  max(0, t − tokens)
        "grouped"  floor(max(0, t − tokens) / group) · group       `tokens` and up to group − 1 more stay
    """

    tokens: int
    keys: Literal["chunk", "rolling", "grouped"] = "chunk"
    values: Literal["chunk", "rolling", "grouped"] = "chunk"
    group: int = 1

    def quantized(self, before: int, side: Literal["keys", "values"]) -> int:
        """Quantized tokens of `before`."""
        how = self.keys if side == "keys" else self.values
        if how == "chunk":
            return before // self.tokens * self.tokens
        beyond = max(0, before - self.tokens)
        return beyond if how == "rolling" else beyond // self.group * self.group


@dataclass(frozen=True)
class CacheType:
    """One row.

    engines      values of --engine that run it; empty: another program, a paper's code, or `lowbit.kv.QuantizedCache`
    queries      rounded too before they meet the keys, where the engine multiplies in integers; None: not rounded
    window       tokens in 16 bits; None: every token is read from the cache, the current one included
    exact_first  tokens at the start of the text that stay in 16 bits
    before_rope  keys are rounded before the rotary embedding
    skip_ends    so many layers at each end of a model without recurrent layers stay in 16 bits
    per          granularity of the scales; how: keys and values in words; source: where the engine does it
    """

    name: str
    engines: tuple[str, ...]
    keys: Codec
    values: Codec
    per: str
    how: str
    source: str
    queries: Codec | None = None
    window: Window | None = None
    exact_first: int = 0
    before_rope: bool = False
    skip_ends: int = 0

    def bits(self, key_dim: int, value_dim: int | None = None) -> float:
        """Bits of a cached value, scales included, over keys and values of heads of these sizes; without windows."""
        value_dim = value_dim or key_dim
        stored = self.keys.bits(key_dim) * key_dim + self.values.bits(value_dim) * value_dim
        return stored / (key_dim + value_dim)

    def rounds_at(self, context: int) -> bool:
        """False where all tokens of such a context are still in the window."""
        sides: tuple[Literal["keys", "values"], ...] = ("keys", "values")
        return self.window is None or any(self.window.quantized(context - 1, side) for side in sides)

    def check(self, key_dim: int, value_dim: int) -> None:
        """ShapeError for heads that the type does not take."""
        self.keys.check(key_dim, self.name)
        self.values.check(value_dim, self.name)

    @property
    def needs(self) -> tuple[str, ...]:
        """What calibration must measure: "range", "distribution", both or nothing."""
        return tuple(sorted({self.keys.needs, self.values.needs} - {"nothing"}))


_VLLM_FP8 = "vLLM, csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh: scaled_convert, __NV_SATFINITE"
_VLLM_TOKEN = "vLLM, vllm/v1/attention/ops: per-token-head kernels; int8 rounds since pull request 45361"
_VLLM_FP4 = "vLLM, csrc/libtorch_stable/nvfp4_kv_cache_kernels.cu"
_TURBO = "vLLM, quantization/turboquant/config.py and attention/ops/triton_turboquant_store.py"
_GGML = "llama.cpp, ggml-quants.c: quantize_row_*_ref; src/llama-kv-cache.cpp: attn_rot_k, attn_rot_v; ops.cpp"
_LMDEPLOY = "LMDeploy, src/turbomind/kernels/attention/quantization.h: warp_stats, ConvertKvCache"
_HF = "transformers, cache_utils.py: QuantizedLayer, q_group_size 64, residual_length 128; optimum-quanto, HQQ"
_KIVI = "Liu et al., KIVI, arXiv 2402.02750; github.com/jy-yuan/KIVI, models/llama_kivi.py, quant/new_pack.py"
_KVQUANT = "Hooper et al., KVQuant, arXiv 2401.18079; github.com/SqueezeAILab/KVQuant, simquant_module_quantizer.py"
_QUAROT = "Ashkboos et al., QuaRot, arXiv 2404.00456, section 4.3: asymmetric, a range for each token and head"
_OWN = "lowbit.kv.QuantizedCache"

OWN_GROUP, OWN_WINDOW = 64, 128


def _plain(name: Literal["f32", "f16", "bf16"], engines: tuple[str, ...]) -> CacheType:
    return CacheType(name, engines, Plain(name), Plain(name), "none", "cast", "the engine's cast")


def _static(name: str, engines: tuple[str, ...], codec: Minifloat | BlockFloat4, per: str, how: str, source: str):
    return CacheType(name, engines, codec, codec, per, how, source)


def _turbo(name: str, keys: Codec, value_bits: int) -> CacheType:
    how = "E4M3 of the value itself" if isinstance(keys, Minifloat) else "rotated, nearest Lloyd-Max centroid, a length"
    values = f"{value_bits}-bit integers of a range"
    return CacheType(name, ("vllm",), keys, Affine(value_bits), "token and head", f"keys: {how}; values: {values}",
                     _TURBO, skip_ends=2)  # fmt: skip


def _ggml(name: str) -> CacheType:
    queries = GgmlBlock("q8_0", "keys")
    return CacheType(
        name, ("llama.cpp",), GgmlBlock(name, "keys"), GgmlBlock(name, "values"), "block of 32",
        "rotated by Hadamard where 64 divides the head; queries are rounded to q8_0", _GGML, queries,
    )  # fmt: skip


def _quantized_layer(name: str, bits: int, solved: bool) -> CacheType:
    codec = Affine(bits, group=64, solved=solved)
    how = "offset by HQQ's iterations" if solved else "least and largest value"
    return CacheType(name, ("transformers",), codec, codec, "group of 64 along the head", how, _HF, window=Window(128))


def _kivi(bits: int) -> CacheType:
    return CacheType(
        f"kivi{bits}", (), Affine(bits, "tokens", 32), Affine(bits, "head", 32), "group of 32",
        "keys: a channel over 32 tokens; values: 32 channels of a token", _KIVI,
        window=Window(128, "chunk", "rolling"),
    )  # fmt: skip


def _own(bits: int, rotated: bool) -> CacheType:
    keys, values = own_codecs(bits, rotated)
    name = f"int{bits}{'_hadamard' if rotated else ''}"
    how = "keys: a channel over 64 tokens; values: 64 channels of a token" + ("; both rotated" if rotated else "")
    window = Window(OWN_WINDOW, "grouped", "grouped", OWN_GROUP)
    return CacheType(name, (), keys, values, "group of 64", how, _OWN, window=window)


def own_codecs(bits: int, rotated: bool) -> tuple[Affine, Affine]:
    """(keys, values) of `lowbit.kv.QuantizedCache`."""
    return Affine(bits, "tokens", OWN_GROUP, rotated), Affine(bits, "head", OWN_GROUP, rotated)


_SERVERS = ("vllm", "sglang", "tensorrt-llm", "tgi")
_PLAIN_SERVERS = ("vllm", "sglang", "tensorrt-llm", "lmdeploy", "tgi")
_E4M3 = Minifloat("e4m3")

CACHE_TYPES: dict[str, CacheType] = {
    row.name: row
    for row in (
        _plain("f32", ("llama.cpp",)),
        _plain("f16", (*_PLAIN_SERVERS, "llama.cpp", "transformers")),
        _plain("bf16", (*_PLAIN_SERVERS, "llama.cpp", "transformers")),
        _static("fp8_e4m3", _SERVERS, _E4M3, "layer", "E4M3, scale 1", _VLLM_FP8),
        _static("fp8_calibrated", _SERVERS, Minifloat("e4m3", "tensor"), "layer",
                "E4M3, scale stored or calibrated: largest / 448", _VLLM_FP8),
        _static("fp8_per_head", ("vllm",), Minifloat("e4m3", "head"), "head",
                "E4M3, a scale per head stored or calibrated: largest / 448", _VLLM_FP8),
        _static("fp8_e5m2", ("vllm", "sglang", "tgi"), Minifloat("e5m2"), "layer", "E5M2, scale 1", _VLLM_FP8),
        CacheType("fp8_per_token_head", ("vllm",), PerTokenHead("e4m3"), PerTokenHead("e4m3"), "token and head",
                  "E4M3, scale largest / 448", _VLLM_TOKEN),
        CacheType("int8_per_token_head", ("vllm",), PerTokenHead("int8"), PerTokenHead("int8"), "token and head",
                  "scale largest / 127", _VLLM_TOKEN),
        CacheType("int4_per_token_head", ("vllm",), RotatedInt4(), RotatedInt4(), "token and head",
                  "rotated by a randomized Hadamard, integers with a zero point", _VLLM_TOKEN),
        _static("nvfp4", ("vllm",), BlockFloat4(), "block of 16", "E2M1, scales in E4M3, above them 1", _VLLM_FP4),
        _static("nvfp4_calibrated", ("vllm",), BlockFloat4("tensor"), "block of 16",
                "E2M1, scales in E4M3, above them largest / 2688", _VLLM_FP4),
        _static("nvfp4_4over6", ("vllm",), BlockFloat4("one", "4over6"), "block of 16",
                "as nvfp4, the better of largest / 6 and largest / 4", _VLLM_FP4),
        _turbo("turboquant_k8v4", _E4M3, 4),
        _turbo("turboquant_4bit_nc", LloydMax(4), 4),
        _turbo("turboquant_k3v4_nc", LloydMax(3), 4),
        _turbo("turboquant_3bit_nc", LloydMax(3), 3),
        *(_ggml(name) for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")),
        CacheType("lmdeploy_int8", ("lmdeploy",), Affine(8), Affine(8), "token and head", "integers of a range",
                  _LMDEPLOY),
        CacheType("lmdeploy_int4", ("lmdeploy",), Affine(4), Affine(4), "token and head", "integers of a range",
                  _LMDEPLOY),
        _quantized_layer("quanto_int4", 4, False), _quantized_layer("quanto_int2", 2, False),
        _quantized_layer("hqq_int8", 8, True), _quantized_layer("hqq_int4", 4, True),
        _quantized_layer("hqq_int2", 2, True),
        _kivi(4), _kivi(2),
        *(CacheType(f"kvquant{bits}", (), NonUniform(bits, "channel"), NonUniform(bits, "token"), "channel, token",
                    "keys before RoPE; codebook by k-means; 1 % of outliers apart; the first token in 16 bits",
                    _KVQUANT, exact_first=1, before_rope=True) for bits in (4, 3, 2)),
        *(CacheType(f"quarot{bits}", (), Affine(bits, rotated=True), Affine(bits, rotated=True), "token and head",
                    "rotated by Hadamard, integers of a range", _QUAROT) for bits in (4, 3)),
        *(_own(bits, rotated) for bits in (8, 4, 2) for rotated in (False, True)),
    )
}  # fmt: skip

# --kv-cache of an output, whose scales are stored → the cache that an engine then has.
OF_OUTPUT = {"fp8": "fp8_calibrated", "fp8_per_head": "fp8_per_head", "nvfp4": "nvfp4_calibrated"}
# Other spellings, of engines and of settings.
SPELLINGS = {"float16": "f16", "fp16": "f16", "bfloat16": "bf16", "float32": "f32", "fp32": "f32", "fp8": "fp8_e4m3"}
PAIRED = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # llama.cpp's, for keys and values
DOCS = "docs/kv-cache.md lists them"


def find_cache_type(name: str) -> CacheType:
    """The type called `name`, or the pair KEYS/VALUES; UsageError names the nearest."""
    spelled = name.strip().lower()
    spelled = SPELLINGS.get(spelled, spelled)
    if spelled in CACHE_TYPES:
        return CACHE_TYPES[spelled]
    if "/" in spelled or "=" in spelled:
        return _pair(spelled)
    raise UsageError(f"there is no cache type {name!r}", did_you_mean(spelled, CACHE_TYPES, DOCS, 3, 0.5))


def find_cache_types(text: str) -> tuple[CacheType, ...]:
    """Types by names, separated by commas; the name of an engine stands for all of its types. Each type once.

    "k=q8_0,v=q4_0" is one type, whatever stands around it.
    """
    return tuple(row for row, _ in asked_cache_types(text))


def asked_cache_types(text: str) -> tuple[tuple[CacheType, bool], ...]:
    """`find_cache_types`, each with whether it was asked for by its own name, not only by that of its engine."""
    words, found = [word.strip() for word in text.split(",")], dict[str, tuple[CacheType, bool]]()
    while words:
        word = words.pop(0)
        if not word:
            raise UsageError(f"--kv-cache {text!r} has an empty name", "separate types by one comma: q8_0,q4_0")
        if word.lower().startswith(("k=", "v=")) and words and words[0].lower().startswith(("k=", "v=")):
            word += f",{words.pop(0)}"
        of_engine = types_of(word.lower())
        for row in map(find_cache_type, of_engine or [word]):
            known = found.get(row.name)
            found[row.name] = row, not of_engine or (known is not None and known[1])
    return tuple(found.values())


def types_of(engine: str) -> list[str]:
    """Names of the types that an engine runs; none for what is no engine."""
    return [row.name for row in CACHE_TYPES.values() if engine in row.engines]


def _pair(spelled: str) -> CacheType:
    """KEYS/VALUES, or k=KEYS,v=VALUES in either order."""
    if "/" in spelled:
        keys, _, values = spelled.partition("/")
    else:
        sides = {side.strip(): name for side, _, name in (part.partition("=") for part in spelled.split(","))}
        keys, values = sides.get("k", ""), sides.get("v", "")
        if set(sides) != {"k", "v"}:
            raise UsageError(f"{spelled!r} does not name a type for keys and one for values",
                             "write k=q8_0,v=q4_0 or q8_0/q4_0")  # fmt: skip
    keys, values = (SPELLINGS.get(side.strip(), side.strip()) for side in (keys, values))
    for side in (keys, values):
        if side not in PAIRED:
            why = f"{side!r} cannot be one of a pair" if side in CACHE_TYPES else f"there is no cache type {side!r}"
            raise UsageError(f"{why}: llama.cpp chooses keys and values apart", f"of {', '.join(PAIRED)}")
    if keys == values:
        return CACHE_TYPES[keys]
    first, second = CACHE_TYPES[keys], CACHE_TYPES[values]
    per = first.per if first.per == second.per else f"{first.per}, {second.per}"
    return replace(first, name=f"{keys}/{values}", engines=("llama.cpp",), values=second.values, per=per,
                   how=f"keys: {first.how}; values: {second.how}", source=_GGML)  # fmt: skip
