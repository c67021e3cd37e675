"""What a look at the tensors tells: factors, zeros, other weights, codes at the ends, 16 bits where none should be."""

import pytest
import torch
from faults import diagnosed, edit_tensors

import lowbit
from lowbit.checkpoint.base import OpenOptions
from lowbit.diagnosis.pair import Pair, codes_at_ends, look_at_tensors
from lowbit.evaluation.opening import Opener
from models import make_model


@pytest.fixture
def pair_of():
    import contextlib

    with contextlib.ExitStack() as stack:
        opener = Opener(stack, torch.float32, "cpu", OpenOptions())
        yield lambda quantized, reference: Pair(opener.open(quantized), opener.open(reference))


def test_facts_of_a_healthy_model(w4a16, llama, pair_of):
    pair = pair_of(w4a16, llama)
    facts = {each.name: each for each in look_at_tensors(pair)}
    one = facts["model.layers.0.self_attn.q_proj.weight"]
    w, q = pair.read_original(one.name), pair.read(one.name)
    assert one.gain == pytest.approx(((w * q).sum() / (w * w).sum()).item(), rel=1e-4)
    assert one.error == pytest.approx(((w - q).square().sum() / w.square().sum()).item(), rel=1e-3)
    assert one.bits == pytest.approx(4.5, abs=0.02)  # the shape is stored too
    assert one.quantized
    assert not facts["model.norm.weight"].quantized
    assert facts["model.norm.weight"].error == 0
    assert not any(
        each.is_scaled or each.is_zeroed or each.is_replaced or each.constant_rows for each in facts.values()
    )


def test_weights_of_another_layer_are_named(w4a16, llama, text):
    def edit(tensors):
        for part in ("weight_packed", "weight_scale"):
            name = "model.layers.{}.mlp.up_proj." + part
            tensors[name.format(1)], tensors[name.format(2)] = tensors[name.format(2)], tensors[name.format(1)]

    edit_tensors(w4a16, edit)
    found = diagnosed(w4a16, llama, text, budget=1)
    assert {each.kind for each in found.findings if each.severity == "fault"} == {"replaced"}
    assert {each.tensors[0] for each in found.findings if each.kind == "replaced"} == {
        "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight",
    }  # fmt: skip


def test_crowded_ends_of_the_grid(w4a16, llama, pair_of, text):
    name = "model.layers.1.mlp.gate_proj"

    def edit(tensors):
        """Every nibble 0 or 15 where its highest bit says so: codes −8 and 7."""
        packed = tensors[f"{name}.weight_packed"]
        high = (packed >> 3) & 0x11111111
        tensors[f"{name}.weight_packed"] = high * 15
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"] / 2.2

    pair = pair_of(w4a16, llama)
    healthy = codes_at_ends(pair, f"{name}.weight")
    assert healthy is not None
    assert healthy.share == pytest.approx(healthy.expected, abs=0.01)
    edit_tensors(w4a16, edit)
    found = diagnosed(w4a16, llama, text, budget=1)
    (ends,) = [each for each in found.findings if each.kind == "saturation"]
    assert ends.tensors == (f"{name}.weight",)
    assert "100.0 % of its codes" in ends.detail


def test_linears_in_sixteen_bits_are_listed(llama, text, tmp_path):
    lowbit.quantize(llama, tmp_path / "q", scheme="W4A16", group_size=32, ignore=("layers.3.mlp.down_proj",))
    found = diagnosed(tmp_path / "q", llama, text, budget=1)
    (left,) = [each for each in found.findings if each.kind == "left"]
    assert left.tensors == ("model.layers.3.mlp.down_proj.weight",)
    assert found.healthy


def test_a_changed_norm_is_a_warning(w4a16, llama, text):
    def edit(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.1

    edit_tensors(w4a16, edit)
    found = diagnosed(w4a16, llama, text, budget=1)
    (changed,) = [each for each in found.findings if each.kind == "changed"]
    assert changed.tensors == ("model.norm.weight",)


def test_outlier_channels_of_an_input_are_named(text, tmp_path):
    source = make_model(tmp_path / "llama")

    def edit(tensors):
        tensors["model.layers.1.input_layernorm.weight"][17] = 60.0

    edit_tensors(source, edit)
    lowbit.quantize(source, tmp_path / "q", scheme="W8A8")
    found = diagnosed(tmp_path / "q", source, text, budget=1)
    (outliers,) = [each for each in found.findings if each.kind == "outliers"]
    assert outliers.severity == "warning"  # activations are quantized
    assert outliers.tensors == ("model.layers.1.attention_input",)
    assert "(channel 17)" in outliers.title


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma2", "opt", "phi3", "qwen3_moe"])
def test_families(architecture, tmp_path, text):
    source = make_model(tmp_path / "model", architecture)
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16", group_size=32)
    found = diagnosed(tmp_path / "q", source, text, windows=2, window_tokens=32, budget=8)
    assert found.healthy
    assert {each.block for each in found.contributions} >= {0, 1}
