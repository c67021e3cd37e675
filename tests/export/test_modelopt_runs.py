"""Whole runs into ModelOpt's AWQ and SmoothQuant files, and what is read back from files with scaled inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint import open_checkpoint
from models import SHORT_TEXT, make_model

CALIBRATION = {"calib": SHORT_TEXT, "samples": 8, "seqlen": 32, "threads": 1}
ATTENTION = "model.layers.0.self_attn"
OUT = f"{ATTENTION}.o_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("runs") / "model", hidden_size=128, intermediate_size=256,
                      num_key_value_heads=4, head_dim=32)  # fmt: skip


def stated(folder: Path) -> dict:
    return json.loads((folder / "hf_quant_config.json").read_text())["quantization"]


@pytest.mark.parametrize(("scheme", "method", "algorithm"), [
    ("W4A16", "awq", "W4A16_AWQ"), ("W4A16", "gptq", "W4A16_AWQ"), ("W4AFP8_STATIC", "awq+gptq", "W4A8_AWQ"),
])  # fmt: skip
def test_awq_files_for_tensorrt_llm(model, tmp_path, scheme, method, algorithm):
    done = lowbit.quantize(model, tmp_path / "out", scheme=scheme, method=method, format="modelopt", kv_cache="fp8",
                           **CALIBRATION)  # fmt: skip
    verification = done.report.verification
    assert verification is not None
    assert (verification.engine, verification.ok) == ("tensorrt-llm", True)
    assert done.report.serve[0].command.startswith("trtllm-serve ")
    quantization = stated(tmp_path / "out")
    assert (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) == (algorithm, "FP8")
    assert (quantization["group_size"], quantization["pre_quant_scale"]) == (128, True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scaled = {name.split(".")[-2] for name in tensors if name.endswith("pre_quant_scale")}
    assert scaled == {"o_proj", "down_proj"}
    assert f"{ATTENTION}.k_proj.k_scale" in tensors
    if algorithm == "W4A8_AWQ":
        for leaf in ("weight_scale_2", "input_scale"):
            assert len({tensors[f"{ATTENTION}.{role}_proj.{leaf}"].item() for role in "qkv"}) == 1
    assert all(tensor.relative_error < 0.2 for tensor in done.report.tensors if tensor.scheme is not None)


def test_smoothquant_files(model, tmp_path):
    done = lowbit.quantize(model, tmp_path / "out", scheme="W8A8_STATIC", method="smoothquant", format="modelopt",
                           **CALIBRATION)  # fmt: skip
    assert stated(tmp_path / "out")["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    assert all(tensor.relative_error < 0.02 for tensor in done.report.tensors if tensor.scheme is not None)
    assert [line.engine for line in done.report.serve] == ["lowbit"]  # no engine loads it


@pytest.fixture
def scaled(model, tmp_path) -> Path:
    """A folder as ModelOpt writes it where it cannot fold a scale: the input of one linear is scaled."""
    folder = tmp_path / "scaled"
    lowbit.quantize(model, folder, scheme="W4A16", format="modelopt", threads=1)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    columns = torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5
    tensors[f"{OUT}.pre_quant_scale"] = columns.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "lowbit_report.json").unlink(missing_ok=True)
    return folder


def test_a_scaled_input_is_taken_out_by_decoding(scaled, tmp_path):
    lowbit.convert(scaled, tmp_path / "float", format="float")
    before, after = open_checkpoint(scaled), open_checkpoint(tmp_path / "float")
    for name in before.schemes:  # type: ignore[attr-defined]
        assert torch.equal(before.read(name).to(torch.bfloat16), after.read(name)), name
    codes = before.read_quantized(f"{OUT}.weight").decode()  # type: ignore[attr-defined]
    assert not torch.equal(codes, before.read(f"{OUT}.weight"))


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt", "gptq"])
def test_a_scaled_input_is_rounded_anew_elsewhere(scaled, tmp_path, format):
    done = lowbit.convert(scaled, tmp_path / "out", format=format)
    linears = {tensor.name: tensor for tensor in done.report.tensors if tensor.scheme is not None}
    anew = {name for name, tensor in linears.items() if not tensor.repacked}
    assert anew == {f"{OUT}.weight"}
    assert any("pre_quant_scale" in note for note in linears[f"{OUT}.weight"].notes)
    wanted, found = (open_checkpoint(folder).read(f"{OUT}.weight") for folder in (scaled, tmp_path / "out"))
    assert ((wanted - found).norm() / wanted.norm()).item() < 0.2
