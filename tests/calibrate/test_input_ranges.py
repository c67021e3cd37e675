"""Ranges of inputs against the same model run by hand, and what static scales become of them."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.architecture import discover_once
from lowbit.calibrate import measure_input_ranges
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import ArchitectureError, CheckpointError, NonFiniteError
from lowbit.text import Text
from models import make_model

TEXT = Text("sample", "Twelve windows of text that says nothing at all, again and again. " * 20)


def ranges(folder, linears, windows=3, text=TEXT):
    checkpoint = open_checkpoint(folder)
    architecture = discover_once(checkpoint.config(), str(folder))
    return measure_input_ranges(checkpoint, architecture, linears, text, windows, 32, dtype=torch.float32)


def test_ranges_are_the_largest_inputs_of_a_run_by_hand(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(TEXT.content, add_special_tokens=False).input_ids[: 3 * 32]).reshape(3, 32)
    with torch.inference_mode():
        hidden = model.model(ids, output_hidden_states=True).hidden_states
        block = model.model.layers[1]
        into_attention = block.input_layernorm(hidden[1])
    found, windows = ranges(tiny_llama, ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"])
    assert windows == 3
    assert found["model.layers.1.self_attn.q_proj"] == pytest.approx(into_attention.abs().max().item(), rel=1e-5)
    assert found["model.layers.1.self_attn.q_proj"] == found["model.layers.1.self_attn.k_proj"]


def test_static_scales_of_the_files_are_the_ranges(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    settings = {"calib": str(tmp_path / "text.txt"), "samples": 3, "seqlen": 32}
    report = lowbit.quantize(tiny_llama, tmp_path / "out", scheme="FP8", **settings).report
    assert report.settings.calibration.tokens == 96
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    found, _ = ranges(tiny_llama, [name])
    assert stored[f"{name}.input_scale"].float().item() == pytest.approx(found[name] / 448, rel=0.02)
    simulated = lowbit.evaluate(tmp_path / "out", tiny_llama, windows=2, window_tokens=64)[-1]
    assert simulated.kld_mean < 0.05


def test_schemes_without_static_scales_read_no_text(tiny_llama, tmp_path):
    report = lowbit.quantize(tiny_llama, tmp_path / "out", scheme="FP8_DYNAMIC", calib="absent.txt").report
    assert report.settings.calibration is None


def test_a_text_shorter_than_a_window_is_refused(tiny_llama):
    with pytest.raises(CheckpointError, match="one window needs 32"):
        ranges(tiny_llama, ["model.layers.0.mlp.down_proj"], text=Text("short", "few words"))


def test_inputs_that_are_not_finite_are_named(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj"):
        ranges(tmp_path / "model", ["model.layers.0.self_attn.q_proj"])


def test_experts_inside_a_fused_operation_are_refused_by_name(tmp_path):
    model = make_model(tmp_path / "moe", "qwen3_moe")
    with pytest.raises(ArchitectureError, match=r"experts\.0\.gate_proj runs inside a fused operation"):
        ranges(model, ["model.layers.0.mlp.experts.0.gate_proj"])
