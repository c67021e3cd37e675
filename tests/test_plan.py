from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import ArchitectureError, CheckpointError, ShapeError, UsageError
from lowbit.plan.plan import Request, prepare
from lowbit.settings import make_settings
from models import FAMILIES, make_model


def plan_of(folder, **settings):
    return prepare(Request(folder, make_settings(**settings))).plan


def by_name(plan):
    return {tensor.name: tensor for tensor in plan.tensors}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_decoder_linear_is_quantized_and_the_rest_explained(tmp_path, model_type):
    plan = plan_of(make_model(tmp_path / "m", model_type), group_size=64)
    assert len(plan.quantized) == 14
    assert all(tensor.is_quantized == (tensor.scheme is not None) for tensor in plan.tensors)


def test_lm_head_stays_by_default_and_says_how_to_change_that(tiny_llama):
    lm_head = by_name(plan_of(tiny_llama))["lm_head.weight"]
    assert lm_head.scheme is None
    assert "--override" in lm_head.reason


def test_override_quantizes_lm_head(tiny_llama):
    plan = plan_of(tiny_llama, overrides={"^lm_head$": "W8A16"})
    assert by_name(plan)["lm_head.weight"].scheme.name == "W8A16"
    assert "lm_head" not in plan.ignored


def test_ignore_wins_over_override(tiny_llama):
    plan = plan_of(tiny_llama, ignore=("down_proj$",), overrides={"down_proj$": "W8A16"})
    assert by_name(plan)["model.layers.0.mlp.down_proj.weight"].reason == "matches --ignore down_proj$"


def test_group_size_adapts_for_all_layers_where_one_does_not_divide_and_says_so(tiny_llama):
    plan = plan_of(tiny_llama)
    note = "group size 64 in all layers, because 128 does not divide some of them"
    assert {tensor.scheme.weight.group_size for tensor in plan.quantized} == {64}
    assert {tensor.notes for tensor in plan.quantized} == {(note,)}
    assert len(plan.exporter.quantization_config(plan.schemes, plan.ignored)["config_groups"]) == 1


def test_group_size_adapts_layer_by_layer_where_no_size_divides_all(tmp_path):
    tensors = by_name(plan_of(make_model(tmp_path / "m", intermediate_size=200)))
    assert tensors["model.layers.0.mlp.up_proj.weight"].notes == ()
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert down.notes == ("group size 100, because 128 does not divide in_features 200",)


def test_chosen_group_size_that_does_not_divide_is_an_error(tiny_llama):
    with pytest.raises(ShapeError, match=r"down_proj: in_features 192 is not a multiple of group size 128") as caught:
        plan_of(tiny_llama, group_size=128)
    assert "--group-size 64" in caught.value.hint


def test_fixed_group_that_does_not_divide_is_left_alone_with_the_reason(tmp_path):
    model = make_model(tmp_path / "m", intermediate_size=200)
    down = by_name(plan_of(model, scheme="MXFP4A16"))["model.layers.0.mlp.down_proj.weight"]
    assert down.reason == "in_features 200 is not a multiple of 32, which MXFP4A16 fixes"


@pytest.mark.parametrize("settings", [
    {"overrides": {"k_proj$": "W8A16"}},
    {"overrides": {"v_proj$": "W4A16_ASYM"}},
    {"ignore": ("gate_proj$",)},
])  # fmt: skip
def test_fused_sets_must_agree(tiny_llama, settings):
    with pytest.raises(UsageError, match="would mix schemes") as caught:
        plan_of(tiny_llama, **settings)
    assert "whole set" in caught.value.hint


def test_overriding_a_whole_fused_set_is_fine(tiny_llama):
    plan = plan_of(tiny_llama, overrides={r"\.(q|k|v)_proj$": "W8A16"})
    assert plan.schemes["model.layers.0.self_attn.k_proj"].name == "W8A16"
    groups = plan.exporter.quantization_config(plan.schemes, plan.ignored)["config_groups"]
    assert all("Linear" not in group["targets"] for group in groups.values())


@pytest.mark.parametrize("option", [{"ignore": ("nothing",)}, {"overrides": {"nothing": "W8A16"}}])
def test_pattern_that_matches_nothing_is_refused(tiny_llama, option):
    with pytest.raises(UsageError, match="matches no linear"):
        plan_of(tiny_llama, **option)


def test_ignoring_everything_is_refused(tiny_llama):
    with pytest.raises(ArchitectureError, match="no linear is left"):
        plan_of(tiny_llama, ignore=("proj",))


def test_tied_lm_head_cannot_be_quantized(tmp_path):
    model = make_model(tmp_path / "m", tie_word_embeddings=True)
    assert "lm_head" in plan_of(model).ignored
    with pytest.raises(UsageError, match=r"tied to model\.embed_tokens\.weight"):
        plan_of(model, overrides={"lm_head": "W8A16"})


def test_absent_tensor_is_named(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*absent"):
        plan_of(folder)


def test_shape_that_contradicts_the_config_is_named(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(CheckpointError, match=r"shape \[192, 128\], config\.json says \[256, 128\]"):
        plan_of(folder)


def test_quantized_source_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        plan_of(folder)


def test_extra_tensors_are_kept_and_listed(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {buffer: torch.ones(16)}, folder / "model.safetensors")
    extra = by_name(plan_of(folder))[buffer]
    assert "copied as it is" in extra.reason
    assert extra.stored[0].shape == (16,)


@pytest.mark.parametrize(("scheme", "needs"), [("FP8", True), ("NVFP4", True), ("FP8_DYNAMIC", False)])
def test_static_schemes_need_the_range_of_every_quantized_linear(tiny_llama, scheme, needs):
    plan = plan_of(tiny_llama, scheme=scheme)
    assert plan.static_inputs == (plan.schemes.keys() if needs else set())


def test_bits_per_weight_counts_scales(tiny_llama):
    assert plan_of(tiny_llama, group_size=64).bits_per_weight(decoder_only=True) == pytest.approx(4 + 16 / 64, abs=0.05)


def test_blocks_that_a_fused_set_would_cut_leave_the_set_alone(tmp_path):
    """k has 64 rows, so v would begin in the middle of a 128 × 128 block."""
    model = make_model(tmp_path / "m", hidden_size=256, intermediate_size=256, num_attention_heads=8)
    tensors = by_name(plan_of(model, scheme="FP8_BLOCK"))
    for leaf in "qkv":
        assert "cut a block" in tensors[f"model.layers.0.self_attn.{leaf}_proj.weight"].reason
    assert tensors["model.layers.0.mlp.gate_proj.weight"].scheme.name == "FP8_BLOCK"


@pytest.mark.parametrize(
    ("asked", "said", "hint"),
    [
        ({"scheme": "FP8_BLOCK"}, "groups of 128, which do not divide 72 in_features", "another scheme"),
        ({"scheme": "W4A16", "ignore": (".*",)}, r"matches --ignore \.\*", "loosen --ignore"),
    ],
)
def test_a_plan_that_quantizes_nothing_says_why(tmp_path, asked, said, hint):
    sizes = {"hidden_size": 72, "intermediate_size": 90, "num_attention_heads": 3, "head_dim": 24}
    model = make_model(tmp_path / "model", num_key_value_heads=3, **sizes)
    with pytest.raises(ArchitectureError, match=f"no linear is left to quantize: .*{said}") as caught:
        lowbit.dry_run(model, **asked)
    assert hint in (caught.value.hint or "")
