"""Whose code runs: a model can ask to bring its own Python. Reading tensors never does; building the model would."""

from __future__ import annotations

from typing import Any

from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import UnsafeError


def requires_remote_code(config: dict[str, Any]) -> bool:
    """True where config.json names modelling code that comes with the checkpoint (`auto_map`), at any depth."""
    if config.get("auto_map"):
        return True
    return any(requires_remote_code(value) for value in config.values() if isinstance(value, dict))


def refuse_remote_code(config: dict[str, Any], source: str, options: OpenOptions) -> None:
    """Raise UnsafeError where building the model would run its own code and the user did not allow that."""
    if requires_remote_code(config) and not options.trust_remote_code:
        raise UnsafeError(
            f"{source}: config.json asks to run Python code that comes with the model (auto_map)",
            "read that code, then pass --trust-remote-code",
        )
