"""`BlockTensors`: the weights and input statistics of one decoder block, which transforms rewrite. `TransformNote`: the
report entry of a transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.tensors import LayerStats

# (linear, its weight [N, K], importance [K] or None) → the weight rounded to nearest and decoded, float32 [N, K]; the
# same object if the linear stays in 16 bits. Searches pass a sample of the rows.
FakeQuantize = Callable[[Linear, Tensor, Tensor | None], Tensor]


@dataclass
class BlockTensors:
    """One decoder block. Transforms replace entries of `tensors` and `stats`, both or neither.

    linears  of the block, including all experts and linears that stay in 16 bits
    tensors  stored name ("model.layers.3.input_layernorm.weight") → float32; weights of linears [N, K], even if the
             file stores them transposed
    stats    name of an input (`Linear.reads`) → its statistics; inputs that no token reached are absent
    dtypes   stored name → output dtype of tensors that are not quantized; absent: unchanged
    """

    linears: tuple[Linear, ...]
    tensors: dict[str, Tensor]
    stats: dict[str, LayerStats] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def weight(self, linear: Linear) -> Tensor:
        return self.tensors[f"{linear.name}.weight"]

    def readers(self, source: str) -> list[Linear]:
        """The linears that read an input."""
        return [linear for linear in self.linears if linear.reads == source]

    def as_written(self, name: str, values: Tensor) -> Tensor:
        """Values rounded to the tensor's output dtype, in their own dtype."""
        return values.to(self.dtypes.get(name, values.dtype)).to(values.dtype)


@dataclass(frozen=True)
class TransformNote:
    """The result of a transform at one place of a block, for the report.

    point    the norm or linear whose output was rewritten, or the input that could not be
    what     name of the transform
    error_before, error_after   Σ tr(ΔW H ΔWᵀ) / Σ tr(W H Wᵀ) over the linears concerned, by rounding to nearest, from a
             sample of their rows; with activations rounded too for smoothquant; None if not measured
    applied  False if nothing changed
    detail   the parameters chosen, or the reason for no change
    """

    point: str
    what: str
    error_before: float | None
    error_after: float | None
    applied: bool
    detail: str
