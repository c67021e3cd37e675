"""Rules on which tensors there are, of which dtype and shape, and that what should be quantized is."""

from __future__ import annotations

from lowbit.checkpoint.compressed_tensors_config import matches
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

# Never loaded: recomputed from config.json by every engine.
_IGNORED_LEAVES = ("rotary_emb.inv_freq",)
_KV_LEAVES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
_ZERO_POINTS = ("weight_zero_point", "input_zero_point")


def check_coverage(subject: Subject) -> Finding:
    """Every linear of the decoder is quantized or listed in `ignore`; config.json and the files say the same."""
    problems = list(subject.misfiled.values())
    for name in subject.stored_linears:
        in_decoder = subject.architecture.linears[name].block is not None
        if in_decoder and name not in subject.groups and not _is_ignored(subject, name):
            problems.append(f"{name}: no group targets it, and `ignore` does not name it")
    for weight, stored in subject.architecture.tied.items():
        name = weight.removesuffix(".weight")
        group = subject.parsed.group_of(name) if name in subject.architecture.linears else None
        if group is not None:
            problems.append(f"{name}: shares its weight with {stored}, but {group.name} quantizes it")
    decoder = [name for name in subject.stored_linears if subject.architecture.linears[name].block is not None]
    quantized = sum(name in subject.groups for name in decoder)
    return Finding(problems, f"{quantized} of {len(decoder)} linears of the decoder are quantized, the others ignored")


def _is_ignored(subject: Subject, name: str) -> bool:
    return any(matches(target, name) or target == "Linear" for target in subject.parsed.ignore)


def check_tensors(subject: Subject) -> Finding:
    """Every tensor that the architecture needs is there, with the dtype and shape of its group."""
    problems = []
    for name, expected in subject.expected.items():
        if name.rpartition(".")[0] in subject.misfiled:
            continue
        info = subject.checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name} {list(expected.shape)} is absent")
        elif info.dtype not in expected.dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected.dtypes)
            problems.append(f"{name} is {str(info.dtype).removeprefix('torch.')}; {wanted} is needed")
        elif tuple(info.shape) != expected.shape:
            problems.append(f"{name} has shape {list(info.shape)}; {list(expected.shape)} is needed")
    return Finding(problems, f"all {len(subject.expected)} are there, with the right dtypes and shapes")


def check_leftovers(subject: Subject) -> Finding:
    """No tensor that a loader would not know where to put, such as a .weight beside .weight_packed."""
    problems = []
    for name in subject.checkpoint.tensors:
        owner, _, leaf = name.rpartition(".")
        known = name in subject.expected or name in subject.architecture.tied or name.endswith(_IGNORED_LEAVES)
        kv_scale = leaf in _KV_LEAVES and subject.parsed.kv_cache is not None
        reported_elsewhere = owner in subject.misfiled or leaf in _ZERO_POINTS or leaf == "weight_g_idx"
        if not (known or kv_scale or reported_elsewhere):
            group = subject.groups.get(owner)
            why = "no module has it" if group is None else f"{owner} is stored as {group.format}"
            problems.append(f"{name} does not belong here: {why}")
    return Finding(problems, "none")


def check_zero_points(subject: Subject) -> Finding:
    """Symmetric groups ship no zero points; those of the others are packed cleanly."""
    problems = []
    for name in subject.checkpoint.tensors:
        linear, _, leaf = name.rpartition(".")
        if leaf in _ZERO_POINTS and name not in subject.expected:
            group = subject.groups.get(linear)
            stated = f"{linear} is not quantized" if group is None else f"{group.name} is symmetric"
            problems.append(f"{name}: zero points, but {stated}")
    problems += subject.survey.zero_points
    asymmetric = sum(not group.scheme.weight.symmetric for group in subject.groups.values())
    return Finding(problems, f"{asymmetric} of {len(subject.groups)} quantized linears have them, as configured")


def check_activation_scales(subject: Subject) -> Finding:
    """Static activation scales are finite and positive."""
    problems, count = [], 0
    for name in subject.expected:
        leaf = name.rpartition(".")[2]
        if leaf in ("input_scale", "input_global_scale") and subject.is_sound(name):
            count += 1
            value = subject.checkpoint.read(name).item()
            if not 0 < value < float("inf"):
                problems.append(f"{name} is {value}; a finite number above 0 is needed")
    return Finding(problems, f"{count} static scales" if count else "no static scales are called for")
