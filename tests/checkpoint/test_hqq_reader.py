"""HQQ folders are refused, and the reason is said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError


def test_hqq_is_refused_by_name(tmp_path):
    tensors = {
        "l.W_q": torch.zeros(32, 64, dtype=torch.uint8),
        "l.scale": torch.ones(64, 1),
        "l.zero": torch.ones(64, 1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 1}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(CheckpointError, match="zero points are floats") as caught:
        open_checkpoint(tmp_path)
    assert "16-bit checkpoint" in caught.value.hint
