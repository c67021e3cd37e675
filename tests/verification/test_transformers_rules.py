"""What `lowbit verify --engine transformers` says of a folder is what transformers does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from breaking import failures

import lowbit
from lowbit.architecture.building import auto_class, build_without_weights
from lowbit.architecture.quantized_loading import initialization_reads, replaced_experts
from lowbit.checkpoint import opening
from lowbit.checkpoint.base import read_config
from lowbit.errors import UsageError
from models import config_of
from tiny_types import make_tiny

IDS = torch.arange(3, 19)[None]
DEQUANTIZE = transformers.CompressedTensorsConfig(dequantize=True)
# One layer with experts: others keep theirs in 16 bits.
SOME_EXPERTS = (r"layers\.0\..*experts",)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory):
    """(model type, scheme, settings) → a compressed-tensors folder."""
    sources: dict[str, Path] = {}

    def make(model_type: str, scheme: str, **settings: Any) -> Path:
        if model_type not in sources:
            sources[model_type] = make_tiny(tmp_path_factory.mktemp("tiny") / "source", model_type)
        folder = tmp_path_factory.mktemp("quantized") / "model"
        grouped = {} if scheme in ("W8A8", "FP8_DYNAMIC", "NVFP4A16") else {"group_size": 32}
        return lowbit.quantize(sources[model_type], folder, scheme=scheme, **grouped, **settings).path

    return make


def loaded(folder: Path, **options: Any) -> Any:
    """The model, as transformers loads it; None where it does not."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        return auto_class(config, config.architectures).from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    except (RuntimeError, AttributeError, ValueError):
        return None


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits.float()


def assert_same_logits(model: Any, folder: Path, within: float) -> None:
    own, _ = lowbit.load(folder, dtype=torch.bfloat16)
    wanted = logits(own)
    assert (logits(model) - wanted).abs().max() < within * wanted.std()


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("model_type", "scheme", "settings", "rule", "named"),
    [
        ("mamba2", "W4A16", {}, "transformers-initialized", "Mamba2Mixer"),
        ("gpt_bigcode", "W4A16", {}, "transformers-initialized", "GPTBigCodeAttention"),
        ("zamba2", "W4A16", {}, "transformers-tied", "shared_transformer.feed_forward"),
        ("olmo_hybrid", "W4A16", {}, "transformers-converted", "q_conv1d and others"),
        ("molmo2", "W4A16", {}, "transformers-converted", "weight_shape"),
        ("mixtral", "W8A8", {}, "transformers-converted", "does not decode its integers"),
        ("mixtral", "W4A16_ASYM", {}, "transformers-converted", "weight_zero_point"),
        ("mixtral", "W4A16", {"ignore": SOME_EXPERTS}, "transformers-converted", "not quantized there"),
    ],
)
def test_a_folder_that_transformers_does_not_load(quantized, model_type, scheme, settings, rule, named):
    """Seen with transformers 5.23 and compressed-tensors 0.20: an error while it loads, of each of these."""
    folder = quantized(model_type, scheme, **settings)
    failed = failures(folder, engine="transformers")
    assert set(failed) == {rule}
    assert named in failed[rule]
    assert loaded(folder) is None
    decoded = loaded(folder, quantization_config=DEQUANTIZE)
    assert (decoded is not None) == ("dequantize=True" in failed[rule])
    if decoded is not None:
        assert_same_logits(decoded, folder, 0.05)  # weights are rounded to bfloat16 once more


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("model_type", "scheme", "settings"),
    [("mixtral", "W4A16", {}), ("llama4_text", "W4A16", {}), ("qwen2_moe", "W4A16", {"ignore": ("shared_expert",)})],
)
def test_a_folder_that_transformers_loads(quantized, model_type, scheme, settings):
    """Llama 4's experts are one tensor in files and parameters; transformers makes linears of them for codes."""
    folder = quantized(model_type, scheme, **settings)
    assert failures(folder, engine="transformers") == {}
    assert_same_logits(loaded(folder), folder, 1e-3)


def test_experts_of_8_bit_floats_may_stand_beside_others(quantized):
    folder = quantized("mixtral", "FP8_DYNAMIC", ignore=SOME_EXPERTS)
    assert failures(folder, engine="transformers") == {}
    assert loaded(folder) is not None


