"""SGLang 0.5.23: paths are below sglang/srt/layers/quantization.

How it matches unquantized layers, for a unit of linears that it builds as one:

    awq              by a substring of the fused name
    gptq             by `dynamic` against the fused name, and nothing else
    modelopt, fp8    by a path within a member's name (all or none); modelopt: by a glob on the fused name too
    bitsandbytes     by a component, or a leading path, of the fused name
"""

from __future__ import annotations

from fnmatch import fnmatch

from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.engines.engine import ADA, AMPERE, BELOW_BLACKWELL, BLACKWELL, GIB, TURING, Engine, MemoryModel, Support
from lowbit.engines.servers import FP8_SCHEMES, INT4, MARLIN_BATCH, MARLIN_GROUP_SIZES, SERVER_RULES
from lowbit.formats.compressed_tensors.rules import NO_TRANSFORMS
from lowbit.formats.modelopt import rules as modelopt
from lowbit.tensors import Granularity
from lowbit.verification import left_out
from lowbit.verification.layers import FUSING, GPT_OSS
from lowbit.verification.left_out import EngineUnit
from lowbit.verification.result import Finding, Loading, Rule
from lowbit.verification.subject import Subject

_CT = "compressed-tensors"
# Marlin takes whole tiles: GPTQ_MARLIN_MIN_THREAD_N rows and GPTQ_MARLIN_MIN_THREAD_K columns of marlin_utils.py.
_MARLIN_ROWS, _MARLIN_COLUMNS = 64, 128


def check_groups(subject: Subject) -> Finding:
    """SGLang has a scheme for every group of config_groups."""
    problems = []
    for group in subject.parsed.groups:
        problem = scheme_problem(group)
        if problem:
            problems.append(f"config_groups.{group.name}: {problem}")
    return Finding(problems, f"a scheme exists for {', '.join(group.scheme.name for group in subject.parsed.groups)}")


def scheme_problem(group: Group) -> str | None:
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
        fits = fits and activation.number == "e4m3"
        return None if fits else "FP8 weights take FP8 activations, per tensor, row or block"
    if weight.two_level and weight.group_size == 16:
        return None
    return "FP4 outside of experts is NVFP4 in groups of 16 only"


def check_awq_kernels(subject: Subject) -> Finding:
    """A kernel exists: Marlin's shapes and groups, or a float16 model for the older kernels."""
    dtype = str(subject.stated_dtype or "bfloat16").removeprefix("torch.")
    problems = []
    for name, scheme in subject.schemes.items():
        linear = subject.architecture.linears[name]
        if linear.expert is not None:
            continue  # experts that Marlin does not take go to the WNA16 kernels
        members = subject.architecture.fused_sets.get(linear.fused or "", (name,))
        rows = sum(subject.architecture.linears[member].shape[0] for member in members)
        group = -1 if scheme.weight.group_size is None else scheme.weight.group_size
        fits = group in MARLIN_GROUP_SIZES and rows % _MARLIN_ROWS == 0 and linear.shape[1] % _MARLIN_COLUMNS == 0
        if not fits and dtype != "float16":
            problems.append(f"{name}: {rows} × {linear.shape[1]} in groups of {group} is not for Marlin, and the other "
                            f"kernels take float16 models, not {dtype}")  # fmt: skip
    return Finding(problems, "Marlin or AWQ kernels take every linear")


def _leaves_out_awq(subject: Subject, unit: EngineUnit) -> bool | None:
    return left_out.head_flag(subject, unit) or any(part in unit.name for part in left_out.left_out_list(subject))


def _leaves_out_gptq(subject: Subject, unit: EngineUnit) -> bool | None:
    return left_out.head_flag(subject, unit) or left_out.leaves_alone(subject, unit.name)


def _leaves_out_paths(subject: Subject, unit: EngineUnit) -> bool | None:
    listed, layers = left_out.left_out_list(subject), left_out.modelopt_layers(subject)
    if layers:
        return left_out.by_members(unit, lambda name: name not in layers)
    if left_out.is_head(subject, unit) and subject.format == "fp8":
        return True
    if unit.experts:
        return any(left_out.path_match(entry, unit.name) for entry in listed) or any(
            unit.name in entry for entry in listed if "experts" in entry
        )
    found = left_out.by_members(unit, lambda name: any(left_out.path_match(entry, name) for entry in listed))
    if found is False and subject.format == "modelopt":
        return any(fnmatch(part, entry) for entry in listed for part in (unit.name, *unit.name.split(".")))
    return found


