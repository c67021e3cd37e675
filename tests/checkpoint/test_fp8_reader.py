"""Native FP8 folders: what is read from files made here by hand, and a test for each way in which they can be bad."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint.checkpoint_files import open_quantized
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError
from lowbit.schemes import SCHEMES
from lowbit.tensors import Granularity

SHAPE = (200, 320)
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
          "modules_to_not_convert": ["lm_head"]}  # fmt: skip


class Files:
    """A folder in the making, with one linear `l` in blocks or with one scale, and a bfloat16 output head."""

    def __init__(self, folder: Path, config: dict):
        self.folder, self.config = folder, dict(config)
        random = torch.Generator().manual_seed(0)
        codes = (torch.randn(SHAPE, generator=random) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        self.tensors = {"l.weight": codes, "lm_head.weight": torch.ones(4, 8, dtype=torch.bfloat16)}
        if config["weight_block_size"] is None:
            self.tensors |= {"l.weight_scale_inv": torch.tensor(0.75), "l.activation_scale": torch.tensor(0.5)}
            self.weight = codes.float() * 0.75
        else:
            scale = torch.rand(2, 3, generator=random) + 0.5
            by_weight = scale.repeat_interleave(128, 0)[: SHAPE[0]].repeat_interleave(128, 1)[:, : SHAPE[1]]
            self.tensors["l.weight_scale_inv"] = scale
            self.weight = codes.float() * by_weight

    def open(self) -> Checkpoint:
        return open_quantized(self.folder, self.tensors, self.config)


@pytest.fixture
def blocks(tmp_path):
    return Files(tmp_path, BLOCKS)


@pytest.fixture
def static(tmp_path):
    return Files(tmp_path, STATIC)


def refusal(files: Files) -> str:
    with pytest.raises(CheckpointError) as caught:
        files.open()
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize(("start", "stop"), [(0, 200), (0, 1), (7, 130), (128, 200), (131, 200)])
def test_blocks(blocks, start, stop):
    """The scale multiplies, whatever its name says; the last blocks are cut in both directions."""
    checkpoint = blocks.open()
    assert checkpoint.schemes == {"l.weight": SCHEMES["FP8_BLOCK"]}
    assert torch.equal(checkpoint.read("l.weight", start, stop), blocks.weight[start:stop])
    assert checkpoint.row_multiple("l.weight") == 128
    assert checkpoint.read_quantized("l.weight", 128).granularity is Granularity.BLOCK


def test_golden_bytes(static):
    """0x38 is 1, 0x7E the largest, 0x01 the smallest; the scale is 0.75."""
    static.tensors["l.weight"].view(torch.uint8)[0, :4] = torch.tensor([0x38, 0x7E, 0x01, 0xB8], dtype=torch.uint8)
    assert static.open().read("l.weight", 0, 1)[0, :4].tolist() == [0.75, 336.0, 0.75 * 2.0**-9, -0.75]


def test_what_is_not_listed_is_read_off_the_files(blocks):
    """DeepSeek-V3 has no list: its output head, routers and embeddings are 16-bit tensors."""
    checkpoint = blocks.open()
    assert checkpoint.says_quantized("l")
    assert not checkpoint.says_quantized("lm_head")
    assert any("16 bits" in note for note in checkpoint.notes)


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_a_list_is_believed(blocks, key):
    blocks.config[key] = ["lm_head", "model.layers.0.self_attn", r"model\.layers\.\d+\.mlp\.gate", "embed"]
    checkpoint = blocks.open()
    left_alone = ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.gate", "model.embed")
    assert [name for name in left_alone if checkpoint.says_quantized(name)] == []
    assert checkpoint.says_quantized("model.layers.3.mlp.gate_proj")
    assert checkpoint.says_quantized("model.layers.1.self_attn.q_proj")


def test_power_of_two_scales(blocks):
    scale = torch.tensor([[1, 2, 4], [0.5, 0.25, 8]])
    blocks.config["scale_fmt"] = "ue8m0"
    blocks.tensors["l.weight_scale_inv"] = scale.to(torch.float8_e8m0fnu)
    by_weight = scale.repeat_interleave(128, 0)[: SHAPE[0]].repeat_interleave(128, 1)[:, : SHAPE[1]]
    assert torch.equal(blocks.open().read("l.weight"), blocks.tensors["l.weight"].float() * by_weight)


def test_other_squares(blocks):
    blocks.config["weight_block_size"] = [64, 64]
    scale = blocks.tensors["l.weight_scale_inv"] = torch.rand(4, 5) + 0.5
    checkpoint = blocks.open()
    by_weight = scale.repeat_interleave(64, 0)[: SHAPE[0]].repeat_interleave(64, 1)
    assert torch.equal(checkpoint.read("l.weight", 70), (blocks.tensors["l.weight"].float() * by_weight)[70:])
    assert checkpoint.schemes["l.weight"].weight.group_size == 64


@pytest.mark.parametrize(
    "names", [("weight_scale_inv", "activation_scale"), ("weight_scale", "input_scale")], ids=["transformers", "vllm"]
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_with_static_activations(static, names, shape):
    for old, new in zip(("weight_scale_inv", "activation_scale"), names, strict=True):
        static.tensors[f"l.{new}"] = static.tensors.pop(f"l.{old}").reshape(shape)
    checkpoint = static.open()
    assert checkpoint.schemes == {"l.weight": SCHEMES["FP8"]}
    assert checkpoint.input_scales == {"l.weight": 0.5}
    assert torch.equal(checkpoint.read("l.weight", 50, 60), static.weight[50:60])


def test_one_scale_with_dynamic_activations(static):
    static.config["activation_scheme"] = "dynamic"
    del static.tensors["l.activation_scale"]
    checkpoint = static.open()
    scheme = checkpoint.schemes["l.weight"]
    assert (scheme.weight, scheme.activation) == (SCHEMES["FP8"].weight, SCHEMES["FP8_DYNAMIC"].activation)
    assert torch.equal(checkpoint.read("l.weight"), static.weight)


@pytest.mark.parametrize("number", ["e5m2", "e4m3fnuz", "float8_e4m3fnuz", None])
def test_another_number_format(blocks, number):
    blocks.config["fmt"] = number
    assert f"fmt is '{number}'" in refusal(blocks)


def test_blocks_that_are_no_squares(blocks):
    for block in ([1, 32], [128], 128, [0, 0], [True, True], [2**40, 2**40]):
        blocks.config["weight_block_size"] = block
        assert "weight_block_size" in refusal(blocks)


def test_packed_fp4_experts(blocks):
    blocks.config["expert_dtype"] = "fp4"
    assert "expert_dtype" in refusal(blocks)


@pytest.mark.parametrize("value", [None, "static", "none"])
def test_blocks_need_dynamic_activations(blocks, value):
    blocks.config["activation_scheme"] = value
    assert "activation_scheme" in refusal(blocks)


def test_scales_that_do_not_fit_the_blocks(blocks):
    blocks.tensors["l.weight_scale_inv"] = torch.ones(2, 2)
    assert "l.weight_scale_inv has shape [2, 2]; [2, 3] is needed; config.json says fp8, FP8_BLOCK" in refusal(blocks)


def test_a_weight_without_its_scale(blocks):
    del blocks.tensors["l.weight_scale_inv"]
    assert "l.weight_scale_inv [2, 3] is absent" in refusal(blocks)


def test_a_scale_without_its_weight(blocks):
    del blocks.tensors["l.weight"]
    assert "l.weight is absent" in refusal(blocks)


def test_static_activations_without_their_scale(static):
    del static.tensors["l.activation_scale"]
    assert "l.activation_scale [] is absent" in refusal(static)


def test_a_scale_beside_a_16_bit_weight(blocks):
    blocks.tensors["l.weight"] = blocks.tensors["l.weight"].to(torch.bfloat16)
    assert "l.weight" in refusal(blocks)


def test_an_fp8_weight_that_config_leaves_out(static):
    static.config["modules_to_not_convert"] = ["l"]
    assert "config.json does not say how l is quantized" in refusal(static)


@pytest.mark.parametrize("entries", ["lm_head", [3], ["("], [""]])
def test_a_list_of_another_kind(static, entries):
    static.config["modules_to_not_convert"] = entries
    assert "modules_to_not_convert" in refusal(static)


@pytest.mark.interop
def test_transformers_decodes_the_same(blocks):
    """Of a weight that blocks divide: transformers refuses others on a machine without a GPU."""
    operations = pytest.importorskip("transformers.integrations.finegrained_fp8")
    blocks.tensors["l.weight"] = blocks.tensors["l.weight"][:128, :256].contiguous()
    blocks.tensors["l.weight_scale_inv"] = blocks.tensors["l.weight_scale_inv"][:1, :2].contiguous()
    decoded = operations.Fp8Dequantize(None)._dequantize_one(
        blocks.tensors["l.weight"], blocks.tensors["l.weight_scale_inv"], torch.float32
    )
    assert torch.equal(blocks.open().read("l.weight"), decoded)
