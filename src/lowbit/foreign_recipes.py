"""What users of other tools write: keywords and recipes, and the same in lowbit's words.

    find_equivalent("w_bit", 4)   'scheme="W4A16"': for the error that says there is no such setting
    translated(values, name)      a recipe of llm-compressor → settings

default_stage:                                            method: smoothquant+gptq
  default_modifiers:                                      scheme: W8A8
    SmoothQuantModifier: {smoothing_strength: 0.8}        ignore: ['^lm_head$', 're:.*down_proj']
    GPTQModifier:                                         damping: 0.05
      {targets: [Linear], scheme: W8A8, dampening_frac: 0.05, ignore: [lm_head, 're:.*down_proj']}

A target or an entry of `ignore` is an exact name, or `re:` and a pattern for the beginning of a name, as
compressed-tensors has it (`utils/match.py`). Groups whose targets are not `Linear` become overrides. What lowbit
decides by itself (which linears share scales, how strongly to smooth) is told, not taken. Refused: modifiers that do
something else (pruning), keys that are unknown, names of classes other than Linear, groups of several sizes, schemes
that lowbit does not have.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowbit.errors import LowbitError, UsageError
from lowbit.registry import load
from lowbit.schemes import SCHEMES, Scheme, find_scheme

_log = logging.getLogger("lowbit")

# ── keywords ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_BITS = 'scheme="W{value}A16"'
_LINEARS = "ignore=(…) leaves linears in 16 bits, overrides={{REGEX: SCHEME}} gives some another scheme"
# Keyword elsewhere → what stands for it here; {value} is the value that was given.
KEYWORDS: dict[str, str] = {
    # llm-compressor: oneshot and modifiers
    "dataset": "calib={value!r}", "dataset_config_name": 'calib="hub:OWNER/NAME:CONFIG:SPLIT"',
    "dataset_path": "calib=PATH", "splits": 'calib="hub:OWNER/NAME:CONFIG:SPLIT"',
    "num_calibration_samples": "samples={value}", "max_seq_length": "seqlen={value}",
    "text_column": "a column called text, messages, conversations or instruction + output", "output_dir": "output",
    "shuffle_calibration_samples": "rows of a dataset are shuffled with seed=…, data in memory keeps its order",
    "targets": _LINEARS, "dampening_frac": "damping={value}", "config_groups": "scheme=…, group_size=… and overrides",
    "kv_cache_scheme": 'kv_cache="fp8"', "modifiers": "method=… and scheme=…", "modifier": "method=… and scheme=…",
    "smoothing_strength": 'method="smoothquant": the strength is searched for each layer',
    "duo_scaling": 'method="awq": searched for each layer', "mappings": "what scales can be folded into is found",
    "actorder": 'method="gptq" always takes columns by falling diag H', "block_size": "no bit depends on it",
    "save_compressed": "outputs are always compressed", "pipeline": "blocks are always calibrated one after another",
    "processor": "tokenizer=…", "trust_remote_code": "options=OpenOptions(trust_remote_code=True)",
    # AutoAWQ
    "quant_config": "scheme=…, group_size=… and format=…", "w_bit": _BITS, "q_group_size": "group_size={value}",
    "zero_point": 'scheme="W4A16_ASYM" has zero points, "W4A16" has none', "version": 'format="awq"',
    "calib_data": "calib={value!r}", "max_calib_samples": "samples={value}", "max_calib_seq_len": "seqlen={value}",
    "modules_to_not_convert": "ignore={value!r}", "quant_path": "output",
    # GPTQModel, AutoGPTQ, optimum
    "bits": _BITS, "wbits": _BITS, "sym": 'scheme="W4A16" is symmetric, "W4A16_ASYM" is not',
    "desc_act": 'method="gptq" always takes columns by falling diag H, and stores them in their own order',
    "act_order": 'method="gptq" always takes columns by falling diag H', "damp_percent": "damping={value}",
    "percdamp": "damping={value}", "calibration": "calib={value!r}", "calibration_dataset": "calib={value!r}",
    "nsamples": "samples={value}", "dynamic": "overrides={{REGEX: SCHEME}} and ignore=(…)",
    "quantize_config": "scheme=…, group_size=… and format=…", "checkpoint_format": "format={value!r}",
    "static_groups": "not needed: groups keep the order of columns", "true_sequential": "always so",
    "batch_size": "batches are chosen by themselves", "mse": 'range="mse"',
    "lm_head": 'overrides={{"lm_head$": SCHEME}}',
    # bitsandbytes
    "quantization_config": "scheme=…, group_size=… and format=…", "load_in_4bit": 'scheme="NF4"',
    "load_in_8bit": 'scheme="INT8"', "bnb_4bit_quant_type": 'scheme="NF4" or "FP4"',
    "bnb_4bit_use_double_quant": "double_quant={value}", "llm_int8_skip_modules": "ignore={value!r}",
    "bnb_4bit_compute_dtype": "the dtype that the model is loaded with", "bnb_4bit_quant_storage": "bytes, always",
    # llama-quantize
    "ftype": "scheme={value!r}", "output_tensor_type": "output_type={value!r}",
    "tensor_type": "overrides={{REGEX: TYPE}}",
    "leave_output_tensor": 'output_type="F16"', "include_weights": "imatrix=FILE is for all tensors",
    "allow_requantize": "always allowed, and noted", "nthread": "threads={value}", "nthreads": "threads={value}",
    # mlx-lm
    "q_bits": _BITS, "quant_predicate": "overrides={{REGEX: SCHEME}} and ignore=(…)", "mlx_path": "output",
    "hf_path": "model, the first argument", "q_mode": "scheme=…", "upload_repo": "`hf upload` of the output",
    "num_samples": "samples={value}", "sequence_length": "seqlen={value}",
}  # fmt: skip


def find_equivalent(keyword: str, value: Any) -> str | None:
    """What stands here for a keyword of another tool; None for one that is not known."""
    found = KEYWORDS.get(keyword)
    if found is None:
        return None
    if isinstance(value, str | int | float | bool):
        return found.format(value=value)
    return found.replace("{value!r}", "{value}").format(value="…")


# ── recipes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# Modifier → part of a method's name; "" where it is the rounding to nearest that any method ends with.
_METHODS = {
    "SmoothQuantModifier": "smoothquant", "AWQModifier": "awq", "GPTQModifier": "gptq", "AutoRoundModifier": "sign-sgd",
    "QuantizationModifier": "",
}  # fmt: skip
_READ = ("scheme", "config_groups", "targets", "ignore", "dampening_frac", "kv_cache_scheme")
# Keys that lowbit decides by itself, and keys of how llm-compressor runs; told where they are given.
_DECIDED = {
    "smoothing_strength": "searched for each layer", "mappings": "found by running the model",
    "duo_scaling": "searched for each layer", "n_grid": "searched for each layer",
    "actorder": "columns are taken by falling diag H and stored in their own order",
    "block_size": "no bit depends on it", "sequential_update": "always so", "sequential_targets": "decoder blocks",
    "offload_hessians": "one block is in memory", "offload_device": "one block is in memory",
    "bypass_divisibility_checks": "group sizes are adapted, with a note", "num_calibration_steps": "--samples",
    "max_chunk_memory": "--max-memory", "iters": "--iterations", "batch_size": "chosen by itself",
}  # fmt: skip
_BOOKKEEPING = {"start", "end", "update", "index", "group", "initialized_", "finalized_", "started_", "ended_"}
_RANGES = {"minmax": "absmax", "memoryless_minmax": "absmax", "static_minmax": "absmax", "mse": "mse",
           "memoryless_mse": "mse"}  # fmt: skip


def is_foreign(values: Mapping[Any, Any]) -> bool:
    """True for a recipe of llm-compressor, by its shape."""
    return bool(_modifiers(values))


def of_modifiers(modifiers: Iterable[Any]) -> dict[str, Any]:
    """The same recipe of llm-compressor's own objects."""
    found: dict[str, Any] = {}
    for modifier in modifiers:
        name, dump = type(modifier).__name__, getattr(modifier, "model_dump", None)
        if dump is None or not name.endswith("Modifier"):
            raise UsageError(f"recipe holds a {name}; a file, a mapping of settings or llm-compressor's modifiers are "
                             f"read", "see docs/recipes.md")  # fmt: skip
        found[name] = dump(exclude_unset=True)
    return found


