"""What a model cannot tell of itself: how files on the hub spell its names, and which experts engines read fused only.

Everything else (blocks, linears, what they read, what feeds them) is found by running the model (`trace`), so most
model types have no row here.
"""

from __future__ import annotations

from dataclasses import dataclass

# Spellings of any model: towers that transformers once wrapped in a module `vision_model`.
COMMON_SPELLINGS = (
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
)
_WITHOUT_PREFIX = (("", "transformer."),)


@dataclass(frozen=True)
class Family:
    """
    spellings      (found, canonical): beginnings of names that some files of this family spell differently
    fused_only     engines and transformers read the experts of 16-bit files as one tensor only
    expert_names   (end of a fused tensor's name, the same of expert "*"): where experts taken apart get names other
                   than NAME.*.gate_proj, .up_proj and .down_proj, one for each of its parts
    """

    spellings: tuple[tuple[str, str], ...] = ()
    fused_only: bool = False
    expert_names: tuple[tuple[str, tuple[str, ...]], ...] = ()


# vLLM's granitemoe.py splits the stacked tensors of the files into these names, which it also reads directly.
_GRANITE_MOE = Family(
    expert_names=(
        ("block_sparse_moe.input_linear.weight", ("block_sparse_moe.experts.*.w1.weight",
                                                  "block_sparse_moe.experts.*.w3.weight")),
        ("block_sparse_moe.output_linear.weight", ("block_sparse_moe.experts.*.w2.weight",)),
    )
)  # fmt: skip

# config.model_type → family
FAMILIES: dict[str, Family] = {
    "bloom": Family(_WITHOUT_PREFIX),
    "gpt2": Family(_WITHOUT_PREFIX),
    "gpt_oss": Family(fused_only=True),
    "granitemoe": _GRANITE_MOE,
    "granitemoehybrid": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "opt": Family((("decoder.", "model.decoder."),)),
}


def family_of(model_type: object) -> Family:
    return FAMILIES.get(str(model_type), Family())
