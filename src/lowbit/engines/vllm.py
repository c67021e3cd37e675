"""vLLM 0.32: paths are below vllm/model_executor/layers/quantization unless they begin otherwise.

`check_limits` follows `_get_scheme_from_parts` of compressed_tensors.py: which combinations of weight, activation and
storage format have a scheme. Limits of the card (FP8 needs compute capability 8.9, NVFP4 activations 10.0) are in
`_SUPPORT`: the same files run on other cards.

How it matches unquantized layers, for a unit of linears that it builds as one:

    awq        by a substring of a member's name; all members or none; without a list, by the tensors in the files
    gptq       by the tensors in the files, as substrings; all members or none; `dynamic` against the fused name
    modelopt   by a member's name (all or none), a substring of the fused name, or fnmatch on it
    fp8        by a member's name (all or none), or the fused one
"""

from __future__ import annotations

from fnmatch import fnmatch

import torch

from lowbit.checkpoint.compressed_tensors_config import Group, is_fp8_cache
from lowbit.engines import engine as e
from lowbit.engines.engine import GIB, Engine, MemoryModel, Support
from lowbit.engines.servers import FP8_SCHEMES, INT4, MARLIN_BATCH, SERVER_RULES
from lowbit.formats.gptq import rules as gptq
from lowbit.formats.modelopt import rules as modelopt
from lowbit.numerics.hadamard import LARGEST_SYLVESTER
from lowbit.tensors import Granularity
from lowbit.verification import left_out
from lowbit.verification.layers import FUSING, GPT_OSS
from lowbit.verification.left_out import EngineUnit
from lowbit.verification.result import QUANTIZED, Finding, Loading, Rule
from lowbit.verification.subject import Subject

_CT = "compressed-tensors"
# Of the kernels for 4- and 8-bit integer weights (Marlin, Machete); wider support exists on some devices only.
_KERNEL_GROUP_SIZES = (32, 64, 128)
# model type → (storage formats it concerns, none for all; key of config.json that must be true, if any; why vLLM's
# class of the model fails). Found by loading tiny models: benchmarks/interop/vllm_architectures.py.
_REFUSED_MODELS: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "bloom": (
        ("pack-quantized", "gptq", "awq", "nvfp4-pack-quantized", "mxfp4-pack-quantized"), None,
        "vLLM's BLOOM puts the rows of query_key_value in another order while it loads them, and cannot do that in "
        "packed tensors; schemes of one code a byte load (W8A8, FP8_DYNAMIC)",
    ),
    "gpt_oss": (
        ("gptq",), None,
        "vLLM's gpt-oss renames self_attn, but not in modules_in_block_to_quantize, and takes its attention for floats",
    ),
    "stablelm": ((), "qk_layernorm", "vLLM's StableLM has no layer norms of queries and keys"),
}  # fmt: skip


def check_limits(subject: Subject) -> Finding:
    """A kernel exists for every group: bits, group size, activations, format and shapes."""
    problems = []
    for group in subject.parsed.groups:
        problem = _scheme_problem(group)
        if problem:
            problems.append(f"config_groups.{group.name}: {problem}")
    problems += _fp8_over_int4_problems(subject)
    return Finding(problems, f"a kernel exists for {', '.join(g.scheme.name for g in subject.parsed.groups)}")


def _scheme_problem(group: Group) -> str | None:
    weight, activation, stored = group.scheme.weight, group.scheme.activation, group.format
    if weight.number == "e2m1" and weight.two_level:
        fits = activation is None or (activation.number == "e2m1" and activation.scale_format == "e4m3")
        if weight.group_size != 16 or not fits:
            return "NVFP4 needs groups of 16, and NVFP4 activations or none"
        return None
    if weight.scale_format == "e8m0":
        return None if weight.group_size == 32 else f"MX formats have groups of 32, not {weight.group_size}"
    if weight.number == "e4m3":
        return _fp8_problem(group)
    if stored == "pack-quantized":
        return _packed_problem(group)
    return _int_problem(group)


def _fp8_problem(group: Group) -> str | None:
    weight, activation = group.scheme.weight, group.scheme.activation
    if weight.granularity is Granularity.GROUP:
        return "FP8 weights take scales per tensor, row or block, not per group"
    if weight.granularity is Granularity.BLOCK and weight.group_size != 128:
        return f"FP8 blocks are 128 × 128, not {weight.group_size}"
    if activation is None or activation.dynamic is True:
        return None
    if activation.number != "e4m3" or activation.per != "tensor" or not activation.symmetric:
        return "static FP8 activations take one symmetric scale per tensor"
    return "FP8 blocks take dynamic activations only" if weight.granularity is Granularity.BLOCK else None


