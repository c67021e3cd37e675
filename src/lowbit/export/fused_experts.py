"""Experts of a block in one stored tensor, as the loaders of gpt-oss read them.

Exporters see one linear of one expert at a time. Formats in `FUSED_EXPERTS` name what they store of it after its
weight; here is where that lies in the tensor of all experts. For P = model.layers.L.mlp.experts and expert e:

    of one expert                                 stored
    P.e.up_proj.weight_blocks  [I, H/32, 16]      P.gate_up_proj_blocks[e, 1::2]      of [E, 2I, H/32, 16]
    P.e.up_proj.weight         [I, H], floats     P.gate_up_proj[e, :, 1::2]          of [E, H, 2I]
    P.e.up_proj.bias           [I]                P.gate_up_proj_bias[e, 1::2]        of [E, 2I]
    P.e.down_proj.weight       [H, I], floats     P.down_proj[e, :, 0::1]             of [E, I, H]

Which rows, and whether floats are turned round, is the architecture's placement of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowbit.architecture import Architecture
from lowbit.architecture.structure import Part
from lowbit.architecture.table import FAMILIES
from lowbit.export import Piece
from lowbit.export.safetensors_writer import StoredTensor

# Formats that store the experts of such models fused; in others they lie one by one, or stay as they are.
FUSED_EXPERTS = ("mxfp4", "float")


@dataclass(frozen=True)
class Share:
    """What one expert has of a stored tensor: stored[expert, start::step], or [expert, :, start::step] if turned."""

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
    """True for model types whose files hold the experts of a block in one tensor."""
    family = FAMILIES.get(architecture.model_type)
    return family is not None and bool(family.fused_experts)


def find_shares(tensors: Iterable[StoredTensor], architecture: Architecture) -> dict[str, Share]:
    """Name of a tensor of one expert → its share in a stored one; other tensors are not in it.

    Empty for model types whose files hold experts one by one, and where the architecture has them in one piece.
    """
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
        found = places.get(f"{owner}.weight" if weight else tensor.name)
        if found is not None:
            fused, part, expert, experts = found
            shares[tensor.name] = _share(tensor, f"{fused}_{leaf}" if weight else fused, part, expert, experts)
    return shares


def _share(tensor: StoredTensor, name: str, part: Part, expert: int, experts: int) -> Share:
    step = part.step
    turned = part.transposed and tensor.dtype.is_floating_point
    rows, rest = tensor.shape[0] * step, tensor.shape[1:]
    shape = (experts, *rest, rows) if turned else (experts, rows, *rest)
    return Share(StoredTensor(name, tensor.dtype, shape), expert, part.start, step, turned)
