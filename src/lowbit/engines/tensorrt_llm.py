"""TensorRT-LLM, its main branch of autumn 2026: paths are below tensorrt_llm."""

from __future__ import annotations

import torch

from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.engines.engine import ADA, AMPERE, BELOW_BLACKWELL, BLACKWELL, GIB, HOPPER, Engine, MemoryModel, Support
from lowbit.formats.modelopt import rules as modelopt
from lowbit.numerics.column_scales import ColumnScales, InputBasis
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity
from lowbit.verification.layers import FUSING
from lowbit.verification.result import Finding, Loading, Rule
from lowbit.verification.subject import Subject

_CT = "compressed-tensors"
_BLOCK = [128, 128]
_W4A16_GROUP_SIZES, _W4A8_GROUP_SIZES = (64, 128), (128,)
_TAKES = (
    "TensorRT-LLM takes FP8 per row with dynamic activations, FP8 blocks of 128, NVFP4 with activations, MXFP4 weights"
)


def check_groups(subject: Subject) -> Finding:
    """TensorRT-LLM has an algorithm for every group of config_groups, and can tell whose it is."""
    groups = subject.parsed.groups
    problems = []
    for group in groups:
        if not takes(group):
            problems.append(f"config_groups.{group.name}: {group.scheme.name} ({group.format}); {_TAKES}")
        classes = [target for target in group.targets if "." not in target and not target.startswith("re:")]
        if len(groups) > 1 and classes and classes != ["lm_head"]:
            problems.append(f"config_groups.{group.name}.targets has the class {classes[0]!r}; with several groups "
                            f"TensorRT-LLM matches names and regexes only")  # fmt: skip
    return Finding(problems, ", ".join(group.scheme.name for group in groups))


def takes(group: Group) -> bool:
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


def check_blocks(subject: Subject) -> Finding:
    """Blocks are 128 × 128, or activations static: the FP8 folders that TensorRT-LLM takes."""
    stated = subject.quantization
    block = stated.get("weight_block_size")
    if block is None and stated.get("activation_scheme") == "static":
        return Finding([], "static activations")
    problem = f"weight_block_size is {block!r}; TensorRT-LLM takes {_BLOCK}"
    return Finding([] if block == _BLOCK else [problem], "128 × 128")


def check_awq_tensors(subject: Subject) -> Finding:
    """What AWQ linears ask for: pre_quant_scale in every linear that is not fused (KeyError without), in W4A8 of the
    model's dtype (assert); groups of 64 or 128, in W4A8 of 128; a 16-bit model; experts in W4A8 only."""
    problems = []
    for name, scheme in _awq(subject).items():
        linear, activations = subject.architecture.linears[name], scheme.activation is not None
        info = subject.stored.tensors.get(f"{name}.pre_quant_scale")
        if info is None and (linear.fused is None or linear.expert is not None):
            problems.append(f"{name}.pre_quant_scale is absent; TensorRT-LLM reads one in every AWQ linear that it "
                            f"does not fuse with others")  # fmt: skip
        if info is not None and activations and linear.expert is None and info.dtype is not subject.dtype:
            problems.append(f"{info.name} is {info.stored}; in W4A8_AWQ it must be of the model's dtype, "
                            f"{str(subject.dtype).removeprefix('torch.')}")  # fmt: skip
        sizes = _W4A8_GROUP_SIZES if activations else _W4A16_GROUP_SIZES
        if scheme.weight.group_size not in sizes:
            problems.append(f"{name}: group size {scheme.weight.group_size}; kernels take "
                            f"{' and '.join(map(str, sizes))}")  # fmt: skip
        if linear.expert is not None and not activations:
            problems.append(f"{name} is an expert in W4A16_AWQ; TensorRT-LLM's experts of 4-bit integers are W4A8_AWQ")
    if _awq(subject) and subject.dtype is torch.float32:
        problems.append("config.json says dtype float32; the kernels of AWQ take bfloat16 and float16")
    return Finding(problems, f"{len(_awq(subject))} AWQ linears have what its loader asks for")


