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
    ("video_tower.", "video_tower.vision_model."),
    ("image_tower.", "image_tower.vision_model."),
    ("model.", "model.language_model."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
)
_WITHOUT_PREFIX = (("", "transformer."),)


@dataclass(frozen=True)
class Family:
    """
    spellings      (found, canonical): beginnings of names that some files of this family spell differently
    on_hub         (regex for names that transformers' rules give backwards, what files have in its place): where the
                   two differ, because a rule that was meant for other modules also fits these
    fused_only     engines and transformers read experts as one tensor only, and pass over others in silence (seen with
                   vLLM 0.32, models/gpt_oss.py, granitemoe.py, aria.py); of Step loaders map stacked names only
    expert_names   (end of a fused tensor's name, the same of expert "*"): where experts taken apart get names other
                   than NAME.*.gate_proj, .up_proj and .down_proj, one for each of its parts
    """

    spellings: tuple[tuple[str, str], ...] = ()
    on_hub: tuple[tuple[str, str], ...] = ()
    fused_only: bool = False
    expert_names: tuple[tuple[str, tuple[str, ...]], ...] = ()


_FUSED_ONLY = Family(fused_only=True)
# get_expert_mapping of vLLM's granitemoehybrid.py
_GRANITE_HYBRID = Family(
    expert_names=(
        ("block_sparse_moe.input_linear.weight", ("block_sparse_moe.experts.*.gate_proj.weight",
                                                  "block_sparse_moe.experts.*.up_proj.weight")),
        ("block_sparse_moe.output_linear.weight", ("block_sparse_moe.experts.*.down_proj.weight",)),
    )
)  # fmt: skip

# config.model_type → family
FAMILIES: dict[str, Family] = {
    "aria": _FUSED_ONLY,
    "aria_text": _FUSED_ONLY,
    "bloom": Family(_WITHOUT_PREFIX),
    "gpt2": Family(_WITHOUT_PREFIX),
    "gpt_oss": _FUSED_ONLY,
    "granitemoe": _FUSED_ONLY,
    "granitemoehybrid": _GRANITE_HYBRID,
    "granitemoeshared": _FUSED_ONLY,
    "kimi_k25": Family(on_hub=((r"^language_model\.model\.blocks\.", "language_model.model.layers."),)),
    "kimi_linear": Family(on_hub=((r"\.block_sparse_moe\.(?=(gate|up|down)_proj\.)", ".mlp."),)),
    "opt": Family((("decoder.", "model.decoder."),)),
    "step3p7": _FUSED_ONLY,
}


def family_of(model_type: object) -> Family:
    return FAMILIES.get(str(model_type), Family())
