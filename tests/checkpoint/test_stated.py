"""What config.json states, checked against the files: counts, kernels of the Hub, left-over quantizations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lowbit
from lowbit.architecture.shape import shape_of
from lowbit.checkpoint import OpenOptions, open_checkpoint
from lowbit.checkpoint.stated import stated_quantization, without_quantization
from lowbit.errors import CheckpointError

FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
LEFT_OVER = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_8bit": True},
    {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8}}},
    {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "awq", "bits": 4},
    {"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "quark"}, {},
]  # fmt: skip


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("stated", LEFT_OVER, ids=lambda stated: stated.get("quant_method", "unnamed"))
def test_a_quantization_over_plain_floats_is_dropped_with_a_note(folder, stated):
    edit_config(folder, quantization_config=stated)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == "safetensors"
    assert not checkpoint.config().get("quantization_config")
    assert bool(stated) == any("states a quantization" in note for note in checkpoint.notes)


def test_it_remains_nowhere_in_an_output(folder, tmp_path):
    edit_config(folder, compression_config=LEFT_OVER[2], quantization_config=LEFT_OVER[0])
    out = lowbit.quantize(str(folder), tmp_path / "out", scheme="W8A16", group_size=32).path
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert "compression_config" not in config
    nested = {"text_config": {"quantization_config": LEFT_OVER[0], "compression_config": {}, "a": 1}}
    assert without_quantization(nested) == {"text_config": {"a": 1}}
    assert stated_quantization(nested) == LEFT_OVER[0]


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("num_hidden_layers", 100), ("num_local_experts", 10**9),
                       ("num_attention_heads", 10**7)]
)  # fmt: skip
def test_counts_that_the_files_cannot_hold_are_refused_before_anything_is_built(folder, key, value):
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config.json: {key} is {value}, and the files hold 21 tensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "moe_intermediate_size"])
def test_sizes_beyond_the_largest_tensor_are_refused_by_every_command_that_opens(folder, key):
    edit_config(folder, **{key: 10**9})
    for look in (open_checkpoint, lowbit.advise, lambda model: lowbit.estimate(model, scheme="W4A16")):
        with pytest.raises(CheckpointError, match=rf"{key} is 1000000000, and the largest tensor holds \d+ numbers"):
            look(folder)
    with pytest.raises(CheckpointError, match=rf"{key} is 1000000000, and no model is so wide"):
        lowbit.advise(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(("key", "value"), [("dtype", ["x"]), ("torch_dtype", 16), ("dtype", True)])
def test_a_dtype_that_is_no_name_is_refused(folder, key, value):
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config.json: {key} is .*; the name of a dtype is needed"):
        open_checkpoint(folder)
    assert shape_of(json.loads((folder / "config.json").read_text())).hidden == 128


def test_a_count_deep_inside_is_found(folder):
    edit_config(folder, vision_config={"encoder": {"depth": 10**9}})
    with pytest.raises(CheckpointError, match="depth is 1000000000"):
        open_checkpoint(folder)


def test_kernels_of_the_hub_are_dropped_unless_code_is_trusted(folder):
    edit_config(folder, attn_implementation="org/kernel@main", _attn_implementation="sdpa")
    checkpoint = open_checkpoint(folder)
    assert "attn_implementation" not in checkpoint.config()
    assert checkpoint.config()["_attn_implementation"] == "sdpa"
    assert any("org/kernel@main" in note for note in checkpoint.notes)
    assert open_checkpoint(folder, OpenOptions(trust_remote_code=True)).config()["attn_implementation"]