def _packed_problem(group: Group) -> str | None:
    weight, activation = group.scheme.weight, group.scheme.activation
    if weight.granularity not in (Granularity.GROUP, Granularity.CHANNEL):
        return f"pack-quantized takes scales per group or row, not per {weight.granularity.value}"
    if activation is not None:
        if activation.number == "int" and activation.bits < 8:
            return f"no kernel has {activation.bits}-bit integer activations"
        fp8 = activation.number == "e4m3" and activation.per == "token" and activation.dynamic is True
        if not (fp8 and weight.bits == 4 and weight.group_size == 128 and weight.symmetric):
            return "of packed codes only 4-bit symmetric ones in groups of 128 take activations (FP8 per token)"
        return None
    if weight.group_size is not None and weight.group_size not in _KERNEL_GROUP_SIZES:
        return f"group size {weight.group_size}; kernels take {', '.join(map(str, _KERNEL_GROUP_SIZES))} or one per row"
    return None


def _int_problem(group: Group) -> str | None:
    """int-quantized: 8 bits with a scale per tensor or row, or 4 bits with one per group or row; int8 activations."""
    weight, activation = group.scheme.weight, group.scheme.activation
    if not weight.symmetric:
        return "unpacked integer weights must be symmetric"
    if activation is None:
        return "int-quantized needs input_activations; weight-only integers are stored as pack-quantized"
    if activation.number != "int" or activation.bits != 8:
        return (f"int-quantized takes 8-bit integer activations, not {activation.number}; with FP8 activations 4-bit "
                f"integers are stored as pack-quantized")  # fmt: skip
    if weight.bits == 8 and weight.granularity in (Granularity.TENSOR, Granularity.CHANNEL):
        fits = (activation.per, activation.dynamic) in (("token", True), ("tensor", False))
        return None if fits else "8-bit activations are per token and dynamic, or per tensor and static"
    if weight.bits == 4 and weight.granularity in (Granularity.GROUP, Granularity.CHANNEL):
        fits = (activation.per, activation.dynamic) == ("token", True)
        return None if fits else "over 4-bit weights, 8-bit activations are per token and dynamic"
    return f"no kernel for {weight.bits}-bit integers with a scale per {weight.granularity.value} and 8-bit activations"


def _fp8_over_int4_problems(subject: Subject) -> list[str]:
    """The kernel of FP8 activations over 4-bit integers (CUTLASS, Hopper) takes multiples of 128 and bfloat16."""
    problems = []
    for name, group in subject.groups.items():
        activation = group.scheme.activation
        if group.scheme.weight.number != "int" or activation is None or activation.number != "e4m3":
            continue
        rows, columns = subject.architecture.linears[name].shape
        if rows % 128 or columns % 128:
            problems.append(f"{name} is {rows} × {columns}; FP8 activations over integers need multiples of 128")
        if subject.dtype is not torch.bfloat16:
            problems.append(f"{name}: FP8 activations over integers need a bfloat16 model, not {subject.dtype}")
    return problems


def check_transforms(subject: Subject) -> Finding:
    """vLLM's linear methods apply every rotation of an input: its kernel takes Sylvester's matrices of up to 32768, and
    linears without bias; fused experts have no transforms. Attention has none either, which changes no score."""
    transforms, problems, rotated = subject.transforms, [], 0
    for name in subject.stored_linears:
        linear, transform = subject.architecture.linears[name], transforms.of(name)
        if transform is None:
            continue
        rotated += 1
        size = transform.head_dim or linear.shape[1]
        if linear.expert is not None:
            problems.append(f"{name} is an expert: FusedMoE applies no transform, and misreads the rotated weight")
        elif linear.has_bias:
            problems.append(f"{name} has a bias: a rotated linear of vLLM asserts that there is none")
        elif transform.kind == "hadamard" and size > LARGEST_SYLVESTER:
            problems.append(f"{name}: a rotation of {size} columns; the kernel takes up to {LARGEST_SYLVESTER}")
    for fused, members in subject.architecture.fused_sets.items():
        if len({transforms.of(member) for member in members}) > 1:
            problems.append(f"{fused}: its members read one input, and only some have it rotated")
    said = f"{rotated} inputs rotated by its kernel, on CUDA, without tensor parallelism" if rotated else "none"
    return Finding(problems, said)


