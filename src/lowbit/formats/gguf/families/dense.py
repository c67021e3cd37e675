"""Dense decoders."""

from __future__ import annotations

from lowbit.formats.gguf.row import GGUFArchitecture

ROWS: tuple[GGUFArchitecture, ...] = ()
