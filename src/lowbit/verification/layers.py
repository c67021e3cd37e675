"""Rules on linears that engines load as one: fused sets (q, k and v; gate and up) and the experts of a block.

vLLM 0.32 (RoutedExperts) and SGLang 0.5 (FusedMoE) stack per-expert matrices `…experts.E.{gate,up,down}_proj.*` and
skip names that they do not know. gpt-oss is the exception: vLLM's `gpt_oss.py` reads its experts only as fused 16-bit
tensors or as MXFP4 blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.checkpoint.quantized import FLOATS
from lowbit.schemes import WeightSpec
from lowbit.tensors import Granularity
from lowbit.verification.result import ALL, QUANTIZED, Finding, Rule
from lowbit.verification.subject import Subject

if TYPE_CHECKING:
    from lowbit.checkpoint.compressed_tensors_config import Group

_SECOND_LEVEL = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")


def check_fused_schemes(subject: Subject) -> Finding:
    """The members of a fused set have one scheme: bits, group size, symmetry, activations and storage format."""
    sets = subject.architecture.fused_sets
    return Finding(_mixed(subject, sets), f"{len(sets)} fused sets have one scheme each")


def check_expert_schemes(subject: Subject) -> Finding:
    """All linears of all experts of a block have one scheme: engines stack them."""
    sets = subject.architecture.expert_sets
    summary = f"{len(sets)} sets of experts have one scheme each" if sets else "no experts"
    return Finding(_mixed(subject, sets), summary)


def _mixed(subject: Subject, sets: dict[str, tuple[str, ...]]) -> list[str]:
    """The first member of each set whose scheme differs from the set's first."""
    problems = []
    for name, members in sets.items():
        first = _stored_as(subject, members[0])
        other = next((member for member in members if _stored_as(subject, member) != first), None)
        if other is not None:
            problems.append(f"{name}: {other} is {_said(subject, other)}, {members[0]} is {_said(subject, members[0])}")
    return problems


def check_groups_fit(subject: Subject) -> Finding:
    """in_features divide by the groups of weights, and by those that activations are quantized in: 16 for NVFP4, 32 for
    MXFP8, 128 for FP8 in blocks. Weights alone may end in part of a block."""
    problems = []
    for name, scheme in subject.schemes.items():
        columns, weight = subject.architecture.linears[name].shape[1], scheme.weight
        whole = weight.granularity is Granularity.GROUP or subject.format == "modelopt"  # which cuts no block
        multiple = weight.group_size if whole else None
        if multiple and columns % multiple:
            problems.append(f"{name} has {columns} in_features; {scheme.name} needs a multiple of {multiple}")
        elif scheme.activation is not None and scheme.activation.unfit(columns) is not None:
            problems.append(f"{name} has {columns} in_features; {scheme.activation.unfit(columns)}")
    return Finding(problems, "groups divide in_features")


def check_fused_global_scales(subject: Subject) -> Finding:
    """Scales per tensor beside group scales (NVFP4, W4A8_AWQ) are the same in a fused set: engines take one for all,
    with a warning at most."""
    problems, sets = [], 0
    for fused, members in subject.architecture.fused_sets.items():
        specs = {name: subject.schemes[name].weight for name in members if name in subject.schemes}
        two_level = [name for name, spec in specs.items() if spec.two_level or spec.ranged]
        for leaf in _SECOND_LEVEL:
            names = [f"{member}.{leaf}" for member in two_level if f"{member}.{leaf}" in subject.stored.tensors]
            values = {name: subject.stored.read(name).reshape(-1)[0].item() for name in names
                      if subject.stored.tensors[name].shape in ((), (1,))}  # fmt: skip
            sets += bool(values)
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                problems.append(f"{fused}: {listed}")
    return Finding(problems, f"{sets} sets share theirs" if sets else "no second level of scales")


def check_blocks(subject: Subject) -> Finding:
    """In a fused set, no block straddles two members: all but the last have whole blocks of rows."""
    problems = []
    for fused, members in subject.architecture.fused_sets.items():
        for member in members[:-1]:
            scheme = subject.schemes.get(member)
            rows = subject.architecture.linears[member].shape[0]
            if scheme is not None and scheme.weight.granularity is Granularity.BLOCK:
                block = scheme.weight.group_size or 1
                if rows % block:
                    problems.append(f"{fused}: {member} has {rows} rows, not a multiple of its block of {block}")
    return Finding(problems, f"{len(subject.architecture.fused_sets)} fused sets are cut between blocks")


