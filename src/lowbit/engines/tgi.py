"""Text Generation Inference 3.3, in maintenance since 2026; paths are below server/text_generation_server.

The launcher and `get_model` of models/__init__.py take the method from quant_method of config.json: awq, gptq, exl2,
fp8, fbgemm_fp8 and compressed-tensors; marlin files are asked for by --quantize. eetq, bitsandbytes (also nf4 and fp4)
and fp8 by --quantize round 16-bit weights as they load; files that bitsandbytes has rounded are not read. Of these
lowbit writes awq, gptq and compressed-tensors.

    compressed-tensors  one `format` for all groups: pack-quantized of 4 and 8 symmetric bits (Marlin), int-quantized of
                        8 bits, float-quantized of 8 bits per tensor or row; activations are always measured per token
    gptq, awq           Marlin from compute capability 8.0: 4 or 8 bits in groups of 32, 64, 128 or one per row; GPTQ
                        symmetric. The model runs in float16

    models              with classes of its own, those below; all others go to transformers, which reads no gptq or awq
                        there ("not supported for AutoModel") and decodes compressed-tensors without TGI's kernels
    experts             gptq and awq by Marlin, where the router ends in a softmax; no compressed-tensors

It loads q, k and v as one matrix, and gate and up, by the scheme of the first; the output layer is always in 16 bits.
"""

from __future__ import annotations

from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.engines.engine import AMPERE, BELOW_BLACKWELL, GIB, HOPPER, TURING, Engine, MemoryModel, Support
from lowbit.engines.servers import MARLIN_BATCH, MARLIN_BITS, MARLIN_GROUP_SIZES
from lowbit.formats.compressed_tensors.rules import NO_TRANSFORMS
from lowbit.formats.gptq import rules as gptq
from lowbit.tensors import Granularity
from lowbit.verification.layers import FUSED_SCHEMES
from lowbit.verification.result import Finding, Loading, Rule
from lowbit.verification.subject import Subject

_CT = "compressed-tensors"
_PACKED = ("gptq", "awq")
# ModelType of models/__init__.py, but for llama4 and gemma3, which it takes from transformers
_MODELS = frozenset((
    "deepseek_v2", "deepseek_v3", "idefics", "idefics2", "idefics3", "llava_next", "mllama", "llama", "phi", "phi3",
    "phimoe", "phi-msft", "granite", "gemma", "gemma2", "gemma3_text", "paligemma", "cohere", "dbrx", "mamba",
    "mistral", "mixtral", "gpt_bigcode", "gpt2", "gpt_neox", "gptj", "baichuan", "falcon", "RefinedWeb",
    "RefinedWebModel", "starcoder2", "qwen2", "qwen2_vl", "qwen2_5_vl", "opt", "bloom", "mpt",
))  # fmt: skip
_EXPERTS_REFUSED = {
    "deepseek_v3": "TGI's Marlin layer of experts takes a softmax, and the router of deepseek_v3 has a sigmoid",
    "dbrx": "TGI's class of dbrx does not support gptq and awq",
}


def check_model(subject: Subject) -> Finding:
    """TGI has a class of its own for the model; transformers', which it takes else, reads no packed codes there."""
    kind = subject.config.get("model_type")
    if kind in _MODELS:
        return Finding([], f"{kind} is one of its own")
    problem = f"TGI has no class of its own for {kind}, and reads no {subject.format} into that of transformers"
    return Finding([problem], "")


def check_speed(subject: Subject) -> Finding:
    """TGI's kernels multiply: the model has a class of TGI's own."""
    kind = subject.config.get("model_type")
    problem = f"TGI has no class of its own for {kind}; transformers decodes the weights, without TGI's kernels"
    return Finding([] if kind in _MODELS else [problem], "by TGI's kernels")


def check_experts(subject: Subject) -> Finding:
    """TGI's class of the model takes quantized experts."""
    experts = [name for members in subject.architecture.expert_sets.values() for name in members
               if name in subject.schemes]  # fmt: skip
    why = _EXPERTS_REFUSED.get(str(subject.config.get("model_type")))
    problem = f"{experts[0] if experts else ''} is quantized; {why}"
    return Finding([problem] if experts and why else [], "experts by Marlin" if experts else "no experts")


def check_groups(subject: Subject) -> Finding:
    """TGI has a loader for every group, and all groups are stored in the global format."""
    problems = []
    for group in subject.parsed.groups:
        problem = group_problem(group)
        if problem:
            problems.append(f"config_groups.{group.name}: {problem}")
        elif group.format != subject.parsed.format:
            problems.append(f"config_groups.{group.name} is {group.format}, and the global format is "
                            f"{subject.parsed.format}, the only one that TGI reads")  # fmt: skip
    experts = next((name for members in subject.architecture.expert_sets.values() for name in members
                    if name in subject.schemes), None)  # fmt: skip
    if experts is not None:
        problems.append(f"{experts} is quantized; TGI's experts are unquantized, GPTQ or AWQ")
    return Finding(problems, ", ".join(group.scheme.name for group in subject.parsed.groups))