def check_model(subject: Subject) -> Finding:
    """vLLM's class of this model loads the files; about cases found by loading tiny models."""
    model_type = str(subject.config.get("model_type"))
    formats, key, reason = _REFUSED_MODELS.get(model_type, ((), None, ""))
    stored_as = {str(group.format) for group in subject.parsed.groups} if subject.format == _CT else {subject.format}
    applies = bool(reason) and (not formats or bool(stored_as & set(formats)))
    if key is not None:
        applies = applies and bool(subject.config.get(key))
    return Finding([reason] if applies else [], f"nothing is known against {model_type}")


def check_left_experts(subject: Subject) -> Finding:
    """Experts that lie in one 16-bit tensor are left out by config.json too, under the names that vLLM asks for.

    It asks for the first expert's projections, after its model class has renamed what it knows (gpt-oss: down_proj to
    w2_weight, in names but not in regexes).
    """
    containers = subject.architecture.expert_containers
    problems = []
    for container in containers:
        asked = [f"{container}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj", "w2_weight")]
        taken = [name for name in asked if subject.parsed.group_of(name) is not None]
        if taken:
            problems.append(f"{container}: its experts lie in one 16-bit tensor, but config.json quantizes {taken[0]}; "
                            f"`ignore` needs a regex for them")  # fmt: skip
    return Finding(problems, f"{len(containers)} containers left out" if containers else "none lie in one tensor")


def check_cache_scheme(subject: Subject) -> Finding:
    """A KV-cache scheme is FP8, symmetric, static, one scale per tensor or head."""
    stated = subject.parsed.kv_cache
    if stated is None:
        return Finding([], "not quantized")
    problem = f"quantization_config.kv_cache_scheme is {stated!r}; vLLM takes 8-bit float, tensor or attn_head"
    return Finding([] if is_fp8_cache(stated) else [problem], f"FP8, {stated.get('strategy')}")


def _leaves_out_awq(subject: Subject, unit: EngineUnit) -> bool | None:
    if left_out.head_flag(subject, unit):
        return True
    listed = left_out.left_out_list(subject) or subject.plain_modules
    if unit.experts or any(part in unit.name for part in listed):
        return any(part in unit.name for part in listed)
    return left_out.by_members(unit, lambda name: any(part in name for part in listed))


def _leaves_out_gptq(subject: Subject, unit: EngineUnit) -> bool | None:
    if left_out.head_flag(subject, unit):
        return True
    if unit.experts or left_out.leaves_alone(subject, unit.name):
        return left_out.leaves_alone(subject, unit.name)
    listed = left_out.flat(subject.quantization.get("modules_in_block_to_quantize") or []) or subject.linears_in_files
    if len(unit.members) == 1:
        return not any(part in unit.name for part in listed)
    return left_out.by_members(unit, lambda name: not any(part in name for part in listed))


def _leaves_out_modelopt(subject: Subject, unit: EngineUnit) -> bool | None:
    layers = left_out.modelopt_layers(subject)
    if layers:
        return left_out.by_members(unit, lambda name: name not in layers)
    listed = left_out.left_out_list(subject)
    if unit.experts:
        exact: bool | None = any(unit.name in entry for entry in listed if "experts" in entry)
    else:
        exact = unit.name in listed or left_out.by_members(unit, lambda name: name in listed)
    if exact is not False:
        return exact
    return any(entry in unit.name or fnmatch(unit.name, entry) for entry in listed)


def _leaves_out_fp8(subject: Subject, unit: EngineUnit) -> bool | None:
    if left_out.is_head(subject, unit):
        return True  # fp8 quantizes no output layer
    listed = left_out.left_out_list(subject)
    if unit.experts:
        return any(unit.name in entry for entry in listed if "experts" in entry)
    return unit.name in listed or left_out.by_members(unit, lambda name: name in listed)


