"""The scale of a whole NVFP4 matrix, which lies beside it: `blk.0.ffn_up.scale` for `blk.0.ffn_up.weight`.

    y = scale · (W x)     float32 [1], or [E], one per expert, of stacked experts

llama.cpp's loader takes such a tensor for the matrices of `_PARTS` in any architecture, but only some of its graphs
multiply by it; the others would silently compute with unscaled weights. `_APPLIED` says which do, by what each file of
llama.cpp's src/models passes to build_qkv, build_attn, build_ffn and build_moe_ffn. Dense feed-forward matrices with a
bias stop it (build_ffn asserts that there is none). `blk.0.ffn_up.input_scale`, the static scale of NVIDIA's
activations, is loaded and used nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Container

SCALE, INPUT_SCALE = ".scale", ".input_scale"

_PARTS = {
    "attention": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "attention output": ("attn_output",),
    "dense": ("ffn_gate", "ffn_up", "ffn_down"),
    "experts": ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    "shared": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    "linear attention": ("attn_gate", "ssm_out", "ssm_alpha", "ssm_beta"),
    "output": ("output",),
}
_PART_OF = {stem: part for part, stems in _PARTS.items() for stem in stems}

_USUAL = ("attention", "attention output", "output")
_EXPERTS = ("dense", "experts", "shared")
_ONLY_USUAL = """
    afmoe apertus arcee arctic baichuan bailingmoe bailingmoe2 bloom chatglm codeshell command-r dbrx deepseek dots1
    dream ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 glm4 glm4moe gpt2 gptneox
    granite grok grovemoe hunyuan-moe internlm2 jais jais2 jamba lfm2 llada llada-moe llama4 maincoder minimax-m2 mpt
    nemotron olmo olmo2 olmoe gpt-oss orion paddleocr pangu-embedded phi2 phi3 plamo qwen qwen2 qwen2moe qwen2vl qwen3vl
    qwen3vlmoe refact rnd1 seed_oss smallthinker smollm3 stablelm starcoder starcoder2 step35 xverse
"""
# architecture → parts whose scale its graph applies
_APPLIED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_ONLY_USUAL.split(), _USUAL),
    **dict.fromkeys(("cohere2", "qwen3", "nanbeige"), (*_USUAL, "dense")),
    **dict.fromkeys(("llama", "mistral3"), (*_USUAL, "dense", "experts")),
    **dict.fromkeys(("qwen3moe", "mellum"), (*_USUAL, "experts")),
    "hy_v3": (*_USUAL, *_EXPERTS),
    "deepseek2": ("attention output", "output"),
    **dict.fromkeys(("deepseek32", "glm-dsa"), ("attention output", "output", *_EXPERTS)),
    "qwen3next": ("attention output", "output", "experts", "shared"),
    "qwen35": (*_USUAL, "dense", "linear attention"),
    "qwen35moe": (*_USUAL, "experts", "shared", "linear attention"),
}


def scale_name(weight: str) -> str:
    """The name of a weight's scale."""
    return weight.removesuffix(".weight") + SCALE


def weight_of(name: str) -> str | None:
    """The weight that a scale, or an activation scale, is of; None for other tensors."""
    for ending in (INPUT_SCALE, SCALE):
        if name.endswith(ending):
            return name.removesuffix(ending) + ".weight"
    return None


def applies_scale(arch: str, weight: str, names: Container[str]) -> bool:
    """True if llama.cpp multiplies the output of this matrix by its scale. names: of all tensors of the file."""
    stem = re.sub(r"^blk\.\d+\.", "", weight.removesuffix(".weight"))
    part = _PART_OF.get(stem)
    if part is None or part not in _APPLIED.get(arch, ()):
        return False
    return part != "dense" or weight.removesuffix(".weight") + ".bias" not in names


def why_not_applied(arch: str, weight: str) -> str:
    """Why `applies_scale` is False, in words."""
    stem = re.sub(r"^blk\.\d+\.", "", weight.removesuffix(".weight"))
    part = _PART_OF.get(stem)
    if part is None:
        return f"llama.cpp knows no scale of {stem}"
    if part not in _APPLIED.get(arch, ()):
        return f"llama.cpp computes {arch} models without the scale of {stem}"
    return f"llama.cpp takes no scale of {stem} where it has a bias"
