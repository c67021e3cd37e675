"""LMDeploy 0.16: TurboMind, its engine of CUDA kernels, and its PyTorch engine; paths are below lmdeploy.

`lmdeploy serve api_server` takes TurboMind where that has the model's class (turbomind/supported_models.py), else the
PyTorch engine. What they read (get_tm_config and _build_resolver of turbomind/converter.py, from_config of
QuantizationConfig in pytorch/config.py):

                        TurboMind                                     PyTorch engine
    awq                 4 bits, version gemm, groups of 128           4 bits
    gptq                4 bits, symmetric, no desc_act, groups of 128   –
    compressed-tensors  pack-quantized, 4 bits, groups of 32 or 128     –
    fp8                 blocks of 128 × 128 (weight_scale_inv)        the same, and static per tensor
    mxfp4               experts of gpt-oss                              –
    smooth_quant        –                                             int8 or FP8 per row, its own files

TurboMind finds quantized linears by the tensors in the files, so no list of exceptions is matched by name. Of
config_groups it reads `group_0` alone. In 4-bit integers it computes in float16, whatever config.json says.
"""

from __future__ import annotations

from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.engines.engine import BELOW_BLACKWELL, GIB, Capability, Engine, MemoryModel, Support
from lowbit.engines.servers import INT4, MARLIN_BATCH
from lowbit.formats.compressed_tensors.rules import NO_TRANSFORMS
from lowbit.formats.gptq import rules as gptq
from lowbit.verification.layers import FUSED_SCHEMES
from lowbit.verification.result import Finding, Loading, Rule
from lowbit.verification.subject import Subject

_CT = "compressed-tensors"
_GROUP_SIZES = {"awq": (128,), "gptq": (128,), _CT: (32, 128), "fp8": (128,)}
_VOLTA: Capability = (7, 0)
_CONSUMER_BLACKWELL: Capability = (12, 0)
# SUPPORTED_ARCHS of turbomind/supported_models.py
_TURBOMIND = frozenset(
    f"{name}ForCausalLM" for name in ("Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Llama", "InternLM2", "InternLM3",
                                      "Glm4MoeLite", "GptOss", "Mixtral")
) | frozenset(
    f"{name}ForConditionalGeneration" for name in ("Qwen2VL", "Qwen2_5_VL", "Qwen3_5", "Qwen3_5Moe", "InternS2Preview",
                                                   "InternS2Mobius", "InternVL", "InternS1")
) | {"InternVLChatModel"}  # fmt: skip
_PYTORCH = ("awq", "fp8")  # of what lowbit reads


def _runs_on_turbomind(subject: Subject) -> bool:
    named = subject.config.get("architectures")
    return isinstance(named, list) and bool(named) and named[0] in _TURBOMIND


def check_engine(subject: Subject) -> Finding:
    """The engine that LMDeploy takes for the model reads the format."""
    named = subject.config.get("architectures")
    if _runs_on_turbomind(subject):
        return Finding([], "TurboMind")
    if subject.format in _PYTORCH:
        return Finding([], "the PyTorch engine")
    problem = (
        f"config.json's architectures is {named!r}, which TurboMind has not, and the PyTorch engine reads "
        f"{', '.join(_PYTORCH)} and its own smooth_quant, not {subject.format}"
    )
    return Finding([problem], "")


