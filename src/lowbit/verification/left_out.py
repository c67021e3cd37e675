"""Rules on unquantized linears: the loader must leave unquantized exactly what the files hold so.

config.json lists them (except for GPTQ, where the files decide). Each loader matches the list in its own way, against
its own names: vLLM and SGLang build one matrix of q, k and v, and one layer of all experts. `Loading.leaves_out`, in
the file of each engine, implements the matching; `check_left_out` compares it with the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from lowbit.checkpoint.compressed_tensors_config import matches
from lowbit.checkpoint.quantized import FLOATS
from lowbit.errors import CheckpointError
from lowbit.patterns import Pattern, PatternError, compiled, up_to_a_dot
from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject

_LISTS = {
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "modelopt": ("ignore", "exclude_modules", "modules_to_not_convert"),
    "bitnet": ("modules_to_not_convert",),
    "fp8": ("ignored_layers", "modules_to_not_convert"),
    "mxfp4": ("modules_to_not_convert",),
    "torchao": ("modules_to_not_convert",),
    "quark": ("exclude",),
    "hqq": ("skip_modules",),
}


@dataclass(frozen=True)
class EngineUnit:
    """Linears that an engine quantizes, or not, together: a fused set, a single linear, the experts of a block."""

    name: str
    members: tuple[str, ...]
    experts: bool = False


def left_out_list(subject: Subject) -> list[str]:
    """Unquantized modules by config.json: names or patterns, in the format's own spelling."""
    stated = subject.quantization
    inner = stated.get("quantization")
    for source in (stated, inner if isinstance(inner, dict) else {}):
        for key in _LISTS.get(subject.format, ()):
            listed = source.get(key)
            if listed and not (isinstance(listed, list) and all(isinstance(entry, str) for entry in listed)):
                raise CheckpointError(f"{subject.folder}: config.json: {key} is {listed!r}; a list of names is needed")
            if listed:
                return listed
    return []


def dynamic_rules(subject: Subject) -> list[tuple[bool, Pattern, str]]:
    """GPTQ's `dynamic`: (True for "leave unquantized", regex, as written), in order; the first match counts."""
    stated = subject.quantization.get("dynamic") or {}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{subject.folder}: config.json: dynamic is {stated!r}; a mapping is needed")
    rules = []
    for key in stated:
        try:
            rules.append((key.startswith("-:"), compiled(re.sub(r"^[+-]:", "", key)), key))
        except PatternError as error:
            raise CheckpointError(f"{subject.folder}: config.json: dynamic: {key!r} is no regex ({error})") from error
    return rules


def is_accounted_for(subject: Subject, linear: str) -> bool:
    """True where config.json says that a linear stays unquantized."""
    listed = left_out_list(subject)
    if subject.format == "compressed-tensors":
        return any(matches(target, linear) or target == "Linear" for target in subject.parsed.ignore)
    if subject.format == "gptq":
        only = flat(subject.quantization.get("modules_in_block_to_quantize") or [])
        return leaves_alone(subject, linear) or bool(only and not any(part in linear for part in only))
    if subject.format == "awq":
        return any(part in linear for part in listed)
    if subject.format == "modelopt":
        layers = modelopt_layers(subject)
        return bool(layers and linear not in layers) or any(
            pattern in linear or fnmatch(linear, pattern) for pattern in listed
        )
    if subject.format in ("bitsandbytes", "bitnet", "fp8"):
        return not transformers_converts(linear, listed) or any(path_match(entry, linear) for entry in listed)
    return True


def leaves_alone(subject: Subject, name: str) -> bool:
    """True where the first pattern of `dynamic` that matches a name leaves it unquantized."""
    return next((negative for negative, pattern, _ in dynamic_rules(subject) if pattern.match(name)), False)


def flat(listed: Any) -> list[str]:
    parts = listed if isinstance(listed, list) else [listed]
    return [str(name) for part in parts for name in (part if isinstance(part, list) else [part])]


def engine_units(subject: Subject) -> list[EngineUnit]:
    """The layers that vLLM and SGLang build for decoder and output, without routers, which they never quantize."""
    architecture = subject.architecture
    in_experts = {name for members in architecture.expert_sets.values() for name in members}
    units = [EngineUnit(name, members, True) for name, members in architecture.expert_sets.items()]
    for name, members in architecture.fused_sets.items():
        if members[0] not in in_experts:
            prefix, dot, last = name.rpartition(".")
            units.append(EngineUnit(prefix + dot + subject.loading.fused_names.get(last, last), members))
    units += [EngineUnit(linear.name, (linear.name,)) for linear in architecture.linears.values()
              if linear.fused is None and linear.name not in in_experts and linear.keep is None]  # fmt: skip
    return units