def test_the_model_is_as_before_the_probe_of_its_initialization():
    model = build_without_weights(config_of("stablelm"), "x")
    before = {name: (id(value), value.shape) for name, value in model.named_parameters()}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert initialization_reads(model, linears) is None
    assert [*before] == [name for name, _ in model.named_parameters()]
    assert before == {name: (id(value), value.shape) for name, value in model.named_parameters()}


def test_a_class_that_reads_weights_while_it_initializes_is_named():
    model = build_without_weights(config_of("stablelm"), "x")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    model._init_weights = lambda module: module.weight if isinstance(module, torch.nn.Linear) else None
    assert initialization_reads(model, linears) == "Linear"
    assert initialization_reads(model, linears[:0]) is None


def test_only_all_experts_of_a_model_are_replaced():
    kind = type("Llama4TextExperts", (torch.nn.Module,), {})
    assert replaced_experts([kind(), kind()]) == ("bitsandbytes", "compressed-tensors")
    assert replaced_experts([kind(), torch.nn.Module()]) == ()
    assert replaced_experts([]) == ()


# One of which transformers joins convolutions, one of which it cuts a joined matrix, and one with experts beside.
@pytest.mark.parametrize("model_type", ["olmo_hybrid", "hrm_text", "kimi_linear"])
def test_a_folder_written_for_transformers_has_the_names_of_its_modules(quantized, model_type):
    hub, own = (quantized(model_type, "W4A16", **more) for more in ({}, {"loader": "transformers"}))
    said = failures(hub, engine="transformers")["transformers-converted"]
    assert "lowbit quantize --loader transformers writes a folder that it reads" in said
    assert failures(own, engine="transformers") == {}
    assert_same_logits(loaded(own), own, 1e-3)


def test_calibration_takes_a_folder_for_transformers_too(quantized):
    folder = quantized("hrm_text", "W4A16", loader="transformers", method="gptq", samples=8, seqlen=64)
    report = json.loads((folder / "lowbit-report.json").read_text(encoding="utf-8"))
    rounded = {entry["name"]: entry["method"] for entry in report["tensors"] if entry["scheme"] is not None}
    assert set(rounded.values()) == {"gptq"}
    assert any(name.endswith("self_attn.q_proj.weight") for name in rounded)


@pytest.mark.parametrize("model_type", ["falcon", "zamba2"])
def test_a_folder_for_transformers_says_that_it_is_decoded_where_it_must_be(quantized, model_type):
    folder = quantized(model_type, "W4A16", loader="transformers")
    assert read_config(folder)["quantization_config"]["dequantize"] is True
    assert failures(folder, engine="transformers") == {}
    assert_same_logits(loaded(folder), folder, 0.05)


def test_experts_that_transformers_cannot_read_stay_in_16_bits_where_it_is_the_loader(quantized):
    folder = quantized("qwen3_vl_moe", "W4A16", loader="transformers")
    assert failures(folder, engine="transformers") == {}
    assert_same_logits(loaded(folder), folder, 1e-3)


def test_a_source_is_opened_once_for_transformers_too(tmp_path, monkeypatch):
    source, opened = make_tiny(tmp_path / "source", "qwen3_vl_moe"), []
    open_folder = opening._open_folder
    monkeypatch.setattr(opening, "_open_folder", lambda *asked: opened.append(asked) or open_folder(*asked))
    lowbit.dry_run(source, scheme="W4A16", group_size=32, loader="transformers")
    assert len(opened) == 1


def test_a_rule_that_cuts_what_is_not_quantized_is_refused_by_transformers(quantized):
    for more in ({}, {"loader": "transformers"}):
        folder = quantized("qianfan_ocr", "W4A16", **more)
        said = failures(folder, engine="transformers")["transformers-converted"]
        assert "refuses to where these are not quantized: ValueError" in said
        assert loaded(folder) is None


def test_experts_of_nvfp4_are_misread_with_dequantize_too(quantized):
    folder = quantized("mixtral", "NVFP4A16")
    said = failures(folder, engine="transformers")["transformers-converted"]
    assert "transformers does not decode its weight_global_scale, with dequantize=True neither" in said
    own, _ = lowbit.load(folder, dtype=torch.bfloat16)
    wanted = logits(own)
    assert (logits(loaded(folder, quantization_config=DEQUANTIZE)) - wanted).abs().max() > wanted.std()


def test_only_folders_of_compressed_tensors_are_written_for_transformers(quantized):
    with pytest.raises(UsageError, match="--loader transformers writes compressed-tensors folders, not gptq"):
        quantized("hrm_text", "W4A16", loader="transformers", format="gptq")
