"""Online rotations against compressed-tensors: its classes read our transform_config, its matrices are ours, and a
model of transformers with its hooks computes what ours does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from calibrate.calibrated import calibrated, write_text
from lowbit.checkpoint import open_checkpoint
from lowbit.evaluation import load_model
from lowbit.evaluation.activations import simulated_activations
from lowbit.numerics import activations
from lowbit.numerics.hadamard import sylvester
from models import make_model

pytestmark = pytest.mark.interop

IDS = torch.tensor([[5, 77, 130, 9, 201, 33, 250, 18, 64, 101, 3, 140]])
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("rotations") / "model", dtype=torch.float32)


def stated(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]


def online_part(folder: Path):
    """What a loader has to do: the stored weights are rotated already."""
    from compressed_tensors.transform import TransformConfig

    config = TransformConfig.model_validate(stated(folder))
    for group in config.config_groups.values():
        group.apply = [args for args in group.apply if args.is_online()]
    return config


def logits_of(network) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=IDS).logits


def ours(folder: Path, simulated: bool = True) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    network = load_model(checkpoint)
    schemes = checkpoint.schemes if simulated else {}
    with simulated_activations(network, schemes, checkpoint.input_scales, checkpoint.rotations):
        return logits_of(network)


def theirs(folder: Path, rotates: bool = True) -> torch.Tensor:
    from compressed_tensors.transform import apply_transform_config
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rotates:
        apply_transform_config(network, online_part(folder))
    return logits_of(network)


@pytest.mark.parametrize("size", [32, 192 & -192, 1024])
def test_the_matrix_is_theirs(size):
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    expected = deterministic_hadamard_matrix(size, torch.float64) / size**0.5
    assert torch.allclose(sylvester(size).matrix(), expected, atol=1e-12)


def test_their_fusing_gives_the_weight_that_is_rounded(model, tmp_path):
    """The whole config on the float model: its logits stay, and its down_proj is what we round."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoModelForCausalLM

    calibrated(model, tmp_path / "out", write_text(tmp_path), "hadamard-down+gptq")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain, weight = logits_of(network), network.get_submodule(DOWN).weight.detach().clone()
    apply_transform_config(network, TransformConfig.model_validate(stated(tmp_path / "out")))
    assert torch.allclose(logits_of(network), plain, atol=2e-5)
    fused = network.get_submodule(DOWN).weight
    assert torch.allclose(fused, sylvester(64).columns(weight), atol=1e-6)
    assert not torch.allclose(fused, weight, atol=1e-2)


@pytest.mark.parametrize(("scheme", "bound"), [("W4A16", 1e-4), ("W8A8", 2e-3), ("W4A4", 0.15)])
def test_transformers_with_their_hooks_computes_what_ours_does(model, tmp_path, monkeypatch, scheme, bound):
    """Scales of activations are max|x| / 127.5 (7.5) there; kernels and we divide by 127 (7). A value near a tie may
    round to the other side, which is a large step of four bits, and moves all tokens behind it."""
    monkeypatch.setattr(activations, "_largest", lambda spec: (2**spec.bits - 1) / 2)
    group = None if scheme == "W8A8" else 32
    calibrated(model, tmp_path / "out", write_text(tmp_path), "rotate+hadamard-down+gptq", scheme=scheme,
               group_size=group)  # fmt: skip
    found, expected = theirs(tmp_path / "out"), ours(tmp_path / "out")
    spread = expected.std()
    assert (found - expected).std() < bound * spread
    # from_pretrained alone reads no transform_config (5.23): what `verify --engine transformers` says
    assert (theirs(tmp_path / "out", rotates=False) - expected).std() > 2 * max(bound, 0.05) * spread


def test_a_random_hadamard_matrix_of_a_folder_is_read_from_its_files(model, tmp_path):
    """As llm-compressor's SpinQuant saves one: the matrix once, of a size that is no power of two."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoModelForCausalLM

    group = {"type": "random-hadamard", "apply": [
        {"targets": ["re:.*down_proj$"], "location": "input"},
        {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True}]}  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain = logits_of(network)
    apply_transform_config(network, TransformConfig(config_groups={"R4": group}))
    matrix = network.get_submodule(DOWN).R4_input.weight.detach().clone()
    assert matrix.shape == (192, 192)
    fused = make_model(tmp_path / "fused", dtype=torch.float32)
    weights = load_file(fused / "model.safetensors")
    for name in weights:
        if name.endswith("down_proj.weight"):
            weights[name] = network.get_parameter(name).detach().contiguous()
    save_file(weights, fused / "model.safetensors", metadata={"format": "pt"})
    out = lowbit.quantize(fused, tmp_path / "out", scheme="W8A8").path
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"R4": group}}
    (out / "config.json").write_text(json.dumps(config))
    stored = load_file(out / "model.safetensors")
    save_file(stored | {f"{DOWN}.R4_input.weight": matrix.bfloat16()}, out / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    found = ours(out, simulated=False)
    assert (found - plain).std() < 0.03 * plain.std()
    assert f"{DOWN}.R4_input.weight" not in open_checkpoint(out).tensors
    assert (ours(out) - plain).std() < 0.05 * plain.std()
