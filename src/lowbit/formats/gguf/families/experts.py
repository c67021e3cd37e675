"""Decoders with experts."""

from __future__ import annotations

from lowbit.formats.gguf.families import latent
from lowbit.formats.gguf.row import GGUFArchitecture

ROWS: tuple[GGUFArchitecture, ...] = (*latent.ROWS,)
