"""Models that make one embedding of a text: Gemma with attention in both directions.

Embedding models that are plain decoders (Qwen 3, Llama, Mistral …) need no row: their class is the bare decoder, whose
names lack "model.", and `pooling.py` reads how their folder pools the tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowbit.formats.gguf.families import gemma
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture


def _scale_is_of_the_head(get: Lookup) -> dict[str, Any]:
    return {"query_pre_attn_scalar": get("head_dim")}


_GEMMA3_TEXT = next(row for row in gemma.ROWS if row.model_type == "gemma3_text")
_GEMMA_EMBEDDING = replace(
    _GEMMA3_TEXT, arch="gemma-embedding", when=lambda get: not gemma.is_causal(get),
    fixed=_GEMMA3_TEXT.fixed | {"use_bidirectional_attention": (True,), "final_logit_softcapping": (None,)},
    keys=tuple(key for key in _GEMMA3_TEXT.keys if key.name != "final_logit_softcapping"),
    implied=_scale_is_of_the_head, window_of=lambda window: 2 * (window - 1),
)  # fmt: skip

_WORDS = "its vocabulary is of WordPiece or unigram kind, which lowbit does not write"
REFUSED: dict[str, str] = {
    "bert": _WORDS, "distilbert": _WORDS, "xlm-roberta": _WORDS, "camembert": _WORDS, "nomic_bert": _WORDS,
    "jina_embeddings_v3": _WORDS,
    "roberta": "encoders have no rows", "modernbert": "encoders have no rows", "eurobert": "encoders have no rows",
}  # fmt: skip

ROWS: tuple[GGUFArchitecture, ...] = (_GEMMA_EMBEDDING,)
