"""Native FP8 blocks, mixture-of-experts models and gpt-oss."""

import json

import pytest
import torch
from breaking import ATTENTION, assert_breaks, edit_config, edit_tensors, failures
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint import open_checkpoint
from models import make_model

OUT = f"{ATTENTION}.o_proj"
EXPERTS = "model.layers.0.mlp.experts"


def test_experts_in_one_tensor_that_config_does_not_leave_out(tmp_path):
    """vLLM would look for quantized experts, and gpt-oss has none."""
    lowbit.quantize(make_model(tmp_path / "m", "gpt_oss"), tmp_path / "out")
    assert failures(tmp_path / "out") == {}
    edit_config(tmp_path / "out", lambda q: q.update(ignore=[name for name in q["ignore"] if "re:" not in name]))
    assert_breaks(tmp_path / "out", "left-experts", "mlp.experts", "regex")


@pytest.mark.parametrize(
    ("architecture", "settings", "named"),
    [
        ("bloom", {}, "query_key_value"),
        ("bloom", {"format": "awq"}, "query_key_value"),
        ("bloom", {"scheme": "W8A8"}, None),
        ("gpt_oss", {"format": "gptq"}, "modules_in_block_to_quantize"),
        ("stablelm_parallel", {}, "layer norms"),
        ("stablelm", {}, None),
    ],
)
def test_model_classes_that_vllm_cannot_load(tmp_path, architecture, settings, named):
    """engine-model, as seen in vLLM 0.32."""
    lowbit.quantize(make_model(tmp_path / "m", architecture), tmp_path / "out", **settings)
    found = failures(tmp_path / "out")
    assert (named is None and found == {}) or named in found["engine-model"]


@pytest.fixture
def native(broken):
    """A folder of FP8 blocks as DeepSeek ships them, made of a compressed-tensors one: weight_scale_inv multiplies."""
    folder = broken("FP8_BLOCK")

    def rename(tensors):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[f"{name}_inv"] = tensors.pop(name).float()

    edit_tensors(folder, rename)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers", "tensorrt-llm"])
def test_native_blocks_pass(native, source, engine):
    assert failures(native, source=source, nearest=True, engine=engine) == {}


def test_activation_scheme_that_blocks_do_not_take(native):
    edit_config(native, lambda q: q.update(activation_scheme="static"))
    assert_breaks(native, "fp8-config", "static")


def test_activation_scheme_that_is_not_stated(native):
    edit_config(native, lambda q: q.pop("activation_scheme"))
    assert_breaks(native, "fp8-config", "activation_scheme")


def test_blocks_that_tensorrt_does_not_take(native):
    edit_config(native, lambda q: q.update(weight_block_size=[64, 64]))
    assert_breaks(native, "tensorrt-fp8-blocks", "[64, 64]", engine="tensorrt-llm")
    assert "tensors" in failures(native)  # the scales are of 128 × 128


def test_list_that_covers_part_of_a_fused_set(native):
    edit_config(native, lambda q: q["modules_to_not_convert"].append(f"{ATTENTION}.q_proj"))
    assert_breaks(native, "coverage", f"{ATTENTION}.q_proj")


@pytest.mark.parametrize(("scheme", "settings"), [
    ("W4A16", {"group_size": 32}), ("NVFP4A16", {}), ("W4A16", {"group_size": 32, "format": "gptq"}),
    ("W4A16_ASYM", {"group_size": 32, "format": "awq"}), ("NVFP4A16", {"format": "modelopt"}),
])  # fmt: skip
def test_quantized_experts_pass(good, models, scheme, settings):
    folder = good(scheme, model="qwen3_moe", **settings)
    source = open_checkpoint(models("qwen3_moe"))
    for engine in ("vllm", "sglang"):
        assert failures(folder, source=source, nearest=True, engine=engine) == {}


