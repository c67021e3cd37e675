"""Blocks for multi-token prediction (MTP, nextn) that stay in 16 bits are declared so, and verify looks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from models import make_model


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory) -> Path:
    """A DeepSeek-V3 with a multi-token prediction block."""
    folder = make_model(tmp_path_factory.mktemp("mtp") / "model", "deepseek_v3")
    state = load_file(folder / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): value + 1 for name, value in state.items() if ".layers.1." in name}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(128, 256).to(torch.bfloat16)
    save_file({**state, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("setting", [("W4A16", "compressed-tensors"), ("W4A16", "gptq"), ("W4A16_ASYM", "awq")])
def test_multi_token_prediction_blocks_are_declared_and_verify_looks(with_mtp, tmp_path, setting):
    """vLLM raises where q_a_proj is listed and kv_a_proj_with_mqa, with which it is fused, is not."""
    scheme, format = setting
    lowbit.quantize(with_mtp, tmp_path / "out", scheme=scheme, format=format, group_size=32, threads=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization_config"]
    key = {"compressed-tensors": "ignore", "gptq": "dynamic", "awq": "modules_to_not_convert"}[format]
    listed = quantization[key]
    for leaf in ("self_attn.kv_a_proj_with_mqa", "eh_proj", "mlp.gate", "mlp.experts.0.up_proj"):
        assert any(leaf in re.sub(r"\\", "", entry) and "2" in entry for entry in listed), leaf
    assert lowbit.verify(tmp_path / "out").ok
    without = [entry for entry in listed if "eh_proj" not in re.sub(r"\\", "", entry)]
    quantization[key] = {entry: listed[entry] for entry in without} if isinstance(listed, dict) else without
    quantization.pop("modules_in_block_to_quantize", None)  # a list of what is quantized, in GPTQ's files
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    if format == "gptq":
        (tmp_path / "out" / "quantize_config.json").write_text(json.dumps(quantization))
    failed = [check.rule for check in lowbit.verify(tmp_path / "out").checks if not check.passed]
    assert "prediction-blocks" in failed