def _leaves_out_bitsandbytes(subject: Subject, unit: EngineUnit) -> bool | None:
    if left_out.is_head(subject, unit):
        return True
    listed = left_out.left_out_list(subject)
    parts = unit.name.split(".")
    return any(entry in parts or unit.name == entry or unit.name.startswith(f"{entry}.") for entry in listed)


_LOADING = Loading(
    cache_scales={"modelopt": ("fp8",), "fp8": ("fp8",)},
    rules=(
        *SERVER_RULES,
        *FUSING,
        GPT_OSS,
        modelopt.ALGORITHM,
        NO_TRANSFORMS,
        Rule("sglang-schemes", "limits", (_CT,), "SGLang has a scheme for every group", check_groups,
             "_get_scheme_from_parts of compressed_tensors/compressed_tensors.py (SGLang)", limit=True),
        Rule("awq-kernels", "limits", ("awq",), "Marlin takes the shapes, or the model is float16", check_awq_kernels,
             "check_marlin_supports_layer of marlin_utils.py, AWQConfig.get_supported_act_dtypes of awq.py (SGLang)",
             limit=True),
    ),
    no_loader={
        "hqq": "SGLang has no HQQ loader",
        "bitnet": "SGLang has no loader for quant_method 'bitnet'",
        "codebook": "SGLang has no loader for lowbit's codebook folders",
        "torchao": "SGLang quantizes with torchao while it loads, but reads no torchao checkpoint",
    },
    dtypes_refused=dict.fromkeys(("gptq", "awq", "fp8", "modelopt", "mxfp4"), ("float32",)),
    leaves_out={
        "awq": _leaves_out_awq, "gptq": _leaves_out_gptq, "modelopt": _leaves_out_paths, "fp8": _leaves_out_paths,
        "bitsandbytes": _leaves_out_bitsandbytes,
    },
    fused_names={"fused_qkv_a_proj": "fused_qkv_a_proj_with_mqa"},
    quant_algos=("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"),
)  # fmt: skip

_SOURCE = "sglang/srt/layers/quantization/compressed_tensors"
_SUPPORT = (
    Support(INT4, "16", _CT, f"{_SOURCE}: schemes of packed 4- and 8-bit integers, Marlin", least=AMPERE,
            small_batch=MARLIN_BATCH, method="gptq"),
    Support(("W8A16",), "16", _CT, f"{_SOURCE}: schemes of packed 4- and 8-bit integers, Marlin", least=AMPERE,
            small_batch=MARLIN_BATCH),
    Support(("W8A8",), "int8", _CT, f"{_SOURCE}: compressed_tensors_w8a8_int8", least=TURING,
            most=BELOW_BLACKWELL, method="smoothquant"),
    Support(FP8_SCHEMES, "fp8", _CT, f"{_SOURCE}: compressed_tensors_w8a8_fp8", least=ADA),
    Support(("NVFP4",), "fp4", _CT, f"{_SOURCE}: NVFP4 in groups of 16", least=BLACKWELL, method="gptq"),
    Support(("W8A8",), "int8", _CT, f"{_SOURCE}: compressed_tensors_w8a8_int8", kinds=("rocm",),
            method="smoothquant"),
    Support(FP8_SCHEMES, "fp8", _CT, f"{_SOURCE}: compressed_tensors_w8a8_fp8", kinds=("rocm",)),)  # fmt: skip

_MEMORY = MemoryModel(
    prefill=((0, 8192),), logit_rows=256, logit_bytes=16, framework=1 * GIB, share=0.88, share_name="of the device",
    cache_types=("auto", "f16", "bf16", "fp8", "fp8_e4m3", "fp8_e5m2"),
    assumptions=(
        "activations and framework: as for vLLM, with a chunked prefill of 8192 tokens and 1 GiB; SGLang chooses "
        "mem-fraction-static by the device, 0.88 is typical",
        "KV cache: a sliding layer counts with every token, since SGLang bounds it for some models only; MLA keeps the "
        "latent",
    ),
    bounds_windows=False, fp8_below_ada=(64, 128, 256),
    fp8_below_ada_source="docs/advanced_features/attention_backend.md of SGLang: FlashInfer is the default there",
)  # fmt: skip

ENGINE = Engine(
    "sglang", "SGLang", ("cuda", "rocm"), _SUPPORT, _MEMORY, _LOADING,
    serve="python -m sglang.launch_server --model-path {output}", serve_load=" --context-length {context}",
    serve_fp8_cache=" --kv-cache-dtype fp8_e4m3", serve_cache=" --kv-cache-dtype {keys}",
    serve_ranks=" --tp {ranks}", sharing="tensor", batch=8,
)  # fmt: skip
