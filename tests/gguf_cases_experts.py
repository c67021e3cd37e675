"""Decoders with experts: tiny models for `gguf_models`."""

from __future__ import annotations

# name → (model_type and sizes, changes to the config, general.architecture, model_type read back or None)
CASES: dict[str, tuple] = {}
# case → nats, with the reason
LOOSER: dict[str, float] = {}
