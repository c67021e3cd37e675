"""Rules on what an engine has a loader or a kernel for, as tables. A checkpoint that fails them is sound."""

from __future__ import annotations

from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.tensors import Granularity
from lowbit.verification.result import PLAIN, Finding
from lowbit.verification.subject import Subject

_CT = "compressed-tensors"

# engine → format → why it cannot load it; a format that is not named here has a loader.
NO_LOADER: dict[str, dict[str, str]] = {
    "vllm": {
        "bitsandbytes": "vLLM 0.32 has no bitsandbytes loader of its own; the package vllm-bnb-plugin adds one",
        "hqq": "vLLM 0.32 has no HQQ loader",
    },
    "sglang": {
        "hqq": "SGLang has no HQQ loader",
        "torchao": "SGLang quantizes with torchao while it loads, but reads no torchao checkpoint",
    },
    "transformers": {
        "modelopt": "transformers 5 does not know quant_method 'modelopt': it warns, skips the quantization, and loads "
                    "the codes as if they were weights",
    },
    "tensorrt-llm": {
        "gptq": "TensorRT-LLM's PyTorch backend passes over quant_method 'gptq'",
        "awq": "TensorRT-LLM's PyTorch backend passes over quant_method 'awq'; its AWQ is ModelOpt's W4A16_AWQ",
        "bitsandbytes": "TensorRT-LLM's PyTorch backend passes over quant_method 'bitsandbytes'",
        "torchao": "TensorRT-LLM's PyTorch backend passes over quant_method 'torchao'",
        "hqq": "TensorRT-LLM's PyTorch backend passes over quant_method 'hqq'",
    },
}  # fmt: skip

# (engine, model_type) → (storage formats it concerns, none for all; key of config.json that must be true, if any;
# why the engine's class of the model fails). Found by loading tiny models: benchmarks/interop/vllm_architectures.py.
_REFUSED_MODELS: dict[tuple[str, str], tuple[tuple[str, ...], str | None, str]] = {
    ("vllm", "bloom"): (
        ("pack-quantized", "gptq", "awq", "nvfp4-pack-quantized", "mxfp4-pack-quantized"), None,
        "vLLM's BLOOM puts the rows of query_key_value in another order while it loads them, and cannot do that in "
        "packed tensors; schemes of one code a byte load (W8A8, FP8_DYNAMIC)",
    ),
    ("vllm", "gpt_oss"): (
        ("gptq",), None,
        "vLLM's gpt-oss renames self_attn, but not in modules_in_block_to_quantize, and takes its attention for floats",
    ),
    ("vllm", "stablelm"): ((), "qk_layernorm", "vLLM's StableLM has no layer norms of queries and keys"),
}  # fmt: skip

# (engine, format) → model dtypes that its kernels refuse: get_supported_act_dtypes of each quantization config
_REFUSED_DTYPES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm", "gptq"): ("float32",), ("vllm", "awq"): ("float32",), ("vllm", "fp8"): ("float32",),
    ("vllm", "modelopt"): ("float32",), ("vllm", "mxfp4"): ("float32", "float16"),
    ("sglang", "gptq"): ("float32",), ("sglang", "awq"): ("float32",), ("sglang", "fp8"): ("float32",),
    ("sglang", "modelopt"): ("float32",), ("sglang", "mxfp4"): ("float32",),
}  # fmt: skip


def check_loader(subject: Subject) -> Finding:
    """The engine has a loader for the format."""
    reason = NO_LOADER[subject.engine].get(subject.format)
    for_gpt_oss = subject.config.get("model_type") == "gpt_oss"
    if reason is None and subject.format == "mxfp4" and subject.engine == "vllm" and not for_gpt_oss:
        reason = "vLLM 0.32 takes quant_method 'mxfp4' for gpt-oss only"
    return Finding([] if reason is None else [reason], f"{subject.engine} loads {subject.format}")


def check_model(subject: Subject) -> Finding:
    """The engine's class of this model takes what the files hold; of the cases that were found by loading them."""
    model_type = str(subject.config.get("model_type"))
    formats, key, reason = _REFUSED_MODELS.get((subject.engine, model_type), ((), "", ""))
    stored_as = {str(group.format) for group in subject.parsed.groups} if subject.format == _CT else {subject.format}
    applies = bool(reason) and (not formats or bool(stored_as & set(formats)))
    if key is not None:
        applies = applies and bool(subject.config.get(key))
    return Finding([reason] if applies else [], f"nothing is known against {model_type}")


