"""Rules on the linears that stay unquantized: every loader must see them as the files have them.

config.json lists them (but for GPTQ, where the files tell), and every loader matches the list in its own way, against
its own names: vLLM and SGLang build one matrix of q, k and v, and one layer of all experts.

    vLLM 0.32      awq        a substring of a member's name; all members or none; without a list, what the files hold
                   gptq       what the files hold, as substrings; all members or none; `dynamic` against the fused name
                   modelopt   equal to a member's name (all or none), or a substring of the fused name, or fnmatch on it
                   fp8        equal to a member's name (all or none), or to the fused one
    SGLang 0.5     awq        a substring of the fused name
                   gptq       `dynamic` against the fused name, and nothing else
                   modelopt, fp8   a path within a member's name (all or none); modelopt: a glob on the fused name too
                   bitsandbytes    a component, or a leading path, of the fused name
    transformers   awq, bitsandbytes, fp8   a regex at the start up to a dot or the end, or a suffix; no fused names

The tables below say so; `check_left_out` compares them with the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from lowbit.checkpoint.compressed_tensors_config import matches
from lowbit.errors import CheckpointError
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

_LISTS = {
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "modelopt": ("ignore", "exclude_modules", "modules_to_not_convert"),
    "fp8": ("ignored_layers", "modules_to_not_convert"),
    "mxfp4": ("modules_to_not_convert",),
    "torchao": ("modules_to_not_convert",),
    "hqq": ("skip_modules",),
}


@dataclass(frozen=True)
class EngineUnit:
    """What an engine decides for at once: a fused set, a linear of its own, or the experts of a block."""

    name: str
    members: tuple[str, ...]
    experts: bool = False


def left_out_list(subject: Subject) -> list[str]:
    """What config.json lists as unquantized: names or patterns, in the format's own spelling."""
    stated = subject.quantization
    inner = stated.get("quantization")
    for source in (stated, inner if isinstance(inner, dict) else {}):
        for key in _LISTS.get(subject.format, ()):
            listed = source.get(key)
            if listed:
                return _strings(subject, key, listed)
    return []


def _strings(subject: Subject, key: str, listed: Any) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise CheckpointError(f"{subject.folder}: config.json: {key} is {listed!r}; a list of names is needed")
    return listed


def dynamic_rules(subject: Subject) -> list[tuple[bool, re.Pattern[str], str]]:
    """GPTQ's `dynamic`: (True where it leaves alone, regex, as written), in order; the first that matches counts."""
    stated = subject.quantization.get("dynamic") or {}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{subject.folder}: config.json: dynamic is {stated!r}; a mapping is needed")
    rules = []
    for key in stated:
        try:
            rules.append((key.startswith("-:"), re.compile(re.sub(r"^[+-]:", "", key)), key))
        except re.error as error:
            raise CheckpointError(f"{subject.folder}: config.json: dynamic: {key!r} is no regex ({error})") from error
    return rules


def is_accounted_for(subject: Subject, linear: str) -> bool:
    """True where config.json says that a linear stays unquantized."""
    listed = left_out_list(subject)
    if subject.format == "compressed-tensors":
        return any(matches(target, linear) or target == "Linear" for target in subject.parsed.ignore)
    if subject.format == "gptq":
        only = _flat(subject.quantization.get("modules_in_block_to_quantize") or [])
        return _leaves_alone(subject, linear) or bool(only and not any(part in linear for part in only))
    if subject.format == "awq":
        return any(part in linear for part in listed)
    if subject.format == "modelopt":
        layers = _modelopt_layers(subject)
        return bool(layers and linear not in layers) or any(
            pattern in linear or fnmatch(linear, pattern) for pattern in listed
        )
    if subject.format in ("bitsandbytes", "fp8"):
        return not _transformers_converts(linear, listed) or any(_path_match(entry, linear) for entry in listed)
    return True


def _leaves_alone(subject: Subject, name: str) -> bool:
    """True where the first pattern of `dynamic` that matches a name leaves it alone."""
    return next((negative for negative, pattern, _ in dynamic_rules(subject) if pattern.match(name)), False)


