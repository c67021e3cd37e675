"""Formats that are known by name and not read are refused with the reason and a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from commands import command
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.quantized import KINDS
from lowbit.checkpoint.unreadable import UNREADABLE
from lowbit.errors import CheckpointError

FORMATS_PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


def folder_of(folder: Path, method: str) -> Path:
    save_file({"model.layers.0.mlp.up_proj.codes": torch.zeros(8, 4, dtype=torch.int16)}, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", [*UNREADABLE, "AQLM", "quip#"])
def test_each_is_refused_by_name(method, tmp_path):
    with pytest.raises(CheckpointError, match=f"says {method}, whose files cannot be read") as caught:
        open_checkpoint(folder_of(tmp_path, method))
    assert "16-bit checkpoint" in caught.value.hint


@pytest.mark.parametrize("words", [["inspect"], ["quantize", "-o", "out"]], ids=["inspect", "quantize"])
def test_commands_say_so_without_a_traceback(words, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    said = command(tmp_path, words[0], folder_of(folder, "aqlm"), *words[1:])
    assert said.code not in (0, None)
    assert "learned codebooks" in said.stderr
    assert "start from the 16-bit checkpoint" in said.stderr
    assert "Traceback" not in said.stderr


def test_none_of_them_is_read_after_all():
    assert not set(UNREADABLE) & set(KINDS)


@pytest.mark.parametrize("method", UNREADABLE)
def test_the_page_on_formats_has_a_line_for_each(method):
    assert f"`{method}`" in FORMATS_PAGE


MODES = {"affine": (torch.bfloat16, 64, True), "mxfp4": (torch.uint8, 32, False), "nvfp4": (torch.uint8, 16, False)}
STATED = {
    "both keys": lambda how: {"quantization": how, "quantization_config": how},
    "the old key": lambda how: {"quantization": how},
    "no key": lambda how: {},
    "a key left of GPTQ": lambda how: {"quantization": how, "quantization_config": {"quant_method": "gptq", "bits": 4}},
    "a list": lambda how: {"quantization_config": [how]},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("stated", STATED)
def test_mlx_is_told_by_its_layout(tmp_path, mode, bits, stated):
    """Its config.json names no method, or that of the model it was made of."""
    dtype, group, biased = MODES[mode]
    linear, words = "model.layers.0.mlp.up_proj", 128 * bits // 32
    tensors = {f"{linear}.weight": torch.zeros(8, words, dtype=torch.uint32),
               f"{linear}.scales": torch.zeros(8, 128 // group, dtype=dtype),
               "model.norm.weight": torch.ones(128)}  # fmt: skip
    if biased:
        tensors[f"{linear}.biases"] = torch.zeros(8, 128 // group, dtype=dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    how = {"group_size": group, "bits": bits, "mode": mode}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **STATED[stated](how)}))
    with pytest.raises(CheckpointError, match="the files are MLX's and cannot be read") as caught:
        open_checkpoint(tmp_path)
    assert "mlx_lm.convert --dequantize" in caught.value.hint
