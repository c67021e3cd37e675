"""transformers with compressed-tensors loads every scheme that we write, and decompresses our bits to our weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit.checkpoint import open_checkpoint
from lowbit.pipeline import calibrate, write_checkpoint
from lowbit.plan.plan import Request, prepare
from lowbit.schemes import SCHEMES
from lowbit.settings import make_settings
from models import FAMILIES, SHORT_TEXT, make_model

pytestmark = pytest.mark.interop

OF_OTHER_FORMATS = ("NF4", "FP4", "INT8", "TERNARY", "W4AFP8_STATIC")
WRITABLE = [name for name, row in SCHEMES.items() if name not in OF_OTHER_FORMATS and not row.weight.is_fitted]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Every dimension divides by 128, so that no scheme leaves a layer out."""
    folder = tmp_path_factory.mktemp("interop") / "model"
    return make_model(folder, hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=64)  # fmt: skip


def load_dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """transformers decompresses while loading. (5.23 then reads every layer by the first group's scheme.)"""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    return dict(AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config).state_dict())  # fmt: skip


def load_then_decompress(folder: Path) -> dict[str, torch.Tensor]:
    """transformers loads codes, compressed-tensors decompresses each layer by its own scheme.

    (With transformers 5.23 this works for symmetric schemes only: it expects zero points unpacked.)
    """
    from compressed_tensors.compressors import BaseCompressor
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for module in loaded.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            BaseCompressor.get_value_from_registry(scheme.format).decompress_module(module)
    return dict(loaded.state_dict())


def quantize(model: Path, out: Path, **settings) -> Path:
    prepared = prepare(Request(model, make_settings(calib=SHORT_TEXT, samples=2, seqlen=64, **settings)))
    write_checkpoint(calibrate(prepared, out), out)
    return out


@pytest.mark.parametrize("scheme", WRITABLE)
def test_decompressed_weights_equal_ours_bit_for_bit(model, tmp_path, scheme):
    folder = quantize(model, tmp_path / "out", scheme=scheme)
    theirs, ours = load_dequantized(folder), open_checkpoint(folder)
    assert len(ours.schemes) == 14
    for name in ours.tensors:
        assert torch.equal(theirs[name].to(torch.bfloat16), ours.read(name).to(torch.bfloat16)), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_loads(tmp_path, model_type):
    folder = quantize(make_model(tmp_path / "m", model_type), tmp_path / "out", scheme="W4A16", group_size=32)
    theirs, ours = load_dequantized(folder), open_checkpoint(folder)
    for name in ours.tensors:
        assert torch.equal(theirs[name].to(torch.bfloat16), ours.read(name).to(torch.bfloat16)), name


def test_mixed_schemes_and_ignored_layers_load(model, tmp_path):
    folder = quantize(model, tmp_path / "out", scheme="W4A16", overrides={r"\.(q|k|v)_proj$": "W8A16"},
                      ignore=(r"\.1\.mlp\.down_proj$",))  # fmt: skip
    theirs, ours = load_then_decompress(folder), open_checkpoint(folder)
    assert {scheme.name for scheme in ours.schemes.values()} == {"W4A16", "W8A16"}
    for name in ours.tensors:
        assert torch.equal(theirs[name].to(torch.bfloat16), ours.read(name).to(torch.bfloat16)), name


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_compressed_forward_pass_agrees_with_decoded_weights(model, tmp_path, scheme):
    """Logits of the loaded model against ours from decoded weights (with activations simulated where it has them)."""
    from transformers import AutoModelForCausalLM

    from lowbit.architecture.loading import load_model
    from lowbit.evaluation.activations import simulated_activations

    folder = quantize(model, tmp_path / "out", scheme=scheme)
    checkpoint = open_checkpoint(folder)
    ids = torch.arange(3, 60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(checkpoint)
    with torch.no_grad(), simulated_activations(ours, checkpoint.schemes, {}):
        a, b = theirs(ids).logits.float(), ours(ids).logits
    divergence = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()
    assert divergence < 1e-3
