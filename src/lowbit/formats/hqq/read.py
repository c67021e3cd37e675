"""HQQ folders (quant_method "hqq"): refused, with the reason.

For a linear `L` with weight [N, K], as HQQ 0.2.8 stores it, beside L.nbits, L.shape, L.axis, L.packing and more:

    L.W_q     uint8, int32 (3 bits) or any float dtype that the bytes were viewed as (`view_as_float`)
    L.scale, L.zero   16-bit floats      W = (codes − zero) · scale

Three things stand against reading it. zero is a float that the method optimises: it lies between codes, while a zero
point of QuantizedTensor, and of every format that lowbit writes, is a code. Which weights share a scale depends on
`axis`, and a byte packs rows from distant halves or quarters of the regrouped matrix, so that no rows of the weight lie
together. And the layout has no version: keys of the state come and go between releases, and transformers 5 neither
quantizes with it nor loads it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError


def refuse_hqq(stored: Checkpoint, quantization: dict[str, Any]) -> NoReturn:
    """Raises CheckpointError: see the module docstring."""
    raise CheckpointError(
        f"{stored.source}: config.json says hqq, whose files cannot be read: its zero points are floats between codes, "
        f"which no other format can hold, and its layout has no version",
        "start from the 16-bit checkpoint, or save the decoded weights with the hqq library (HQQLinear.dequantize)",
    )