def check_config(subject: Subject) -> Finding:
    """Bits, group size, version and column order are those that TurboMind asserts."""
    stated, problems = subject.quantization, []
    if not _runs_on_turbomind(subject):
        return Finding([], "not for TurboMind")
    if subject.format == _CT:
        problem = group_problem(subject.parsed.groups[0]) if subject.parsed.groups else "it is empty"
        problems += [f"config_groups: {problem}"] if problem else []
        if "group_0" not in (stated.get("config_groups") or {}):
            problems.append("config_groups has no 'group_0', the only one that TurboMind reads")
    elif subject.format == "fp8":
        if stated.get("weight_block_size") != [128, 128]:
            problems.append(f"weight_block_size is {stated.get('weight_block_size')!r}; TurboMind takes [128, 128]")
    else:
        sizes, size = _GROUP_SIZES[subject.format], stated.get("group_size", stated.get("q_group_size"))
        if size not in sizes:
            problems.append(f"group_size is {size!r}; TurboMind takes {', '.join(map(str, sizes))}")
        bits = stated.get("bits", stated.get("w_bit"))
        if bits != 4:
            problems.append(f"bits is {bits!r}; TurboMind takes 4")
        if subject.format == "gptq" and (stated.get("desc_act", False) or not stated.get("sym", True)):
            problems.append("desc_act is true or sym is false; TurboMind takes neither")
        if subject.format == "awq" and stated.get("version") != "gemm":
            problems.append(f"version is {stated.get('version')!r}; TurboMind takes 'gemm', in lower case")
    return Finding(problems, "what TurboMind asserts holds")


def group_problem(group: Group) -> str | None:
    """Why TurboMind refuses a folder whose first group this is; None where it loads it."""
    weight = group.scheme.weight
    if group.format != "pack-quantized" or weight.number != "int" or weight.bits != 4:
        return f"{group.name} is {weight.bits}-bit {weight.number} as {group.format}; TurboMind takes packed int4"
    if group.scheme.activation is not None:
        return f"{group.name} quantizes activations; TurboMind's packed int4 is weight-only"
    sizes = _GROUP_SIZES[_CT]
    return None if weight.group_size in sizes else (
        f"{group.name} has group size {weight.group_size}; TurboMind takes {', '.join(map(str, sizes))}"
    )  # fmt: skip


def check_one_scheme(subject: Subject) -> Finding:
    """All quantized linears are as the one statement says that TurboMind reads."""
    weights = {name: scheme.weight for name, scheme in subject.schemes.items()}
    first = next(iter(weights), "")
    problems = []
    for name, weight in weights.items():
        if (weight.bits, weight.group_size) != (weights[first].bits, weights[first].group_size):
            problems.append(
                f"{name} has {weight.bits} bits in groups of {weight.group_size}, {first} has "
                f"{weights[first].bits} in {weights[first].group_size}; TurboMind reads one size for all"
            )
    return Finding(problems[:1], "one for all")  # fmt: skip


def check_zero_offset(subject: Subject) -> Finding:
    """GPTQ's zero points are stored less 1: TurboMind adds 1 to what it finds."""
    stated = subject.quantization
    version = str(stated.get("checkpoint_format") or stated.get("format") or "gptq").lower()
    problem = "checkpoint_format is gptq_v2, whose zero points TurboMind takes for those of v1: each is 1 too large"
    return Finding([problem] if version == "gptq_v2" else [], version)


def check_cache(subject: Subject) -> Finding:
    """No scales of an FP8 KV cache: LMDeploy reads none, and keeps the cache as --quant-policy says."""
    problem = (
        "kv_cache_scheme states an FP8 KV cache, which LMDeploy does not read: the cache stays in 16 bits without "
        "--quant-policy"
    )
    return Finding([] if subject.parsed.kv_cache is None else [problem], "none is stated")