def check_left_out(subject: Subject) -> Finding:
    """The engine leaves exactly those layers unquantized that the files hold unquantized."""
    leaves_out = subject.loading.leaves_out.get(subject.format)
    if leaves_out is None:
        return Finding([], "nothing is matched by name")
    if subject.loading.fuses:
        units = engine_units(subject)
    else:
        in_experts = {name for members in subject.architecture.expert_sets.values() for name in members}
        units = [EngineUnit(name, (name,)) for name in subject.architecture.linears if name not in in_experts]
    problems = []
    for unit in units:
        left_out = leaves_out(subject, unit)
        if left_out is None:
            problems.append(f"{unit.name}: config.json leaves out some of {', '.join(unit.members[:3])}, but not all")
            continue
        in_files = {member in subject.schemes for member in unit.members}
        if len(in_files) > 1 or any(member in subject.misfiled for member in unit.members):
            continue  # a problem for the rules on fused sets and on coverage
        quantized = in_files.pop()
        if left_out is quantized:
            how = ("leave it unquantized", "quantized") if quantized else ("look for a quantized weight", "unquantized")
            problems.append(
                f"{unit.name}: {subject.engine} would {how[0]}, but the files hold {unit.members[0]} {how[1]}"
            )
    return Finding(problems, f"{len(units)} layers are matched as the files have them")


def check_prediction(subject: Subject) -> Finding:
    """Every unquantized matrix of a block for multi-token prediction is declared so."""
    tensors, architecture = subject.stored.tensors, subject.architecture
    matrices = [name.removesuffix(".weight") for name, info in tensors.items()
                if architecture.predicts(name) and name.endswith(".weight") and len(info.shape) == 2
                and info.dtype in FLOATS and not name.endswith(("embed_tokens.weight", "norm.weight"))]  # fmt: skip
    problems = [
        f"{name} is in 16 bits, and config.json does not say so: the engine would look for a quantized weight"
        for name in matrices
        if subject.quantization and not is_accounted_for(subject, name)
    ]
    return Finding(problems, f"{len(matrices)} matrices are declared" if matrices else "no such blocks")


def by_members(unit: EngineUnit, is_left_out: Callable[[str], bool]) -> bool | None:
    """True, False, or None where members differ, which vLLM and SGLang refuse."""
    answers = {is_left_out(member) for member in unit.members}
    return answers.pop() if len(answers) == 1 else None


def is_head(subject: Subject, unit: EngineUnit) -> bool:
    linear = subject.architecture.linears.get(unit.name)
    return linear is not None and linear.block is None


def head_flag(subject: Subject, unit: EngineUnit) -> bool:
    """GPTQ and AWQ: an output layer is quantized only where config.json says `lm_head`."""
    return is_head(subject, unit) and not subject.quantization.get("lm_head", False)


def modelopt_layers(subject: Subject) -> dict[str, Any]:
    """`quantized_layers` of a folder with several algorithms; all other layers are unquantized."""
    inner = subject.quantization.get("quantization")
    stated = subject.quantization.get("quantized_layers")
    stated = (inner if isinstance(inner, dict) else {}).get("quantized_layers") if stated is None else stated
    return stated if isinstance(stated, dict) else {}


def path_match(entry: str, name: str) -> bool:
    """SGLang's `_module_path_match`: the dotted path of an entry occurs in a name."""
    return f".{entry.rstrip('.')}." in f".{name}."


def transformers_converts(name: str, listed: list[str]) -> bool:
    """transformers' `should_convert_module`."""
    for entry in listed:
        try:
            if name.endswith(entry) or up_to_a_dot(entry).match(name):
                return False
        except PatternError as error:
            raise CheckpointError(f"config.json: {entry!r} in the list of modules is no regex ({error})") from error
    return True


PREDICTION = Rule(
    "prediction-blocks", "layers", ("compressed-tensors", "gptq", "awq", "modelopt", "fp8"),
    "unquantized blocks for multi-token prediction are declared", check_prediction,
    "models/deepseek_mtp.py, qwen3_next_mtp.py, is_layer_skipped of utils/quant_utils.py (vLLM)",
)  # fmt: skip
LEFT_OUT = Rule(
    "left-out", "layers", ("gptq", "awq", "bitsandbytes", "modelopt", "fp8"),
    "the engine leaves unquantized what the files hold so", check_left_out,
    "is_layer_skipped of utils/quant_utils.py, is_layer_gptq_quantized, is_layer_excluded (vLLM); is_layer_skipped of "
    "utils.py, awq.py, bitsandbytes.py (SGLang); should_convert_module of quantizers_utils.py (transformers)",
)  # fmt: skip
