"""torchao folders: what is read from files made here by hand, and a test for each way in which they can be bad.

The metadata are copies of what transformers 5.23 writes with torchao 0.18; with `torchao` installed, whole models are
saved and compared.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from checkpoint.checkpoint_files import open_quantized
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError
from lowbit.schemes import SCHEMES
from lowbit.tensors import Granularity

SHAPE = (24, 64)
BFLOAT16 = {"_type": "torch.dtype", "_data": "bfloat16"}
PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
INT8_ROWS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {"granularity": PER_ROW, "mapping_type": SYMMETRIC, "reduce_range": False},
}
FP8_ROWS = {
    "_type": "QuantizeTensorToFloat8Kwargs",
    "_data": {"float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}, "granularity": PER_ROW},
}
METADATA = {
    "int8": {"_type": "Int8Tensor", "_data": {"act_quant_kwargs": None, "reduce_range": False, "block_size": [1, 64],
             "dtype": BFLOAT16}, "_tensor_data_names": ["zero_point", "qdata", "scale"]},
    "float8": {"_type": "Float8Tensor", "_data": {"block_size": [1, 64], "mm_config": None, "act_quant_kwargs": None,
               "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}, "dtype": BFLOAT16},
               "_tensor_data_names": ["qdata", "scale"]},
    "intx": {"_type": "IntxUnpackedToInt8Tensor", "_data": {"target_dtype": {"_type": "torch.dtype", "_data": "int4"},
             "block_size": [1, 32], "dtype": BFLOAT16, "activation_quantization": None},
             "_tensor_data_names": ["qdata", "scale", "zero_point"]},
}  # fmt: skip
CONFIG_CLASS = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig", "intx": "IntxWeightOnlyConfig"}


class Files:
    """A folder in the making, with one linear `l`: tensors, metadata and config, and the weight they stand for."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        data = {"mapping_type": dict(SYMMETRIC)} if kind == "intx" else {}
        stated = {"_type": CONFIG_CLASS[kind], "_data": data, "_version": 2}
        self.config: dict = {
            "quant_method": "torchao",
            "quant_type": {"default": stated},
            "modules_to_not_convert": None,
        }
        self.stated = copy.deepcopy(METADATA[kind])
        self.metadata = {"format": "pt"}
        random = torch.Generator().manual_seed(0)
        groups = 2 if kind == "intx" else 1
        scale = torch.rand(SHAPE[0], groups, generator=random) + 0.5
        scale = scale.to(torch.bfloat16) if kind == "intx" else scale
        if kind == "float8":
            qdata = (torch.randn(SHAPE, generator=random) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            limit = 8 if kind == "intx" else 128
            qdata = torch.randint(-limit, limit, SHAPE, generator=random, dtype=torch.int8)
        self.tensors = {"l._weight_qdata": qdata, "l._weight_scale": scale, "lm_head.weight": torch.ones(4, 8)}
        if kind != "float8":
            self.tensors["l._weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
        self.weight = qdata.float() * scale.float().repeat_interleave(SHAPE[1] // groups, 1)

    def open(self) -> Checkpoint:
        metadata = dict(self.metadata)
        if self.stated is not None:
            metadata["l.weight"] = self.stated if isinstance(self.stated, str) else json.dumps(self.stated)
        metadata["lm_head.weight"] = json.dumps({"_type": "Tensor"})
        metadata["tensor_names"] = json.dumps(["l.weight", "lm_head.weight"])
        return open_quantized(self.folder, self.tensors, self.config, metadata)


@pytest.fixture
def files(tmp_path):
    return lambda kind: Files(tmp_path, kind)


def refusal(files: Files) -> str:
    with pytest.raises(CheckpointError) as caught:
        files.open()
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize(("start", "stop"), [(0, 24), (0, 1), (5, 17)])
def test_decoded_weights(files, kind, start, stop):
    made = files(kind)
    checkpoint = made.open()
    assert list(checkpoint.schemes) == ["l.weight"]
    assert checkpoint.tensors["l.weight"].shape == SHAPE
    assert torch.equal(checkpoint.read("l.weight", start, stop), made.weight[start:stop])
    assert set(checkpoint.tensors) == {"l.weight", "lm_head.weight"}
    assert not checkpoint.says_quantized("lm_head")


def test_schemes(files):
    made = files("int8")
    assert made.open().schemes["l.weight"].weight == SCHEMES["W8A8"].weight
    assert made.open().schemes["l.weight"].activation is None
    made.stated["_data"]["act_quant_kwargs"] = INT8_ROWS
    assert made.open().schemes["l.weight"] == SCHEMES["W8A8"]
    made = files("float8")
    assert made.open().schemes["l.weight"].name == "FP8A16"
    made.stated["_data"]["act_quant_kwargs"] = FP8_ROWS
    assert made.open().schemes["l.weight"] == SCHEMES["FP8_DYNAMIC"]
    made = files("intx")
    assert made.open().schemes["l.weight"] == SCHEMES["W4A16"].with_group_size(32)
    made.stated["_data"]["activation_quantization"] = "int8_asym_per_token"
    activation = made.open().schemes["l.weight"].activation
    assert activation is not None
    assert (activation.number, activation.per, activation.symmetric) == ("int", "token", False)


def test_one_scale_for_all(files):
    made = files("int8")
    made.stated["_data"]["block_size"] = list(SHAPE)
    made.tensors["l._weight_scale"] = torch.tensor([[0.25]])
    made.tensors["l._weight_zero_point"] = torch.zeros(1, 1, dtype=torch.int8)
    checkpoint = made.open()
    assert checkpoint.schemes["l.weight"].weight.granularity is Granularity.TENSOR
    assert torch.equal(checkpoint.read("l.weight", 3, 9), made.tensors["l._weight_qdata"][3:9].float() * 0.25)


def test_asymmetric_codes(files):
    made = files("intx")
    made.config["quant_type"]["default"]["_data"]["mapping_type"]["_data"] = "ASYMMETRIC"
    zero = made.tensors["l._weight_zero_point"] = torch.randint(-8, 8, (24, 2), dtype=torch.int8)
    scale = made.tensors["l._weight_scale"].float().repeat_interleave(32, 1)
    expected = (made.tensors["l._weight_qdata"].float() - zero.float().repeat_interleave(32, 1)) * scale
    checkpoint = made.open()
    assert checkpoint.schemes["l.weight"].weight.symmetric is False
    assert torch.equal(checkpoint.read("l.weight"), expected)


def test_layers_with_configurations_of_their_own_are_asymmetric(files):
    """Nothing short of reading every zero point tells whether they are all zero."""
    made = files("intx")
    made.config["quant_type"]["default"] = {"_type": "FqnToConfig", "_data": {}, "_version": 1}
    checkpoint = made.open()
    assert checkpoint.schemes["l.weight"].weight.symmetric is False
    assert torch.equal(checkpoint.read("l.weight"), made.weight)


def test_a_zero_point_where_there_should_be_none(files):
    made = files("int8")
    made.tensors["l._weight_zero_point"][7] = 1
    checkpoint = made.open()
    with pytest.raises(CheckpointError, match=r"l\._weight_zero_point is not all zeros"):
        checkpoint.read("l.weight")


def test_float_zero_points(files):
    made = files("intx")
    made.tensors["l._weight_zero_point"] = made.tensors["l._weight_zero_point"].to(torch.bfloat16)
    assert "l._weight_zero_point is BF16" in refusal(made)


@pytest.mark.parametrize(
    "class_name", ["Int4Tensor", "Int4TilePackedTo4dTensor", "NVFP4Tensor", "MXTensor", "os.system"]
)
def test_other_classes(files, class_name):
    made = files("int8")
    made.stated["_type"] = class_name
    assert f"l.weight is a {class_name} of torchao" in refusal(made)


def test_config_names_another_configuration(files):
    made = files("float8")
    made.config["quant_type"]["default"]["_type"] = "Int8WeightOnlyConfig"
    assert "is a Float8Tensor; config.json says Int8WeightOnlyConfig" in refusal(made)


@pytest.mark.parametrize("stated", ["int4_weight_only", {"default": "int4_weight_only"}, None, {"default": {}}])
def test_configurations_by_name_are_of_old_releases(files, stated):
    made = files("int8")
    made.config["quant_type"] = stated
    assert "quant_type" in refusal(made)


def test_metadata_that_was_lost(files):
    made = files("int8")
    made.stated = None
    assert "header does not say" in refusal(made)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]"])
def test_metadata_that_is_no_object(files, text):
    made = files("int8")
    made.stated = text
    refusal(made)


def test_a_missing_part(files):
    for name in ("l._weight_scale", "l._weight_qdata", "l._weight_zero_point"):
        made = files("intx")
        del made.tensors[name]
        assert f"{name} " in refusal(made)


def test_all_parts_missing(files):
    made = files("int8")
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if name == "l._weight_scale"}
    assert "l._weight_qdata" in refusal(made)


def test_a_parameter_that_is_no_weight(files):
    made = files("int8")
    made.metadata["m.experts.gate_up_proj"] = json.dumps({"_type": "Int8Tensor"})
    assert "m.experts.gate_up_proj is a Int8Tensor" in refusal(made)


def test_scales_of_activation_channels(files):
    made = files("int8")
    made.stated["_tensor_data_names"].append("act_pre_scale")
    made.tensors["l._weight_act_pre_scale"] = torch.ones(64)
    assert "act_pre_scale" in refusal(made)


@pytest.mark.parametrize("block", [[1, 48], [2, 64], [1, 0], "all", [1, 32, 1], None])
def test_blocks_that_do_not_fit(files, block):
    made = files("int8")
    made.stated["_data"]["block_size"] = block
    refusal(made)


def test_scales_that_do_not_fit_the_block(files):
    made = files("int8")
    made.stated["_data"]["block_size"] = [1, 32]
    assert "l._weight_scale has shape [24, 1]; [24, 2] is needed" in refusal(made)


def test_codes_of_another_dtype(files):
    made = files("int8")
    made.tensors["l._weight_qdata"] = made.tensors["l._weight_qdata"].view(torch.uint8)
    assert "l._weight_qdata is uint8; int8 is needed" in refusal(made)
    made = files("float8")
    made.tensors["l._weight_qdata"] = torch.zeros(SHAPE, dtype=torch.float8_e5m2)
    assert "E5M2" in refusal(made)


@pytest.mark.parametrize("bits", ["int1", "int9", "uint4"])
def test_other_widths(files, bits):
    made = files("intx")
    made.stated["_data"]["target_dtype"]["_data"] = bits
    assert "target_dtype" in refusal(made)


def test_other_activations(files):
    made = files("intx")
    made.stated["_data"]["activation_quantization"] = "int4"
    assert "activation_quantization is int4" in refusal(made)
    made = files("int8")
    made.stated["_data"]["act_quant_kwargs"] = copy.deepcopy(INT8_ROWS)
    made.stated["_data"]["act_quant_kwargs"]["_data"]["mapping_type"]["_data"] = "ASYMMETRIC"
    assert "act_quant_kwargs" in refusal(made)


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["int8", "int8_tensor", "int8_group", "int8_dynamic", "float8", "intx4", "intx3_asym"])
def test_models_that_transformers_saved(tmp_path, kind):
    pytest.importorskip("torchao")
    transformers = pytest.importorskip("transformers")
    from torchao import quantization as ao

    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int8_tensor": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
        "int8_group": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
        "int8_dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "float8": lambda: ao.Float8WeightOnlyConfig(),
        "intx4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "intx3_asym": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int3, granularity=ao.PerGroup(32), mapping_type=ao.MappingType.ASYMMETRIC
        ),
    }
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=transformers.TorchAoConfig(configs[kind]()), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "quantized")
    checkpoint = open_checkpoint(tmp_path / "quantized")
    assert checkpoint.schemes
    assert len(checkpoint.schemes) == 7
    for name in checkpoint.schemes:
        theirs = model.get_parameter(name).dequantize()
        assert torch.equal(checkpoint.read(name).to(theirs.dtype), theirs)
