"""Rotary embeddings: key-values and tensors of a GGUF file ↔ transformers' `rope_parameters`.

    key-values {arch}.rope.freq_base, rope.freq_base_swa, rope.dimension_count
               {arch}.rope.dimension_sections [4]     rotary pairs of time, height, width: positions with several axes
               {arch}.rope.scaling.{type,factor,original_context_length,attn_factor}     linear, yarn
               {arch}.rope.scaling.{yarn_beta_fast,yarn_beta_slow}       yarn, where they are not 32 and 1
    tensors    rope_freqs.weight [d / 2]                                         Llama 3: divisors of the frequencies
                                                                                 Gemma 4: 1e30 for pairs at rest
               rope_factors_long.weight, rope_factors_short.weight [d / 2]       Phi-3: longrope

The divisors of Llama 3 are a function of four numbers (Llama 3.1 model card; transformers' `llama3`):

    wavelength = 2π θ^(2i/d)
    divisor = 1                                        wavelength < original / high
              factor                                   wavelength > original / low
              1 / ((1 - s) / factor + s)               between, s = (original / wavelength - low) / (high - low)

A file keeps the divisors only. Every published model has low 1, high 4, original 8192; if these reproduce the tensor
they go into config.json, else there is a note.

YaRN scales cos and sin by m(f) = 1 + 0.1 ln f; llama.cpp multiplies that by attn_factor, transformers takes
attention_factor instead: attention_factor = m(f) · attn_factor. With yarn_log_multiplier a in the file it is
m(f) / (1 + 0.1 a ln f) · attn_factor.

YaRN of latent attention (DeepSeek) scales the scores instead, by (1 + 0.1 a ln f)² with a = mscale_all_dim:

    key-value  {arch}.rope.scaling.yarn_log_multiplier = 0.1 a

llama.cpp then leaves cos and sin alone, as transformers does where mscale is mscale_all_dim.

The ends of YaRN's ramp, beta_fast and beta_slow, are turns within the original context. llama.cpp's converter writes
both. Of its loaders that of mistral3 reads them (`Rope.betas`); the others pass by them and compute with 32 and 1. Its
options --yarn-beta-fast and --yarn-beta-slow count there; a note says so.

Refused when writing: a scaling that llama.cpp does not compute for this architecture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf.constants import MODEL_TENSOR, GGUFValueType
from torch import Tensor

from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.keys import KeyValues, shortest
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Rope

T = MODEL_TENSOR
FLOAT = GGUFValueType.FLOAT32
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Divides the frequencies of pairs that do not rotate (Gemma 4).
_AT_REST = 1e30
# llama.cpp's, where neither the file nor an option says otherwise.
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def rope_key_values(
    row: GGUFArchitecture, get: Lookup, where: str
) -> tuple[KeyValues, dict[MODEL_TENSOR, Tensor], list[str]]:
    """({full key: (value, type)}, {tensor: float32 [d / 2]}, notes) of a model; `get` looks up its config."""
    rope = row.rope
    if rope is None:
        return {}, {}, []
    parameters = get("rope_parameters") or {}
    local = parameters.get("sliding_attention") or {}
    parameters = parameters.get("full_attention", parameters)
    prefix = f"{row.arch}.rope."
    share = parameters.get("partial_rotary_factor", 1.0)
    kind = parameters.get("rope_type", "default")
    moving = share
    if kind == "proportional":  # frequencies are of the whole head, of whose pairs a share moves
        share = 1.0
        if parameters.get("factor", 1.0) != 1.0:
            raise _refused(row, f"slower by a factor of {parameters['factor']}", where)
    if share != 1.0 and not rope.partial:
        raise _refused(row, f"on {share} of every head", where)
    if rope.dim is not None:
        dim = rope.dim(get)
    else:
        dim = int((get("head_dim") or get("hidden_size") // get("num_attention_heads")) * share)
    values: KeyValues = {
        f"{prefix}dimension_count": (dim, GGUFValueType.UINT32),
        f"{prefix}freq_base": (float(parameters.get("rope_theta", 10000.0)), FLOAT),
    }
    sections, notes = _sections(rope, parameters, dim // 2, where)
    if sections:
        values[f"{prefix}dimension_sections"] = (sections, GGUFValueType.ARRAY, GGUFValueType.INT32)
    if rope.local and local:
        if local.get("rope_type", "default") != "default":
            raise _refused(row, f"{local['rope_type']} in its sliding-window blocks", where)
        local_share = local.get("partial_rotary_factor", 1.0)
        if rope.local_partial:
            values[f"{prefix}dimension_count_swa"] = (int(get("head_dim") * local_share), GGUFValueType.UINT32)
        elif local_share != share:
            raise _refused(row, "on another part of a head in its sliding-window blocks", where)
        values[f"{prefix}freq_base_swa"] = (float(local.get("rope_theta", 10000.0)), FLOAT)
    if kind == "dynamic" and rope.alpha and parameters.get("alpha"):
        scale = float(parameters["alpha"]) ** (dim / (dim - 2))
        values[f"{prefix}freq_base"] = (float(parameters.get("rope_theta", 10000.0)) * scale, FLOAT)
        return values, {}, notes
    if kind == "dynamic":
        return values, {}, [*notes, "dynamic rope scaling has no place in GGUF: the context is not extended"]
    if kind not in rope.scalings:
        raise _refused(row, f"{str(kind)[:40]!r}", where)
    scaling, tensors, more = {}, {}, []
    if kind == "linear":
        scaling = {"type": ("linear", GGUFValueType.STRING), "factor": (float(parameters["factor"]), FLOAT)}
    elif kind == "yarn":
        scaling, more = _yarn(row, parameters, get, dim, where)
    elif kind == "llama3":
        theta = float(parameters.get("rope_theta", 10000.0))
        tensors = {T.ROPE_FREQS: llama3_divisors(theta, dim, float(parameters["factor"]), parameters)}
    elif kind == "proportional":
        rotated = torch.arange(dim // 2) < int(moving * dim // 2)
        tensors = {T.ROPE_FREQS: torch.where(rotated, 1.0, _AT_REST)}
    elif kind == "longrope":
        scaling, tensors, more = _longrope(parameters, dim, get, where)
    return values | {f"{prefix}scaling.{key}": value for key, value in scaling.items()}, tensors, [*notes, *more]


def rope_parameters(
    row: GGUFArchitecture, metadata: dict[str, Any], factors: dict[MODEL_TENSOR, Tensor], head_dim: int
) -> tuple[dict[str, Any], list[str]]:
    """({"rope_parameters": …} for config.json or {}, notes about what cannot be expressed).

    factors   float32 [d / 2], those of rope_freqs, rope_factors_long and rope_factors_short that the file has
    head_dim  of the model, for the share of it that is rotated
    """
    if row.rope is None:
        return {}, []
    prefix = f"{row.arch}.rope."
    theta = _finite(metadata.get(f"{prefix}freq_base"), 10000.0)
    parameters: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    rotated: Any = metadata.get(f"{prefix}dimension_count")
    if row.rope.partial:
        whole = type(rotated) is not int or not 0 < rotated <= head_dim
        parameters["partial_rotary_factor"] = 1.0 if whole else rotated / head_dim
    if T.ROPE_FACTORS_LONG in factors and T.ROPE_FACTORS_SHORT in factors:
        scaling, notes = _longrope_of_file(row, metadata, factors)
    elif T.ROPE_FREQS in factors:
        scaling, notes = _from_divisors(factors[T.ROPE_FREQS].float(), theta)
    else:
        scaling, notes = _from_key_values(row, metadata)
    parameters |= scaling
    if row.rope.local:
        base = theta if row.rope.local_base is None else row.rope.local_base
        local = {"rope_theta": _finite(metadata.get(f"{prefix}freq_base_swa"), base), "rope_type": "default"}
        if row.rope.partial:
            rotated = metadata.get(f"{prefix}dimension_count_swa", rotated)
            whole = type(rotated) is not int or not 0 < rotated <= head_dim
            local["partial_rotary_factor"] = 1.0 if whole else rotated / head_dim
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return {"rope_parameters": parameters}, notes


def llama3_divisors(theta: float, dim: int, factor: float, numbers: dict[str, Any] | None = None) -> Tensor:
    """float32 [dim / 2]; see the module's docstring. numbers  original, low and high, by transformers' names."""
    numbers = LLAMA3 | (numbers or {})
    low, high, original = (float(numbers[key]) for key in LLAMA3)
    wavelength = 2 * math.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(wavelength > original / low, torch.full_like(between, factor), between)
    return torch.where(wavelength < original / high, torch.ones_like(between), divisors).float()


def _sections(rope: Rope, parameters: dict[str, Any], pairs: int, where: str) -> tuple[list[int], list[str]]:
    """(rotary pairs of each of four axes, notes); nothing where positions have one axis."""
    if not rope.sections:
        return [], []
    sections = parameters.get("mrope_section") or []
    if not 0 < len(sections) <= 4 or any(type(count) is not int or count < 0 for count in sections):
        raise ArchitectureError(
            f"{where}: mrope_section is {str(sections)[:80]} in config.json; a number of rotary pairs for each axis of "
            f"the positions is needed",
            "complete config.json; the one that the model was published with has them",
        )
    sections = [*sections, 0, 0, 0][:4]
    still = [pair for pair in range(pairs) if pair >= 3 * sections[pair % 3]] if rope.sections == "interleaved" else []
    note = f"llama.cpp does not turn {len(still)} of {pairs} rotary pairs, the slowest: long contexts differ a little"
    return sections, [note] if still else []


def _yarn(
    row: GGUFArchitecture, parameters: dict[str, Any], get: Lookup, dim: int, where: str
) -> tuple[dict[str, Any], list[str]]:
    original = parameters.get("original_max_position_embeddings") or get("max_position_embeddings")
    factor = parameters.get("factor") or get("max_position_embeddings") / original
    scaling: dict[str, Any] = {
        "type": ("yarn", GGUFValueType.STRING),
        "factor": (float(factor), FLOAT),
        "original_context_length": (int(original), GGUFValueType.UINT32),
    }
    attention, scale, all_dims = (parameters.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and scale and all_dims:
        attention = _magnitude(factor, scale) / _magnitude(factor, all_dims)
    usual = _magnitude(factor)
    if row.rope is not None and row.rope.log and all_dims:
        scaling["yarn_log_multiplier"] = (float(all_dims), FLOAT)
        usual /= _magnitude(factor, all_dims)
    attention = _magnitude(factor) if attention is None else attention
    if row.rope is not None and row.rope.latent is not None:
        if factor > 1 and (attention != 1.0 or not all_dims or (row.rope.latent and all_dims not in row.rope.latent)):
            raise _refused(row, f"yarn with mscale {scale} and mscale_all_dim {all_dims}", where)
        scaling["yarn_log_multiplier"] = (0.1 * float(all_dims or 0.0), FLOAT)
    elif attention != usual:
        scaling["attn_factor"] = (float(attention) / usual, FLOAT)
    betas = {key: float(parameters.get(key) or usual) for key, usual in _YARN_BETAS.items()}
    truncates = parameters.get("truncate", True)
    notes = [] if truncates else [
        "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, transformers does not for this model: logits "
        "differ a little"
    ]  # fmt: skip
    if betas != _YARN_BETAS:
        scaling |= {f"yarn_{key}": (value, FLOAT) for key, value in betas.items()}
        if row.rope is None or not row.rope.betas:
            notes += _betas_not_read(
                row, float(parameters.get("rope_theta", 10000.0)), dim, int(original), factor, betas
            )
    return scaling, notes


def yarn_speeds(theta: float, dim: int, original: int, factor: float, betas: dict[str, float]) -> Tensor:
    """float32 [dim / 2]: what YaRN multiplies the frequency of each rotary pair by: 1, down a ramp to 1 / factor."""
    turns = (betas[key] for key in _YARN_BETAS)
    ends = [dim * math.log(original / (2 * math.pi * count)) / (2 * math.log(theta)) for count in turns]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
    shares = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return 1 - shares + shares / factor


def _betas_not_read(
    row: GGUFArchitecture, theta: float, dim: int, original: int, factor: float, betas: dict[str, float]
) -> list[str]:
    """The note where pairs turn otherwise for llama.cpp, whose loader passes by beta_fast and beta_slow."""
    meant, computed = (yarn_speeds(theta, dim, original, factor, ends) for ends in (betas, _YARN_BETAS))
    ratios = computed / meant
    other = ratios[ratios != 1]
    if not len(other):
        return []
    changed = {key: value for key, value in betas.items() if value != _YARN_BETAS[key]}
    options = " ".join(f"--yarn-{key.replace('_', '-')} {value:g}" for key, value in changed.items())
    return [
        f"start llama.cpp with {options}: it does not read that from a file of {row.arch}, and without the option "
        f"{len(other)} of {len(ratios)} rotary pairs turn at {100 * other.min():.0f} to {100 * other.max():.0f} % of "
        f"their speed"
    ]


def _longrope(
    parameters: dict[str, Any], dim: int, get: Lookup, where: str
) -> tuple[dict[str, Any], dict[MODEL_TENSOR, Tensor], list[str]]:
    tensors = {}
    for tensor, key in ((T.ROPE_FACTORS_LONG, "long_factor"), (T.ROPE_FACTORS_SHORT, "short_factor")):
        factors = parameters.get(key) or []
        if len(factors) != dim // 2:
            raise ArchitectureError(
                f"{where}: rope_parameters.{key} has {len(factors)} numbers, where {dim // 2} dimensions rotate",
                "complete config.json; the one that the model was published with has them",
            )
        tensors[tensor] = torch.tensor(factors, dtype=torch.float32)
    original = parameters.get("original_max_position_embeddings") or get("original_max_position_embeddings")
    attention = parameters.get("attention_factor")
    if attention is None:
        factor = parameters.get("factor") or get("max_position_embeddings") / original
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scaling = {
        "attn_factor": (float(attention), FLOAT),
        "original_context_length": (int(original), GGUFValueType.UINT32),
    }
    note = (
        f"long and short rope factors: llama.cpp takes the long ones where it is started with a context above "
        f"{original}, transformers where the text is longer than that"
    )
    return scaling, tensors, [note]


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _refused(row: GGUFArchitecture, what: str, where: str) -> ArchitectureError:
    return ArchitectureError(
        f"{where}: the model has rotary embeddings {what} that llama.cpp does not compute for {row.arch}",
        "llama.cpp cannot run this variant of the model",
    )


def _finite(value: Any, otherwise: float) -> float:
    return shortest(value) if type(value) is float and math.isfinite(value) and value > 0 else otherwise


def _longrope_of_file(
    row: GGUFArchitecture, metadata: dict[str, Any], factors: dict[MODEL_TENSOR, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [shortest(value) for value in factors[T.ROPE_FACTORS_LONG].tolist()],
        "short_factor": [shortest(value) for value in factors[T.ROPE_FACTORS_SHORT].tolist()],
        "attention_factor": _finite(metadata.get(f"{row.arch}.rope.scaling.attn_factor"), 1.0),
    }
    original = metadata.get(f"{row.arch}.rope.scaling.original_context_length")
    if type(original) is int and original > 0:
        parameters["original_max_position_embeddings"] = original
    return parameters, []


def _from_key_values(row: GGUFArchitecture, metadata: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    prefix = f"{row.arch}.rope.scaling"
    factor = metadata.get(f"{prefix}.factor", metadata.get(f"{row.arch}.rope.scale_linear"))
    kind = metadata.get(f"{prefix}.type", "none" if factor is None else "linear")
    if isinstance(kind, str) and kind == "none":
        return {}, []
    if str(kind) not in ("linear", "yarn") or not isinstance(factor, float) or not math.isfinite(factor):
        found = f"{str(kind)[:40]!r} by {str(factor)[:40]}"
        return {}, [f"rope scaling {found} cannot be expressed in config.json: the context is not extended"]
    parameters: dict[str, Any] = {"rope_type": str(kind), "factor": shortest(factor)}
    original = metadata.get(f"{prefix}.original_context_length")
    if type(original) is int:
        parameters["original_max_position_embeddings"] = original
    if kind == "yarn":
        betas = {key: metadata.get(f"{prefix}.yarn_{key}") for key in _YARN_BETAS}
        parameters |= {key: _finite(value, _YARN_BETAS[key]) for key, value in betas.items() if value is not None}
    if kind == "yarn" and row.rope is not None and row.rope.latent is not None:
        tenth = _finite(metadata.get(f"{prefix}.yarn_log_multiplier"), 0.0)
        return parameters | dict.fromkeys(("mscale", "mscale_all_dim"), shortest(10 * tenth)), []
    attention = metadata.get(f"{prefix}.attn_factor", 1.0)
    log = metadata.get(f"{prefix}.yarn_log_multiplier")
    if kind == "yarn" and row.rope is not None and row.rope.log and isinstance(log, float) and math.isfinite(log):
        parameters |= {"mscale": 1.0, "mscale_all_dim": shortest(log)}
    if kind == "yarn" and isinstance(attention, float) and math.isfinite(attention) and attention != 1.0:
        divisor = _magnitude(factor, parameters.get("mscale_all_dim", 0.0))
        parameters["attention_factor"] = shortest(attention * _magnitude(factor) / divisor)
    if kind == "yarn" and row.rope is not None and not row.rope.truncates:
        parameters["truncate"] = False
    return parameters, []


def _from_divisors(divisors: Tensor, theta: float) -> tuple[dict[str, Any], list[str]]:
    factor = divisors.max().item() if divisors.numel() else 1.0
    if divisors.eq(1).all():
        return {}, []
    rotated = int(divisors.lt(0.1 * _AT_REST).sum())
    if divisors[:rotated].eq(1).all() and divisors[rotated:].ge(0.1 * _AT_REST).all():
        return {"rope_type": "proportional", "partial_rotary_factor": rotated / divisors.numel()}, []
    if torch.allclose(llama3_divisors(theta, 2 * divisors.numel(), factor), divisors, rtol=1e-4):
        return {"rope_type": "llama3", "factor": shortest(factor)} | LLAMA3, []
    return {}, ["rope_freqs.weight is no Llama 3 scaling, so config.json cannot express it: long contexts will differ"]