def check_awq_inputs(subject: Subject) -> Finding:
    """Scales of inputs that its loader does not apply: of fused sets in W4A16_AWQ none, in W4A8_AWQ the first member's.

    Of the gate and up of an expert, the larger in every column.
    """
    problems = []
    for fused, members in subject.architecture.fused_sets.items():
        chosen = {name: scheme for name, scheme in _awq(subject).items() if name in members}
        scales = {name: subject.layout.rotation(name, subject.architecture.linears[name].shape[1]) for name in chosen}
        own = [name for name, scale in scales.items() if scale is not None]
        if not own:
            continue
        if chosen[own[0]].activation is None:
            problems.append(f"{own[0]}.pre_quant_scale is not all ones; in W4A16_AWQ TensorRT-LLM does not read it in "
                            f"{fused}: fold it into the norm before")  # fmt: skip
        elif any(not _same(scales[own[0]], scale) for scale in scales.values()):
            problems.append(f"{fused}: its members have different pre_quant_scale, and TensorRT-LLM takes one for all")
    return Finding(problems, "scales of inputs are those of a single linear, or ones")


def _same(one: InputBasis | None, other: InputBasis | None) -> bool:
    return isinstance(one, ColumnScales) and isinstance(other, ColumnScales) and torch.equal(one.scale, other.scale)


def _awq(subject: Subject) -> dict[str, Scheme]:
    """Linear → scheme, of those in packed 4-bit integers."""
    return {name: scheme for name, scheme in subject.schemes.items()
            if scheme.weight.number == "int" and scheme.weight.bits == 4}  # fmt: skip


def check_needless_scales(subject: Subject) -> Finding:
    """No pre_quant_scale of ones in a fused set of W4A8_AWQ: its loader multiplies every input by it."""
    problems = []
    for fused, members in subject.architecture.fused_sets.items():
        first = members[0]
        scheme = _awq(subject).get(first)
        if scheme is None or scheme.activation is None or subject.architecture.linears[first].expert is not None:
            continue
        held = f"{first}.pre_quant_scale" in subject.stored.tensors
        if held and subject.layout.rotation(first, subject.architecture.linears[first].shape[1]) is None:
            problems.append(f"{fused}: pre_quant_scale is all ones, and every input is multiplied by it; leave it out")
    return Finding(problems, "no input is multiplied by ones where none is asked for")


_PASSES_OVER = "TensorRT-LLM's PyTorch backend passes over quant_method {!r}"
_LOADING = Loading(
    rules=(
        *FUSING,
        modelopt.ALGORITHM,
        Rule("tensorrt-awq", "limits", ("modelopt",), "AWQ linears have what its loader asks for", check_awq_tensors,
             "W4A16_AWQ_LinearMethod, W4A8_AWQ_LinearMethod of _torch/modules/linear.py; fpA_intB_gemm_template.h; "
             "WInt4AFP8FusedMoEMethod of _torch/modules/fused_moe/quantization.py (TensorRT-LLM)", limit=True),
        Rule("tensorrt-input-scales", "limits", ("modelopt",), "every pre_quant_scale is one that its loader applies",
             check_awq_inputs, "load_weights_fused_qkv_linear, load_weights_fused_gate_up_linear of "
             "_torch/modules/linear.py (TensorRT-LLM)", limit=True, reads_values=True, then="misreads"),
        Rule("tensorrt-needless-scales", "limits", ("modelopt",), "no input is multiplied by ones without need",
             check_needless_scales, "apply of W4A8_AWQ_LinearMethod in _torch/modules/linear.py (TensorRT-LLM)",
             limit=True, reads_values=True, then="costs"),
        Rule("tensorrt-algorithms", "limits", (_CT,), "TensorRT-LLM has an algorithm for every group", check_groups,
             "_quant_config_from_config_group of quant_config_utils.py (TensorRT-LLM)", limit=True),
        Rule("tensorrt-fp8-blocks", "limits", ("fp8",), "blocks are 128 × 128", check_blocks,
             "load_hf_quant_config of _torch/model_config.py (TensorRT-LLM)", limit=True),
    ),
    no_loader={name: _PASSES_OVER.format(name)
               for name in ("gptq", "bitsandbytes", "torchao", "quark", "hqq", "auto-round", "fbgemm_fp8", "bitnet",
                            "codebook")}
    | {"awq": f"{_PASSES_OVER.format('awq')}; its AWQ is ModelOpt's W4A16_AWQ"},
    # QuantAlgo of quantization/mode.py, as far as its PyTorch backend has linear methods for it (from documentation:
    # "Quantization" of its manual)
    # The W8A8_SQ algorithms are in QuantAlgo, but get_quant_method of _torch/modules/linear.py raises for them.
    quant_algos=("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES", "NVFP4", "W4A16_AWQ", "W4A8_AWQ",
                 "W8A16", "NVFP4_AWQ", "MXFP8", "W4A8_MXFP4_FP8", "MIXED_PRECISION"),
)  # fmt: skip

