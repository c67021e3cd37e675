"""Experts of a block in one stored tensor, as the loaders of gpt-oss read them.

Exporters pack one linear of one expert at a time. This module places its tensors in those of all experts, for formats
with `fused_experts` in their row. For P = model.layers.L.mlp.experts and expert e:

    of one expert                                 stored
    P.e.up_proj.weight_blocks  [I, H/32, 16]      P.gate_up_proj_blocks[e, 1::2]      of [E, 2I, H/32, 16]
    P.e.up_proj.weight         [I, H], floats     P.gate_up_proj[e, :, 1::2]          of [E, H, 2I]
    P.e.up_proj.bias           [I]                P.gate_up_proj_bias[e, 1::2]        of [E, 2I]
    P.e.down_proj.weight       [H, I], floats     P.down_proj[e, :, 0::1]             of [E, I, H]

The architecture's placement of the parameter has the rows, and whether floats are transposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowbit.architecture import Architecture, family_of
from lowbit.export import Piece
from lowbit.export.safetensors_writer import StoredTensor


@dataclass(frozen=True)
class Share:
    """The share of one expert: stored[expert, start::step], or stored[expert, :, start::step] if `turned`."""

    stored: StoredTensor
    expert: int
    start: int
    step: int
    turned: bool

    def place(self, piece: Piece) -> Piece:
        """Consecutive rows of one expert's tensor, as a piece of the stored one."""
        first = self.start + piece.row * self.step
        rows = slice(first, first + piece.values.shape[0] * self.step, self.step)
        if self.turned:
            return Piece(self.stored.name, piece.values.t(), index=(self.expert, slice(None), rows))
        return Piece(self.stored.name, piece.values, index=(self.expert, rows))


def stores_fused_experts(architecture: Architecture) -> bool:
    """True for model types of which engines read the experts of a block as one tensor only."""
    return family_of(architecture.model_type).fused_only


def find_shares(tensors: Iterable[StoredTensor], architecture: Architecture) -> dict[str, Share]:
    """Tensor of one expert → its share of a stored one; empty for models whose files hold experts one by one."""
    if not stores_fused_experts(architecture):
        return {}
    places = {
        name: (fused, part, expert, placement.shape[0])
        for fused, placement in architecture.layout.items()
        for name, part, expert in placement.pieces()
        if expert is not None
    }
    shares = {}
    for tensor in tensors:
        owner, weight, leaf = tensor.name.partition(".weight_")
        place = places.get(f"{owner}.weight" if weight else tensor.name)
        if place is not None:
            fused, part, expert, experts = place
            turned = part.transposed and tensor.dtype.is_floating_point
            rows, rest = tensor.shape[0] * part.step, tensor.shape[1:]
            shape = (experts, *rest, rows) if turned else (experts, rows, *rest)
            stored = StoredTensor(f"{fused}_{leaf}" if weight else fused, tensor.dtype, shape)
            shares[tensor.name] = Share(stored, expert, part.start, part.step, turned)
    return shares
