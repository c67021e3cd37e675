"""Decoders with state spaces, convolutions or linear attention."""

from __future__ import annotations

from lowbit.formats.gguf.row import GGUFArchitecture

ROWS: tuple[GGUFArchitecture, ...] = ()
