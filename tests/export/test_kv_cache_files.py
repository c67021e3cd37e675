"""Scales of an FP8 KV cache: written, read, kept by a conversion, and judged; what cannot say them refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.architecture import discover_once
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.kv_cache import key_value_heads
from lowbit.errors import ArchitectureError, FormatError, UsageError
from lowbit.export.kv_cache import stored_kv_scales
from lowbit.pipeline import write_checkpoint
from lowbit.plan.folder import with_kv_cache
from lowbit.plan.plan import Request, prepare
from lowbit.registry import FORMATS
from lowbit.schemes import KV_CACHE_SCHEMES, find_kv_cache_scheme
from lowbit.settings import make_settings
from lowbit.verification import verify
from models import config_of, make_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32}
ABSMAX = {
    0: (torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.25])),
    1: (torch.tensor([7.1, 2.3]), torch.tensor([4.0, 9.9])),
}
CT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("kv") / "model", **SIZES)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """(format, name of the KV-cache scheme) → folder."""
    made: dict[tuple[str, str], Path] = {}

    def make(format: str, name: str) -> Path:
        if (format, name) not in made:
            prepared = prepare(Request(model, make_settings(scheme="FP8_DYNAMIC", format=format), threads=1))
            plan = with_kv_cache(prepared.plan, find_kv_cache_scheme(name), prepared.checkpoint.config())
            folder = tmp_path_factory.mktemp("written") / "model"
            write_checkpoint(replace(prepared, plan=replace(plan, kv_absmax=ABSMAX)), folder)
            made[format, name] = folder
            assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) == plan.file_bytes
        return made[format, name]

    return make


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_compressed_tensors_per_tensor(written):
    folder = written("compressed-tensors", "fp8")
    tensors = stored(folder)
    for layer, pair in ABSMAX.items():
        for leaf, absmax in zip(("k_scale", "v_scale"), pair, strict=True):
            scale = tensors[f"model.layers.{layer}.self_attn.{leaf}"]
            assert (scale.dtype, scale.shape) == (torch.float32, (1,))
            assert scale.item() == pytest.approx(absmax.max().item() / 448, rel=1e-6)
    assert quantization(folder)["kv_cache_scheme"] == CT | {"strategy": "tensor"}


def test_compressed_tensors_per_head(written):
    folder = written("compressed-tensors", "fp8_per_head")
    scale = stored(folder)["model.layers.1.self_attn.v_scale"]
    assert scale.shape == (2, 1, 1)
    assert torch.equal(scale.flatten(), (ABSMAX[1][1].double() / 448).float())
    assert quantization(folder)["kv_cache_scheme"] == CT | {"strategy": "attn_head"}


def test_modelopt_says_it_in_both_files(written):
    folder = written("modelopt", "fp8")
    scale = stored(folder)["model.layers.0.self_attn.k_proj.k_scale"]
    assert (scale.shape, scale.item()) == ((), pytest.approx(3 / 448))
    assert "model.layers.0.self_attn.v_proj.v_scale" in stored(folder)
    assert quantization(folder)["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    beside = json.loads((folder / "hf_quant_config.json").read_text())
    assert beside["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_modelopt_says_nvfp4_as_modelopt_does(written):
    """config.json: the name of the algorithm, as `convert_hf_quant_config_format` of ModelOpt writes it."""
    folder = written("modelopt", "nvfp4")
    scale = stored(folder)["model.layers.1.self_attn.v_proj.v_scale"]
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert scale.item() == pytest.approx(9.9 / (6 * 448))
    assert quantization(folder)["kv_cache_scheme"] == "NVFP4"
    beside = json.loads((folder / "hf_quant_config.json").read_text())
    assert beside["quantization"]["kv_cache_quant_algo"] == "NVFP4"


def test_nvfp4_scales_are_read_of_either_file(written, tmp_path):
    """hf_quant_config.json's key in config.json counts too; a name that is no cache of ours is left out with a note."""
    folder = broken(written("modelopt", "nvfp4"), tmp_path / "other", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    for algorithm, known in (("NVFP4", True), ("nvfp4", True), ("INT8", False)):
        config["quantization_config"]["kv_cache_quant_algo"] = algorithm
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = open_checkpoint(folder)
        assert (checkpoint.kv_cache is not None) == known  # type: ignore[attr-defined]
        assert any("left out" in note for note in checkpoint.notes) != known


def test_a_cache_in_nvfp4_is_refused_where_engines_take_8_bits():
    config = config_of("llama", **SIZES)
    with pytest.raises(FormatError, match="no scales for a KV cache in NVFP4") as refused:
        stored_kv_scales(FORMATS["compressed-tensors"], KV_CACHE_SCHEMES["nvfp4"], discover_once(config, "llama"),
                         config)  # fmt: skip
    assert "--format modelopt" in str(refused.value.hint)


def test_nvfp4_scales_that_the_target_lacks_are_dropped_with_a_note(written, tmp_path):
    made = lowbit.convert(written("modelopt", "nvfp4"), tmp_path / "out", format="compressed-tensors")
    assert any("KV cache in NVFP4" in note for note in made.report.source.notes)
    assert not any(name.endswith("k_scale") for name in stored(tmp_path / "out"))


@pytest.mark.parametrize(
    ("format", "name", "engine", "said"),
    [
        ("compressed-tensors", "fp8", "vllm", None),
        ("compressed-tensors", "fp8_per_head", "vllm", None),
        ("modelopt", "nvfp4", "vllm", None),
        ("modelopt", "fp8", "sglang", None),
        ("compressed-tensors", "fp8", "sglang", "it reads such scales of modelopt and fp8"),
        ("compressed-tensors", "fp8_per_head", "sglang", "sglang drops scales of a KV cache in FP8, one per head"),
        ("modelopt", "nvfp4", "sglang", "of modelopt it reads fp8"),
    ],
)
def test_scales_that_an_engine_reads_or_drops(written, format, name, engine, said):
    [check] = [each for each in verify(written(format, name), engine=engine).checks if each.rule == "cache-scales-read"]
    assert check.passed == (said is None)
    assert (check.limit, check.outcome) == (True, "costs")
    if said is not None:
        assert said in check.detail


@pytest.mark.parametrize("place", [("compressed-tensors", "fp8"), ("compressed-tensors", "fp8_per_head"),
                                   ("modelopt", "fp8"), ("modelopt", "nvfp4")], ids="-".join)  # fmt: skip
def test_written_scales_are_read_again_and_pass_every_rule(written, place):
    folder = written(*place)
    checkpoint = open_checkpoint(folder)
    cache = checkpoint.kv_cache  # type: ignore[attr-defined]
    assert cache.scheme == KV_CACHE_SCHEMES[place[1]]
    for layer, pair in ABSMAX.items():
        for found, absmax in zip(cache.absmax[layer], pair, strict=True):
            wanted = absmax if place[1] == "fp8_per_head" else absmax.max().reshape(1)
            torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=0)
    assert not any(name.endswith(("k_scale", "v_scale")) for name in checkpoint.tensors)
    found = verify(folder)
    assert found.ok, found.failed
    assert "kv-cache-scales" in [check.rule for check in found.checks]