def group_problem(group: Group) -> str | None:
    """Why TGI has no loader for a group; None where it has one."""
    weight, activation = group.scheme.weight, group.scheme.activation
    by_row = weight.granularity in (Granularity.TENSOR, Granularity.CHANNEL)
    if group.format == "pack-quantized":
        size = -1 if weight.group_size is None else weight.group_size
        if weight.bits not in MARLIN_BITS or not weight.symmetric or size not in MARLIN_GROUP_SIZES:
            symmetry = "symmetric" if weight.symmetric else "asymmetric"
            return f"{weight.bits} bits, {symmetry}, group size {size}; TGI takes symmetric 4 and 8 bits for Marlin"
        return None if activation is None else "packed codes with quantized activations"
    if group.format == "int-quantized":
        fits = weight.bits == 8 and by_row and weight.symmetric
        return None if fits else f"{weight.bits}-bit integers with a scale per {weight.granularity.value}"
    if group.format == "float-quantized":
        return None if by_row else f"FP8 with a scale per {weight.granularity.value}; TGI takes one per tensor or row"
    return f"{group.scheme.name} ({group.format}) has no loader"


def check_packed(subject: Subject) -> Finding:
    """Marlin takes bits, group size and symmetry; a GPTQ linear has g_idx; no linear of a block is left in 16 bits."""
    problems = []
    for linear in subject.decoder:
        name, scheme = linear.name, subject.schemes.get(linear.name)
        if linear.keep is not None or name not in subject.stored_linears:
            continue
        if scheme is None:
            problems.append(f"{name} is in 16 bits; TGI's Marlin loader expects qweight in every linear of a block")
            continue
        size = -1 if scheme.weight.group_size is None else scheme.weight.group_size
        fits = scheme.weight.symmetric or subject.format == "awq"
        if scheme.weight.bits not in MARLIN_BITS or size not in MARLIN_GROUP_SIZES or not fits:
            problems.append(f"{name}: {scheme.weight.bits} bits in groups of {size}; Marlin takes 4 and 8 bits in "
                            f"{', '.join(map(str, MARLIN_GROUP_SIZES))}, of GPTQ symmetric ones")  # fmt: skip
        if subject.format == "gptq" and f"{name}.g_idx" not in subject.stored.tensors:
            problems.append(f"{name}.g_idx is absent; TGI reads it in every GPTQ linear")
    return Finding(problems, f"Marlin takes all {len(subject.schemes)} linears")


def check_head(subject: Subject) -> Finding:
    """The output layer is in 16 bits: TGI reads its .weight, whatever config.json says."""
    heads = [name for name in subject.schemes if subject.architecture.linears[name].block is None]
    return Finding([f"{name} is quantized; TGI reads the output layer as {name}.weight" for name in heads], "16 bits")


def check_static(subject: Subject) -> Finding:
    """Activations are dynamic: TGI measures every token, whatever scale the files state."""
    static = [name for name, scheme in subject.schemes.items()
              if scheme.activation is not None and scheme.activation.needs_calibration]  # fmt: skip
    problem = f"{static[0] if static else ''} has a static activation scale, which TGI does not use: it measures tokens"
    return Finding([problem] if static else [], "measured per token, as stated")


def check_cache(subject: Subject) -> Finding:
    """A stated FP8 KV cache has one scale per layer."""
    stated = subject.parsed.kv_cache
    if stated is None:
        return Finding([], "not quantized")
    strategy = stated.get("strategy")
    problem = (
        f"kv_cache_scheme.strategy is {strategy!r}; TGI takes one scale for the keys of a layer, and one for values"
    )
    return Finding([] if strategy == "tensor" else [problem], "FP8, with --attention flashinfer, else 16 bits")


