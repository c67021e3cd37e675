"""Decoders with state spaces, convolutions or linear attention."""

from __future__ import annotations

from lowbit.formats.gguf.families import falcon_h1, gated_delta, granite_hybrid, lfm2, mamba, nemotron_h
from lowbit.formats.gguf.row import GGUFArchitecture

ROWS: tuple[GGUFArchitecture, ...] = (
    *gated_delta.ROWS, *lfm2.ROWS, *mamba.ROWS, *granite_hybrid.ROWS, *nemotron_h.ROWS, *falcon_h1.ROWS,
)  # fmt: skip
