"""Text decoders of models that see or hear; what they see and hear with is left out.

Where the decoder is another model type's, `AROUND` says what its tensors are called in the model. Decoders of their own
kind have rows: positions of Qwen-VL and GLM-V have three axes (time, height, width), which a text walks together, so
that the positions of a text are the usual ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.formats.gguf.families import experts, llama, qwen
from lowbit.formats.gguf.families.common import (
    KEYS,
    MLP_NORM,
    O_PROJ,
    OUTSIDE,
    PRE_NORM,
    QKV_KINDS,
    QWEN_BLOCK,
    SILU,
)
from lowbit.formats.gguf.layout import HALVES_K, HALVES_Q, Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, Key, Place, Rope


@dataclass(frozen=True)
class Around:
    """A model around a text decoder of another model type, which has a row.

    model_class  what config.json's `architectures` says
    left_out     beginnings of names of the other parts
    stem, head   what the "model." and the "lm_head" of the decoder are called
    """

    model_class: str
    left_out: tuple[str, ...]
    stem: str = "language_model.model."
    head: str = "language_model.lm_head"


_TOWER = ("vision_tower.", "multi_modal_projector.")
_EAR = ("audio_tower.", "multi_modal_projector.")
_INNER_TOWER = ("model.vision_tower.", "model.multi_modal_projector.")
_INNER = ("model.language_model.", "lm_head")
_IDEFICS = (("model.vision_model.", "model.connector."), "model.text_model.", "lm_head")

AROUND: dict[str, Around] = {
    "llava": Around("LlavaForConditionalGeneration", _TOWER),
    "llava_next": Around("LlavaNextForConditionalGeneration", (*_TOWER, "image_newline")),
    "llava_next_video": Around("LlavaNextVideoForConditionalGeneration", (*_TOWER, "image_newline")),
    "llava_onevision": Around("LlavaOnevisionForConditionalGeneration", (*_TOWER, "image_newline")),
    "video_llava": Around("VideoLlavaForConditionalGeneration", ("video_tower.", "image_tower.", _TOWER[1])),
    "vipllava": Around("VipLlavaForConditionalGeneration", _TOWER),
    "internvl": Around("InternVLForConditionalGeneration", _TOWER),
    "aya_vision": Around("AyaVisionForConditionalGeneration", _TOWER),
    "got_ocr2": Around("GotOcr2ForConditionalGeneration", _TOWER),
    "cohere2_vision": Around("Cohere2VisionForConditionalGeneration", _INNER_TOWER, *_INNER),
    "idefics3": Around("Idefics3ForConditionalGeneration", *_IDEFICS),
    "smolvlm": Around("SmolVLMForConditionalGeneration", *_IDEFICS),
    "lighton_ocr": Around(
        "LightOnOcrForConditionalGeneration", ("model.vision_encoder.", "model.vision_projection."), *_INNER
    ),
    "lfm2_vl": Around("Lfm2VlForConditionalGeneration", _INNER_TOWER, *_INNER),
    "deepseek_vl": Around("DeepseekVLForConditionalGeneration", ("model.vision_model.", "model.aligner."), *_INNER),
    "kimi_k25": Around(
        "Kimi_K25ForConditionalGeneration", ("vision_tower.", "mm_projector.", "model.mm_projector.")
    ),
    "janus": Around(
        "JanusForConditionalGeneration",
        ("model.vision_model.", "model.aligner.", "model.vqmodel.", "model.generation_"), *_INNER,
    ),
    "voxtral": Around("VoxtralForConditionalGeneration", _EAR),
    "qwen2_audio": Around("Qwen2AudioForConditionalGeneration", _EAR),
    "glmasr": Around("GlmAsrForConditionalGeneration", _EAR),
    "granite_speech": Around("GraniteSpeechForConditionalGeneration", ("encoder.", "projector.")),
    "qwen3_asr": Around(
        "Qwen3ASRForConditionalGeneration", ("model.audio_tower.", "model.multi_modal_projector."), *_INNER
    ),
}  # fmt: skip

REFUSED: dict[str, str] = {
    "paligemma": "the model attends to a prompt in both directions, llama.cpp only backwards",
    "mllama": "llama.cpp has no blocks that attend to the image",
}


def _deepstack_layers(get: Lookup) -> int:
    """Blocks behind which a state of the vision tower is added."""
    return len(getattr(get("vision_config"), "deepstack_visual_indexes", None) or ())


def _blocks_behind_the_deepstack(get: Lookup) -> dict[str, Any]:
    """llama.cpp cannot add a state behind the last block, where only the last token is left."""
    return {"num_hidden_layers": max(get("num_hidden_layers"), _deepstack_layers(get) + 1)}


def _read_as_text(row: GGUFArchitecture, text: GGUFArchitecture) -> GGUFArchitecture:
    """What a file of `row` becomes: the plain text model that computes the same on a text."""
    return replace(text, arch=row.arch, when=lambda get: False)


_QWEN2, _, _QWEN3, _QWEN3_MOE = qwen.ROWS
_RUNS, _INTERLEAVED = Rope(sections="runs"), Rope(sections="interleaved")
# llama.cpp's loader leaves out the epsilon of the norms, which is then 0: too little to be seen in trained models.
_QWEN2_VL = replace(
    _QWEN2, model_type="qwen2_vl", model_class="Qwen2VLForConditionalGeneration", arch="qwen2vl", rope=_RUNS,
    left_out=("visual.",), read_back=False,
)  # fmt: skip
_QWEN2_5_VL = replace(_QWEN2_VL, model_type="qwen2_5_vl", model_class="Qwen2_5_VLForConditionalGeneration")
_DEEPSTACK = Key("n_deepstack_layers", value=_deepstack_layers)
_QWEN3_VL = replace(
    _QWEN3.around(
        "qwen3_vl", "Qwen3VLForConditionalGeneration", "model.language_model.", "lm_head", ("model.visual.",)
    ),
    arch="qwen3vl", keys=(*_QWEN3.keys, _DEEPSTACK), rope=_INTERLEAVED, implied=_blocks_behind_the_deepstack,
)  # fmt: skip
_QWEN3_VL_MOE = replace(
    _QWEN3_MOE.around(
        "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "model.language_model.", "lm_head", ("model.visual.",)
    ),
    arch="qwen3vlmoe", keys=(*_QWEN3_MOE.keys, _DEEPSTACK), rope=_INTERLEAVED,
    implied=_blocks_behind_the_deepstack,
)  # fmt: skip


# --- GLM-V, PaddleOCR -----------------------------------------------------------------------------------------------


def _rotating_share(metadata: dict[str, Any]) -> dict[str, Any]:
    """The part of a head that rotates, on which the order of rows depends."""
    rotates, length = metadata.get("glm4.rope.dimension_count"), metadata.get("glm4.attention.key_length")
    if type(rotates) is not int or type(length) is not int or not 0 < rotates <= length:
        raise ValueError(f"{str(rotates)[:40]} of {str(length)[:40]} dimensions of a head rotate")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": rotates / length}}


_NAMES = ("model.language_model.", "lm_head", ("model.visual.",))
_PARTIAL_RUNS = Rope(partial=True, sections="runs")
# What a file with sections becomes: the text model, whose rotary pairs are neighbours.
_GLM4 = GGUFArchitecture(
    "glm4", "Glm4ForCausalLM", "glm4", "model.layers", OUTSIDE,
    {
        **PRE_NORM,
        "self_attn.q_proj": Place(T.ATTN_Q, HALVES_Q), "self_attn.k_proj": Place(T.ATTN_K, HALVES_K),
        "self_attn.v_proj": Place(T.ATTN_V), **O_PROJ,
        "post_self_attn_layernorm": Place(T.ATTN_POST_NORM),
        **MLP_NORM,
        "mlp.gate_up_proj": Place(T.FFN_UP),  # gate first, then up
        "mlp.down_proj": Place(T.FFN_DOWN),
        "post_mlp_layernorm": Place(T.FFN_POST_NORM),
    },
    KEYS, biases={QKV_KINDS: {"attention_bias": True}, frozenset(): {"attention_bias": False}}, fixed=SILU,
    rope=Rope(partial=True), when=lambda get: False,
    of_file=lambda metadata: "glm4.rope.dimension_sections" in metadata, from_file=_rotating_share,
)  # fmt: skip
_GLM4V = replace(
    _GLM4.around("glm4v", "Glm4vForConditionalGeneration", *_NAMES), rope=_PARTIAL_RUNS,
    biases={QKV_KINDS: {}, frozenset(): {}}, when=lambda get: True,
)  # fmt: skip
_GLM_OCR = replace(_GLM4V, model_type="glm_ocr", model_class="GlmOcrForConditionalGeneration")
_GLM4_MOE = next(row for row in experts.ROWS if row.model_type == "glm4_moe")
_GLM4V_MOE = replace(
    _GLM4_MOE.around("glm4v_moe", "Glm4vMoeForConditionalGeneration", *_NAMES), rope=_PARTIAL_RUNS,
)  # fmt: skip
_PADDLEOCR_VL = GGUFArchitecture(
    "paddleocr_vl", "PaddleOCRVLForConditionalGeneration", "paddleocr", "model.layers", OUTSIDE, QWEN_BLOCK, KEYS,
    fixed=SILU | {"use_bias": (False,)}, rope=_RUNS, left_out=("visual.", "mlp_AR."), read_back=False,
)  # fmt: skip
_PHI4_MULTIMODAL = replace(
    next(row for row in llama.ROWS if row.model_type == "phi3"), model_type="phi4_multimodal",
    model_class="Phi4MultimodalForCausalLM", left_out=("model.embed_tokens_extend.",), read_back=False,
)  # fmt: skip
# The same on a text, rotary halves and all.
_LLAMA_OF_PADDLEOCR = replace(
    _PADDLEOCR_VL, model_type="llama", model_class="LlamaForCausalLM", when=lambda get: False, read_back=True,
    fixed=SILU, rope=Rope(), left_out=(),
)  # fmt: skip

ROWS: tuple[GGUFArchitecture, ...] = (
    _QWEN2_VL, _QWEN2_5_VL, _QWEN3_VL, _QWEN3_VL_MOE, _GLM4V, _GLM_OCR, _GLM4V_MOE, _PADDLEOCR_VL,
    _PHI4_MULTIMODAL, _GLM4, _LLAMA_OF_PADDLEOCR,
    _read_as_text(_QWEN2_VL, _QWEN2), _read_as_text(_QWEN3_VL, _QWEN3), _read_as_text(_QWEN3_VL_MOE, _QWEN3_MOE),
)  # fmt: skip
