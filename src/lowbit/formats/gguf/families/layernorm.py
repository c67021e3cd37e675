"""Dense decoders with norms of mean and variance (LayerNorm)."""

from __future__ import annotations

from lowbit.formats.gguf.row import GGUFArchitecture

REFUSED: dict[str, str] = {}
ROWS: tuple[GGUFArchitecture, ...] = ()