def _flat(listed: Any) -> list[str]:
    parts = listed if isinstance(listed, list) else [listed]
    return [str(name) for part in parts for name in (part if isinstance(part, list) else [part])]


def engine_units(subject: Subject) -> list[EngineUnit]:
    """The decoder and the output layer, as vLLM and SGLang build them; routers, which they never quantize, left out."""
    architecture = subject.architecture
    in_experts = {name for members in architecture.expert_sets.values() for name in members}
    units = [EngineUnit(name, members, True) for name, members in architecture.expert_sets.items()]
    units += [EngineUnit(_fused_name(subject, name), members) for name, members in architecture.fused_sets.items()
              if members[0] not in in_experts]  # fmt: skip
    units += [EngineUnit(linear.name, (linear.name,)) for linear in architecture.linears.values()
              if linear.fused is None and linear.name not in in_experts and linear.keep is None]  # fmt: skip
    return units


def _fused_name(subject: Subject, name: str) -> str:
    """What the engine calls a fused set."""
    return f"{name}_with_mqa" if subject.engine == "sglang" and name.endswith(".fused_qkv_a_proj") else name


def check_left_out(subject: Subject) -> Finding:
    """The engine leaves unquantized what the files hold unquantized, of every layer as it builds it, and no more."""
    leaves_out = _ENGINES[subject.engine].get(subject.format)
    if leaves_out is None:
        return Finding([], "nothing is matched by name")
    problems, count = [], 0
    units = _transformers_units(subject) if subject.engine == "transformers" else engine_units(subject)
    for unit in units:
        count += 1
        found = leaves_out(subject, unit)
        if found is None:
            problems.append(f"{unit.name}: config.json leaves out some of {', '.join(unit.members[:3])}, but not all")
            continue
        held = {member in subject.schemes for member in unit.members}
        if len(held) > 1 or any(member in subject.misfiled for member in unit.members):
            continue  # the rules on fused sets and on coverage say so
        quantized = held.pop()
        if found is quantized:
            how = ("leave it unquantized", "quantized") if quantized else ("look for a quantized weight", "unquantized")
            problems.append(
                f"{unit.name}: {subject.engine} would {how[0]}, but the files hold {unit.members[0]} {how[1]}"
            )
    return Finding(problems, f"{count} layers are matched as the files have them")


def _transformers_units(subject: Subject) -> list[EngineUnit]:
    in_experts = {name for members in subject.architecture.expert_sets.values() for name in members}
    return [EngineUnit(name, (name,)) for name in subject.architecture.linears if name not in in_experts]


def _by_members(unit: EngineUnit, is_left_out: Callable[[str], bool]) -> bool | None:
    """True, False, or None where it is so of some members only, which vLLM and SGLang refuse."""
    found = {is_left_out(member) for member in unit.members}
    return found.pop() if len(found) == 1 else None


def _is_head(subject: Subject, unit: EngineUnit) -> bool:
    linear = subject.architecture.linears.get(unit.name)
    return linear is not None and linear.block is None


def _head_flag(subject: Subject, unit: EngineUnit) -> bool:
    """GPTQ and AWQ: an output layer is quantized only where config.json says `lm_head`."""
    return _is_head(subject, unit) and not subject.quantization.get("lm_head", False)


def _vllm_awq(subject: Subject, unit: EngineUnit) -> bool | None:
    if _head_flag(subject, unit):
        return True
    listed = left_out_list(subject) or subject.plain_modules
    if unit.experts or any(part in unit.name for part in listed):
        return any(part in unit.name for part in listed)
    return _by_members(unit, lambda name: any(part in name for part in listed))


def _vllm_gptq(subject: Subject, unit: EngineUnit) -> bool | None:
    if _head_flag(subject, unit):
        return True
    if unit.experts or _leaves_alone(subject, unit.name):
        return _leaves_alone(subject, unit.name)
    listed = _flat(subject.quantization.get("modules_in_block_to_quantize") or []) or subject.linears_in_files
    if len(unit.members) == 1:
        return not any(part in unit.name for part in listed)
    return _by_members(unit, lambda name: not any(part in name for part in listed))


