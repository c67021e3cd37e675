"""GGUF file types as data: which ggml type llama.cpp gives which tensor of a model. `gguf_mix.py` reads these tables.

A file type such as Q4_K_M is not one type: it has a base type (Q4_K), and RULES give more bits, or fewer, to some
tensors. Of the rules for a file type and a kind of tensor the first whose conditions hold decides; where none does, the
base type stands. What RULES choose may not fit: then FALLBACKS decides. What NEVER_QUANTIZED names keeps its own type.

Kinds of tensors are llama.cpp's categories. An attention value tensor ("attn_v") is also the fused attn_qkv, which
contains it, and DeepSeek's attn_kv_b.

Spec: llama.cpp src/llama-quant.cpp (tensor_allows_quantization, llama_tensor_get_type_impl, tensor_type_fallback,
tensor_requires_imatrix, llama_ftype_get_default_type), as of October 2026. docs/gguf-file-types.md has the tables for
readers.
"""

from __future__ import annotations

from dataclasses import dataclass


def _with_wide_ends(name: str, like: FileType, bits_per_weight: float) -> FileType:
    summary = f"{like.name} with embeddings and output in Q8_0"
    return FileType(name, like.number, like.base, bits_per_weight, summary, True, like.name, "Q8_0")


@dataclass(frozen=True)
class FileType:
    """One file type.

    number           general.file_type in the file's header (llama.h, enum llama_ftype)
    base             ggml type of the tensors that no rule names
    bits_per_weight  of a whole file of Llama 3.1 8B (MXFP4_MOE: gpt-oss-20b), without importance if that can be
    ours             llama-quantize does not offer it
    like, ends       another file type's rules and number, but embeddings and output of type `ends`
    """

    name: str
    number: int
    base: str
    bits_per_weight: float
    summary: str
    ours: bool = False
    like: str | None = None
    ends: str | None = None

    @property
    def is_float(self) -> bool:
        return self.base in ("F32", "F16", "BF16")

    @property
    def rules(self) -> tuple[MixRule, ...]:
        """Those that can apply, in the order of precedence; none in files of floats."""
        if self.is_float:
            return ()
        name = self.like or self.name
        ends = () if self.ends is None else (MixRule((self.name,), ("output", "token_embd"), self.ends),)
        return (*ends, *(rule for rule in RULES if not rule.file_types or name in rule.file_types))

    @property
    def needs_imatrix(self) -> bool:
        """Whether some tensor of it needs an importance matrix (where rows divide by the block)."""
        types = {self.base} | {rule.type_name for rule in RULES if self.name in rule.file_types}
        return any(needs_importance(self.name, type_name) for type_name in types)


@dataclass(frozen=True)
class MixRule:
    """The tensors of `kinds` become `type_name` in `file_types` if all of `when` hold.

    file_types  names in FILE_TYPES; empty: all
    kinds       names of KINDS; empty: all
    when        names in CONDITIONS
    """

    file_types: tuple[str, ...]
    kinds: tuple[str, ...]
    type_name: str
    when: tuple[str, ...] = ()


