"""Recipes of llm-compressor, told by their shape, and the same settings as a recipe of lowbit.

default_stage:                               scheme: W4A16
  default_modifiers:                         method: gptq
    GPTQModifier: {scheme: W4A16, …}         ignore: [lm_head, 're:.*down_proj']
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.errors import UsageError

# Modifier → part of a method's name; None where it is the rounding to nearest that any method ends with.
_METHODS = {
    "GPTQModifier": "gptq", "AWQModifier": "awq", "SmoothQuantModifier": "smoothquant", "QuantizationModifier": None,
}  # fmt: skip
_TAKEN = {"scheme": "scheme", "ignore": "ignore", "dampening_frac": "damping", "targets": None}


def refuse_foreign_recipe(values: dict[Any, Any], path: Path) -> None:
    """UsageError for a recipe of llm-compressor, with its settings in lowbit's words."""
    modifiers = dict(_modifiers(values))
    if not modifiers:
        return
    ours: dict[str, Any] = {}
    unknown = [name for name in modifiers if name not in _METHODS]
    for given in modifiers.values():
        for key, value in (given if isinstance(given, dict) else {}).items():
            setting = _TAKEN.get(str(key), "")
            if setting:
                ours[setting] = value
            elif setting == "":
                unknown.append(str(key))
    method = "+".join(part for name in modifiers if (part := _METHODS.get(name)))
    ours |= {"method": method} if method else {}
    shown = "; ".join(f"{key}: {value}" for key, value in ours.items()) or "nothing that has a counterpart"
    more = f" (without a counterpart here: {', '.join(dict.fromkeys(unknown))})" if unknown else ""
    raise UsageError(
        f"{path}: this is a recipe of llm-compressor", f"as a recipe of lowbit, one setting a line: {shown}{more}"
    )


def _modifiers(values: dict[Any, Any]) -> list[tuple[str, Any]]:
    """(name of a modifier, its settings), at any of the depths that llm-compressor takes."""
    found = []
    for key, value in values.items():
        name = str(key)
        if name.endswith("Modifier"):
            found.append((name, value))
        elif name.endswith(("_stage", "_modifiers")) and isinstance(value, dict):
            found += _modifiers(value)
    return found
