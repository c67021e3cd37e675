"""Rules on GPTQ folders.

vLLM 0.32 (auto_gptq.py, utils/gptq_utils.py) and SGLang 0.5 (gptq.py) run GPTQ files with Marlin kernels for symmetric
codes of 4 and 8 bits only, with a fixed zero point. They ignore zero points and column order in the files, so that a
checkpoint which needs these loads and generates nonsense.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit import kernels
from lowbit.checkpoint.base import read_json_object
from lowbit.verification.left_out import dynamic_rules, engine_units
from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject

_TRANSFORMERS_BITS = (2, 3, 4, 8)
_KEYS = ("bits", "group_size", "desc_act", "sym")
# What quantize_config.json and config.json must say alike; both leave keys out that have their default.
_SHARED_KEYS = {"bits": None, "group_size": None, "sym": True, "desc_act": False, "lm_head": False, "dynamic": None,
                "checkpoint_format": "gptq"}  # fmt: skip


def check_keys(subject: Subject) -> Finding:
    """bits, group_size, desc_act and sym are there, and of the right kind."""
    stated, problems = subject.quantization, []
    for key in _KEYS:
        kind = bool if key in ("desc_act", "sym") else int
        if key not in stated:
            problems.append(f"quantization_config has no {key}, which {subject.engine} needs")
        elif type(stated[key]) is not kind:
            problems.append(f"quantization_config.{key} is {stated[key]!r}; {kind.__name__} is needed")
    return Finding(problems, ", ".join(f"{key} {stated.get(key)}" for key in _KEYS))


def check_column_order(subject: Subject) -> Finding:
    """desc_act is false, or there is one group per row: group activation order is no longer supported."""
    stated = subject.quantization
    problems = _order_problem("desc_act", stated.get("desc_act"), stated.get("group_size"))
    for key, override in (stated.get("dynamic") or {}).items():
        if not key.startswith("-:") and isinstance(override, dict):
            order = override.get("desc_act", stated.get("desc_act"))
            problems += _order_problem(f"dynamic[{key!r}]", order, override.get("group_size", stated.get("group_size")))
    return Finding(problems, "columns are in their own order")


def _order_problem(where: str, order: Any, group_size: Any) -> list[str]:
    if order and group_size != -1:
        return [f"quantization_config.{where}: desc_act is true with group_size {group_size}; vLLM takes columns in "
                f"their own order only, unless there is one group per row"]  # fmt: skip
    return []


def check_group_index(subject: Subject) -> Finding:
    """Where desc_act is false, g_idx says what engines assume without reading it: column c is in group c // g."""
    if subject.quantization.get("desc_act"):
        return Finding([], "desc_act is stated")
    problems = []
    for name, scheme in subject.schemes.items():
        index = f"{name}.g_idx"
        if index in subject.stored.tensors and subject.unsound(name) is None:
            found = subject.stored.read(index)
            plain = torch.arange(len(found)) // (scheme.weight.group_size or len(found))
            if not torch.equal(found.long(), plain):
                column = int((found.long() != plain).int().argmax())
                here, needed = int(found[column]), int(plain[column])
                problems.append(f"{index}[{column}] is {here}, not {needed}: columns are permuted, desc_act is false, "
                                f"and {subject.engine} misreads the groups")  # fmt: skip
    return Finding(problems, "columns are in the groups that engines assume")


def check_zeros(subject: Subject) -> Finding:
    """Symmetric zero points are 2^(b−1), stored less 1 by version 1: engines assume so without reading them."""
    version_2 = _version(subject.quantization) == "gptq_v2"
    problems, count = [], 0
    for name, scheme in subject.schemes.items():
        if not scheme.weight.symmetric or subject.unsound(name) is not None:
            continue
        count += 1
        bits = scheme.weight.bits
        wanted = (1 << (bits - 1)) - (not version_2)
        rows = subject.architecture.linears[name].shape[0]
        zeros = kernels.unpack_dense(subject.stored.read(f"{name}.qzeros"), bits, rows, offset=0)
        if not bool((zeros == wanted).all()):
            found = int(zeros[zeros != wanted][0])
            said = _version(subject.quantization)
            problems.append(
                f"{name}.qzeros holds {found}; symmetric {bits}-bit codes in the format {said} have {wanted}"
            )
    return Finding(problems, f"those of {count} linears are the symmetric ones" if count else "no symmetric linears")


def _version(stated: dict[str, Any]) -> str:
    return str(stated.get("checkpoint_format") or stated.get("format") or "gptq").lower()


def check_companion(subject: Subject) -> Finding:
    """quantize_config.json, where there is one, says the same as config.json: loaders differ in which they read."""
    path = subject.folder / "quantize_config.json"
    if not path.is_file():
        return Finding([], "there is none; config.json is enough")
    if not isinstance(subject.config.get("quantization_config"), dict):
        return Finding([], "it is the only one; config.json has no quantization_config")
    here, there = subject.quantization, read_json_object(path)
    problems = []
    for key, default in _SHARED_KEYS.items():
        one, other = (default if stated.get(key) is None else stated[key] for stated in (there, here))
        if (one or None) != (other or None):
            problems.append(f"{key} is {one!r} in quantize_config.json, {other!r} in config.json")
    return Finding(problems, "quantize_config.json and config.json agree")


