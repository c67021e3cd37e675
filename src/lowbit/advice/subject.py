"""The model that is asked about: its shape, and the exact bytes of its files where there are headers to plan from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.advice.engines import DOUBLE_QUANT, SIXTEEN, Support
from lowbit.advice.footprint import Footprint, active_weights, footprint
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import UsageError
from lowbit.estimation.shapes import ModelShape, shape_of
from lowbit.estimation.weights import Opened, opened, plan_of
from lowbit.schemes import is_gguf_name
from lowbit.settings import MEASURE, make_settings

# What is advised on without MODEL: the shape of Llama 3.1 8B.
GENERIC = ModelShape("llama", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
                     vocab=128256, max_positions=131072)  # fmt: skip
GENERIC_NAME = "a model of Llama 3.1 8B's shape (no MODEL was given)"


@dataclass(frozen=True)
class Subject:
    """
    name     what the user typed, or what it is
    path     what `lowbit quantize` is given; None without a model
    found    its headers; None where bytes follow from the shape alone
    notes    how it was looked at
    """

    name: str
    shape: ModelShape
    path: str | None = None
    found: Opened | None = None
    options: OpenOptions | None = None
    notes: tuple[str, ...] = ()

    @property
    def billions(self) -> float:
        """Billions of weights, embeddings included."""
        return footprint(self.shape, SIXTEEN).total / 2e9

    @property
    def active_billions(self) -> float:
        return active_weights(self.shape) / 1e9

    def weights(self, scheme: str, how: Support | None) -> Footprint:
        """The bytes in a scheme: exact in sum where the model's headers are known and lowbit writes the format.

        Raises what planning raises: FormatError, ShapeError, ArchitectureError, UsageError.
        """
        guess = footprint(self.shape, scheme)
        if self.found is None or how is None or how.format is None:
            return guess
        extra: dict[str, Any] = {"imatrix": MEASURE} if is_gguf_name(scheme) else {}
        extra |= {"double_quant": True} if scheme in DOUBLE_QUANT else {}
        settings = make_settings(None, scheme=scheme, format=how.format, **extra)
        prepared, _ = plan_of(self.found, settings, self.options or OpenOptions())
        return guess.scaled(prepared.plan.file_bytes)


@contextmanager
def subject(
    model: str | Path | ModelShape | dict[str, Any] | None, options: OpenOptions | None = None
) -> Iterator[Subject]:
    """A folder, a .gguf file, a Hugging Face id (headers only), demo:…, a parsed config.json, a shape, or None."""
    if model is None or isinstance(model, ModelShape):
        name = GENERIC_NAME if model is None else f"a model of {model.hidden} × {model.layers}"
        yield Subject(name, model or GENERIC)
        return
    if isinstance(model, dict):
        yield Subject(str(model.get("model_type", "a config.json")), shape_of(model))
        return
    options = options or OpenOptions()
    with opened(model, options) as found:
        if not found.config:
            raise UsageError(
                f"{model}: nothing is known of the model's shape", "give the Hugging Face model that it was made from"
            )
        yield Subject(found.name, shape_of(found.config), str(model), found, options, found.notes)
