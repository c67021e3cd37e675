"""A quantized model and its reference under the same tensor names, and what each tensor holds in either.

Names are those of the quantized checkpoint's architecture (experts one by one); tensors are given as the quantized
checkpoint has them, so that one may stand in for the other: where only one of the two stores a linear transposed
(Conv1D in 16 bits), the reference's is turned round.

Refused: a model type without a row in the table of families, and a reference of another architecture, named by the
first tensor that is absent or of another shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.architecture.view import canonical_view
from lowbit.checkpoint.base import Checkpoint, is_decoded
from lowbit.errors import ArchitectureError, UsageError

if TYPE_CHECKING:
    from lowbit.architecture.structure import Architecture, Linear
    from lowbit.evaluation.opening import Opened

# What takes fewer bits per weight than this is quantized.
PLAIN_BITS = 15.5


@dataclass(frozen=True)
class Pair:
    """See the module docstring. `names` are the tensors of both, in the order of the architecture."""

    judged: Opened
    reference: Opened

    @cached_property
    def architecture(self) -> Architecture:
        architecture = self.judged.loader.architecture
        if architecture is None or self.reference.loader.architecture is None:
            kind = self.judged.model.config.model_type
            raise ArchitectureError(
                f"model type {kind!r} is not known to lowbit and cannot be run block by block",
                "lowbit evaluate judges it as a whole",
            )
        return architecture

    @property
    def quantized(self) -> Checkpoint:
        return self.judged.loader.checkpoint

    @cached_property
    def original(self) -> Checkpoint:
        """The reference under the architecture's names."""
        return canonical_view(self.reference.checkpoint, self.architecture)

    @cached_property
    def names(self) -> list[str]:
        names = [name for name in self.architecture.parameters if name in self.quantized.tensors]
        for name in names:
            info = self.original.tensors.get(name)
            shape = None if info is None else self._seen_shape(name)
            if shape != tuple(self.quantized.tensors[name].shape):
                found = "absent" if info is None else f"{list(info.shape)}"
                raise UsageError(
                    f"{name} is {list(self.quantized.tensors[name].shape)} in {self.quantized.source} and {found} in "
                    f"its reference {self.original.source}",
                    "the reference must be the model that was quantized",
                )
        return names

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Weight → its linear, of the tensors in `names`."""
        known = set(self.names)
        found = {f"{linear.name}.weight": linear for linear in self.architecture.linears.values()}
        return {name: linear for name, linear in found.items() if name in known}

    def bits(self, name: str) -> float:
        """Stored bits per weight, scales included."""
        info = self.quantized.tensors[name]
        weights = 1
        for size in info.shape:
            weights *= size
        return 8 * info.nbytes / weights if weights else 0.0

    def is_quantized(self, name: str) -> bool:
        return len(self.quantized.tensors[name].shape) > 1 and self.bits(name) < PLAIN_BITS

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the quantized model's tensor, decoded, float32."""
        return self.quantized.read(name, start, stop).float()

    def read_original(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The same rows as the reference has them, float32."""
        if not self._turned(name):
            return self.original.read(name, start, stop).float()
        return self.original.read(name).t()[start:stop].float().contiguous()

    def release(self, name: str) -> None:
        self.quantized.release(name)
        self.original.release(name)

    def _turned(self, name: str) -> bool:
        linear = self.architecture.linears.get(name.removesuffix(".weight"))
        if linear is None or not linear.transposed or not name.endswith(".weight"):
            return False
        return is_decoded(self.quantized, name) != is_decoded(self.original, name)

    def _seen_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.original.tensors[name].shape)
        return shape[::-1] if self._turned(name) else shape
