"""Rules on ModelOpt folders: vLLM 0.32 modelopt.py, SGLang 0.5 modelopt_quant.py, TensorRT-LLM's modelopt_config.py.

The quantization is stated twice: in config.json, which vLLM and SGLang read, and in hf_quant_config.json, which
TensorRT-LLM treats as authoritative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint.base import read_json_object
from lowbit.schemes import Scheme
from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject

FILE = "hf_quant_config.json"
_NVFP4_KEYS = ("group_size", "kv_cache_quant_algo", "exclude_modules")


@dataclass(frozen=True)
class Stated:
    """The same facts of either file."""

    algorithm: str
    group_size: Any
    kv_cache: str | None
    left_out: frozenset[str]


def _stated(raw: dict[str, Any]) -> Stated:
    """Of the nested form (hf_quant_config.json) or the flat one (config.json), as vLLM's `from_config` tells them."""
    nested = raw.get("quantization")
    if isinstance(nested, dict):
        algorithm, group_size = nested.get("quant_algo"), nested.get("group_size")
        kv_cache, left_out = nested.get("kv_cache_quant_algo"), nested.get("exclude_modules")
    else:
        algorithm, left_out, group_size = raw.get("quant_algo"), raw.get("ignore"), _group_size(raw)
        scheme = raw.get("kv_cache_scheme")
        is_fp8 = isinstance(scheme, dict) and scheme.get("type") == "float" and scheme.get("num_bits") == 8
        named = scheme if isinstance(scheme, str) else raw.get("kv_cache_quant_algo")
        kv_cache = "FP8" if is_fp8 else named
    names = frozenset(map(str, left_out)) if isinstance(left_out, list) else frozenset()
    return Stated(str(algorithm or "").upper(), group_size, kv_cache, names)


def _group_size(raw: dict[str, Any]) -> Any:
    """Of config.json: at the top, or that of the weights of the only group."""
    groups = raw.get("config_groups")
    if raw.get("group_size") is not None or not isinstance(groups, dict) or len(groups) != 1:
        return raw.get("group_size")
    first = next(iter(groups.values()))
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights.get("group_size") if isinstance(weights, dict) else None


def check_file(subject: Subject) -> Finding:
    """hf_quant_config.json has producer, quant_algo, and for NVFP4 the keys that vLLM insists on; earlier
    releases of TensorRT-LLM read nothing else."""
    path = subject.folder / FILE
    if not path.is_file():
        problem = f"there is no {FILE}, the only place where earlier releases of TensorRT-LLM look"
        return Finding([problem] if subject.engine == "tensorrt-llm" else [], "there is none; config.json is enough")
    raw = read_json_object(path)
    nested = raw.get("quantization")
    if not isinstance(nested, dict):
        return Finding([f"{FILE} has no mapping 'quantization'"], "")
    algorithm = _stated(raw).algorithm
    problems = [] if algorithm else [f"{FILE}: quantization.quant_algo is absent"]
    if "NVFP4" in algorithm:
        problems += [
            f"{FILE}: quantization.{key} is absent; NVFP4 needs it" for key in _NVFP4_KEYS if key not in nested
        ]
    producer = raw.get("producer")
    if not isinstance(producer, dict) or producer.get("name") != "modelopt":
        problems.append(f"{FILE}: producer.name is not 'modelopt', by which loaders know the format")
    return Finding(problems, algorithm)


def check_agreement(subject: Subject) -> Finding:
    """hf_quant_config.json and config.json say the same: engines differ in which of them they read."""
    path, inline = subject.folder / FILE, subject.config.get("quantization_config")
    if not path.is_file() or not isinstance(inline, dict):
        return Finding([], "the quantization is stated in one place only")
    file, config = _stated(read_json_object(path)), _stated(inline)
    problems = []
    for key in ("algorithm", "kv_cache"):
        if getattr(file, key) != getattr(config, key):
            problems.append(f"{key} is {getattr(file, key)!r} in {FILE}, {getattr(config, key)!r} in config.json")
    if config.group_size is not None and file.group_size is not None and file.group_size != config.group_size:
        problems.append(f"group_size is {file.group_size!r} in {FILE}, {config.group_size!r} in config.json")
    only = sorted(file.left_out ^ config.left_out)
    if only:
        where = FILE if only[0] in file.left_out else "config.json"
        problems.append(f"{only[0]} is left unquantized in {where} only")
    return Finding(problems, "hf_quant_config.json and config.json agree")


def check_algorithm(subject: Subject) -> Finding:
    """The engine knows quant_algo, and those of `quantized_layers`."""
    known = subject.loading.quant_algos
    stated = _stated(subject.quantization).algorithm
    problems = (
        [] if stated in known else [f"quant_algo is {stated or None!r}; {subject.engine} knows {', '.join(known)}"]
    )
    inner = subject.quantization.get("quantization")
    layers = subject.quantization.get("quantized_layers") or (inner if isinstance(inner, dict) else {}).get(
        "quantized_layers"
    )
    for name, layer in (layers if isinstance(layers, dict) else {}).items():
        algorithm = str(layer.get("quant_algo") if isinstance(layer, dict) else layer).upper()
        if algorithm not in known:
            problems.append(f"quantized_layers: {name} is {algorithm}; {subject.engine} knows {', '.join(known)}")
    return Finding(problems, stated)


def check_scales_present(subject: Subject) -> Finding:
    """Every scale of the algorithm is present: parameters that are not loaded stay NaN, or uninitialised."""
    problems = []
    for name, scheme in subject.schemes.items():
        for leaf in _scales_of(scheme):
            scale = f"{name}.{leaf}"
            if scale not in subject.stored.tensors:
                problems.append(f"{scale} is absent; {scheme.name} needs it")
    return Finding(problems, f"those of {len(subject.schemes)} linears are there")


def _scales_of(scheme: Scheme) -> tuple[str, ...]:
    second = scheme.weight.two_level or scheme.weight.ranged
    leaves = ("weight_scale", "weight_scale_2") if second else ("weight_scale",)
    static = scheme.activation is not None and scheme.activation.needs_calibration
    return (*leaves, "input_scale") if static else leaves


RULES: tuple[Rule, ...] = (
    Rule("modelopt-file", "format", ("modelopt",), "hf_quant_config.json has the keys that loaders need", check_file,
         "ModelOptNvFp4Config._from_config of modelopt.py (vLLM); load_modelopt_quant_config of "
         "_torch/model_config.py (TensorRT-LLM)"),
    Rule("modelopt-agreement", "format", ("modelopt",), "hf_quant_config.json and config.json agree", check_agreement,
         "warn_if_inline_quant_config_differs of modelopt_config.py (TensorRT-LLM)"),
    Rule("modelopt-scales", "format", ("modelopt",), "every scale that the algorithm calls for is there",
         check_scales_present, "KNvfp4Static.process, KFp8StaticTensor of modelopt.py (vLLM)"),
)  # fmt: skip
# Of engines that name the algorithms they know (`Loading.quant_algos`).
ALGORITHM = Rule(
    "modelopt-algorithm", "limits", ("modelopt",), "the engine knows quant_algo", check_algorithm,
    "LINEAR_ALGOS of modelopt.py (vLLM); from_config of modelopt_quant.py (SGLang); QuantAlgo of "
    "quantization/mode.py, and from documentation (TensorRT-LLM)", limit=True,
)  # fmt: skip
