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
