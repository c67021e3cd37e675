"""LMDeploy and TGI: what they load passes, and each rule fails on a folder that breaks it alone."""

from __future__ import annotations

import json

import pytest
import torch
from breaking import ATTENTION, assert_breaks, edit_config, edit_tensors, failures

from models import SHORT_TEXT

OUT = f"{ATTENTION}.o_proj"
STATIC = {"calib": SHORT_TEXT, "samples": 2, "seqlen": 32}


def outcomes(verification) -> list[str]:
    return [check.outcome for check in verification.failed]


def edit_model(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(("scheme", "settings"), [
    ("W4A16", {}), ("W4A16_ASYM", {}), ("W4A16", {"group_size": 32}), ("W4A16", {"format": "gptq"}),
    ("W4A16_ASYM", {"format": "awq"}), ("W4A16", {"format": "awq"}),
])  # fmt: skip
def test_what_turbomind_loads(good, scheme, settings):
    assert failures(good(scheme, **settings), engine="lmdeploy") == {}


@pytest.mark.parametrize(("scheme", "settings", "said"), [
    ("W8A16", {}, "8-bit int as pack-quantized"), ("W4A16", {"group_size": 64}, "group size 64"),
    ("W8A8", {}, "as int-quantized"), ("FP8_DYNAMIC", {}, "as float-quantized"),
    ("W8A16", {"format": "gptq"}, "bits is 8"), ("W4A16", {"format": "gptq", "group_size": 64}, "group_size is 64"),
    ("W4A16_ASYM", {"format": "awq", "group_size": 64}, "group_size is 64"),
    ("W4A16_ASYM", {"format": "gptq_v2"}, "sym is false"),
])  # fmt: skip
def test_what_turbomind_asserts(good, scheme, settings, said):
    verification = assert_breaks(good(scheme, **settings), "lmdeploy-config", said, engine="lmdeploy")
    assert not verification.broken
    assert outcomes(verification)[0] == "refuses"


def test_version_of_awq_in_capitals(broken):
    folder = broken("W4A16_ASYM", format="awq")
    edit_config(folder, lambda stated: stated.update(version="GEMM"))
    assert_breaks(folder, "lmdeploy-config", "'GEMM'", engine="lmdeploy")


def test_a_group_of_another_name(broken):
    folder = broken("W4A16")

    def rename(stated):
        stated["config_groups"] = {"own": stated["config_groups"]["group_0"]}

    edit_config(folder, rename)
    assert_breaks(folder, "lmdeploy-config", "no 'group_0'", engine="lmdeploy")


def test_a_model_that_turbomind_has_not(broken):
    """Then the PyTorch engine loads it, which reads AWQ, and neither GPTQ nor compressed-tensors."""
    folder = broken("W4A16")
    edit_model(folder, architectures=["GemmaForCausalLM"])
    verification = assert_breaks(folder, "lmdeploy-engine", "GemmaForCausalLM", engine="lmdeploy")
    assert outcomes(verification) == ["refuses"]


def test_awq_of_a_model_that_turbomind_has_not(broken):
    folder = broken("W4A16_ASYM", format="awq", group_size=64)
    edit_model(folder, architectures=["GemmaForCausalLM"])
    assert failures(folder, engine="lmdeploy") == {}


def test_a_second_group_is_not_read(good):
    folder = good("W4A16", overrides={r"\.down_proj$": "W4A16"}, group_size=32)
    assert failures(folder, engine="lmdeploy") == {}
    mixed = good("W4A16", overrides={r"\.down_proj$": "W8A16"})
    verification = assert_breaks(mixed, "lmdeploy-one-scheme", "down_proj has 8 bits", engine="lmdeploy")
    assert outcomes(verification) == ["misreads"]


def test_zero_points_of_version_2(broken):
    folder = broken("W4A16", format="gptq_v2")
    verification = assert_breaks(folder, "lmdeploy-zero-points", "gptq_v2", engine="lmdeploy")
    assert outcomes(verification) == ["misreads"]


def test_a_cache_that_lmdeploy_leaves_in_16_bits(good):
    folder = good("W4A16", kv_cache="fp8", **STATIC)
    verification = assert_breaks(folder, "lmdeploy-kv-cache", "--quant-policy", engine="lmdeploy")
    assert outcomes(verification) == ["costs"]


@pytest.mark.parametrize("engine", ["lmdeploy", "tgi"])
@pytest.mark.parametrize(("scheme", "format"), [("NF4", "bitsandbytes"), ("FP8_DYNAMIC", "modelopt")])
def test_formats_without_a_loader(good, engine, scheme, format):
    assert list(failures(good(scheme, format=format), engine=engine)) == ["engine-loader"]


@pytest.mark.parametrize("engine", ["lmdeploy", "tgi"])
def test_columns_in_another_order(broken, engine):
    folder = broken("W4A16", format="gptq")
    edit_tensors(folder, lambda tensors:
                 tensors.update({f"{OUT}.g_idx": torch.ones_like(tensors[f"{OUT}.g_idx"])}))  # fmt: skip
    assert "gptq-group-index" in failures(folder, engine=engine)


@pytest.mark.parametrize(("scheme", "settings"), [
    ("W4A16", {}), ("W8A16", {}), ("W8A8", {}), ("FP8_DYNAMIC", {}), ("W4A16", {"group_size": -1}),
    ("W4A16", {"format": "gptq"}), ("W8A16", {"format": "gptq"}), ("W4A16_ASYM", {"format": "awq"}),
])  # fmt: skip
def test_what_tgi_loads(good, scheme, settings):
    assert failures(good(scheme, **settings), engine="tgi") == {}


@pytest.mark.parametrize(("scheme", "settings", "said"), [
    ("W4A16_ASYM", {}, "asymmetric"), ("W3A16", {}, "3 bits"), ("FP8_BLOCK", {}, "a scale per block"),
    ("NVFP4A16", {}, "has no loader"), ("MXFP8", {}, "has no loader"), ("W4A8", {}, "4-bit integers"),
    ("W4A16", {"overrides": {r"\.down_proj$": "FP8_DYNAMIC"}}, "the global format is"),
])  # fmt: skip
def test_groups_that_tgi_has_no_loader_for(good, scheme, settings, said):
    verification = assert_breaks(good(scheme, **settings), "tgi-groups", said, engine="tgi")
    assert outcomes(verification)[0] == "refuses"


def test_experts_in_packed_codes_that_tgi_has_no_layer_for(good):
    assert_breaks(good("W4A16", model="mixtral"), "tgi-groups", "experts are unquantized", engine="tgi")


@pytest.mark.parametrize(("scheme", "settings"), [("W4A16", {"format": "gptq"}), ("W4A16_ASYM", {"format": "awq"})])
def test_packed_codes_of_a_model_that_tgi_has_no_class_for(good, scheme, settings):
    assert failures(good(scheme, model="mixtral", **settings), engine="tgi") == {}
    verification = assert_breaks(good(scheme, model="qwen3", **settings), "tgi-model", "no class of its own for qwen3",
                                 engine="tgi")  # fmt: skip
    assert outcomes(verification) == ["refuses"]


def test_transformers_decodes_what_tgi_has_no_class_for(good):
    verification = assert_breaks(good("W4A16", model="qwen3"), "tgi-speed", "without TGI's kernels", engine="tgi")
    assert outcomes(verification) == ["costs"]


def test_packed_experts_behind_a_sigmoid(good):
    folder = good("W4A16_ASYM", format="awq", model="deepseek_v3")
    assert "router of deepseek_v3 has a sigmoid" in failures(folder, engine="tgi")["tgi-experts"]


def test_linears_that_marlin_does_not_take(good):
    for scheme, format, said in (("W3A16", "gptq", "3 bits"), ("W4A16_ASYM", "gptq_v2", "symmetric ones")):
        assert_breaks(good(scheme, format=format), "tgi-packed", said, engine="tgi")


def test_a_linear_of_a_block_in_16_bits(good):
    folder = good("W4A16_ASYM", format="awq", ignore=(r"\.1\.mlp\.",))
    assert_breaks(folder, "tgi-packed", "model.layers.1.mlp", "is in 16 bits", engine="tgi")


def test_a_gptq_linear_without_its_column_index(broken):
    folder = broken("W4A16", format="gptq")
    edit_tensors(folder, lambda tensors: tensors.pop(f"{OUT}.g_idx"))
    assert_breaks(folder, "tgi-packed", f"{OUT}.g_idx is absent", engine="tgi")


def test_a_quantized_output_layer(good):
    folder = good("W4A16", overrides={"lm_head": "W4A16"})
    assert_breaks(folder, "tgi-head", "lm_head.weight", engine="tgi")


def test_static_activations_that_tgi_measures_anyway(good):
    for scheme in ("FP8", "W8A8_STATIC"):
        verification = assert_breaks(good(scheme, **STATIC), "tgi-static", "static activation scale", engine="tgi")
        assert outcomes(verification) == ["costs"]


def test_a_scale_per_head_of_the_cache(good):
    assert failures(good("W4A16", kv_cache="fp8", **STATIC), engine="tgi") == {}
    assert_breaks(good("W4A16", kv_cache="fp8_per_head", **STATIC), "tgi-kv-cache", "attn_head", engine="tgi")