def check_dynamic(subject: Subject) -> Finding:
    """`dynamic` means the same under the fused names that engines look up: qkv_proj, gate_up_proj, experts."""
    rules = dynamic_rules(subject)
    problems = []
    for unit in engine_units(subject):
        if len(unit.members) == 1 or not all(member in subject.schemes for member in unit.members):
            continue  # whether unquantized ones are seen as such is a rule of its own
        found = _first_match(rules, unit.name)
        for member in unit.members:
            own = _first_match(rules, member)
            if _override(subject, own) != _override(subject, found):
                problems.append(f"dynamic: {own or 'no pattern'} is for {member}, but {found or 'no pattern'} for "
                                f"{unit.name}, the name that {subject.engine} looks up")  # fmt: skip
                break
    return Finding(problems, f"{len(rules)} patterns mean the same under fused names" if rules else "there is none")


def _first_match(rules: list, name: str) -> str | None:
    return next((key for _, pattern, key in rules if pattern.match(name)), None)


def _override(subject: Subject, key: str | None) -> Any:
    """The settings of a pattern, completed by the general ones; False for "leave unquantized"."""
    stated = subject.quantization
    if key is None or not key.startswith("-:"):
        own = {} if key is None else stated["dynamic"][key]
        return {name: own.get(name, stated.get(name)) for name in _KEYS}
    return False


def check_shapes(subject: Subject) -> Finding:
    """Rows and columns fill 32-bit words, and groups divide the columns: engines allocate by whole words and groups."""
    problems = []
    for name, scheme in subject.schemes.items():
        rows, columns = subject.architecture.linears[name].shape
        weight = scheme.weight
        if columns * weight.bits % 32 or rows * weight.bits % 32:
            problems.append(f"{name} is {rows} × {columns}; {weight.bits}-bit codes do not fill 32-bit words")
        elif weight.group_size is not None and columns % weight.group_size:
            problems.append(f"{name} has {columns} columns; groups of {weight.group_size} do not divide them")
    return Finding(problems, "whole words and groups")


def check_transformers(subject: Subject) -> Finding:
    """bits are 2, 3, 4 or 8, and the format is one that GPTQModel reads."""
    stated = subject.quantization
    problems = []
    for name, scheme in subject.schemes.items():
        if scheme.weight.bits not in _TRANSFORMERS_BITS:
            problems.append(f"{name}: {scheme.weight.bits} bits; transformers takes 2, 3, 4 and 8")
    if _version(stated) not in ("gptq", "gptq_v2"):
        problems.append(f"checkpoint_format is {_version(stated)!r}; gptq or gptq_v2 is needed")
    only = stated.get("modules_in_block_to_quantize")
    skipped = [key for negative, _, key in dynamic_rules(subject) if negative]
    if skipped and not only:
        problems.append(f"dynamic leaves linears alone ({skipped[0]}), which optimum does not read; it needs "
                        f"modules_in_block_to_quantize")  # fmt: skip
    return Finding(problems, f"{_version(stated)}, loaded by optimum and GPTQModel")


RULES: tuple[Rule, ...] = (
    Rule("gptq-zeros", "format", ("gptq",), "symmetric zero points are 2^(b−1), as the version has them", check_zeros,
         "TYPE_MAP of auto_gptq.py: uint4b8, uint8b128, zero points unread (vLLM); convert_gptq_v1_to_v2 (GPTQModel)"),
    Rule("gptq-files", "format", ("gptq",), "quantize_config.json and config.json agree", check_companion,
         "get_config_filenames of auto_gptq.py (vLLM); GPTQModel reads quantize_config.json first"),
    Rule("gptq-shapes", "format", ("gptq",), "rows and columns fill words, groups divide columns", check_shapes,
         "create_weights of auto_gptq.py (vLLM); pack of AutoGPTQ"),
)  # fmt: skip

# Of servers.
GROUP_INDEX = Rule(
    "gptq-group-index", "format", ("gptq",), "without desc_act, column c is in group c // g", check_group_index,
    "AutoGPTQLinearMethod (vLLM) registers no g_idx; gptq_marlin.py (SGLang): has_g_idx=desc_act; "
    "repack_gptq_for_marlin of layers/marlin/gptq.py (TGI); suffix_map of turbomind/weight_format.py (LMDeploy)",
)  # fmt: skip
# Of vLLM and SGLang.
SERVER_RULES: tuple[Rule, ...] = (
    Rule("gptq-keys", "config", ("gptq",), "bits, group_size, desc_act and sym are stated", check_keys,
         "from_config of auto_gptq.py (vLLM), of GPTQMarlinConfig (SGLang)"),
    GROUP_INDEX,
    Rule("gptq-dynamic", "format", ("gptq",), "`dynamic` means the same under fused names", check_dynamic,
         "get_dynamic_override of utils/gptq_utils.py (vLLM), of utils.py (SGLang), called with the fused name"),
)  # fmt: skip
COLUMN_ORDER = Rule(
    "gptq-column-order", "format", ("gptq",), "desc_act is false, or there is one group per row", check_column_order,
    "normalize_and_validate_gptq_desc_act of utils/gptq_utils.py (vLLM)",
)  # fmt: skip
TRANSFORMERS = Rule(
    "gptq-transformers", "format", ("gptq",), "bits, format and left-out linears are stated as optimum reads them",
    check_transformers, "GPTQConfig.post_init (transformers); GPTQQuantizer.convert_model (optimum)",
)  # fmt: skip