FILE_TYPES: dict[str, FileType] = {
    kind.name: kind
    for kind in (
        FileType("F32", 0, "F32", 32.0, "everything as 32-bit floats"),
        FileType("F16", 1, "F16", 16.0, "16-bit floats; plain conversion"),
        FileType("BF16", 32, "BF16", 16.0, "16-bit floats with the range of float32; plain conversion"),
        FileType("Q8_0", 7, "Q8_0", 8.5, "8 bits, nearly lossless"),
        FileType("Q6_K", 18, "Q6_K", 6.56, "6 bits, hard to tell from 8"),
        FileType("Q5_K_M", 17, "Q5_K", 5.7, "5 bits; attention values and half of ffn_down with 6"),
        FileType("Q5_K_S", 16, "Q5_K", 5.57, "5 bits throughout"),
        FileType("Q5_1", 9, "Q5_1", 6.04, "5 bits with an offset, blocks of 32; Q5_K is better for the size"),
        FileType("Q5_0", 8, "Q5_0", 5.57, "5 bits, blocks of 32; Q5_K is better for the size"),
        FileType("Q4_K_M", 15, "Q4_K", 4.89, "4 bits; attention values and half of ffn_down with 6; the usual choice"),
        FileType("Q4_K_S", 14, "Q4_K", 4.67, "4 bits; the first attention values and ffn_down with 5"),
        FileType("Q4_1", 3, "Q4_1", 5.1, "4 bits with an offset, blocks of 32; Q4_K is better for the size"),
        FileType("Q4_0", 2, "Q4_0", 4.64, "4 bits, blocks of 32; quick on CPUs without much else to recommend it"),
        FileType("IQ4_NL", 25, "IQ4_NL", 4.68, "4 bits from 16 unequal steps, blocks of 32"),
        FileType("IQ4_XS", 30, "IQ4_XS", 4.46, "4 bits from 16 unequal steps; smaller than Q4_K_S and about as good"),
        FileType("Q3_K_L", 13, "Q3_K", 4.3, "3 bits; attention values and outputs and ffn_down with 5"),
        FileType("Q3_K_M", 12, "Q3_K", 4.0, "3 bits; attention values and outputs and ffn_down with 4"),
        FileType("Q3_K_S", 11, "Q3_K", 3.64, "3 bits throughout"),
        FileType("IQ3_M", 27, "IQ3_S", 3.76, "3 bits from a codebook; attention values and outputs with 4"),
        FileType("IQ3_S", 26, "IQ3_S", 3.66, "3 bits from a codebook"),
        FileType("IQ3_XS", 22, "IQ3_S", 3.5, "3 bits from a codebook; queries, keys and the middle layers with less"),
        FileType("IQ3_XXS", 23, "IQ3_XXS", 3.25, "3 bits from a small codebook; queries and keys with less"),
        FileType("Q2_K", 10, "Q2_K", 3.16, "2 bits; attention values and outputs and ffn_down with 3"),
        FileType("Q2_K_S", 21, "Q2_K", 2.97, "2 bits; attention values and the first ffn_down with 4"),
        FileType("IQ2_M", 29, "IQ2_S", 2.93, "2 bits from a codebook; attention values and outputs with more"),
        FileType("IQ2_S", 28, "IQ2_XS", 2.74, "2 bits from a smaller codebook; attention values and outputs with more"),
        FileType("IQ2_XS", 20, "IQ2_XS", 2.59, "2 bits from a codebook"),
        FileType("IQ2_XXS", 19, "IQ2_XXS", 2.38, "2 bits from a small codebook"),
        FileType("IQ1_M", 31, "IQ1_M", 2.15, "under 2 bits from a ternary codebook"),
        FileType("IQ1_S", 24, "IQ1_S", 2.0, "under 2 bits from a ternary codebook, smallest"),
        FileType("TQ2_0", 37, "TQ2_0", 2.52, "ternary, for models trained so (BitNet); 2 bits a code"),
        FileType("TQ1_0", 36, "TQ1_0", 2.19, "ternary, for models trained so (BitNet); five codes in a byte"),
        FileType("Q2_0", 41, "Q2_0", 2.68, "2 bits, four values per 64 weights; for models trained so"),
        FileType("Q1_0", 40, "Q1_0", 1.48, "one bit, the sign; for models trained so"),
        FileType("MXFP4_MOE", 38, "MXFP4", 4.62, "experts as MXFP4, as gpt-oss was trained; everything else Q8_0"),
        FileType("NVFP4", 39, "NVFP4", 4.64, "FP4 in 16s with E4M3 scales; the output matrix Q6_K", ours=True),
    )
}  # fmt: skip
# Names that publishers of GGUF files use, of one rule each: what llama-quantize makes of a file type with
# --token-embedding-type q8_0 --output-tensor-type q8_0. schemes.py lists them for --scheme.
FILE_TYPES |= {
    name: _with_wide_ends(name, FILE_TYPES[like], bits_per_weight)
    for name, like, bits_per_weight in (
        ("Q6_K_L", "Q6_K", 6.82), ("Q5_K_L", "Q5_K_M", 6.03), ("Q4_K_L", "Q4_K_M", 5.28), ("Q3_K_XL", "Q3_K_L", 4.76),
        ("Q2_K_L", "Q2_K", 3.67),
    )
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Kind → what the name contains; the first that matches. Output and token embeddings are whole names.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attn_v", ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")),
    ("attn_k", ("attn_k.weight",)),
    ("attn_q", ("attn_q.weight",)),
    ("attn_output", ("attn_output.weight",)),
    ("ffn_up", ("ffn_up",)),
    ("ffn_gate", ("ffn_gate",)),
    ("ffn_down", ("ffn_down",)),
)
OUTPUT = "output.weight"
EMBEDDING = "token_embd.weight"
LAYER_EMBEDDING = "per_layer_token_embd.weight"