def test_a_conversion_keeps_the_scales_bit_for_bit(written, tmp_path):
    lowbit.convert(written("compressed-tensors", "fp8"), tmp_path / "there", format="modelopt")
    lowbit.convert(tmp_path / "there", tmp_path / "back", format="compressed-tensors")
    before, after = stored(written("compressed-tensors", "fp8")), stored(tmp_path / "back")
    for name in (name for name in before if name.endswith(("k_scale", "v_scale"))):
        assert torch.equal(before[name], after[name]), name
    assert verify(tmp_path / "there").ok
    assert quantization(tmp_path / "back")["kv_cache_scheme"] == CT | {"strategy": "tensor"}


def test_scales_per_head_become_the_largest_where_the_format_has_one(written, tmp_path):
    report = lowbit.convert(written("compressed-tensors", "fp8_per_head"), tmp_path / "out", format="modelopt").report
    assert stored(tmp_path / "out")["model.layers.1.self_attn.k_proj.k_scale"].item() == pytest.approx(7.1 / 448)
    assert any("one per layer" in note for note in report.source.notes)


def test_a_format_without_such_scales_drops_them_and_says_so(written, tmp_path):
    report = lowbit.convert(written("compressed-tensors", "fp8"), tmp_path / "out", format="float").report
    assert any("dropped: float has no scales for a KV cache" in note for note in report.source.notes)
    assert not any(name.endswith("k_scale") for name in stored(tmp_path / "out"))


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "awq", "bitsandbytes", "mxfp4", "float"])
def test_formats_without_such_scales_refuse_them(format):
    config = config_of("llama", **SIZES)
    with pytest.raises(FormatError, match=f"{format} has no scales for a KV cache"):
        stored_kv_scales(FORMATS[format], KV_CACHE_SCHEMES["fp8"], discover_once(config, "llama"), config)


def test_modelopt_refuses_scales_per_head():
    config = config_of("llama", **SIZES)
    with pytest.raises(FormatError, match="not one per head"):
        stored_kv_scales(FORMATS["modelopt"], KV_CACHE_SCHEMES["fp8_per_head"], discover_once(config, "llama"), config)


@pytest.mark.parametrize(("architecture", "said"), [("deepseek_v3", "makes no keys"), ("gpt2", "is transformer.h.0")])
def test_models_whose_attention_is_not_where_engines_look_are_refused(architecture, said):
    config = config_of(architecture)
    with pytest.raises(ArchitectureError, match=said):
        stored_kv_scales(
            FORMATS["compressed-tensors"], KV_CACHE_SCHEMES["fp8"], discover_once(config, architecture), config
        )


def test_stacked_keys_and_values_have_their_scales_beside_the_one_matrix():
    config = config_of("phi3")
    scales = stored_kv_scales(FORMATS["modelopt"], KV_CACHE_SCHEMES["fp8"], discover_once(config, "phi3"), config)
    assert scales[1].v.name == "model.layers.1.self_attn.qkv_proj.v_scale"


