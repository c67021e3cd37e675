"""Rules on mixture-of-experts models.

vLLM 0.32 (RoutedExperts) and SGLang 0.5 (FusedMoE) stack the experts of a block themselves, out of per-expert matrices
`…experts.E.{gate,up,down}_proj.*`; names that they do not know are passed over. gpt-oss is the exception: vLLM's
`gpt_oss.py` reads its experts as fused 16-bit tensors or as MXFP4 blocks, and nothing else.
"""

from __future__ import annotations

from lowbit.checkpoint.quantized import FLOATS
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

_FUSED_BY_TRANSFORMERS = "transformers merges the experts of a block into one parameter as it loads them"


def check_layout(subject: Subject) -> Finding:
    """Quantized experts lie in the files one by one, as matrices; fused 3-D tensors fail, or load as garbage."""
    problems = []
    for name, info in subject.stored.tensors.items():
        if ".experts." in name and len(info.shape) > 2 and info.dtype not in FLOATS:
            problems.append(f"{name} has shape {list(info.shape)}; {subject.engine} reads a matrix per expert")
    sets = subject.architecture.expert_sets
    return Finding(problems, f"{len(sets)} sets of experts, one by one" if sets else "no experts")


def check_gpt_oss(subject: Subject) -> Finding:
    """gpt-oss: experts are MXFP4 blocks or fused 16-bit tensors; per-expert names are passed over in silence."""
    if subject.config.get("model_type") != "gpt_oss":
        return Finding([], "not gpt-oss")
    apart = [name for name in subject.stored.tensors if ".experts.0." in name]
    problem = f"{apart[0]}: {subject.engine} has no place for experts of gpt-oss one by one" if apart else ""
    return Finding([problem] if problem else [], "MXFP4 blocks" if subject.format == "mxfp4" else "fused, 16 bits")


def check_left_experts(subject: Subject) -> Finding:
    """Experts that lie in one 16-bit tensor are left out by config.json too, under the names that vLLM asks for.

    It asks for the first expert's projections, after its model class has renamed what it knows (gpt-oss: down_proj to
    w2_weight, in names but not in regexes).
    """
    containers = dict.fromkeys(
        name.rpartition(".")[0] for name, role in subject.architecture.roles.items() if role == "experts"
    )
    problems = []
    for container in containers:
        asked = [f"{container}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj", "w2_weight")]
        taken = [name for name in asked if subject.parsed.group_of(name) is not None]
        if taken:
            problems.append(f"{container}: its experts lie in one 16-bit tensor, but config.json quantizes {taken[0]}; "
                            f"`ignore` needs a regex for them")  # fmt: skip
    return Finding(problems, f"{len(containers)} containers left out" if containers else "none lie in one tensor")


def check_transformers(subject: Subject) -> Finding:
    """Experts that transformers merges into one parameter are not quantized: it replaces linears only."""
    merged = [name for name, placement in subject.architecture.layout.items()
              if any(part.per_expert for part in placement.parts)]  # fmt: skip
    quantized = [name for members in subject.architecture.expert_sets.values() for name in members
                 if name in subject.schemes]  # fmt: skip
    if merged and quantized:
        problem = (
            f"{quantized[0]} is quantized, but {_FUSED_BY_TRANSFORMERS} ({merged[0]}), and its integration of "
            f"{subject.format} knows linears only"
        )
        return Finding([problem], "")
    return Finding([], "no experts are quantized" if subject.architecture.expert_sets else "no experts")