_LOADING = Loading(
    rules=(
        FUSED_SCHEMES,
        gptq.GROUP_INDEX,
        NO_TRANSFORMS,
        Rule("tgi-groups", "limits", (_CT,), "TGI has a loader for every group", check_groups,
             "_create_loader_for_group of layers/compressed_tensors/loader.py, layers/moe/__init__.py (TGI)",
             limit=True),
        Rule("tgi-packed", "limits", _PACKED, "Marlin takes every linear of a block", check_packed,
             "can_use_gptq_marlin, GPTQMarlinWeightsLoader of layers/marlin/gptq.py (TGI)", limit=True),
        Rule("tgi-model", "limits", _PACKED, "TGI has a class of its own for the model", check_model,
             "get_model of models/__init__.py: not supported for AutoModel (TGI)", limit=True),
        Rule("tgi-speed", "limits", (_CT,), "its kernels multiply, by a class of its own for the model", check_speed,
             "get_model of models/__init__.py: TransformersFlashCausalLM (TGI)", limit=True, then="costs"),
        Rule("tgi-experts", "limits", _PACKED, "its class takes quantized experts", check_experts,
             "GPTQMarlinSparseMoELayer of layers/moe/gptq_marlin.py, _load_experts_quantized of "
             "models/custom_modeling/flash_dbrx_modeling.py (TGI)", limit=True),
        Rule("tgi-head", "limits", (_CT, *_PACKED, "fp8"), "the output layer is in 16 bits", check_head,
             "TensorParallelHead.load of layers/tensor_parallel.py (TGI)", limit=True),
        Rule("tgi-static", "limits", (_CT,), "no static activation scale that is not used", check_static,
             "W8A8IntLoader of layers/compressed_tensors/w8a8_int.py, Fp8Linear.forward of layers/fp8.py (TGI)",
             limit=True, then="costs"),
        Rule("tgi-kv-cache", "limits", (_CT,), "KV-cache scales are one per layer", check_cache,
             "KVScales of layers/attention/kv_cache.py (TGI)", limit=True),
    ),
    no_loader={
        "bitsandbytes": "TGI rounds with bitsandbytes while it loads, and reads no file that bitsandbytes has rounded",
        "modelopt": "TGI does not know quant_method 'modelopt'",
        "mxfp4": "TGI has no MXFP4 loader",
        "torchao": "TGI has no torchao loader",
        "quark": "TGI does not know quant_method 'quark'",
        "hqq": "TGI has no HQQ loader",
        "bitnet": "TGI does not know quant_method 'bitnet'",
        "codebook": "TGI has no loader for lowbit's codebook folders",
        "auto-round": "TGI does not know quant_method 'auto-round'",
    },
    dtypes_refused=dict.fromkeys((*_PACKED, _CT), ("float32",)),
)  # fmt: skip

_MARLIN = "server/text_generation_server/layers/marlin/util.py: CUDA from compute capability 8.0"
_FP8 = "get_fp8_linear of server/text_generation_server/layers/fp8.py"
_NEWER = "no source names newer cards"
_SUPPORT = (
    Support(("W4A16",), "16", _CT, f"{_MARLIN}; {_NEWER}", least=AMPERE, most=BELOW_BLACKWELL, small_batch=MARLIN_BATCH,
            method="gptq"),
    Support(("W4A16_ASYM",), "16", "awq", f"{_MARLIN}; {_NEWER}", least=AMPERE, most=BELOW_BLACKWELL,
            small_batch=MARLIN_BATCH, method="awq"),
    Support(("W8A16",), "16", _CT, f"{_MARLIN}; {_NEWER}", least=AMPERE, most=BELOW_BLACKWELL,
            small_batch=MARLIN_BATCH),
    Support(("W8A8",), "int8", _CT, "layers/compressed_tensors/w8a8_int.py: vLLM's CUTLASS kernels", least=TURING,
            most=BELOW_BLACKWELL, method="smoothquant"),
    Support(("FP8_DYNAMIC",), "fp8", _CT, f"{_FP8}: FP8 from compute capability 9.0; {_NEWER}", least=HOPPER,
            most=BELOW_BLACKWELL),
    Support(("FP8_DYNAMIC",), "16", _CT, f"{_FP8}: Marlin decodes FP8 on 8.x", least=AMPERE, most=(8, 9),
            small_batch=MARLIN_BATCH, fallback=True),
    Support(("FP8_DYNAMIC",), "fp8", _CT, f"{_FP8}: torch on ROCm", kinds=("rocm",)),
)  # fmt: skip

_MEMORY = MemoryModel(
    prefill=((0, 4096),), logit_rows=256, logit_bytes=8, framework=1 * GIB, share=0.9,
    share_name="cuda_memory_fraction",
    cache_types=("auto", "f16", "bf16", "fp8", "fp8_e4m3", "fp8_e5m2"),
    assumptions=(
        "activations: a prefill of 4096 tokens, the launcher's default where it cannot judge the card; "
        "framework: 1 GiB for context, libraries and CUDA graphs, a round number without a source",
        "share: cuda_memory_fraction is 1.0, of which warm-up leaves some (TGI_WIGGLE_ROOM); 0.9 here",
        "KV cache: every layer counts with every token; MLA keeps the latent",
    ),
    bounds_windows=False, fp8_below_ada=(),
    fp8_below_ada_source="layers/attention/kv_cache.py of TGI names no older card",
)  # fmt: skip

ENGINE = Engine(
    "tgi", "TGI", ("cuda", "rocm"), _SUPPORT, _MEMORY, _LOADING,
    serve="text-generation-launcher --model-id {output}", serve_load=" --max-total-tokens {context}",
    serve_fp8_cache=" --kv-cache-dtype fp8_e4m3fn", serve_ranks=" --num-shard {ranks}", sharing="tensor", batch=8,
)  # fmt: skip