def test_one_expert_with_another_scheme(broken):
    folder = broken("W4A16", model="qwen3_moe", group_size=32)

    def edit(quantization):
        general = quantization["config_groups"]["group_0"]
        own = {**general, "targets": ["re:.*0.mlp.experts.1.down_proj$"],
               "weights": {**general["weights"], "num_bits": 8}}  # fmt: skip
        quantization["config_groups"] = {"own": own, "group_0": general}

    edit_config(folder, edit)
    assert_breaks(folder, "expert-schemes", EXPERTS, f"{EXPERTS}.1.down_proj", "int 8 bits")


def test_gate_and_up_of_an_expert_that_do_not_share_their_global_scale(broken):
    folder = broken("NVFP4A16", model="qwen3_moe")
    edit_tensors(folder, lambda tensors: tensors[f"{EXPERTS}.2.up_proj.weight_global_scale"].mul_(2))
    assert_breaks(folder, "fused-global-scales", f"{EXPERTS}.2.up_proj.weight_global_scale")


def test_experts_in_one_tensor(broken):
    folder = broken("W4A16", model="qwen3_moe", group_size=32)

    def stack(tensors):
        names = [f"{EXPERTS}.{index}.down_proj.weight_packed" for index in range(4)]
        tensors[f"{EXPERTS}.down_proj_packed"] = torch.stack([tensors.pop(name) for name in names])

    edit_tensors(folder, stack)
    assert_breaks(folder, "expert-matrices", f"{EXPERTS}.down_proj_packed")
    assert_breaks(folder, "tensors", f"{EXPERTS}.0.down_proj.weight_packed")


def test_experts_that_transformers_merges(good):
    """Seen with transformers 5.23: the codes of an expert do not fit the merged parameter."""
    failed = failures(good("NF4", model="qwen3_moe"), engine="transformers")
    assert set(failed) == {"transformers-experts"}
    assert f"{EXPERTS}.0.gate_proj" in failed["transformers-experts"]
    assert failures(good("NF4", model="qwen3_moe", ignore=("experts",)), engine="transformers") == {}


def test_conv1d_that_transformers_does_not_fill(good):
    """Seen with transformers 5.23 and compressed-tensors 0.20: GPT-2 loads without an error and talks nonsense. The
    rule says what to do instead."""
    failed = failures(good("W4A16", model="gpt2", group_size=32), engine="transformers")
    assert set(failed) == {"transformers-conv1d"}
    assert "c_attn" in failed["transformers-conv1d"]
    assert "load it with lowbit.load" in failed["transformers-conv1d"]
    assert "lowbit convert OUT -o FLOAT --format float" in failed["transformers-conv1d"]


@pytest.fixture
def gpt_oss(models, tmp_path):
    """gpt-oss as OpenAI ships it: random MXFP4 blocks in place of the experts."""
    import shutil

    folder = tmp_path / "gpt_oss"
    shutil.copytree(models("gpt_oss"), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator,
                                                  dtype=torch.uint8)  # fmt: skip
        tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 120, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers", "tensorrt-llm"])
def test_gpt_oss_as_it_ships_passes(gpt_oss, engine):
    assert failures(gpt_oss, engine=engine) == {}


def test_mxfp4_block_scale_that_is_nan(gpt_oss):
    edit_tensors(gpt_oss, lambda tensors: tensors[f"{EXPERTS}.down_proj_scales"][1, 2].fill_(255))
    assert_breaks(gpt_oss, "scales", f"{EXPERTS}.1.down_proj", "row 2")


def test_experts_of_gpt_oss_one_by_one(gpt_oss):
    """Names that vLLM passes over in silence."""
    edit_tensors(gpt_oss, lambda tensors: tensors.update({f"{EXPERTS}.0.gate_proj.extra": torch.zeros(4)}))
    for engine in ("vllm", "sglang", "transformers"):
        assert_breaks(gpt_oss, "gpt-oss-experts", f"{EXPERTS}.0.gate_proj.extra", engine=engine)
