"""transformers 5.23, with the packages that it calls: optimum and GPTQModel, bitsandbytes, compressed-tensors.

It matches unquantized layers by a regex at the start of a name up to a dot or the end, or by a suffix. It fuses experts
only.
"""

from __future__ import annotations

from lowbit.engines.engine import GIB, Engine, MemoryModel, Support
from lowbit.formats.compressed_tensors.rules import NO_TRANSFORMS
from lowbit.formats.gptq import rules as gptq
from lowbit.verification.layers import GPT_OSS
from lowbit.verification.left_out import LEFT_OUT, EngineUnit, is_head, left_out_list, transformers_converts
from lowbit.verification.result import Finding, Loading, Rule
from lowbit.verification.subject import Subject


def check_experts(subject: Subject) -> Finding:
    """Experts that transformers merges into one parameter are not quantized: it replaces linears only."""
    merged = [name for name, placement in subject.architecture.layout.items()
              if any(part.per_expert for part in placement.parts)
              and (subject.format != "compressed-tensors" or placement.fused)]  # fmt: skip
    quantized = [name for members in subject.architecture.expert_sets.values() for name in members
                 if name in subject.schemes]  # fmt: skip
    if merged and quantized:
        problem = (
            f"{quantized[0]} is quantized, but transformers merges the experts of a block into one parameter as it "
            f"loads them ({merged[0]}), and its integration of {subject.format} knows linears only"
        )
        return Finding([problem], "")
    return Finding([], "no experts are quantized" if subject.architecture.expert_sets else "no experts")


def check_transposed(subject: Subject) -> Finding:
    """No quantized Conv1D: the integration replaces nn.Linear only, and leaves others as they were initialized."""
    quantized = [linear.name for linear in subject.architecture.linears.values()
                 if linear.transposed and linear.name in subject.schemes]  # fmt: skip
    if quantized:
        problem = (
            f"{quantized[0]} is a Conv1D in transformers ({subject.architecture.class_name}), and its integration of "
            f"{subject.format} knows nn.Linear only: the layer stays as it was initialized"
        )
        return Finding([problem], "")
    return Finding([], "every quantized layer is an nn.Linear")


def _leaves_out(subject: Subject, unit: EngineUnit) -> bool | None:
    listed = left_out_list(subject)
    if is_head(subject, unit) and (subject.format == "awq" or not listed):
        return True  # transformers leaves the output layer alone by itself
    return not transformers_converts(unit.name, listed)


_LOADING = Loading(
    rules=(
        gptq.TRANSFORMERS,
        LEFT_OUT,
        GPT_OSS,
        NO_TRANSFORMS,
        Rule("transformers-conv1d", "limits", ("compressed-tensors", "bitnet", "codebook"), "no quantized Conv1D",
             check_transposed, "quantizers/quantizer_compressed_tensors.py (transformers); "
             "quantization/lifecycle/apply.py (compressed-tensors)", limit=True),
        Rule("transformers-experts", "limits",
             ("gptq", "awq", "bitsandbytes", "bitnet", "compressed-tensors", "codebook"),
             "no quantized experts that transformers merges", check_experts,
             "conversion_mapping.py, replace_with_bnb_linear (transformers)", limit=True),
    ),
    no_loader={
        "modelopt": "transformers 5 does not know quant_method 'modelopt': it warns, skips the quantization, and loads "
                    "the codes as if they were weights",
    },
    leaves_out=dict.fromkeys(("awq", "bitsandbytes", "bitnet", "fp8"), _leaves_out),
    fuses=False,
)  # fmt: skip

_KINDS = ("cuda", "rocm", "cpu")
_BNB = "huggingface.co/docs/bitsandbytes: LLM.int8() and 4-bit linears; peft trains adapters on them"
_DECODES = "transformers decodes compressed-tensors weights for every product, in torch: smaller, not quicker"
_SUPPORT = (
    Support(("NF4", "FP4"), "16", "bitsandbytes", _BNB, kinds=_KINDS, small_batch=1, finetune=True),
    Support(("INT8",), "16", "bitsandbytes", _BNB, kinds=_KINDS, small_batch=1, finetune=True),
    Support(("W4A16", "W4A16_ASYM", "W8A16"), "16", "compressed-tensors", _DECODES, kinds=_KINDS, small_batch=0,
            method="gptq"),
)  # fmt: skip

_MEMORY = MemoryModel(
    prefill=(), logit_rows=None, logit_bytes=8, framework=GIB // 2, share=0.95, share_name="of the device",
    cache_types=("auto", "f16", "bf16"),
    assumptions=(
        "activations: the prompts of the whole batch in one pass, attention without a matrix of scores (SDPA), logits "
        "of the last token of each",
        "framework: 0.5 GiB for the CUDA context and libraries; 0.95 of the device, since PyTorch's allocator loses "
        "some in pieces",
        "KV cache: a sliding layer keeps its window (DynamicCache); MLA keeps the latent",
    ),
)  # fmt: skip

ENGINE = Engine(
    "transformers", "transformers", ("cuda", "rocm", "metal", "cpu"), _SUPPORT, _MEMORY, _LOADING,
    serve="transformers chat {output}", serves=False, suits="training",
    train="python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{output}')\"  # peft",
)  # fmt: skip
