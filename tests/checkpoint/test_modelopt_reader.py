"""ModelOpt folders: what is read from files made here by hand, and a test for each way in which they can be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError
from lowbit.schemes import SCHEMES

SHAPE = (200, 256)
FLOAT8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Files:
    """A folder in the making: tensors and config, to be spoiled, and the weight that good ones decode to."""

    def __init__(self, folder: Path, algorithm: str):
        self.folder = folder
        self.config: dict = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
        self.companion: dict | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        getattr(self, f"_{algorithm.lower()}")(torch.Generator().manual_seed(0))
        self.tensors["lm_head.weight"] = torch.ones(4, 8, dtype=torch.bfloat16)

    def write(self) -> Path:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.folder / "model.safetensors"
        )
        config = {} if self.config is None else {"quantization_config": self.config}
        (self.folder / "config.json").write_text(json.dumps(config))
        if self.companion is not None:
            (self.folder / "hf_quant_config.json").write_text(json.dumps(self.companion))
        return self.folder

    def open(self) -> Checkpoint:
        checkpoint = open_checkpoint(self.write())
        assert checkpoint.schemes
        return checkpoint

    def _float8(self, random) -> torch.Tensor:
        codes = (torch.randn(SHAPE, generator=random) * 100).clamp(-448, 448).to(FLOAT8)
        self.tensors["l.weight"] = codes
        return codes.float()

    def _fp8(self, random) -> None:
        self.weight = self._float8(random) * 0.03125
        self.tensors |= {"l.weight_scale": torch.tensor(0.03125), "l.input_scale": torch.tensor(0.5)}

    def _fp8_per_channel_per_token(self, random) -> None:
        scale = torch.rand(SHAPE[0], generator=random) + 0.5
        self.weight = self._float8(random) * scale[:, None]
        self.tensors["l.weight_scale"] = scale

    def _fp8_pb_wo(self, random) -> None:
        scale = torch.rand(2, 1, 2, 1, generator=random) + 0.5
        by_weight = scale[:, 0, :, 0].repeat_interleave(128, 0)[: SHAPE[0]].repeat_interleave(128, 1)
        self.weight = self._float8(random) * by_weight
        self.tensors["l.weight_scale"] = scale

    def _w4a16_nvfp4(self, random) -> None:
        codes = torch.randint(0, 16, SHAPE, generator=random, dtype=torch.uint8)
        scale = (torch.rand(SHAPE[0], SHAPE[1] // 16, generator=random) * 400 + 1).to(FLOAT8)
        second = torch.tensor(0.0123)
        self.tensors["l.weight"] = codes[:, 0::2] | codes[:, 1::2] << 4
        self.tensors |= {"l.weight_scale": scale, "l.weight_scale_2": second}
        self.weight = E2M1[codes.long()] * (scale.float() * second).repeat_interleave(16, 1)

    def _nvfp4(self, random) -> None:
        self._w4a16_nvfp4(random)
        self.tensors["l.input_scale"] = torch.tensor(0.25)

    def _mxfp8(self, random) -> None:
        exponents = torch.randint(100, 140, (SHAPE[0], SHAPE[1] // 32), generator=random, dtype=torch.uint8)
        self.weight = self._float8(random) * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
        self.tensors["l.weight_scale"] = exponents

    def _w4a16_awq(self, random) -> None:
        codes = torch.randint(-8, 8, SHAPE, generator=random, dtype=torch.int8)
        scale = torch.rand(SHAPE[0], SHAPE[1] // 64, generator=random) + 0.5
        nibbles = (codes & 0x0F).to(torch.uint8)
        self.tensors |= {"l.weight": nibbles[0::2] | nibbles[1::2] << 4, "l.weight_scale": scale}
        self.weight = codes.float() * scale.repeat_interleave(64, 1)
        self.config["group_size"] = 64

    def _w4a8_awq(self, random) -> None:
        self._w4a16_awq(random)
        self.tensors |= {"l.weight_scale_2": torch.tensor(0.03), "l.input_scale": torch.tensor(0.125)}

    def _w8a16(self, random) -> None:
        codes = torch.randint(-128, 128, SHAPE, generator=random, dtype=torch.int8)
        scale = torch.rand(SHAPE[0], generator=random) + 0.5
        self.tensors |= {"l.weight": codes, "l.weight_scale": scale}
        self.weight = codes.float() * scale[:, None]

    def _w8a8_sq_per_channel_per_token_plugin(self, random) -> None:
        self._w8a16(random)

    def _w8a8_sq_per_channel(self, random) -> None:
        self._w8a16(random)
        self.tensors["l.input_scale"] = torch.tensor(0.25)

    def _w8a8_sq_per_tensor_per_token_plugin(self, random) -> None:
        self._w8a16(random)
        self.tensors["l.weight_scale"] = torch.tensor(0.75)
        self.weight = self.tensors["l.weight"].float() * 0.75


ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "W4A16_AWQ", "W4A8_AWQ", "W8A16",
    "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
)  # fmt: skip
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture
def files(tmp_path):
    return lambda algorithm: Files(tmp_path, algorithm)


def refusal(files: Files) -> str:
    with pytest.raises(CheckpointError) as caught:
        files.open()
    assert caught.value.hint
    return str(caught.value)


@EVERY
def test_decoded_weights(files, algorithm):
    made = files(algorithm)
    checkpoint = made.open()
    assert list(checkpoint.schemes) == ["l.weight"]
    assert checkpoint.tensors["l.weight"].shape == SHAPE
    assert torch.equal(checkpoint.read("l.weight"), made.weight)
    assert checkpoint.tensors["lm_head.weight"].dtype == torch.bfloat16


@EVERY
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (7, 130), (128, 200), (131, 200), (199, 200)])
def test_slabs_are_rows_of_the_whole(files, algorithm, start, stop):
    made = files(algorithm)
    assert torch.equal(made.open().read("l.weight", start, stop), made.weight[start:stop])


@EVERY
def test_codes_begin_where_rows_may(files, algorithm):
    made = files(algorithm)
    checkpoint = made.open()
    multiple = checkpoint.row_multiple("l.weight")
    assert multiple == {"FP8_PB_WO": 128, "W4A16_AWQ": 2, "W4A8_AWQ": 2}.get(algorithm, 1)
    slab = checkpoint.read_quantized("l.weight", 128, 200)
    assert torch.equal(slab.decode(), made.weight[128:])


def test_input_scales_and_scale_dtypes(files):
    assert files("FP8").open().input_scales == {"l.weight": 0.5}
    nvfp4 = files("NVFP4").open()
    assert nvfp4.input_scales == {"l.weight": 0.25}
    assert nvfp4.scale_dtype("l.weight") == torch.float32
    assert files("W4A16_NVFP4").open().input_scales == {}
    assert files("W8A8_SQ_PER_CHANNEL").open().input_scales == {"l.weight": 0.25}
    assert files("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN").open().input_scales == {}
    assert files("W4A8_AWQ").open().input_scales == {"l.weight": 0.125}


def test_the_range_of_w4a8_changes_no_value(files):
    """Kernels divide by weight_scale_2 and multiply by it again."""
    made = files("W4A8_AWQ")
    checkpoint = made.open()
    assert checkpoint.schemes["l.weight"] == SCHEMES["W4AFP8_STATIC"].with_group_size(64)
    assert checkpoint.read_quantized("l.weight").global_scale == pytest.approx(0.03)


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4"])
def test_scaled_columns_are_scaled_back(files, algorithm):
    """pre_quant_scale multiplies the input: y = Σ (x p) w = Σ x (p w)."""
    made = files(algorithm)
    made.config["quant_algo"] = {"NVFP4": "NVFP4_AWQ"}.get(algorithm, algorithm)
    scale = torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(1)) + 0.5
    made.tensors["l.pre_quant_scale"] = scale
    checkpoint = made.open()
    assert torch.equal(checkpoint.read("l.weight", 3, 90), (made.weight * scale)[3:90])
    assert torch.equal(checkpoint.read_quantized("l.weight").decode(), made.weight)
    x = torch.randn(5, SHAPE[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    transform = checkpoint.rotations["l.weight"]  # type: ignore[attr-defined]
    engine = transform.inputs(x) @ made.weight.double().t()
    torch.testing.assert_close(engine, x @ checkpoint.read("l.weight").double().t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(transform.inputs_back(transform.inputs(x)), x)
    torch.testing.assert_close(transform.columns(checkpoint.read("l.weight")), made.weight)


def test_scales_of_one_are_none(files):
    made = files("W4A16_AWQ")
    made.tensors["l.pre_quant_scale"] = torch.ones(1, SHAPE[1], dtype=torch.bfloat16)
    checkpoint = made.open()
    assert checkpoint.rotations == {}  # type: ignore[attr-defined]
    assert torch.equal(checkpoint.read("l.weight"), made.weight)


def test_lower_case_and_tensorrt_llms_spelling_are_the_same_algorithm(files):
    made = files("FP8_PB_WO")
    for spelling in ("fp8_pb_wo", "FP8_BLOCK_SCALES"):
        made.config["quant_algo"] = spelling
        assert made.open().schemes["l.weight"] == SCHEMES["FP8_BLOCK"]


@pytest.mark.parametrize(
    ("algorithm", "name", "shape"),
    [("FP8", "l.weight_scale", (1,)), ("FP8", "l.input_scale", (1,)), ("NVFP4", "l.weight_scale_2", (1,)),
     ("FP8_PER_CHANNEL_PER_TOKEN", "l.weight_scale", (200, 1)), ("FP8_PB_WO", "l.weight_scale", (2, 2))],
)  # fmt: skip
def test_scales_with_dimensions_of_one_more_or_less(files, algorithm, name, shape):
    made = files(algorithm)
    made.tensors[name] = made.tensors[name].reshape(shape)
    assert torch.equal(made.open().read("l.weight", 3, 150), made.weight[3:150])


def test_hf_quant_config_alone(files):
    made = files("NVFP4")
    made.config = None
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    made.companion = {"producer": {"name": "modelopt", "version": "0.15.0"}, "quantization": quantization}
    assert torch.equal(made.open().read("l.weight"), made.weight)


def test_both_files_that_agree(files):
    made = files("W4A16_AWQ")
    del made.config["group_size"]
    made.companion = {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 64, "exclude_modules": ["lm_head"]}}
    assert torch.equal(made.open().read("l.weight"), made.weight)


def test_config_groups_without_activations_mean_weight_only(files):
    """As vLLM takes them."""
    made = files("W4A16_NVFP4")
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    made.config |= {"quant_algo": "NVFP4", "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
    checkpoint = made.open()
    assert checkpoint.schemes["l.weight"] == SCHEMES["NVFP4A16"]
    assert torch.equal(checkpoint.read("l.weight"), made.weight)


@pytest.mark.parametrize("listed", ["model.l", "model"])
def test_mixed_precision_layer_by_layer(files, listed):
    """A layer may be listed by a parent, as fused experts are."""
    made = files("FP8")
    made.tensors = {f"model.{name}" if name.startswith("l.") else name: t for name, t in made.tensors.items()}
    layers = {listed: {"quant_algo": "FP8", "group_size": 0}, "other": {"quant_algo": "NVFP4", "group_size": 16}}
    made.config |= {"quant_algo": "MIXED_PRECISION", "ignore": [], "quantized_layers": layers}
    checkpoint = made.open()
    assert checkpoint.schemes == {"model.l.weight": SCHEMES["FP8"]}
    assert torch.equal(checkpoint.read("model.l.weight"), made.weight)
    assert not checkpoint.says_quantized("lm_head")


def test_exceptions_are_wildcards_and_parts_of_names(files):
    made = files("FP8")
    names = ("model.layers.0.mlp.gate", "model.layers.10.self_attn.q_proj", "vision.head")
    made.tensors |= {f"{name}.weight": torch.ones(4, 8, dtype=torch.bfloat16) for name in names}
    made.config["ignore"] = ["lm_head", "model.layers.0*", "vision", "*.q_proj"]
    checkpoint = made.open()
    assert [name for name in (*names, "lm_head", "l") if checkpoint.says_quantized(name)] == ["l"]


def test_missing_scale(files):
    for algorithm, name in (("FP8", "l.weight_scale"), ("FP8", "l.input_scale"), ("NVFP4", "l.weight_scale_2"),
                            ("NVFP4", "l.weight_scale"), ("NVFP4", "l.input_scale")):  # fmt: skip
        made = files(algorithm)
        del made.tensors[name]
        assert f"{name} " in refusal(made)
        assert "is absent; config.json says modelopt" in refusal(made)


def test_missing_weight(files):
    made = files("NVFP4")
    del made.tensors["l.weight"]
    assert "l.weight is absent" in refusal(made)


def test_config_says_nvfp4_and_the_tensors_are_fp8(files):
    made = files("FP8")
    made.config["quant_algo"] = "NVFP4"
    assert "l.weight is float8_e4m3fn; uint8 is needed; config.json says modelopt, NVFP4" in refusal(made)


def test_config_says_fp8_and_the_tensors_are_nvfp4(files):
    made = files("NVFP4")
    made.config["quant_algo"] = "FP8"
    assert "l.weight is uint8; float8_e4m3fn is needed" in refusal(made)


def test_scales_that_do_not_fit_the_groups(files):
    made = files("NVFP4")
    made.tensors["l.weight_scale"] = made.tensors["l.weight_scale"][:, ::2]
    assert "l.weight_scale has shape [200, 8]; [200, 16] is needed" in refusal(made)


def test_scales_of_another_dtype(files):
    made = files("NVFP4")
    made.tensors["l.weight_scale"] = made.tensors["l.weight_scale"].float()
    assert "l.weight_scale is float32; float8_e4m3fn is needed" in refusal(made)


def test_a_quantized_linear_that_config_leaves_out(files):
    made = files("FP8")
    made.config["ignore"] = ["l*"]
    assert "config.json does not say how l is quantized" in refusal(made)


@pytest.mark.parametrize("algorithm", [None, "W8A8_SQ_PER_TENSOR_PLUGIN", "NVFP4_SVD", "FP8_E4M3FNUZ"])
def test_an_unknown_algorithm(files, algorithm):
    made = files("FP8")
    made.config["quant_algo"] = algorithm
    assert str(algorithm) in refusal(made)


def test_the_two_files_disagree(files):
    made = files("FP8")
    made.companion = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    assert "quant_algo is 'NVFP4'; config.json says 'FP8'" in refusal(made)


def test_another_group_size_than_the_algorithms(files):
    made = files("NVFP4")
    made.config["group_size"] = 32
    assert "group_size is '32'" in refusal(made)


@pytest.mark.parametrize("group_size", [None, 0, "64", True])
def test_awq_without_a_group_size(files, group_size):
    made = files("W4A16_AWQ")
    made.config["group_size"] = group_size
    assert "group_size" in refusal(made)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_of_columns_that_is_no_positive_number(files, value):
    made = files("W4A16_AWQ")
    made.tensors["l.pre_quant_scale"] = torch.ones(SHAPE[1])
    made.tensors["l.pre_quant_scale"][7] = value
    assert "l.pre_quant_scale holds a value that is not finite and above 0" in refusal(made)


def test_scales_of_columns_of_another_shape(files):
    made = files("W4A8_AWQ")
    made.tensors["l.pre_quant_scale"] = torch.ones(SHAPE[0])
    assert "l.pre_quant_scale has shape [200]; [256] is needed" in refusal(made)


def test_scales_of_the_columns_of_a_float(files):
    made = files("W4A16_AWQ")
    made.tensors["lm_head.pre_quant_scale"] = torch.ones(8)
    assert "lm_head.pre_quant_scale is of a linear that is not quantized" in refusal(made)


def test_scales_of_columns_without_a_weight(files):
    made = files("W4A16_AWQ")
    made.tensors["m.pre_quant_scale"] = torch.ones(8)
    assert "m.weight is absent" in refusal(made)


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_awq_with_zero_points(files, place):
    made = files("W4A16_AWQ")
    if place == "config.json":
        made.config["has_zero_point"] = True
    else:
        made.companion = {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": True}}
    assert "has_zero_point" in refusal(made)


def test_a_missing_range(files):
    made = files("W4A8_AWQ")
    del made.tensors["l.weight_scale_2"]
    assert "l.weight_scale_2 [] is absent" in refusal(made)


def test_fused_experts(files):
    made = files("NVFP4")
    made.tensors["m.experts.gate_up_proj_weight_scale"] = torch.ones(2, 4, 4)
    assert "m.experts.gate_up_proj_weight_scale" in refusal(made)


@pytest.mark.parametrize(
    "spoil",
    [{"ignore": "lm_head"}, {"ignore": [1]}, {"quant_algo": "MIXED_PRECISION"}, {"config_groups": []},
     {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"l": "FP8"}}, {"quantization": []}],
)  # fmt: skip
def test_config_of_another_shape(files, spoil):
    made = files("FP8")
    made.config |= spoil
    refusal(made)