# Condition → how the documents say it. What each one is, gguf_mix.py computes.
CONDITIONS = {
    "imatrix": "there is an importance matrix",
    "no imatrix": "there is no importance matrix",
    "first two": "it is one of the first two of its kind",
    "first four": "it is one of the first four of its kind",
    "first sixteenth": "it lies in the first sixteenth of the layers",
    "first eighth": "it lies in the first eighth of the layers",
    "middle": "it lies in neither the first nor the last eighth of the layers",
    "more bits": "it lies in the first or last eighth of the layers, or is every third one between",
    "stacked experts": "it holds several experts",
    "ragged": "its rows do not divide by the block of the base type",
    "shared values": "at least 4 query heads share a value head",
    "70B": "the model is one of 70B's shape",
    "8 experts": "the model has exactly 8 experts",
    "not 8 experts": "the model has not exactly 8 experts",
    "4 experts": "the model has at least 4 experts",
    "falcon": "the model is a Falcon",
    "not falcon": "the model is not a Falcon",
    "glm5-next queries": "the model is a GLM5-Next and it is an attn_q_a, attn_q_b or nextn.eh_proj",
}

# Architecture → layers that make it "70B"; True: only if value heads are shared (Llama 65B has as many layers).
MODELS_70B = {
    "llama": (80, True),
    "llama-embed": (80, True),
    "qwen2": (80, False),
    "deci": (80, False),
    "olmo": (80, False),
    "jais2": (68, False),
}

_TINY = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
COUNTED = frozenset(_TINY.split())  # these count ffn_down tensors where others look at the layer in the name
_ONE_BIT = "IQ1_S IQ1_M"
_TWO_BIT_S = "IQ2_S IQ2_M"
_TINIEST = "IQ1_S IQ1_M IQ2_XXS IQ2_XS"


def _rule(file_types: str, kinds: str, type_name: str, *when: str) -> MixRule:
    return MixRule(tuple(file_types.split()), tuple(kinds.split()), type_name, when)