def check_layout(subject: Subject) -> Finding:
    """Quantized experts lie in the files one by one, as matrices; fused 3-D tensors fail, or load as garbage."""
    problems = []
    for name, info in subject.stored.tensors.items():
        if ".experts." in name and len(info.shape) > 2 and info.dtype not in FLOATS:
            problems.append(f"{name} has shape {list(info.shape)}; {subject.engine} reads a matrix per expert")
    sets = subject.architecture.expert_sets
    return Finding(problems, f"{len(sets)} sets of experts, one by one" if sets else "no experts")


def check_gpt_oss(subject: Subject) -> Finding:
    """gpt-oss: experts are MXFP4 blocks or fused 16-bit tensors; loaders skip per-expert names silently."""
    if subject.config.get("model_type") != "gpt_oss":
        return Finding([], "not gpt-oss")
    apart = [name for name in subject.stored.tensors if ".experts.0." in name]
    problem = f"{apart[0]}: {subject.engine} has no place for experts of gpt-oss one by one" if apart else ""
    return Finding([problem] if problem else [], "MXFP4 blocks" if subject.format == "mxfp4" else "fused, 16 bits")


def storage(group: Group | None) -> object:
    """Attributes that linears of one matrix must share."""
    return None if group is None else (group.scheme.weight, group.scheme.activation, group.format)


def _stored_as(subject: Subject, linear: str) -> object:
    """`storage` for a linear of any format."""
    scheme = subject.schemes.get(linear)
    if linear in subject.groups or scheme is None:
        return storage(subject.groups.get(linear))
    return scheme.weight, scheme.activation


def _said(subject: Subject, linear: str) -> str:
    scheme = subject.schemes.get(linear)
    if linear in subject.groups or scheme is None:
        return described(subject.groups.get(linear))
    return f"{_weight_said(scheme.weight)} ({scheme.name})"


def described(group: Group | None) -> str:
    return "unquantized" if group is None else f"{_weight_said(group.scheme.weight)} ({group.name})"


def _weight_said(weight: WeightSpec) -> str:
    size = f" {weight.group_size}" if weight.group_size else ""
    symmetry = "symmetric" if weight.symmetric else "asymmetric"
    return f"{weight.number} {weight.bits} bits, {weight.granularity.value}{size}, {symmetry}"


# Of engines that fuse: `from documentation` for TensorRT-LLM.
FUSED_SCHEMES = Rule(
    "fused-schemes", "layers", QUANTIZED, "q/k/v and gate/up have one scheme", check_fused_schemes,
    "QKVParallelLinear and MergedColumnParallelLinear have one quant_method (vLLM, SGLang); get_multi_weights_col "
    "(TGI); from documentation (TensorRT-LLM, LMDeploy)", then="misreads",
)  # fmt: skip
FUSING: tuple[Rule, ...] = (
    FUSED_SCHEMES,
    Rule("expert-schemes", "layers", QUANTIZED, "all experts of a block have one scheme", check_expert_schemes,
         "RoutedExperts (vLLM), FusedMoE (SGLang) have one quant_method; from documentation (TensorRT-LLM)",
         then="misreads"),
    Rule("expert-matrices", "layers", tuple(kind for kind in QUANTIZED if kind != "mxfp4"),
         "quantized experts lie in the files one by one", check_layout,
         "make_expert_params_mapping of fused_moe (vLLM, SGLang); from documentation (TensorRT-LLM)"),
    Rule("fused-blocks", "limits", ("compressed-tensors", "modelopt", "fp8"),
         "no FP8 block straddles two of a fused set", check_blocks,
         "validate_fp8_block_shape of utils/fp8_utils.py (vLLM), fp8.py (SGLang)", limit=True),
    Rule("fused-global-scales", "values", ("compressed-tensors", "modelopt"),
         "scales per tensor of NVFP4 and W4A8_AWQ are shared in fused sets", check_fused_global_scales,
         "KNvfp4Static.process of modelopt.py (vLLM); load_weight_scales_w4a8 of _torch/modules/linear.py, and from "
         "documentation (TensorRT-LLM)"),
)  # fmt: skip
GPT_OSS = Rule(
    "gpt-oss-experts", "limits", ALL, "experts of gpt-oss are MXFP4 blocks or fused", check_gpt_oss,
    "load_weights of models/gpt_oss.py (vLLM, SGLang); GptOssExperts (transformers)", limit=True,
)  # fmt: skip