def test_heads_that_are_not_those_of_the_config_are_named(model):
    prepared = prepare(Request(model, make_settings(scheme="FP8_DYNAMIC"), threads=1))
    plan = with_kv_cache(prepared.plan, KV_CACHE_SCHEMES["fp8_per_head"], prepared.checkpoint.config())
    with pytest.raises(ArchitectureError, match=r"3 heads were measured, config\.json has 2"):
        replace(plan, kv_absmax=dict.fromkeys(range(2), (torch.ones(3), torch.ones(3)))).pieces_beside()
    with pytest.raises(ArchitectureError, match="layer 1 were not measured"):
        replace(plan, kv_absmax={0: ABSMAX[0]}).pieces_beside()


def test_heads_of_configs():
    assert key_value_heads({"text_config": {"num_attention_heads": 8, "num_key_value_heads": 2}}) == 2
    assert key_value_heads({"num_attention_heads": 8}) == 8
    with pytest.raises(ArchitectureError, match="key-value heads"):
        key_value_heads({"num_key_value_heads": [1, 2]})


def test_schemes_by_name():
    assert find_kv_cache_scheme("FP8").per == "tensor"
    with pytest.raises(UsageError, match="int8"):
        find_kv_cache_scheme("int8")
    scales = KV_CACHE_SCHEMES["fp8_per_head"].scales(torch.tensor([448.0, 0.0]))
    assert scales[0] == 1.0
    assert scales[1] > 0


def broken(folder: Path, to: Path, edit) -> Path:
    shutil.copytree(folder, to)
    tensors = {name: tensor.clone() for name, tensor in stored(folder).items()}
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


K, V = "model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale"


@pytest.mark.parametrize(("edit", "said"), [
    (lambda t: t.pop(V), "layer 1 has no v_scale"),
    (lambda t: t.update({K: torch.zeros(1)}), f"{K} is 0.0"),
    (lambda t: t.update({K: torch.full((1,), float("nan"))}), f"{K} is nan"),
    (lambda t: t.update({K: torch.ones(2)}), f"{K} has shape [2]"),
    (lambda t: t.update({K: torch.ones(1, dtype=torch.int32)}), f"{K} is int32"),
    (lambda t: t.update({K.replace("self_attn.", "self_attn.attn."): torch.ones(1)}), "are both of layer 1"),
])  # fmt: skip
def test_scales_that_engines_would_misread_fail_the_rule(written, tmp_path, edit, said):
    folder = broken(written("compressed-tensors", "fp8"), tmp_path / "broken", edit)
    details = {check.rule: check.detail for check in verify(folder).failed}
    assert said in details["kv-cache-scales"]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kv_cache is None  # type: ignore[attr-defined]
    assert any("left out" in note for note in checkpoint.notes)


def test_a_scheme_without_scales_fails_the_rule_and_is_noted(written, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            del tensors[name]

    for format in ("compressed-tensors", "modelopt"):
        folder = broken(written(format, "fp8"), tmp_path / format, drop)
        details = {check.rule: check.detail for check in verify(folder).failed}
        assert "layer 0 has no k_scale" in details["kv-cache-scales"]
        assert any("hold no scales" in note for note in open_checkpoint(folder).notes)


def test_scales_that_config_json_says_nothing_of_are_left_out_with_a_note(written, tmp_path):
    folder = broken(written("compressed-tensors", "fp8"), tmp_path / "broken", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert any("left out: config.json does not say" in note for note in checkpoint.notes)
    assert K not in checkpoint.tensors
    assert "leftovers" in {check.rule for check in verify(folder).failed}


def test_scales_of_fp8_folders_are_read_by_their_names(tmp_path, model):
    """The format of model makers, which does not speak of the cache: vLLM reads what is there."""
    lowbit.convert(_fp8_folder(model, tmp_path / "fp8"), tmp_path / "out", format="modelopt")
    assert stored(tmp_path / "out")["model.layers.1.self_attn.v_proj.v_scale"].item() == pytest.approx(0.02)


def _fp8_folder(model: Path, to: Path) -> Path:
    """quant_method fp8, per tensor and static, made of the same model by hand."""
    shutil.copytree(model, to)
    tensors = {}
    for name, tensor in stored(model).items():
        if "_proj" in name:
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".weight_scale")] = scale
            tensors[name.replace(".weight", ".input_scale")] = torch.tensor(0.01)
        else:
            tensors[name] = tensor.clone()
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.self_attn.{leaf}": torch.tensor(0.02) for leaf in ("k_scale", "v_scale")}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static",
                                     "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_scales_that_the_engine_would_drop_in_silence_are_named(model, tmp_path):
    """vLLM's loader of GPTQ gives the attention no scales, whatever config.json says of a cache."""
    folder = lowbit.quantize(model, tmp_path / "gptq", scheme="W4A16", group_size=32, format="gptq").path
    assert verify(folder).ok
    folder = broken(folder, tmp_path / "scaled", lambda tensors: tensors.update({K: torch.ones(1), V: torch.ones(1)}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (folder / "config.json").write_text(json.dumps(config))
    details = {check.rule: check.detail for check in verify(folder).failed}
    assert K in details["leftovers"]
