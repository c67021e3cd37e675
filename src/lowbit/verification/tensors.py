"""Rules on which tensors there are, of which dtype and shape, and that what should be quantized is."""

from __future__ import annotations

from lowbit.checkpoint.quantized import tensor_problem
from lowbit.verification.kv_cache import KV_LEAVES, quantizes_kv_cache
from lowbit.verification.left_out import is_accounted_for
from lowbit.verification.result import PLAIN, Finding
from lowbit.verification.subject import Subject

# Never loaded: recomputed from config.json by every engine.
_IGNORED_LEAVES = ("rotary_emb.inv_freq", "attn.masked_bias", ".attn.bias", "attention.bias")
# Rules of their own say more of these.
_NAMED_ELSEWHERE = ("weight_zero_point", "input_zero_point", "weight_g_idx")
_ACTIVATION_SCALES = ("input_scale", "input_global_scale")


def check_coverage(subject: Subject) -> Finding:
    """Every linear of the decoder is quantized, or left out in config.json; it and the files say the same."""
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
    """Weights that are shared with the embedding, and that config.json quantizes all the same."""
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
            continue  # another rule says so
        problems.append(f"{name} does not belong here: {_why(subject, owner)}")
    return Finding(problems, "none")


def _is_known_beside(subject: Subject, name: str) -> bool:
    """Tensors that engines take although the architecture has none: KV-cache scales, GPTQ's zero biases, blocks for
    multi-token prediction."""
    if subject.architecture.stands_beside(name):
        return True
    owner, _, leaf = name.rpartition(".")
    if leaf in KV_LEAVES:
        # fp8 folders do not speak of the cache; vLLM reads its scales by their names
        return subject.format != PLAIN and (subject.format == "fp8" or quantizes_kv_cache(subject))
    if leaf == "bias":
        # AutoGPTQ writes a bias for every linear; loaders pass over what the model lacks
        return subject.format in ("gptq", "awq") and owner in subject.schemes
    return subject.format == "mxfp4" and leaf.endswith(("_blocks", "_scales"))


def _why(subject: Subject, owner: str) -> str:
    group = subject.groups.get(owner)
    if group is not None:
        return f"{owner} is stored as {group.format}"
    if owner in subject.schemes:
        return f"{owner} is quantized, and {subject.format} has no such tensor"
    return "no module has it"


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
