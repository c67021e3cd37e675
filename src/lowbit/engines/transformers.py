"""transformers 5.23, with the packages that it calls: optimum and GPTQModel, bitsandbytes, compressed-tensors.

It matches unquantized layers by a regex at the start of a name up to a dot or the end, or by a suffix. It fuses experts
only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lowbit.engines.engine import GIB, Engine, MemoryModel, Support
from lowbit.formats.compressed_tensors.rules import NO_TRANSFORMS
from lowbit.formats.gptq import rules as gptq
from lowbit.verification.layers import GPT_OSS
from lowbit.verification.left_out import LEFT_OUT, EngineUnit, is_head, left_out_list, transformers_converts
from lowbit.verification.result import Finding, Loading, Rule
from lowbit.verification.subject import Subject

if TYPE_CHECKING:
    from lowbit.checkpoint.compressed_tensors_config import Group


def check_experts(subject: Subject) -> Finding:
    """Experts that transformers merges into one parameter are not quantized: it replaces linears only."""
    merged = [name for name, placement in subject.architecture.layout.items()
              if any(part.per_expert for part in placement.parts)
              and (subject.format != "compressed-tensors" or placement.fused)]  # fmt: skip
    quantized = [name for members in subject.architecture.expert_sets.values() for name in members
                 if name in subject.linears_in_files]  # fmt: skip
    if merged and quantized and subject.format not in subject.architecture.replaced_experts:
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
            f"{subject.format} knows nn.Linear only: the layer stays as it was initialized; load it with lowbit.load, "
            f"or have transformers load the decoded weights, which lowbit convert OUT -o FLOAT --format float writes"
        )
        return Finding([problem], "")
    return Finding([], "every quantized layer is an nn.Linear")


def check_initialized(subject: Subject) -> Finding:
    """Linears without `weight` only in models whose initialization asks whether there is one."""
    packed = _packed(subject)
    needs_weights = subject.architecture.needs_weights
    if packed and needs_weights and not _is_decoded(subject):
        why = f"transformers initializes {needs_weights} by the weight that such a layer does not have"
        if needs_weights == subject.architecture.class_name:  # it has no forward
            why = f"transformers decodes such layers when the model is called, and {needs_weights} calls its parts only"
        problem = f"{packed[0]} is packed, and {why}: AttributeError{_decoded(subject)}"
        return Finding([problem], "")
    return Finding([], "no module is initialized by a weight that is packed")


def check_tied(subject: Subject) -> Finding:
    """No packed linear shares its weight with another: transformers ties parameters by the name `weight`."""
    packed = set(_packed(subject))
    tied = subject.architecture.tied
    shared = [
        alias for alias, name in tied.items() if {alias.removesuffix(".weight"), name.removesuffix(".weight")} & packed
    ]
    if shared and not _is_decoded(subject):
        problem = (
            f"{shared[0]} is {tied[shared[0]]}, which is packed, and transformers ties layers by their weights: "
            f"AttributeError{_decoded(subject)}"
        )
        return Finding([problem], "")
    return Finding([], "no packed layer is used twice")


def check_converted(subject: Subject) -> Finding:
    """What transformers makes of several tensors, or of a part of one, is quantized in a way that its conversion reads.

    Into a parameter (experts, convolutions): it decodes packed integers without zero points, MXFP4 and 8-bit floats, by
    one group for all, and passes floats on in folders of 8-bit floats only. Into a linear: it does to every stored
    tensor what it does to the rows of the weight."""
    group = _group_of_experts(subject.parsed.groups)
    problems = _cut_unquantized(subject)
    for parameter, placement in subject.architecture.layout.items():
        names = [name.removesuffix(".weight") for name, _, _ in placement.pieces() if name.endswith(".weight")]
        if problems or placement.fused or not names or not placement.converted:
            continue
        plain = [name for name in names if name not in subject.schemes]
        joined = len(plain) == len(names) or any(part.per_expert for part in placement.parts)
        if plain and group.scheme.weight.number != "e4m3":
            lost = f"transformers makes {parameter} of {plain[0]} and others, and loses what is not quantized there"
            problems.append(lost + _NAMED)
        elif joined:
            problems += [
                said for name in names if name in subject.schemes and (said := _undecoded(subject, name, group))
            ]
        else:
            problems += [said for name in names if (said := _torn(subject, name, parameter))]
    return Finding(problems[:1], "all that transformers converts is quantized in a way that it reads")


def _cut_unquantized(subject: Subject) -> list[str]:
    """A tensor that transformers cuts into weights of linears that are not quantized: it extends that conversion by
    the tensors of quantized ones, and then refuses it, whatever the files hold."""
    names = subject.architecture.loaded_names
    loaded = "\n".join(f"{each}.weight" for name in subject.schemes for each in names.get(name, (name,)))
    cut = [target for target in subject.architecture.cut_weights if not re.search(rf"{target}$", loaded, re.MULTILINE)]
    return [f"transformers cuts a tensor into {target} and others, and refuses to where these are not quantized: "
            f"ValueError, for every compressed-tensors folder of {subject.architecture.class_name}"
            for target in cut[:1]]  # fmt: skip


# Files under the names of its modules are not converted.
_NAMED = "; lowbit quantize --loader transformers writes a folder that it reads"


def _group_of_experts(groups: tuple[Group, ...]) -> Group:
    """The group by which transformers decodes what it merges (get_experts_scheme)."""
    regexes = [group for group in groups
               if any(target.startswith("re:") and "experts" in target for target in group.targets)]  # fmt: skip
    named = [group for group in groups if any(not target.startswith("re:") for target in group.targets)]
    return (*regexes, *named, *groups)[0]


def _undecoded(subject: Subject, linear: str, group: Group) -> str | None:
    """Why transformers does not decode this one of several linears that it merges."""
    spec = subject.schemes[linear].weight
    if spec != group.scheme.weight:
        return f"{linear} has another scheme than group {group.name}, by which transformers decodes all that it merges"
    leaves = {name.rpartition(".")[2] for name in subject.expected_of(linear)}
    strange = sorted(leaf for leaf in leaves if leaf.startswith("weight_") and leaf not in _DECODED)
    if not strange and ("weight_packed" in leaves or spec.number == "e4m3"):
        return None
    return (f"{linear} is merged with others, and transformers does not decode its {', '.join(strange) or 'integers'}, "
            "with dequantize=True neither: it computes with other values")  # fmt: skip


def _torn(subject: Subject, linear: str, parameter: str) -> str | None:
    """Why the conversion of a quantized linear's rows does not fit all its tensors."""
    rows = subject.architecture.linears[linear].shape[0]
    for name, expected in subject.expected_of(linear).items():
        leaf = name.rpartition(".")[2]
        if leaf.startswith("weight") and expected.shape[:1] != (rows,):
            shape = list(expected.shape)
            return f"transformers makes {parameter} of rows of {linear}, and {name}, {shape}, has no such rows{_NAMED}"
    return None