RULES: tuple[MixRule, ...] = (
    _rule("", "", "Q8_0", "glm5-next queries"),
    # The output matrix. Where it is tied to the embeddings, these are the rules of the embeddings.
    _rule("MXFP4_MOE", "output", "Q8_0"),
    _rule("", "output", "Q8_0", "falcon"),
    _rule("", "output", "Q8_0", "ragged"),
    _rule(f"{_TINY} IQ3_XXS", "output", "Q5_K"),
    _rule("Q8_0", "output", "Q8_0"),
    _rule("", "output", "Q6_K"),
    _rule("MXFP4_MOE", "", "MXFP4", "stacked experts"),
    _rule("MXFP4_MOE", "", "Q8_0"),
    _rule(_TINIEST, "token_embd", "Q2_K"),
    _rule(f"{_TWO_BIT_S} IQ3_XXS", "token_embd", "IQ3_S"),
    _rule("TQ1_0 TQ2_0", "token_embd", "Q4_K"),
    _rule("Q2_0", "token_embd", "Q4_K"),
    # Two bits and fewer.
    _rule(_TINY, "attn_v", "Q4_K", "shared values"),
    _rule(_TINY, "attn_v", "Q4_K", "4 experts"),
    _rule(_TWO_BIT_S, "attn_v", "IQ3_S"),
    _rule(_TINIEST, "attn_v", "Q2_K"),
    _rule(_TINY, "attn_k", "Q4_K", "8 experts"),
    _rule(_TWO_BIT_S, "ffn_down", "IQ3_S", "first eighth"),
    _rule(_TINIEST, "ffn_down", "Q2_K", "first eighth"),
    _rule(_TINY, "attn_output", "Q5_K", "8 experts"),
    _rule(_ONE_BIT, "attn_output", "IQ2_XXS"),
    _rule(_TWO_BIT_S, "attn_output", "IQ3_S"),
    # Mixtral's attention is a small part of it.
    _rule("", "attn_v attn_k", "Q8_0", "8 experts"),
    # Eight query heads share the values of Llama 70B, so that better values cost little.
    _rule("Q2_K Q3_K_S Q3_K_M Q4_K_S IQ3_M", "attn_v", "Q5_K", "70B"),
    _rule("Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "attn_v", "Q5_K", "70B", "shared values"),
    _rule("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "attn_v", "Q4_K", "shared values"),
    _rule("Q2_K", "attn_v", "Q3_K"),
    _rule("IQ3_XXS", "attn_v", "IQ3_S", "no imatrix"),
    _rule("IQ3_M", "attn_v", "Q4_K"),
    _rule("Q3_K_M", "attn_v", "Q5_K", "first two"),
    _rule("Q3_K_M", "attn_v", "Q4_K"),
    _rule("Q3_K_L", "attn_v", "Q5_K"),
    _rule("IQ4_NL IQ4_XS", "attn_v", "Q5_K", "shared values"),
    _rule("Q4_K_M Q5_K_M", "attn_v", "Q6_K", "more bits"),
    _rule("Q4_K_M", "attn_v", "Q5_K", "70B"),
    _rule("Q4_K_S", "attn_v", "Q5_K", "first four"),
    _rule("IQ3_XS", "attn_k attn_q", "IQ3_XXS"),
    _rule("IQ3_XXS", "attn_k attn_q", "IQ2_S"),
    _rule("Q2_K", "ffn_down", "Q3_K"),
    _rule("Q2_K_S", "ffn_down", "Q4_K", "first eighth"),
    _rule("IQ3_XXS", "ffn_down", "Q4_K", "no imatrix", "first eighth"),
    _rule("IQ3_XXS", "ffn_down", "Q3_K", "no imatrix"),
    _rule("Q3_K_M", "ffn_down", "Q5_K", "first sixteenth"),
    _rule("Q3_K_M", "ffn_down", "Q4_K", "not falcon"),
    _rule("Q3_K_M", "ffn_down", "Q4_K", "more bits"),
    _rule("IQ3_M", "ffn_down", "Q4_K", "first eighth"),
    _rule("IQ3_M", "ffn_down", "Q4_K", "8 experts", "more bits"),
    _rule("Q3_K_L", "ffn_down", "Q4_K", "falcon"),
    _rule("Q3_K_L", "ffn_down", "Q5_K"),
    _rule("Q4_K_M", "ffn_down", "Q6_K", "falcon", "first sixteenth"),
    _rule("Q4_K_M", "ffn_down", "Q5_K", "falcon", "more bits"),
    _rule("Q4_K_M", "ffn_down", "Q6_K", "not falcon", "more bits"),
    _rule("Q5_K_M", "ffn_down", "Q6_K", "more bits"),
    _rule("Q4_K_S", "ffn_down", "Q5_K", "not falcon", "first eighth"),
    _rule("IQ4_NL IQ4_XS", "ffn_down", "Q5_K", "no imatrix", "first eighth"),
    # Four bits weighed by importance go wrong in the first layers of some models.
    _rule("Q4_0", "ffn_down", "Q4_1", "imatrix", "first eighth"),
    _rule("Q5_0", "ffn_down", "Q5_1", "imatrix", "first eighth"),
    _rule("Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS", "attn_output", "Q5_K",
          "not falcon", "8 experts"),
    _rule("Q2_K", "attn_output", "Q3_K", "not falcon"),
    _rule("IQ3_XXS", "attn_output", "IQ3_S", "not falcon"),
    _rule("Q3_K_M IQ3_M", "attn_output", "Q4_K", "not falcon"),
    _rule("Q3_K_L", "attn_output", "Q4_K", "falcon"),
    _rule("Q3_K_L", "attn_output", "Q5_K", "not 8 experts"),
    _rule("IQ3_XS", "ffn_gate ffn_up", "IQ3_XXS", "middle"),
)  # fmt: skip

# Type → what a tensor becomes whose rows do not divide by the type's block; F16 if that does not fit either. NVFP4's
# and Q1_0's are ours, llama-quantize has none.
FALLBACKS = {
    **dict.fromkeys(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"], "IQ4_NL"),
    **dict.fromkeys(["Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q2_0", "Q1_0", "NVFP4"], "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
LAST_FALLBACK = "F16"

_RWKV_SMALL = "first w0 w1 w2 v0 v1 v2 a0 a1 a2 g1 g2 decay_w1 decay_w2 lerp_fused"

# What is never quantized, besides vectors and whatever is not called *.weight: (what it is, parts of names).
NEVER_QUANTIZED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norms", ("_norm.weight",)),
    ("expert routing", ("ffn_gate_inp.weight", "ffn_gate_tid2eid.weight")),
    ("AltUp, LAuReL and the per-layer projection of Gemma 3n", ("altup", "laurel", "per_layer_model_proj")),
    ("short convolutions", ("ssm_conv1d", "shortconv.conv.weight")),
    ("sparse-attention indexers", ("indexer.k_proj.weight", "indexer.q_proj.weight")),
    ("the small matrices of RWKV", tuple(f"time_mix_{part}.weight" for part in _RWKV_SMALL.split())),
    ("relative position biases", ("attn_rel_b.weight", ".rel_pos")),
    (
        "vision and audio encoders' embeddings",
        (
            *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".patch_embd", ".patch_merger"),
            *("a.rvq.codebook", "mm.a.code_embd"),
        ),
    ),
)
NEVER_QUANTIZED_NAMES = {"position_embd.weight": "position embeddings", "token_types.weight": "token types"}
NEVER_QUANTIZED_IN = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
        *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight"),
        *("ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    ),
}

# Of those, what convert_hf_to_gguf.py writes as F32, besides vectors, norms and what is not called *.weight. The rest
# has the 16-bit type of the model.
FLOAT32_PARTS = (
    *("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "token_types.weight", "ssm_conv1d"),
    *("shortconv.conv.weight", "altup_correct_coef", "altup_predict_coef"),
    *(f"time_mix_{part}.weight" for part in "first w1 w2 decay_w1 decay_w2 lerp_fused".split()),  # noqa: SIM905
)

# Image and video models, which ComfyUI-GGUF runs: what its quantizer leaves alone (tools/lcpp.patch). Only matrices of
# such a model are quantized, not kernels of convolutions, which have more dimensions.
_FLUX = ("txt_in.", "img_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")
_SD = (
    *("class_embedding.", "time_embedding.", "add_embedding.", "time_embed.", "label_emb.", "conv_in.", "conv_out."),
    *("input_blocks.0.0.weight", "out.2.weight"),
)
IMAGE_MODELS = {
    "flux": _FLUX,
    "hyvid": _FLUX,
    "sd1": _SD,
    "sdxl": _SD,
    "sd3": (
        *("final_layer.", "time_text_embed.", "context_embedder.", "t_embedder.", "y_embedder.", "x_embedder."),
        "proj_out.weight",
    ),
    "aura": ("t_embedder.", "init_x_linear.", "modF.1.weight", "cond_seq_linear.weight", "final_linear.weight"),
    "ltxv": ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out.", "scale_shift_table"),
    "wan": (
        *("modulation.", "patch_embedding.", "text_embedding.", "time_projection.", "time_embedding.", "img_emb."),
        "head.",
    ),
    "hidream": (
        "p_embedder.",
        "t_embedder.",
        "x_embedder.",
        "final_layer.",
        ".ff_i.gate.weight",
        "caption_projection.",
    ),
    "cosmos": ("p_embedder.", "t_embedder.", "t_embedding_norm.", "x_embedder.", "pos_embedder.", "final_layer."),
    "lumina2": ("t_embedder.", "x_embedder.", "final_layer.", "cap_embedder.", "context_refiner.", "noise_refiner."),
}

# Types that are of no use without an importance matrix, except for embeddings and output.
NEEDS_IMPORTANCE = frozenset(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"])


def needs_importance(file_type: str, type_name: str) -> bool:
    """Whether a tensor of this type needs an importance matrix: also the Q2_K of Q2_K_S."""
    return type_name in NEEDS_IMPORTANCE or (file_type == "Q2_K_S" and type_name == "Q2_K")
