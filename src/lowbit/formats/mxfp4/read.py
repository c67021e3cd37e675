"""gpt-oss as OpenAI ships it (quant_method "mxfp4"), read: the experts of a block in fused 4-bit tensors.

For P = model.layers.L.mlp.experts, E experts, hidden size H, expert size I:
write.py pictures the fused tensors P.gate_up_proj_{blocks,scales} and P.down_proj_{blocks,scales}. They appear as
P.e.gate_proj.weight (rows 0::2), P.e.up_proj.weight (rows 1::2) and P.e.down_proj.weight, codes E2M1 with power-of-two
scales. Biases (P.gate_up_proj_bias [E, 2I], P.down_proj_bias [E, H]), attention, router, embeddings appear as stored.
Spec: `convert_moe_packed_tensors` and `GptOssExperts` of transformers 5.23.

Refused: blocks without scales and the reverse, a gate_up_proj with an odd number of rows, fused tensors of other names
(the names of OpenAI's own release in the folder original/), experts of which some are in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import Expected, Layout
from lowbit.errors import CheckpointError
from lowbit.numerics import grid_for
from lowbit.numerics.scales import e8m0_values
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import Granularity, QuantizedTensor

SCHEME = SCHEMES["MXFP4A16"]
_BLOCK_COLUMNS = 32
_BLOCK_BYTES = 16
# fused tensor → (leaf of a single expert, first row, step)
_PARTS = {
    "gate_up_proj": (("gate_proj", 0, 2), ("up_proj", 1, 2)),
    "down_proj": (("down_proj", 0, 1),),
}
_HINT = "the files and config.json do not belong together, or a download is incomplete"


@dataclass(frozen=True)
class _Place:
    """Where a linear lies: rows first::step of expert `expert` of `fused`_blocks and `fused`_scales."""

    fused: str
    expert: int
    first: int
    step: int


class Mxfp4Layout(Layout):
    """Only experts are ever packed: `modules_to_not_convert` of config.json adds nothing."""

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self.notes = ["the experts of a layer are stored in one tensor, gate and up in alternating rows"]
        self.places: dict[str, _Place] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        for name in stored.tensors:
            if name.endswith(("_blocks", "_scales", ".blocks", ".scales")):
                self._add_fused(name[: -len("_blocks")])
        self._refuse_16_bit_experts()

    def linears(self) -> dict[str, tuple[int, int]]:
        return dict(self.shapes)

    def scheme_of(self, linear: str) -> Scheme | None:
        return SCHEME if linear in self.places else None

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        """Blocks were looked at when the folder was opened; scales must fit them."""
        fused = self.places[linear].fused
        blocks = tuple(self.stored.tensors[f"{fused}_blocks"].shape)
        return {
            f"{fused}_blocks": Expected((torch.uint8,), blocks),
            f"{fused}_scales": Expected((torch.uint8,), blocks[:3]),
        }

    def owned(self, linear: str) -> list[str]:
        """Shared by all experts of a block."""
        fused = self.places[linear].fused
        return [f"{fused}_blocks", f"{fused}_scales"]

    def scale_dtype(self, linear: str) -> torch.dtype:
        return torch.uint8

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        place = self.places[linear]
        blocks, scales = (
            self.stored.read(f"{place.fused}_{leaf}", place.expert, place.expert + 1)[0, place.first :: place.step]
            for leaf in ("blocks", "scales")
        )
        codes = kernels.unpack_nibbles(blocks[start:stop].reshape(stop - start, shape[1] // 2))
        grid = grid_for(SCHEME.weight, "float32")
        return QuantizedTensor(codes, e8m0_values(scales[start:stop]), grid, Granularity.GROUP, _BLOCK_COLUMNS)

    def _add_fused(self, fused: str) -> None:
        """The linears of a pair of fused tensors."""
        tensors = self.stored.tensors
        path, _, leaf = fused.rpartition(".")
        blocks, scales = tensors.get(f"{fused}_blocks"), tensors.get(f"{fused}_scales")
        if leaf not in _PARTS or not path.endswith(".experts"):
            raise CheckpointError(
                f"{self.stored.source}: {fused}_blocks is no fused tensor of gpt-oss as transformers names them "
                f"({', '.join(f'….mlp.experts.{name}_blocks' for name in _PARTS)})",
                "take the files beside config.json, not those of the folder original/",
            )
        if blocks is None or scales is None:
            there, absent = ("scales", "blocks") if blocks is None else ("blocks", "scales")
            raise CheckpointError(f"{self.stored.source}: {fused}_{there} is there, {fused}_{absent} is absent", _HINT)
        shape, parts = tuple(blocks.shape), _PARTS[leaf]
        if len(shape) != 4 or 0 in shape or shape[3] != _BLOCK_BYTES or shape[1] % len(parts):
            raise CheckpointError(
                f"{blocks.file}: {blocks.name} has shape {list(shape)}; [experts, rows, blocks of 32 columns, 16]"
                f"{', rows even,' if len(parts) > 1 else ''} is needed",
                _HINT,
            )
        for expert in range(shape[0]):
            for name, first, step in parts:
                linear = f"{path}.{expert}.{name}"
                self.places[linear] = _Place(fused, expert, first, step)
                self.shapes[linear] = (shape[1] // step, shape[2] * _BLOCK_COLUMNS)

    def _refuse_16_bit_experts(self) -> None:
        if not self.places:
            raise CheckpointError(
                f"{self.stored.source}: config.json says mxfp4, but there is no ….mlp.experts.gate_up_proj_blocks",
                "the files are of another checkpoint, perhaps of one that was decoded: remove quantization_config then",
            )
        for name, info in self.stored.tensors.items():
            path, _, leaf = name.rpartition(".")
            if path.endswith(".experts") and leaf in _PARTS:
                raise CheckpointError(
                    f"{info.file}: {name} is {info.stored}, while experts of other layers are packed; config.json says "
                    f"mxfp4 of all",
                    _HINT,
                )