def _packed(subject: Subject) -> list[str]:
    """Quantized linears that store no tensor called weight."""
    return [name for name in subject.schemes if f"{name}.weight" not in subject.expected_of(name)]


def _decoded(subject: Subject) -> str:
    """How it loads all the same: with dequantize=True, which reads all layers by the first group."""
    if not _is_alike(subject):
        return ""
    return ("; it loads with quantization_config=CompressedTensorsConfig(dequantize=True), which lowbit quantize "
            "--loader transformers writes into config.json")  # fmt: skip


def _is_decoded(subject: Subject) -> bool:
    """True where config.json has transformers decode all layers as it loads."""
    return subject.quantization.get("dequantize") is True and _is_alike(subject)


def _is_alike(subject: Subject) -> bool:
    return len({group.scheme.weight for group in subject.parsed.groups}) == 1


def _leaves_out(subject: Subject, unit: EngineUnit) -> bool | None:
    listed = left_out_list(subject)
    if is_head(subject, unit) and (subject.format == "awq" or not listed):
        return True  # transformers leaves the output layer alone by itself
    return not transformers_converts(unit.name, listed)


# The stored tensors that transformers takes along when it decodes a linear that it merges with others.
_DECODED = ("weight_packed", "weight_scale", "weight_shape")

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
        Rule("transformers-initialized", "limits", ("compressed-tensors",),
             "no packed layer is initialized by its weight", check_initialized,
             "_init_weights of the model's class (transformers)", limit=True),
        Rule("transformers-tied", "limits", ("compressed-tensors",), "no packed layer is used twice", check_tied,
             "tie_weights, modeling_utils.py (transformers)", limit=True),
        Rule("transformers-converted", "limits", ("compressed-tensors",), "what transformers converts is read by it",
             check_converted, "update_weight_conversions, quantizers/base.py; integrations/compressed_tensors.py "
             "(transformers)", limit=True),
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