def translated(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The settings of lowbit that a recipe of llm-compressor asks for; UsageError for what the module refuses.

    where  its name, for messages
    """
    settings: dict[str, Any] = {}
    parts, told = [], []
    for name, given in _modifiers(values):
        if name not in _METHODS:
            raise UsageError(f"{where}: {name} has no counterpart here", f"read are {', '.join(_METHODS)}")
        parts.append(_METHODS[name])
        if not isinstance(given, Mapping | None):
            raise UsageError(f"{where}: {name} is {given!r}; a mapping is needed")
        given = {key: value for key, value in (given or {}).items() if value is not None and key not in _BOOKKEEPING}
        for key in given:
            if key in _DECIDED:
                told.append(f"{key} ({_DECIDED[key]})")
            elif key not in _READ:
                raise UsageError(f"{where}: {name}.{key} has no counterpart here", f"read are {', '.join(_READ)}")
        for key, value in _of_modifier(given, f"{where}: {name}").items():
            if settings.setdefault(key, value) != value:
                raise UsageError(f"{where}: two modifiers disagree about {key}: {settings[key]!r} and {value!r}",
                                 "leave one of them out")  # fmt: skip
    settings["method"] = "+".join(filter(None, parts)) or "rtn"
    if told:
        _log.warning("%s: not taken over: %s", where, "; ".join(dict.fromkeys(told)))
    _log.info("%s: read as %s", where, ", ".join(f"{key}: {value}" for key, value in settings.items()))
    return settings


def _modifiers(values: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """(name of a modifier, its settings), at any of the depths that llm-compressor takes."""
    found = []
    for key, value in values.items():
        name = str(key)
        if name.endswith("Modifier"):
            found.append((name, value))
        elif name.endswith(("_stage", "_modifiers")) and isinstance(value, Mapping):
            found += _modifiers(value)
    return found


def _of_modifier(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    groups = [*_preset_groups(given, where), *_config_groups(given, where)]
    sizes = {size for _, _, size in groups if size is not None}
    if len(sizes) > 1:
        raise UsageError(f"{where}: groups of {' and '.join(map(str, sorted(sizes)))}; lowbit has one group size",
                         "make an output for each, or choose one")  # fmt: skip
    settings |= {"group_size": sizes.pop()} if sizes else {}
    for targets, scheme, _ in groups:
        for target in targets:
            if target == "Linear":
                if settings.setdefault("scheme", scheme) != scheme:
                    raise UsageError(f"{where}: two schemes for all linears: {settings['scheme']} and {scheme}")
            else:
                settings.setdefault("overrides", {})[_pattern(target, where)] = scheme
    if groups and "scheme" not in settings:
        raise UsageError(
            f"{where}: quantizes only {', '.join(settings.get('overrides', ())) or 'nothing'}",
            "lowbit quantizes all linears of the decoder blocks: target Linear, and ignore the rest",
        )
    ignored = _listed(given.get("ignore"), f"{where}.ignore")
    settings |= {"ignore": tuple(_pattern(target, where) for target in ignored)} if ignored else {}
    settings |= {"damping": given["dampening_frac"]} if "dampening_frac" in given else {}
    ranges = {_RANGES.get(name) for name in _observers(given)}
    settings |= {"range": ranges.pop()} if len(ranges) == 1 and None not in ranges else {}
    if "kv_cache_scheme" in given:
        cache, is_fp8 = given["kv_cache_scheme"], load("lowbit.checkpoint.compressed_tensors_config:is_fp8_cache")
        if not isinstance(cache, Mapping) or not is_fp8(dict(cache)):
            raise UsageError(f"{where}.kv_cache_scheme is {given['kv_cache_scheme']!r}; static symmetric FP8 is needed")
        per_head = cache.get("strategy") == "attn_head"
        settings["kv_cache"] = "fp8_per_head" if per_head else "fp8"
    return settings


_Grouped = list[tuple[list[str], str, int | None]]  # (targets, scheme, a group size that is not the scheme's)


def _preset_groups(given: Mapping[str, Any], where: str) -> _Grouped:
    """Of `scheme`: a name, or {name: targets}."""
    scheme = given.get("scheme")
    if scheme is None:
        return []
    if isinstance(scheme, Mapping):
        return [(_listed(targets, f"{where}.scheme"), find_scheme(str(name)).name, None)
                for name, targets in scheme.items()]  # fmt: skip
    return [(_listed(given.get("targets"), f"{where}.targets") or ["Linear"], find_scheme(str(scheme)).name, None)]


def _config_groups(given: Mapping[str, Any], where: str) -> _Grouped:
    """Of `config_groups`, as compressed-tensors reads it in config.json."""
    stated = given.get("config_groups")
    if stated is None:
        return []
    groups: Any = stated
    if isinstance(stated, Mapping):  # what a dump spells out as null is absent
        groups = {name: {key: value for key, value in group.items() if value is not None}
                  if isinstance(group, Mapping) else group for name, group in stated.items()}  # fmt: skip
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    try:
        parsed = load("lowbit.checkpoint.compressed_tensors_config:parse_quantization_config")(
            {"quantization_config": config})  # fmt: skip
    except LowbitError as error:
        raise UsageError(str(error).replace("config.json: quantization_config", where),
                         "correct the recipe, or name a scheme") from error  # fmt: skip
    found: _Grouped = []
    for group in parsed.groups:
        scheme: Scheme = group.scheme
        if scheme.name not in SCHEMES or SCHEMES[scheme.name].activation != scheme.activation:
            raise UsageError(f"{where}: group {group.name} is no scheme of lowbit ({scheme.name}: {scheme.weight})",
                             f"schemes: {', '.join(SCHEMES)}")  # fmt: skip
        own, size = SCHEMES[scheme.name].weight.group_size, scheme.weight.group_size
        found.append((list(group.targets), scheme.name, None if own == size else -1 if size is None else size))
    return found


def _observers(given: Mapping[str, Any]) -> set[str]:
    """The observers that groups name for weights."""
    groups = given.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, Mapping)]
    return {str(args["observer"]) for args in weights if isinstance(args, Mapping) and args.get("observer")}


def _listed(value: Any, where: str) -> list[str]:
    value = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple | set) else value
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UsageError(f"{where} is {value!r}; names and re: patterns are needed")
    return value


def _pattern(target: str, where: str) -> str:
    """lowbit's pattern of a target: `re:` stays, a name is matched whole."""
    if target.startswith("re:"):
        return target
    if target[:1].isupper():
        raise UsageError(f"{where}: {target!r} is the name of a class; lowbit goes by names of modules",
                         "write a pattern, such as 're:.*self_attn'; `lowbit inspect` lists the names")  # fmt: skip
    return f"^{re.escape(target)}$"