_LOADING = Loading(
    cache_scales={_CT: ("fp8", "fp8_per_head"), "modelopt": ("fp8", "nvfp4"), "fp8": ("fp8",)},
    rules=(
        *SERVER_RULES,
        *FUSING,
        GPT_OSS,
        modelopt.ALGORITHM,
        gptq.COLUMN_ORDER,
        Rule("kv-cache", "format", (_CT,), "a KV-cache scheme is one that vLLM knows", check_cache_scheme,
             "CompressedTensorsKVCacheMethod.validate_kv_cache_scheme (vLLM)"),
        Rule("engine-limits", "limits", (_CT,), "kernels exist for bits, group sizes and formats", check_limits,
             "_get_scheme_from_parts of compressed_tensors.py (vLLM)", limit=True),
        Rule("engine-transforms", "limits", (_CT,), "every online rotation is one that the engine applies",
             check_transforms, "transform/linear.py, transform/module.py, get_quant_method of compressed_tensors.py",
             limit=True),
        Rule("engine-model", "limits", QUANTIZED, "the engine's class of the model takes this format", check_model,
             "load_weights of models/bloom.py, models/gpt_oss.py, models/stablelm.py", limit=True),
        Rule("left-experts", "limits", (_CT,), "experts in one 16-bit tensor are in `ignore`, by regex",
             check_left_experts, "get_moe_method of compressed_tensors_moe.py"),
    ),
    no_loader={
        "bitsandbytes": "vLLM 0.32 has no bitsandbytes loader of its own; the package vllm-bnb-plugin adds one",
        "hqq": "vLLM 0.32 has no HQQ loader",
        "bitnet": "vLLM 0.32 has no loader for quant_method 'bitnet'",
        "codebook": "vLLM has no loader for lowbit's codebook folders",
    },
    gpt_oss_only={"mxfp4": "vLLM 0.32 takes quant_method 'mxfp4' for gpt-oss only"},
    dtypes_refused={
        "gptq": ("float32",), "awq": ("float32",), "fp8": ("float32",), "modelopt": ("float32",),
        "mxfp4": ("float32", "float16"),
    },
    leaves_out={
        "awq": _leaves_out_awq, "gptq": _leaves_out_gptq, "modelopt": _leaves_out_modelopt, "fp8": _leaves_out_fp8,
    },
    quant_algos=("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"),
)  # fmt: skip

_EXECUTOR = "vllm/model_executor/"
_WNA16 = f"{_EXECUTOR}layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py; Marlin, Machete"
_FP8_DOCS = "docs.vllm.ai, FP8 W8A8: native from compute capability 8.9, weight-only (Marlin) from 7.5"
_NVFP4_KERNELS = f"{_EXECUTOR}kernels/linear/nvfp4: CUTLASS and FlashInfer from sm_100, Marlin decodes elsewhere"
_SUPPORT = (
    Support(INT4, "16", _CT, f"{_WNA16}, get_min_capability 75", least=e.TURING, small_batch=MARLIN_BATCH,
            method="gptq"),
    Support(("W8A16",), "16", _CT, f"{_WNA16}, get_min_capability 75", least=e.TURING,
            small_batch=MARLIN_BATCH),
    Support(("W8A8",), "int8", _CT,
            "compressed_tensors_w8a8_int8.py, get_min_capability 75; docs.vllm.ai, INT8 W8A8: not on Blackwell",
            least=e.TURING, most=e.BELOW_BLACKWELL, method="smoothquant"),
    Support(FP8_SCHEMES, "fp8", _CT, f"compressed_tensors_w8a8_fp8.py, get_min_capability 89; {_FP8_DOCS}",
            least=e.ADA),
    Support(FP8_SCHEMES, "16", _CT, f"compressed_tensors_w8a16_fp8.py, get_min_capability 75; {_FP8_DOCS}",
            least=e.TURING, most=e.BELOW_ADA, small_batch=MARLIN_BATCH, fallback=True),
    Support(("W4AFP8",), "fp8", _CT, "compressed_tensors_w4a8_fp8.py, 90; kernels/linear/mixed_precision/"
            "cutlass.py takes capability 90 alone", least=e.HOPPER, most=e.BELOW_BLACKWELL, converts=True,
            method="gptq"),
    Support(("NVFP4",), "fp4", _CT, _NVFP4_KERNELS, least=e.BLACKWELL, method="gptq"),
    Support(("NVFP4",), "16", _CT, _NVFP4_KERNELS, least=e.TURING, most=e.BELOW_BLACKWELL,
            small_batch=MARLIN_BATCH, fallback=True, method="gptq"),
    Support(("NVFP4A16",), "16", _CT, _NVFP4_KERNELS, least=e.TURING, small_batch=MARLIN_BATCH, fallback=True,
            method="gptq"),
    Support(("MXFP4",), "fp4", _CT, f"{_EXECUTOR}kernels/linear/mxfp4/flashinfer.py: from sm_100", least=e.BLACKWELL,
            method="gptq"),
    Support(("MXFP4",), "16", _CT, "compressed_tensors_w4a4_mxfp4.py, get_min_capability 80; Marlin",
            least=e.AMPERE, most=e.BELOW_BLACKWELL, small_batch=MARLIN_BATCH, fallback=True, method="gptq"),
    Support(("MXFP4A16",), "16", _CT, "compressed_tensors_w4a4_mxfp4.py, get_min_capability 80; Marlin",
            least=e.AMPERE, small_batch=MARLIN_BATCH, fallback=True, method="gptq"),
    Support(("MXFP8",), "fp8", _CT, f"{_EXECUTOR}kernels/linear/mxfp8/flashinfer.py: from sm_100", least=e.BLACKWELL),
    Support(("MXFP8",), "16", _CT, "compressed_tensors_w8a8_mxfp8.py, get_min_capability 75; Marlin",
            least=e.TURING, most=e.BELOW_BLACKWELL, small_batch=MARLIN_BATCH, fallback=True),
    Support(INT4, "16", _CT, f"{_EXECUTOR}kernels/linear/__init__.py: Triton, Conch and ExLlama on ROCm",
            kinds=("rocm",), small_batch=8, method="gptq"),
    Support(("W8A8",), "int8", _CT, f"{_EXECUTOR}kernels/linear/__init__.py: AITER and Triton on ROCm",
            kinds=("rocm",), method="smoothquant"),
    Support(FP8_SCHEMES, "fp8", _CT, f"{_EXECUTOR}kernels/linear/__init__.py: AITER and torch on ROCm",
            kinds=("rocm",)),
    Support(INT4, "16", _CT, f"{_EXECUTOR}kernels/linear/mixed_precision/cpu.py: 4 bits only", kinds=("cpu",),
            small_batch=4, method="gptq"),
    Support(("W8A8",), "int8", _CT, f"{_EXECUTOR}kernels/linear/scaled_mm/cpu.py", kinds=("cpu",),
            method="smoothquant"),
    Support(("FP8_DYNAMIC",), "16", _CT, f"{_EXECUTOR}kernels/linear/__init__.py: CPU FP8 kernels", kinds=("cpu",),
            small_batch=4, fallback=True),)  # fmt: skip

