"""What cache types cost, as measured: the figures of benchmarks/kv_cache.py, in data/kv_cache_losses.json.

    loss = 100 · mean KLD                percent

which is the rise of perplexity that a divergence of this size means where the text is the model's own kind: the mean of
ln(PPL / PPL of the 16-bit cache) over what the reference says is the KLD. One small model; larger ones lose less.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class CacheLoss:
    """percent, with its standard error; of a model, at a context of so many tokens; says: all of that in words."""

    type: str
    percent: float
    percent_se: float
    model: str
    context: int
    command: str

    @property
    def says(self) -> str:
        return (f"measured: {self.percent:.2g} % ± {self.percent_se:.1g} % for {self.model} at {self.context} tokens, "
                f"type {self.type}; `{self.command}`")  # fmt: skip


def cache_loss(name: str) -> CacheLoss | None:
    """Of a type, at the longest context measured; None where it was not measured."""
    table = _table()
    rows = [row for row in table["rows"] if row["type"] == name]
    if not rows:
        return None
    row = max(rows, key=lambda each: each["context"])
    return CacheLoss(name, 100 * row["kld_mean"], 100 * row["kld_se"], table["model"], row["context"], table["command"])


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    file = resources.files("lowbit") / "data" / "kv_cache_losses.json"
    return json.loads(file.read_text(encoding="utf-8"))
