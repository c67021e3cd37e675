"""`BlockTensors`: the weights of one decoder block and what was measured of its inputs, for transforms to rewrite.
`TransformNote`: what a transform says it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.tensors import LayerStats

# (linear, its weight [N, K], importance [K] or None) → what rounding to nearest makes of it, float32 [N, K];
# the weight itself, the very same object, where the linear stays in 16 bits. Searches pass some of the rows only.
FakeQuantize = Callable[[Linear, Tensor, Tensor | None], Tensor]


@dataclass
class BlockTensors:
    """One decoder block. Transforms replace entries of `tensors` and `stats`, both or neither.

    linears  of the block, those of all experts and those that stay in 16 bits included
    tensors  stored name ("model.layers.3.input_layernorm.weight") → float32; weights of linears [N, K], also where the
             file has them turned round
    stats    name of an input (`Linear.reads`) → what was measured; inputs that no token reached are absent
    dtypes   stored name → dtype it will be written in, of tensors that are not quantized; absent: as it is here
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
        """Values as a reader of the written file will see them, in the dtype they came in."""
        return values.to(self.dtypes.get(name, values.dtype)).to(values.dtype)


@dataclass(frozen=True)
class TransformNote:
    """What was done at one place of a block, for the report.

    point    the norm or linear whose output was rewritten, or the input that could not be
    what     "awq", "smoothquant", "rotate", "hadamard"
    error_before, error_after   Σ tr(ΔW H ΔWᵀ) / Σ tr(W H Wᵀ) over the linears concerned, by rounding to nearest, from a
             sample of their rows; with activations rounded too for smoothquant; None where nothing was measured
    applied  False where everything stayed as it was
    detail   the parameters chosen, or why nothing was done
    """

    point: str
    what: str
    error_before: float | None
    error_after: float | None
    applied: bool
    detail: str