_MEMORY = MemoryModel(
    prefill=((160 * GIB, 16384), (70 * GIB, 8192), (0, 2048)), logit_rows=256, logit_bytes=16,
    framework=1 * GIB, share=0.92, share_name="gpu_memory_utilization",
    cache_types=("auto", "f16", "bf16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_head", "fp8_per_token_head",
                 "int8_per_token_head", "int4_per_token_head", "nvfp4"),
    assumptions=(
        "activations: a pass of max_num_batched_tokens (2048, 8192 from 70 GiB, 16384 from 160 GiB of device memory; "
        "the defaults of vLLM 0.32's server) and logits of 256 sequences, 16 bytes each with the sampler's copies; "
        "that is 1.27 GiB for Llama-3-8B, and vLLM logged 1.26 (its pull request 10511)",
        "framework: 1 GiB for the CUDA context, libraries and CUDA graphs; logs of single cards have 0.2 to 1.8 GiB of "
        "non-torch memory and 0.1 to 0.6 GiB of graphs",
        "KV cache: in blocks of 16 tokens; a sliding layer keeps its window and two passes in flight "
        "(SlidingWindowSpec of vLLM 0.32); MLA keeps the latent",
    ),
    token_block=16, slack_passes=2, fp8_below_ada=(64, 128, 256),
    fp8_below_ada_source="docs/design/attention_backends.md of vLLM: only FLASHINFER reads it there",
    fp8_on_cpu="vLLM's CPU backend cuts the bits of FP8 values off (csrc/cpu/cpu_attn_fp8.hpp), which costs three to "
               "five times the loss of rounding them",
)  # fmt: skip

ENGINE = Engine(
    "vllm", "vLLM", ("cuda", "rocm", "cpu"), _SUPPORT, _MEMORY, _LOADING,
    serve="vllm serve {output}", serve_load=" --max-model-len {context}",
    serve_cache=" --kv-cache-dtype {keys}", serve_skip=" --kv-cache-dtype-skip-layers {layers}",
    serve_ranks=" --tensor-parallel-size {ranks}", sharing="tensor", batch=8, suits="servers",
)  # fmt: skip