_CHOOSING = "nvidia.github.io/Model-Optimizer/guides/_choosing_quant_methods.html"
_DOCS = "nvidia.github.io/TensorRT-LLM/reference/precision.html"
_BATCH = 4  # "small-batch inference scenarios (batch size <= 4)": _CHOOSING
_TOOL = "python examples/quantization/quantize.py --model_dir MODEL --output_dir OUT --qformat {}"
_SUPPORT = (
    Support(("FP8",), "fp8", "modelopt", f"{_DOCS}; {_CHOOSING}", least=ADA),
    Support(("FP8_DYNAMIC", "FP8_BLOCK"), "fp8", _CT,
            f"{_DOCS}: rowwise and block FP8; quant_config_utils.py", least=HOPPER, most=BELOW_BLACKWELL),
    Support(("FP8_BLOCK",), "fp8", _CT, f"{_DOCS}; quant_config_utils.py", least=BLACKWELL),
    Support(("NVFP4",), "fp4", "modelopt", f"{_DOCS}", least=BLACKWELL, method="gptq"),
    Support(("W8A8",), "int8", None, f"{_DOCS}: SmoothQuant; {_CHOOSING}: INT8 SQ on Ampere",
            least=AMPERE, most=BELOW_BLACKWELL, method="smoothquant",
            note="INT8 SmoothQuant of its TensorRT engines; lowbit writes no checkpoint that they are built from, and "
            "ModelOpt's W8A8_SQ_PER_CHANNEL, which it writes, is not loaded by the PyTorch backend",
            instead=_TOOL.format("int8_sq")),
    Support(("W4A16",), "16", "modelopt", f"{_DOCS}: W4A16 AWQ; {_CHOOSING}: INT4 AWQ for small batches",
            least=AMPERE, most=BELOW_BLACKWELL, small_batch=_BATCH, method="awq"),
    Support(("W4AFP8_STATIC",), "fp8", "modelopt", f"{_DOCS}: W4A8 AWQ; docs/source/features/quantization.md: Ada and "
            "Hopper", least=ADA, most=BELOW_BLACKWELL, converts=True, method="awq"),
    Support(("W8A16",), "16", "modelopt", f"{_DOCS}: W8A16 weight-only; WeightOnlyQuantLinearMethod of "
            "_torch/modules/linear.py", least=AMPERE, small_batch=_BATCH, group_size=-1,
            note="INT8 weight-only takes one scale per row"),
)  # fmt: skip

_MEMORY = MemoryModel(
    prefill=((0, 8192),), logit_rows=256, logit_bytes=16, framework=2 * GIB, share=0.9,
    share_name="free_gpu_memory_fraction", cache_types=("auto", "f16", "bf16", "fp8"),
    assumptions=(
        "activations: a pass of 8192 tokens (its default max_num_tokens); framework: 2 GiB for context, libraries and "
        "workspaces, a round number without a source",
        "KV cache: in blocks of 32 tokens; a sliding layer keeps its window; MLA keeps the latent",
    ),
    token_block=32,  # an FP8 cache on Ampere too: docs/source/features/quantization.md, Hardware Support Matrix
)  # fmt: skip

ENGINE = Engine(
    "tensorrt-llm", "TensorRT-LLM", ("cuda",), _SUPPORT, _MEMORY, _LOADING,
    serve="trtllm-serve {output}", serve_load=" --max_seq_len {context}", serve_ranks=" --tp_size {ranks}",
    sharing="tensor", batch=8,
)  # fmt: skip
