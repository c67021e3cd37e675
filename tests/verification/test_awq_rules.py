"""AWQ folders: good ones pass, and each rule fails on a folder that breaks it alone."""

import pytest
import torch
from breaking import ATTENTION, BLOCK, assert_breaks, edit_config, edit_tensors, failures

Q, K, V, OUT = (f"{ATTENTION}.{role}_proj" for role in "qkvo")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_good_folders_pass(good, source, scheme, engine):
    assert failures(good(scheme, format="awq"), source=source, nearest=True, engine=engine) == {}


@pytest.mark.parametrize("key", ["zero_point"])
def test_missing_key(broken, key):
    folder = broken("W4A16_ASYM", format="awq")
    edit_config(folder, lambda q: q.pop(key))
    for engine in ("vllm", "sglang"):
        assert_breaks(folder, "awq-keys", key, engine=engine)


def test_other_bits_and_versions_cannot_be_opened(broken):
    folder = broken("W4A16_ASYM", format="awq")
    edit_config(folder, lambda q: q.update(version="gemv"))
    assert_breaks(folder, "awq-version", "gemv")


def test_version_under_its_newer_key(broken):
    folder = broken("W4A16_ASYM", format="awq")
    edit_config(folder, lambda q: q.update(format="gemv_fast"))
    assert failures(folder) == {}  # version is there, and counts
    edit_config(folder, lambda q: q.pop("version"))
    assert_breaks(folder, "quantization-config", "gemv_fast")


def test_version_is_compared_without_case(broken):
    from lowbit.verification import verify

    folder = broken("W4A16_ASYM", format="awq")
    edit_config(folder, lambda q: q.update(version="GEMM"))
    assert {check.rule: check.detail for check in verify(folder).checks}["awq-version"] == "gemm"


def test_absent_zero_points(broken):
    folder = broken("W4A16", format="awq")
    edit_config(folder, lambda q: q.update(zero_point=False))
    edit_tensors(folder, lambda tensors: tensors.pop(f"{OUT}.qzeros"))
    assert_breaks(folder, "awq-zeros", f"{OUT}.qzeros")


def test_groups_that_do_not_divide(broken):
    folder = broken("W4A16_ASYM", format="awq")
    edit_config(folder, lambda q: q.update(group_size=96))
    assert_breaks(folder, "awq-shapes", f"{Q} has 128 columns; groups of 96")


def test_list_that_covers_part_of_a_fused_set(broken):
    folder = broken("W4A16_ASYM", format="awq", ignore=(r"\.0\.self_attn\.[qkv]_proj$",))
    for name in (K, f"{ATTENTION}.qkv_proj"):
        edit_config(folder, lambda q, name=name: q["modules_to_not_convert"].remove(name))
    assert_breaks(folder, "left-out", f"{ATTENTION}.qkv_proj", "some of")


def test_left_out_sets_are_seen_by_vllm_and_by_sglang(good, source):
    folder = good("W4A16_ASYM", format="awq", ignore=(r"\.0\.self_attn\.[qkv]_proj$",))
    assert failures(folder, source=source, nearest=True) == {}
    assert failures(folder, engine="sglang", source=source, nearest=True) == {}


def test_left_out_sets_without_their_fused_name_are_not_seen_by_sglang(broken):
    """SGLang looks its fused names up in the list; members alone are not enough."""
    folder = broken("W4A16_ASYM", format="awq", ignore=(r"\.0\.self_attn\.[qkv]_proj$",))
    edit_config(folder, lambda q: q["modules_to_not_convert"].remove(f"{ATTENTION}.qkv_proj"))
    assert failures(folder) == {}
    assert f"{ATTENTION}.qkv_proj" in failures(folder, engine="sglang")["left-out"]


def test_list_that_hits_a_quantized_linear(broken):
    folder = broken("W4A16_ASYM", format="awq", ignore=(r"\.0\.self_attn\.o_proj$",))
    edit_config(folder, lambda q: q["modules_to_not_convert"].append("down_proj"))
    assert_breaks(folder, "coverage", f"{BLOCK}.mlp.down_proj", "leaves it unquantized")


def test_partly_quantized_model_that_nobody_announced(broken):
    folder = broken("W4A16_ASYM", format="awq")

    def unquantize(tensors):
        for leaf in ("qweight", "qzeros", "scales"):
            del tensors[f"{OUT}.{leaf}"]
        tensors[f"{OUT}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)

    edit_tensors(folder, unquantize)
    assert_breaks(folder, "coverage", OUT, "does not say")
    assert_breaks(folder, "left-out", OUT)


def test_shape_that_sglang_has_no_bfloat16_kernel_for(good):
    """K = 64 columns of experts go elsewhere; groups of 16 are not Marlin's."""
    folder = good("W4A16_ASYM", format="awq", group_size=16)
    assert "groups of 16" in failures(folder, engine="sglang")["awq-kernels"]
    assert failures(folder) == {}


def test_tampered_zero_point(broken, source):
    folder = broken("W4A16_ASYM", format="awq")
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.qzeros"].view(-1)[0].bitwise_xor_(3))
    assert_breaks(folder, "nearest-codes", f"{OUT}.weight[0, ", source=source, nearest=True)
