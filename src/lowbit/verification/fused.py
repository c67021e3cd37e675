"""Rules on fused layers: engines build one matrix of q, k and v, and one of gate and up.

vLLM looks config.json's patterns up under the fused name too, and decides for the whole matrix by its own rules
(`find_matched_target` and `should_ignore_layer` of vLLM's compressed_tensors/utils.py, 0.32):

    ignored   a pattern matches the fused name, or every member; some members only is an error
    target    the first that matches the fused name; else, where every member has one, that of the first member;
              else the first whose text occurs in the engine's class name ("Linear" in "QKVParallelLinear")

Earlier releases look for the class before they look into fused layers; a checkpoint must mean the same to both.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.checkpoint.compressed_tensors_config import CompressedTensorsConfig, Group, matches
from lowbit.schemes import WeightSpec
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

_CLASSES = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear", "lm_head": "ParallelLMHead"}


@dataclass(frozen=True)
class EngineLayer:
    """A layer as vLLM builds it: a fused set, a linear of its own, or an embedding (no members)."""

    name: str
    members: tuple[str, ...]
    class_name: str


def engine_layers(subject: Subject) -> list[EngineLayer]:
    architecture = subject.architecture
    layers = [_engine_layer(name, members) for name, members in architecture.fused_sets.items()]
    layers += [_engine_layer(linear.name, (linear.name,))
               for linear in architecture.linears.values() if linear.fused is None]  # fmt: skip
    layers += [EngineLayer(name.removesuffix(".weight"), (), "VocabParallelEmbedding")
               for name, role in architecture.roles.items() if role == "embedding"]  # fmt: skip
    return layers


def _engine_layer(name: str, members: tuple[str, ...]) -> EngineLayer:
    return EngineLayer(name, members, _CLASSES.get(name.rsplit(".", 1)[-1], "RowParallelLinear"))


def engine_ignores(layer: EngineLayer, config: CompressedTensorsConfig) -> bool | None:
    """Whether vLLM leaves a layer unquantized; None where it refuses to decide."""
    if _matches_any(config.ignore, layer.name):
        return True
    ignored = [_matches_any(config.ignore, member) for member in layer.members]
    if any(ignored) and not all(ignored):
        return None
    return bool(ignored) and all(ignored)


def engine_group(layer: EngineLayer, config: CompressedTensorsConfig, class_first: bool) -> Group | None:
    """The group whose scheme vLLM gives to a layer that is not ignored."""
    targets = config.targets
    by_name = _first_match(layer.name, targets)
    by_members = [_first_match(member, targets) for member in layer.members]
    by_member = by_members[0] if by_members and all(by_members) else None
    by_class = next((targets[target] for target in targets if _class_matches(target, layer.class_name)), None)
    later = (by_class or by_member) if class_first else (by_member or by_class)
    return by_name or later


def _class_matches(target: str, class_name: str) -> bool:
    return matches(target, class_name) if target.startswith("re:") else target.lower() in class_name.lower()


def _first_match(name: str, targets: dict[str, Group]) -> Group | None:
    return next((targets[target] for target in targets if matches(target, name)), None)


def _matches_any(patterns: tuple[str, ...], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def check_fused_ignore(subject: Subject) -> Finding:
    """`ignore` covers all of a fused set or nothing of it."""
    problems = []
    for layer in engine_layers(subject):
        if engine_ignores(layer, subject.parsed) is None:
            hit = [member for member in layer.members if _matches_any(subject.parsed.ignore, member)]
            problems.append(f"`ignore` names {', '.join(hit)}, but not all of {layer.name}")
    return Finding(problems, f"whole sets only ({len(subject.architecture.fused_sets)} fused sets)")


def check_fused_patterns(subject: Subject) -> Finding:
    """A regex that matches a fused name matches every member: `re:.*v_proj$` also hits qkv_proj."""
    problems = []
    patterns = dict.fromkeys(subject.parsed.ignore, "ignore")
    patterns |= {pattern: f"config_groups.{group.name}.targets" for pattern, group in subject.parsed.targets.items()}
    for pattern, where in patterns.items():
        for fused, members in subject.architecture.fused_sets.items():
            missed = [member for member in members if not matches(pattern, member)]
            if matches(pattern, fused) and missed:
                better = pattern.replace(".*", r".*\.", 1)
                problems.append(f"{where}: {pattern} matches {fused} but not {missed[0]}; write it as {better}")
                break
    return Finding(problems, f"{len(patterns)} patterns mean the same under fused names")


def check_engine_groups(subject: Subject) -> Finding:
    """vLLM gives every layer the scheme that config.json gives its linears, whichever release looks it up."""
    problems = []
    layers = engine_layers(subject)
    for layer in layers:
        ignored = engine_ignores(layer, subject.parsed)
        if ignored is None:
            continue
        found = [None if ignored else engine_group(layer, subject.parsed, first) for first in (False, True)]
        stated = {member: subject.groups.get(member) for member in layer.members} or {layer.name: None}
        for member, group in stated.items():
            wrong = next((taken for taken in found if _storage(taken) != _storage(group)), group)
            if _storage(wrong) != _storage(group):
                problems.append(f"{layer.name}: vLLM would load it as {_described(wrong)}, but {member} is "
                                f"{_described(group)}")  # fmt: skip
                break
    return Finding(problems, f"{len(layers)} layers resolve as config.json means them")


def check_fused_schemes(subject: Subject) -> Finding:
    """The members of a fused set have one scheme: bits, group size, symmetry, activations and storage format."""
    sets = subject.architecture.fused_sets
    problems = [problem for name, members in sets.items() if (problem := _mixed(subject, name, members))]
    return Finding(problems, f"{len(sets)} fused sets have one scheme each")


def check_expert_schemes(subject: Subject) -> Finding:
    """All linears of all experts of a block have one scheme: engines stack them."""
    sets = subject.architecture.expert_sets
    problems = [problem for name, members in sets.items() if (problem := _mixed(subject, name, members))]
    return Finding(problems, f"{len(sets)} sets of experts have one scheme each" if sets else "no experts")


def _mixed(subject: Subject, name: str, members: tuple[str, ...]) -> str | None:
    first = _stored_as(subject, members[0])
    for member in members:
        if _stored_as(subject, member) != first:
            return f"{name}: {member} is {_said(subject, member)}, {members[0]} is {_said(subject, members[0])}"
    return None


_SECOND_LEVEL = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")


def check_fused_global_scales(subject: Subject) -> Finding:
    """NVFP4's scales per tensor are the same in a fused set: engines take the largest for all, with a warning only."""
    problems, sets = [], 0
    for fused, members in subject.architecture.fused_sets.items():
        two_level = [name for name in members if name in subject.schemes and subject.schemes[name].weight.two_level]
        for leaf in _SECOND_LEVEL:
            names = [f"{member}.{leaf}" for member in two_level if f"{member}.{leaf}" in subject.stored.tensors]
            values = {name: subject.stored.read(name).reshape(-1)[0].item() for name in names
                      if subject.stored.tensors[name].shape in ((), (1,))}  # fmt: skip
            sets += bool(values)
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                problems.append(f"{fused}: {listed}")
    return Finding(problems, f"{sets} sets share theirs" if sets else "no second level of scales")


def _storage(group: Group | None) -> object:
    """What must agree for two linears to lie in one matrix."""
    return None if group is None else (group.scheme.weight, group.scheme.activation, group.format)


def _stored_as(subject: Subject, linear: str) -> object:
    """The same of a linear in any format."""
    scheme = subject.schemes.get(linear)
    if linear in subject.groups or scheme is None:
        return _storage(subject.groups.get(linear))
    return scheme.weight, scheme.activation


def _said(subject: Subject, linear: str) -> str:
    scheme = subject.schemes.get(linear)
    if linear in subject.groups or scheme is None:
        return _described(subject.groups.get(linear))
    return f"{_weight_said(scheme.weight)} ({scheme.name})"


def _described(group: Group | None) -> str:
    return "unquantized" if group is None else f"{_weight_said(group.scheme.weight)} ({group.name})"


def _weight_said(weight: WeightSpec) -> str:
    size = f" {weight.group_size}" if weight.group_size else ""
    symmetry = "symmetric" if weight.symmetric else "asymmetric"
    return f"{weight.number} {weight.bits} bits, {weight.granularity.value}{size}, {symmetry}"