def check_dtype(subject: Subject) -> Finding:
    """config.json's dtype is one that the kernels compute in."""
    stated = str(subject.stated_dtype or "bfloat16").removeprefix("torch.")
    refused = _REFUSED_DTYPES.get((subject.engine, subject.format), ())
    floats = [name for name, group in subject.groups.items() if group.scheme.weight.number != "int"]
    where = floats[0] if floats else subject.format
    if subject.format != PLAIN and (stated in refused or (floats and stated == "float32")):
        needed = "bfloat16" if "float16" in refused else "bfloat16 or float16"
        return Finding([f"config.json says dtype {stated}, which the kernels refuse ({where}); {needed} is needed"], "")
    return Finding([], stated)


def check_sglang_groups(subject: Subject) -> Finding:
    """SGLang has a scheme for every group of config_groups."""
    problems = []
    for group in subject.parsed.groups:
        problem = _sglang_problem(group)
        if problem:
            problems.append(f"config_groups.{group.name}: {problem}")
    return Finding(problems, f"a scheme exists for {', '.join(group.scheme.name for group in subject.parsed.groups)}")


def _sglang_problem(group: Group) -> str | None:
    weight, activation = group.scheme.weight, group.scheme.activation
    by_row = weight.granularity in (Granularity.TENSOR, Granularity.CHANNEL)
    if weight.number == "int" and activation is None:
        if group.format != "pack-quantized" or weight.bits not in (4, 8):
            return f"{weight.bits}-bit integers stored as {group.format}; SGLang takes pack-quantized of 4 and 8 bits"
        if weight.group_size is not None and weight.group_size not in (32, 64, 128):
            return f"group size {weight.group_size}; kernels take 32, 64, 128 or one per row"
        return None
    if weight.number == "int":
        int8 = activation is not None and (activation.number, activation.bits) == ("int", 8)
        fits = int8 and activation is not None and activation.per in ("token", "tensor")
        if fits and weight.bits == 8 and by_row and weight.symmetric:
            return None
        return f"no scheme for {weight.bits}-bit integers with these activations; W8A8 has one"
    if weight.number == "e4m3":
        if weight.scale_format == "e8m0":
            return "SGLang reads MXFP8 as quant_method 'mxfp8', not as compressed-tensors"
        if activation is None:
            return None if by_row else "weight-only FP8 takes scales per tensor or row"
        fits = by_row or weight.granularity is Granularity.BLOCK
        return (
            None
            if fits and activation.number == "e4m3"
            else "FP8 weights take FP8 activations, per tensor, row or block"
        )
    if weight.two_level and weight.group_size == 16:
        return None
    return "FP4 outside of experts is NVFP4 in groups of 16 only"


_TENSORRT_TAKES = (
    "TensorRT-LLM takes FP8 per row with dynamic activations, FP8 blocks of 128, NVFP4 with activations, MXFP4 weights"
)


def check_tensorrt_groups(subject: Subject) -> Finding:
    """TensorRT-LLM has an algorithm for every group of config_groups, and can tell whose it is."""
    groups = subject.parsed.groups
    problems = []
    for group in groups:
        if not _tensorrt_takes(group):
            problems.append(f"config_groups.{group.name}: {group.scheme.name} ({group.format}); {_TENSORRT_TAKES}")
        classes = [target for target in group.targets if "." not in target and not target.startswith("re:")]
        if len(groups) > 1 and classes and classes != ["lm_head"]:
            problems.append(f"config_groups.{group.name}.targets has the class {classes[0]!r}; with several groups "
                            f"TensorRT-LLM matches names and regexes only")  # fmt: skip
    return Finding(problems, ", ".join(group.scheme.name for group in groups))


def _tensorrt_takes(group: Group) -> bool:
    weight, activation = group.scheme.weight, group.scheme.activation
    if weight.number == "e2m1" and weight.scale_format == "e8m0":
        return weight.group_size == 32
    if activation is None:
        return False
    if weight.number == "e4m3" and weight.scale_format == "model":
        if weight.granularity is Granularity.CHANNEL:
            return activation.per == "token"
        return weight.granularity is Granularity.BLOCK and activation.per == "group" and activation.group_size == 128
    return weight.number == "e2m1" and weight.two_level and weight.group_size == 16 and activation.per == "group"


def check_turned_weights(subject: Subject) -> Finding:
    """GPT-2: codes do not lie under `.weight`, which the engine takes for the transpose that 16-bit files hold."""
    turned = [
        linear.name
        for linear in subject.decoder
        if linear.transposed and linear.name in subject.schemes and f"{linear.name}.weight" in subject.stored.tensors
    ]
    problem = (
        f"{turned[0]}.weight holds codes [out, in], but {subject.engine} turns every .weight of this model round"
        if turned
        else ""
    )
    return Finding([problem] if problem else [], "no weight is turned round")