_LOADING = Loading(
    rules=(
        FUSED_SCHEMES,
        gptq.GROUP_INDEX,
        NO_TRANSFORMS,
        Rule("lmdeploy-engine", "limits", (_CT, "gptq", "awq", "fp8"), "one of its engines reads the format for the "
             "model", check_engine, "SUPPORTED_ARCHS of turbomind/supported_models.py, from_config of "
             "pytorch/config.py (LMDeploy)", limit=True),
        Rule("lmdeploy-config", "limits", (_CT, "gptq", "awq", "fp8"), "TurboMind takes bits, group size and version",
             check_config, "get_tm_config, _SUPPORTED_GROUP_SIZES of turbomind/converter.py (LMDeploy)", limit=True),
        Rule("lmdeploy-one-scheme", "limits", (_CT, "gptq"), "all linears have one group size and number of bits",
             check_one_scheme, "get_tm_config of turbomind/converter.py: group_0, group_size (LMDeploy)", limit=True,
             then="misreads"),
        Rule("lmdeploy-zero-points", "limits", ("gptq",), "zero points are stored as GPTQ v1 stores them",
             check_zero_offset, "GPTQFormat.normalize of turbomind/weight_format.py (LMDeploy)", limit=True,
             then="misreads"),
        Rule("lmdeploy-kv-cache", "limits", (_CT,), "no KV-cache scales that would not be used", check_cache,
             "suffix_map of turbomind/weight_format.py; docs/en/quantization/kv_quant.md (LMDeploy)", limit=True,
             then="costs"),
    ),
    no_loader=dict.fromkeys(
        ("bitsandbytes", "modelopt", "torchao", "quark", "hqq", "auto-round", "fbgemm_fp8", "bitnet", "codebook"),
        "LMDeploy reads awq, gptq, compressed-tensors, fp8, mxfp4 and its own smooth_quant",
    ),
    gpt_oss_only={"mxfp4": "TurboMind's MXFP4 is of the experts of gpt-oss"},
)  # fmt: skip

_W4A16 = "docs/en/quantization/llm_compressor.md: sm_70 to sm_90 and sm_120; turbomind/converter.py"
_W8A8 = "docs/en/quantization/w8a8.md: INT8 from sm_70, FP8 from sm_89, by its PyTorch engine"
_SUPPORT = (
    # No figure of its own says up to which batch; Marlin's.
    Support(INT4, "16", _CT, _W4A16, least=_VOLTA, most=BELOW_BLACKWELL, small_batch=MARLIN_BATCH, method="gptq"),
    Support(INT4, "16", _CT, _W4A16, least=_CONSUMER_BLACKWELL, small_batch=MARLIN_BATCH, method="gptq"),
    Support(("W8A8",), "int8", None, _W8A8, least=(7, 5), most=BELOW_BLACKWELL, method="smoothquant",
            note="int8 of its PyTorch engine; lowbit does not write its files",
            instead="lmdeploy lite smooth_quant MODEL --work-dir OUT --quant-dtype int8"),
    Support(("FP8_DYNAMIC",), "fp8", None, _W8A8, least=(8, 9), most=BELOW_BLACKWELL,
            note="FP8 per row of its PyTorch engine; lowbit does not write its files",
            instead="lmdeploy lite smooth_quant MODEL --work-dir OUT --quant-dtype fp8"),
)  # fmt: skip

_MEMORY = MemoryModel(
    prefill=((0, 8192),), logit_rows=256, logit_bytes=8, framework=1 * GIB, share=0.8,
    share_name="cache_max_entry_count", cache_types=("auto", "f16", "bf16", "lmdeploy_int8", "lmdeploy_int4"),
    assumptions=(
        "activations: a pass of 8192 tokens (max_prefill_token_num of TurbomindEngineConfig in messages.py) and logits "
        "of 256 sequences; framework: 1 GiB for context, libraries and workspaces, a round number without a source",
        "cache_max_entry_count is 0.8 of what is free behind the weights; it counts here as 0.8 of the device, so that "
        "a little more fits than is said",
        "KV cache: in blocks of 64 tokens (cache_block_seq_len); a sliding layer counts with every token; "
        "--quant-policy 8 or 4 is lmdeploy_int8 or lmdeploy_int4, in TurboMind for heads of 128 only",
    ),
    token_block=64, bounds_windows=False,
)  # fmt: skip

ENGINE = Engine(
    "lmdeploy", "LMDeploy", ("cuda",), _SUPPORT, _MEMORY, _LOADING,
    serve="lmdeploy serve api_server {output}", serve_load=" --session-len {context}", serve_ranks=" --tp {ranks}",
    sharing="tensor", batch=8,
)  # fmt: skip
