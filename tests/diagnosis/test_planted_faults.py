"""Each planted fault is found, named as the first finding, and named in the verdict."""

import shutil

import pytest
from faults import RUSSIAN, diagnosed, edit_tensors, multiply_scales

import lowbit
from models import make_model


def test_doubled_scales_of_a_layer(w4a16, llama, text):
    multiply_scales(w4a16, ".layers.2.", 2)
    found = diagnosed(w4a16, llama, text)
    first = found.findings[0]
    assert (first.kind, first.severity) == ("scale", "fault")
    assert "block 2 are 2.0 times" in first.title
    assert found.verdict.startswith(first.title)
    assert len(first.tensors) == 7
    assert all(".layers.2." in name for name in first.tensors)
    assert first.share > 0.8
    largest = max(found.contributions, key=lambda each: each.kld)
    assert largest.block == 2


@pytest.mark.parametrize(("method", "scheme"), [("awq", "W4A16"), ("smoothquant", "W8A8")])
def test_doubled_scales_of_a_layer_that_a_transform_rewrote(quantized, llama, text, tmp_path, method, scheme):
    """Its columns are scaled on purpose; the factor beyond that is found."""
    group = {"group_size": 32} if scheme == "W4A16" else {}
    shutil.copytree(quantized(scheme, **group, method=method), tmp_path / "q")
    multiply_scales(tmp_path / "q", ".layers.2.", 2)
    first = diagnosed(tmp_path / "q", llama, text, budget=10).findings[0]
    assert first.title.startswith("the 7 quantized linears of block 2 are 2.0 times")
    multiply_scales(tmp_path / "q", ".layers.2.", 0.5)
    multiply_scales(tmp_path / "q", ".layers.1.mlp.gate_proj", 2)
    first = diagnosed(tmp_path / "q", llama, text, budget=10).findings[0]
    assert first.title.startswith("model.layers.1.mlp.gate_proj.weight is 2.0 times")


def test_doubled_scales_of_some_rows_of_one_tensor(w4a16, llama, text):
    def edit(tensors):
        tensors["model.layers.1.mlp.down_proj.weight_scale"][:16] *= 2

    edit_tensors(w4a16, edit)
    first = diagnosed(w4a16, llama, text, budget=1).findings[0]
    assert first.kind == "scale"
    assert first.title.startswith("16 of 128 rows of model.layers.1.mlp.down_proj.weight are 2.0 times")


def test_zeroed_expert(tmp_path, text):
    source = make_model(tmp_path / "mixtral", "mixtral")
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16", group_size=32)
    multiply_scales(tmp_path / "q", ".layers.1.block_sparse_moe.experts.2.", 0)
    found = diagnosed(tmp_path / "q", source, text)
    first = found.findings[0]
    assert (first.kind, first.severity) == ("zero", "fault")
    assert first.title.startswith("expert 2 of model.layers.1.block_sparse_moe ")
    assert found.verdict.startswith(first.title)
    assert len(first.tensors) == 3
    of_expert = next(each for each in found.contributions if each.name == "model.layers.1.block_sparse_moe.experts.2")
    assert of_expert.significant
    assert first.kld == of_expert.kld


def test_expert_zeroed_before_it_was_quantized(tmp_path, text):
    source = make_model(tmp_path / "mixtral", "mixtral")
    damaged = make_model(tmp_path / "damaged", "mixtral")

    def edit(tensors):
        for name, values in tensors.items():
            if ".layers.0.block_sparse_moe.experts.1." in name:
                values.zero_()

    edit_tensors(damaged, edit)
    lowbit.quantize(damaged, tmp_path / "q", scheme="W4A16", group_size=32)
    first = diagnosed(tmp_path / "q", source, text).findings[0]
    assert first.title.startswith("expert 1 of model.layers.0.block_sparse_moe ")


def test_calibration_on_the_wrong_language(llama, text, tmp_path):
    (tmp_path / "russian.txt").write_text(RUSSIAN * 12)
    lowbit.quantize(
        llama, tmp_path / "q", method="gptq", group_size=32, calib=str(tmp_path / "russian.txt"), samples=12, seqlen=48
    )
    found = diagnosed(tmp_path / "q", llama, text, windows=24)
    first = found.findings[0]
    assert (first.kind, first.severity) == ("calibration", "fault")
    assert "russian.txt does not look like it" in first.title
    assert "tokens do not occur in the calibration text" in first.detail
    assert found.verdict.startswith(first.title)
    assert f"--calib {text}" in found.suggestions[0].command


def test_output_head_in_two_bits(llama, text, tmp_path):
    lowbit.quantize(llama, tmp_path / "q", scheme="W4A16", group_size=32, overrides={"lm_head": "W2A16"})
    found = diagnosed(tmp_path / "q", llama, text)
    first = found.findings[0]
    assert (first.kind, first.severity) == ("bits", "fault")
    assert first.tensors == ("lm_head.weight",)
    assert "stored in 2.5 bits per weight" in first.title
    assert found.verdict.startswith(first.title)
    assert "'^lm_head$=W8A16'" in found.suggestions[0].command


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_found_and_the_rest_is_measured(w4a16, llama, text, value):
    def edit(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight_scale"][3] = value

    edit_tensors(w4a16, edit)
    found = diagnosed(w4a16, llama, text, budget=8)
    assert found.findings[0].kind == "nonfinite"
    assert found.findings[0].tensors == ("model.layers.1.self_attn.o_proj.weight",)
    assert found.kld is not None
    assert found.contributions


def test_one_zeroed_expert_of_many_is_measured_by_itself(tmp_path, text):
    source = make_model(tmp_path / "moe", "qwen3_moe", num_experts=16)
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16", group_size=32)
    multiply_scales(tmp_path / "q", ".layers.0.mlp.experts.11.", 0)
    found = diagnosed(tmp_path / "q", source, text, budget=4)
    assert found.findings[0].title.startswith("expert 11 of model.layers.0.mlp ")
    assert "model.layers.0.mlp.experts.11" in {each.name for each in found.contributions}


def test_a_wrong_scale_of_ternary_codes_is_found(quantized, llama, text, tmp_path):
    folder = shutil.copytree(quantized("TERNARY"), tmp_path / "ternary")
    multiply_scales(folder, ".layers.1.mlp.up_proj", 2)
    faults = [each for each in diagnosed(folder, llama, text).findings if each.severity == "fault"]
    assert [each.tensors for each in faults] == [("model.layers.1.mlp.up_proj.weight",)]
    assert "2.0 times what it should be" in faults[0].title