def _modelopt_layers(subject: Subject) -> dict[str, Any]:
    """`quantized_layers` of a folder with several algorithms: what is not in it stays unquantized."""
    inner = subject.quantization.get("quantization")
    stated = subject.quantization.get("quantized_layers")
    stated = (inner if isinstance(inner, dict) else {}).get("quantized_layers") if stated is None else stated
    return stated if isinstance(stated, dict) else {}


def _vllm_modelopt(subject: Subject, unit: EngineUnit) -> bool | None:
    layers = _modelopt_layers(subject)
    if layers:
        return _by_members(unit, lambda name: name not in layers)
    listed = left_out_list(subject)
    if unit.experts:
        exact: bool | None = any(unit.name in entry for entry in listed if "experts" in entry)
    else:
        exact = unit.name in listed or _by_members(unit, lambda name: name in listed)
    if exact is not False:
        return exact
    return any(entry in unit.name or fnmatch(unit.name, entry) for entry in listed)


def _vllm_fp8(subject: Subject, unit: EngineUnit) -> bool | None:
    if _is_head(subject, unit):
        return True  # fp8 quantizes no output layer
    listed = left_out_list(subject)
    if unit.experts:
        return any(unit.name in entry for entry in listed if "experts" in entry)
    return unit.name in listed or _by_members(unit, lambda name: name in listed)


def _sglang_awq(subject: Subject, unit: EngineUnit) -> bool | None:
    return _head_flag(subject, unit) or any(part in unit.name for part in left_out_list(subject))


def _sglang_gptq(subject: Subject, unit: EngineUnit) -> bool | None:
    return _head_flag(subject, unit) or _leaves_alone(subject, unit.name)


def _sglang_paths(subject: Subject, unit: EngineUnit) -> bool | None:
    listed, layers = left_out_list(subject), _modelopt_layers(subject)
    if layers:
        return _by_members(unit, lambda name: name not in layers)
    if _is_head(subject, unit) and subject.format == "fp8":
        return True
    if unit.experts:
        return any(_path_match(entry, unit.name) for entry in listed) or any(
            unit.name in entry for entry in listed if "experts" in entry
        )
    found = _by_members(unit, lambda name: any(_path_match(entry, name) for entry in listed))
    if found is False and subject.format == "modelopt":
        return any(fnmatch(part, entry) for entry in listed for part in (unit.name, *unit.name.split(".")))
    return found


def _sglang_bitsandbytes(subject: Subject, unit: EngineUnit) -> bool | None:
    if _is_head(subject, unit):
        return True
    listed = left_out_list(subject)
    parts = unit.name.split(".")
    return any(entry in parts or unit.name == entry or unit.name.startswith(f"{entry}.") for entry in listed)


def _transformers(subject: Subject, unit: EngineUnit) -> bool | None:
    listed = left_out_list(subject)
    if _is_head(subject, unit) and (subject.format == "awq" or not listed):
        return True  # transformers leaves the output layer alone by itself
    return not _transformers_converts(unit.name, listed)


def _path_match(entry: str, name: str) -> bool:
    """SGLang's `_module_path_match`: the dotted path of an entry occurs in a name."""
    return f".{entry.rstrip('.')}." in f".{name}."


def _transformers_converts(name: str, listed: list[str]) -> bool:
    """transformers' `should_convert_module`."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    for entry in listed:
        try:
            if re.match(rf"(?:{entry}){boundary}", name) or name.endswith(entry):
                return False
        except re.error as error:
            raise CheckpointError(f"config.json: {entry!r} in the list of modules is no regex ({error})") from error
    return True


_ENGINES: dict[str, dict[str, Callable[[Subject, EngineUnit], bool | None]]] = {
    "vllm": {"awq": _vllm_awq, "gptq": _vllm_gptq, "modelopt": _vllm_modelopt, "fp8": _vllm_fp8},
    "sglang": {
        "awq": _sglang_awq, "gptq": _sglang_gptq, "modelopt": _sglang_paths, "fp8": _sglang_paths,
        "bitsandbytes": _sglang_bitsandbytes,
    },
    "transformers": {"awq": _transformers, "bitsandbytes": _transformers, "fp8": _transformers},
    "tensorrt-llm": {},
}  # fmt: skip
