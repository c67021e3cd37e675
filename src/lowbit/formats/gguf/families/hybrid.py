"""Decoders with state spaces, convolutions or linear attention."""

from __future__ import annotations

from lowbit.formats.gguf.families import (
    falcon_h1,
    gated_delta,
    gemma3n,
    gemma4,
    granite_hybrid,
    kimi_linear,
    lfm2,
    mamba,
    nemotron_h,
)
from lowbit.formats.gguf.row import GGUFArchitecture

ROWS: tuple[GGUFArchitecture, ...] = (
    *gated_delta.ROWS, *kimi_linear.ROWS, *lfm2.ROWS, *mamba.ROWS, *granite_hybrid.ROWS, *nemotron_h.ROWS,
    *falcon_h1.ROWS, *gemma3n.ROWS, *gemma4.ROWS,
)  # fmt: skip

_NO_ARCHITECTURE = "llama.cpp has no such architecture"
REFUSED: dict[str, str] = {
    "minimax": "lowbit does not write the lightning attention of llama.cpp's minimax-01",
    **dict.fromkeys(("recurrent_gemma", "zamba", "zamba2"), _NO_ARCHITECTURE),
}
