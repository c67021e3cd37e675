"""FBGEMM's FP8 folders (quant_method "fbgemm_fp8", Meta's Llama 3.1 405B): ModelOpt's tensors of FP8 per row.

    L.weight float8_e4m3fn [N, K]   L.weight_scale float [N, 1] (or [N])   decoded = value · weight_scale
    config.json   activation_scale_ub: bound of the dynamic scale of a token's range; modules_to_not_convert

Activations are FP8 per token, dynamic. The bound is not simulated, and a note says so.
Spec: integrations/fbgemm_fp8.py of transformers 5.23, fbgemm_fp8.py of vLLM.
"""

from __future__ import annotations

from typing import Any

from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import Layout
from lowbit.registry import FORMATS, load


def open_fbgemm_fp8(stored: Checkpoint, quantization: dict[str, Any]) -> Layout:
    """The layout of the tensors, restated in ModelOpt's terms."""
    stated = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
              "ignore": quantization.get("modules_to_not_convert")}  # fmt: skip
    layout: Layout = load(FORMATS["modelopt"].read or "")(stored, stated)
    bound = quantization.get("activation_scale_ub")
    if bound is not None:
        layout.notes.append(f"activation_scale_ub {bound}: the bound on scales of activations is not simulated")
    return layout
