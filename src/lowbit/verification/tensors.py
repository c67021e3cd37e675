"""Rules on tensors: presence, dtype and shape; coverage by quantization; scales of a KV cache; and values, by the
survey, one pass over every weight.

vLLM silently takes 1.0 for an absent scale of the KV cache: keys and values beyond 448 are clipped, small ones lose
their bits.
"""

from __future__ import annotations

import math

from lowbit.checkpoint.kv_cache import key_value_heads, kv_cache_names
from lowbit.checkpoint.quantized import FLOATS, tensor_problem
from lowbit.registry import FORMATS
from lowbit.verification.checksums import error_bound
from lowbit.verification.left_out import is_accounted_for
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject
from lowbit.verification.survey import LARGEST_RELATIVE_ERROR

# Never loaded: recomputed from config.json by every engine.
_IGNORED_LEAVES = ("rotary_emb.inv_freq", "attn.masked_bias", ".attn.bias", "attention.bias")
# These have rules of their own.
_NAMED_ELSEWHERE = ("weight_zero_point", "input_zero_point", "weight_g_idx")
_ACTIVATION_SCALES = ("input_scale", "input_global_scale")
_KV_FORMATS = tuple(name for name, row in FORMATS.items() if row.kv_cache)
_KV_LEAVES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")


def check_coverage(subject: Subject) -> Finding:
    """Every linear of the decoder is quantized, or left out in config.json; config.json and the files agree."""
    problems = list(subject.misfiled.values())
    for linear in subject.decoder:
        name = linear.name
        if name in subject.schemes or name in subject.misfiled or name not in subject.stored_linears:
            continue
        if linear.keep is None and not is_accounted_for(subject, name):
            said = "no group targets it, and `ignore` does not name it"
            if subject.format != "compressed-tensors":
                said = "the files hold it unquantized, and config.json does not say that it is left out"
            problems.append(f"{name}: {said}")
    problems += _quantized_ties(subject)
    decoder = [linear.name for linear in subject.decoder if linear.name in subject.stored_linears]
    quantized = sum(name in subject.schemes for name in decoder)
    return Finding(problems, f"{quantized} of {len(decoder)} linears of the decoder are quantized, the others left out")


def _quantized_ties(subject: Subject) -> list[str]:
    """Weights that are tied to the embedding although config.json quantizes them."""
    if subject.format != "compressed-tensors":
        return []
    problems = []
    for weight, stored in subject.architecture.tied.items():
        name = weight.removesuffix(".weight")
        group = subject.parsed.group_of(name) if name in subject.architecture.linears else None
        if group is not None:
            problems.append(f"{name}: shares its weight with {stored}, but {group.name} quantizes it")
    return problems


def check_tensors(subject: Subject) -> Finding:
    """Every tensor that the architecture needs is there, with the dtype and shape that the format gives it."""
    problems = []
    for name, expected in subject.expected.items():
        if name.rpartition(".")[0] not in subject.misfiled:
            problem = tensor_problem(subject.checkpoint.tensors, {name: expected})
            problems += [] if problem is None else [problem]
    return Finding(problems, f"all {len(subject.expected)} are there, with the right dtypes and shapes")


def check_leftovers(subject: Subject) -> Finding:
    """No tensor that a loader would not know where to put, such as a .weight beside .weight_packed."""
    problems = []
    for name in subject.checkpoint.tensors:
        owner, _, leaf = name.rpartition(".")
        known = name in subject.expected or name in subject.architecture.tied or name.endswith(_IGNORED_LEAVES)
        if known or name in subject.optional or _is_known_beside(subject, name):
            continue
        if owner in subject.misfiled or owner.removesuffix(".weight") in subject.misfiled or leaf in _NAMED_ELSEWHERE:
            continue  # another rule reports it
        why, group = "no module has it", subject.groups.get(owner)
        if group is not None:
            why = f"{owner} is stored as {group.format}"
        elif owner in subject.schemes:
            why = f"{owner} is quantized, and {subject.format} has no such tensor"
        problems.append(f"{name} does not belong here: {why}")
    return Finding(problems, "none")


def _is_known_beside(subject: Subject, name: str) -> bool:
    """Tensors that engines take although the architecture has none: KV-cache scales, GPTQ's zero biases, blocks for
    multi-token prediction."""
    if subject.architecture.stands_beside(name):
        return True
    owner, _, leaf = name.rpartition(".")
    if leaf in _KV_LEAVES:
        # fp8 folders do not state a KV cache; vLLM finds its scales by name. Its loaders of GPTQ, AWQ and others give
        # the attention no scales: there they would be passed over in silence, whatever config.json says.
        return subject.format == "fp8" or (subject.format in _KV_FORMATS and _quantizes_kv_cache(subject))
    if leaf == "bias":
        # AutoGPTQ writes a bias for every linear; loaders skip those that the model lacks
        return subject.format in ("gptq", "awq", "auto-round") and owner in subject.schemes
    return subject.format == "mxfp4" and leaf.endswith(("_blocks", "_scales"))


def check_activation_scales(subject: Subject) -> Finding:
    """Static activation scales are finite and positive."""
    problems, count = [], 0
    for linear in subject.schemes:
        for name in subject.expected_of(linear):
            if name.rpartition(".")[2] in _ACTIVATION_SCALES and subject.is_sound(name):
                count += 1
                value = subject.stored.read(name).float().reshape(-1)[0].item()
                if not 0 < value < float("inf"):
                    problems.append(f"{name} is {value}; a finite number above 0 is needed")
    return Finding(problems, f"{count} static scales" if count else "no static scales are called for")


