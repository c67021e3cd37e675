"""`BlockTensors`: the weights of one decoder block and what was measured of its inputs, for transforms to rewrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.tensors import LayerStats

# (linear, its weight [N, K], importance [K] or None) → what rounding to nearest makes of it, float32 [N, K];
# the weight itself where the linear stays in 16 bits.
FakeQuantize = Callable[[Linear, Tensor, Tensor | None], Tensor]


@dataclass
class BlockTensors:
    """One decoder block. Transforms replace entries of `tensors` and `stats`, both or neither.

    linears  of the block, those of all experts and those that stay in 16 bits included
    tensors  stored name ("model.layers.3.input_layernorm.weight") → float32; weights of linears [N, K], also where the
             file has them turned round
    stats    name of an input (`Linear.reads`) → what was measured; inputs that no token reached are absent
    """

    linears: tuple[Linear, ...]
    tensors: dict[str, Tensor]
    stats: dict[str, LayerStats] = field(default_factory=dict)

    def weight(self, linear: Linear) -> Tensor:
        return self.tensors[f"{linear.name}.weight"]

    def readers(self, source: str) -> list[Linear]:
        """The linears that read an input."""
        return [linear for linear in self.linears if linear.reads == source]