def _quantizes_kv_cache(subject: Subject) -> bool:
    """True if config.json (or ModelOpt's file) states a quantized KV cache."""
    stated = subject.quantization
    nested = stated.get("quantization")
    inner = nested if isinstance(nested, dict) else {}
    return any((stated.get("kv_cache_scheme"), stated.get("kv_cache_quant_algo"), inner.get("kv_cache_quant_algo")))


def check_cache_scales(subject: Subject) -> Finding:
    """Every layer has scales of keys and values: floats, finite and above 0, of the stated shape."""
    found = kv_cache_names(subject.stored)
    places = {place: name for name, place in found.items()}
    layout = subject.layout
    scheme = None if layout is None else layout.kv_cache
    if not _quantizes_kv_cache(subject) and not (subject.format == "fp8" and places):
        return Finding([], "the cache is not quantized")
    if scheme is None:
        return Finding([], "the cache is not quantized to FP8 or NVFP4 with one scale per tensor or head")
    problems = [f"{name} and {places[place]} are both of layer {place[0]}"
                for name, place in found.items() if places[place] != name]  # fmt: skip
    heads = key_value_heads(subject.config) if scheme.per == "head" else 1
    for layer in range(len(subject.architecture.blocks)):
        for leaf in ("k_scale", "v_scale"):
            name = places.get((layer, leaf))
            if name is None:
                problems.append(f"layer {layer} has no {leaf}; config.json says that the KV cache is {scheme.label}")
                continue
            problem = _cache_problem(subject, name, heads)
            problems += [] if problem is None else [problem]
    return Finding(
        problems, f"{scheme.label}, one scale per {scheme.per}, in {len(subject.architecture.blocks)} layers"
    )


def check_cache_scales_read(subject: Subject) -> Finding:
    """The engine reads the scales that the files have; where it drops them in silence, the cache is in 16 bits, or in
    FP8 with scales of 1."""
    layout, reads = subject.layout, subject.loading.cache_scales
    scheme = None if layout is None else layout.kv_cache
    if scheme is None or not kv_cache_names(subject.stored):
        return Finding([], "there are none")
    if reads is None:
        return Finding([], f"whether {subject.engine} reads them is not known")
    read = reads.get(subject.format, ())
    if scheme.name in read:
        return Finding([], f"{subject.engine} reads them: {scheme.label}, one per {scheme.per}")
    instead = [name for name, schemes in reads.items() if scheme.name in schemes]
    where = f"; it reads such scales of {' and '.join(instead)}" if instead else ""
    where = f"; of {subject.format} it reads {', '.join(read)}" if read else where
    return Finding([f"{subject.engine} drops scales of a KV cache in {scheme.label}, one per {scheme.per}, of "
                    f"{subject.format} folders in silence{where}"], "")  # fmt: skip


def _cache_problem(subject: Subject, name: str, heads: int) -> str | None:
    info = subject.stored.tensors[name]
    if info.dtype not in FLOATS:
        return f"{name} is {str(info.dtype).removeprefix('torch.')}; a float is needed"
    if math.prod(info.shape) != heads:
        return f"{name} has shape {list(info.shape)}; {heads} {'number is' if heads == 1 else 'numbers are'} needed"
    values = subject.stored.read(name).float().reshape(-1)
    wrong = [value for value in values.tolist() if not 0 < value < float("inf")]
    return f"{name} is {wrong[0]}; a finite number above 0 is needed" if wrong else None


def check_scales(subject: Subject) -> Finding:
    """No scale is NaN, infinite, zero where its weights are not, or negative where the scheme's may not be."""
    return Finding(subject.survey.scales, f"those of {subject.survey.decoded} linears are finite and not 0")


def check_codes(subject: Subject) -> Finding:
    """Every code is within its grid's range and no number is NaN; padding bits are zero; weight_shape is right."""
    return Finding(subject.survey.codes, f"{subject.survey.decoded} linears decode")


def check_finite(subject: Subject) -> Finding:
    """Tensors that are not quantized hold neither NaN nor inf."""
    return Finding(subject.survey.finite, "no NaN, no inf")


def check_nearest(subject: Subject) -> Finding:
    """Every code is the nearest one to the source's weight, or the end code beyond the range of its scale."""
    return Finding(subject.survey.nearest, f"every code of {subject.survey.compared} linears is the nearest one")


def check_relative_error(subject: Subject) -> Finding:
    """Decoded weights are the source's, within a bound by bits; those of a folder of floats within the widest."""
    errors = subject.survey.relative_errors
    worst = max(errors, key=lambda name: errors[name], default="")
    bits = subject.schemes[worst].weight.bits if worst in subject.schemes else 2
    bound = error_bound(LARGEST_RELATIVE_ERROR[bits], subject.errors_left.get(f"{worst}.weight"))
    return Finding(subject.survey.relative, f"at most {errors.get(worst, 0.0):.4f} ({worst}; {bound:.3g} is allowed)")


def check_unquantized(subject: Subject) -> Finding:
    """Tensors that are not quantized equal the source's, in the dtype they are stored in."""
    return Finding(subject.survey.copied, "equal to the source")
