"""GPTQ folders: good ones pass, and each rule fails on a folder that breaks it alone."""

import json

import pytest
import torch
from breaking import ATTENTION, assert_breaks, edit_config, edit_tensors, failures

Q, K, OUT = (f"{ATTENTION}.{role}_proj" for role in "qko")
HALVES = {"group_size": 32, "format": "gptq"}


def edit_both(folder, edit):
    """config.json and quantize_config.json alike."""
    edit_config(folder, edit)
    path = folder / "quantize_config.json"
    stated = json.loads(path.read_text())
    edit(stated)
    path.write_text(json.dumps(stated))


def without(*keys):
    return lambda stated: [stated.pop(key) for key in keys]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_symmetric_codes_of_4_and_8_bits_pass(good, source, scheme, version, engine):
    folder = good(scheme, format=version)
    assert failures(folder, source=source, nearest=True, engine=engine) == {}


@pytest.mark.parametrize(("scheme", "version"), [("W2A16", "gptq"), ("W3A16", "gptq_v2"), ("W4A16_ASYM", "gptq_v2")])
def test_what_vllm_has_no_kernel_for_is_a_limit_and_transformers_takes_it(good, source, scheme, version):
    from lowbit.verification import verify

    folder = good(scheme, format=version)
    failed = verify(folder, source=source, nearest=True).failed
    assert [(check.rule, check.limit) for check in failed] == [("gptq-kernels", True)]
    assert verify(folder).broken == []
    assert failures(folder, engine="transformers", source=source, nearest=True) == {}


def test_group_size_without_a_kernel(good):
    assert "group size 16" in failures(good("W4A16", format="gptq", group_size=16))["gptq-kernels"]


@pytest.mark.parametrize("key", ["desc_act", "sym"])
def test_missing_key(broken, key):
    folder = broken("W4A16", format="gptq")
    edit_both(folder, without(key))
    assert_breaks(folder, "gptq-keys", key)
    assert_breaks(folder, "gptq-keys", key, engine="sglang")
    assert "gptq-keys" not in failures(folder, engine="transformers")


def test_missing_bits_stop_the_rest(broken):
    folder = broken("W4A16", format="gptq")
    edit_both(folder, without("bits"))
    assert_breaks(folder, "gptq-keys", "bits")
    assert "tensors" in assert_breaks(folder, "quantization-config", "bits").unchecked


def test_activation_order_in_groups_is_no_longer_supported(broken):
    folder = broken("W4A16", **HALVES)
    edit_both(folder, lambda q: q.update(desc_act=True))
    assert_breaks(folder, "gptq-column-order", "desc_act", "32")
    assert "gptq-column-order" not in failures(folder, engine="sglang")


def test_activation_order_with_one_group_per_row_changes_nothing(broken):
    folder = broken("W4A16", format="gptq", group_size=-1)
    edit_both(folder, lambda q: q.update(desc_act=True))
    assert failures(folder) == {}


def test_activation_order_of_a_dynamic_pattern(broken):
    folder = broken("W4A16", **HALVES)
    edit_both(folder, lambda q: q.update(dynamic={r"+:.*\.o_proj$": {"desc_act": True}}))
    assert_breaks(folder, "gptq-column-order", "o_proj")


def permuted(tensors):
    tensors[f"{OUT}.g_idx"] = torch.arange(128).flip(0).to(torch.int32) // 32


def test_permuted_columns_without_desc_act_are_misread(broken):
    folder = broken("W4A16", **HALVES)
    edit_tensors(folder, permuted)
    for engine in ("vllm", "sglang"):
        assert_breaks(folder, "gptq-group-index", f"{OUT}.g_idx[0] is 3, not 0", engine=engine)
    assert "gptq-group-index" not in failures(folder, engine="transformers")


def test_trivial_group_index_passes(broken, source):
    folder = broken("W4A16", **HALVES)
    edit_tensors(folder, lambda t: t.update({f"{OUT}.g_idx": torch.arange(128, dtype=torch.int32) // 32}))
    assert failures(folder, source=source, nearest=True) == {}


def test_truly_permuted_groups_are_decoded_in_their_order(broken, source):
    """Columns in other groups, with scales that follow: transformers reads g_idx, and every code is the nearest."""
    folder = broken("W4A16", **HALVES)

    def swap_groups(tensors):
        tensors[f"{OUT}.g_idx"] = torch.tensor([1, 0, 2, 3], dtype=torch.int32).repeat_interleave(32)
        tensors[f"{OUT}.scales"] = tensors[f"{OUT}.scales"][[1, 0, 2, 3]]

    edit_tensors(folder, swap_groups)
    edit_both(folder, lambda q: q.update(desc_act=True))
    assert failures(folder, source=source, nearest=True, engine="transformers") == {}


def test_zero_points_of_the_other_version(broken):
    folder = broken("W4A16", format="gptq")
    edit_both(folder, lambda q: q.update(checkpoint_format="gptq_v2"))
    assert_breaks(folder, "gptq-zeros", f"{Q}.qzeros holds 7", "gptq_v2 have 8")


def test_one_zero_point_that_is_not_symmetric(broken):
    folder = broken("W4A16", format="gptq")
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.qzeros"].view(-1)[1].bitwise_xor_(1))
    assert_breaks(folder, "gptq-zeros", f"{OUT}.qzeros holds 6")


@pytest.mark.parametrize(("key", "value"), [("group_size", 64), ("sym", False), ("dynamic", {"-:x": {}})])
def test_quantize_config_that_contradicts(broken, key, value):
    folder = broken("W4A16", format="gptq")
    path = folder / "quantize_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert_breaks(folder, "gptq-files", key, "quantize_config.json")


def test_quantize_config_alone_is_enough(broken, source):
    folder = broken("W4A16", format="gptq")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert failures(folder, source=source, nearest=True) == {}


def test_dynamic_pattern_that_misses_the_fused_name(broken):
    folder = broken("W4A16", format="gptq")
    edit_both(folder, lambda q: q.update(dynamic={r"+:.*\.0\.self_attn\.[qkv]_proj$": {"bits": 8}}))
    assert_breaks(folder, "gptq-dynamic", f"{ATTENTION}.qkv_proj", "[qkv]_proj")


def test_mixed_schemes_of_our_own_pass(good, source):
    folder = good(
        "W4A16", format="gptq", overrides={r"\.down_proj$": "W8A16"}, ignore=(r"\.0\.self_attn\.[qkv]_proj$",)
    )
    for engine in ("vllm", "sglang"):
        assert failures(folder, source=source, nearest=True, engine=engine) == {}


def test_rows_that_do_not_fill_words(broken):
    """A matrix of 124 rows: 4-bit zero points fill no 32-bit words."""
    folder = broken("W4A16", format="gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 252}))
    assert_breaks(folder, "gptq-shapes", "252")


def test_groups_that_do_not_divide(broken):
    folder = broken("W4A16", format="gptq")
    edit_both(folder, lambda q: q.update(group_size=96))
    assert_breaks(folder, "gptq-shapes", f"{Q} has 128 columns; groups of 96")


def test_left_out_linears_that_optimum_would_not_see(broken):
    folder = broken("W4A16", format="gptq", ignore=(r"\.0\.self_attn\.",))
    edit_both(folder, without("modules_in_block_to_quantize"))
    assert_breaks(folder, "gptq-transformers", "modules_in_block_to_quantize", engine="transformers")


def unquantize(tensors, linear):
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{linear}.{leaf}", None)
    tensors[f"{linear}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)


def test_partly_quantized_model_that_nobody_announced(broken):
    folder = broken("W4A16", format="gptq")
    edit_tensors(folder, lambda tensors: unquantize(tensors, OUT))
    assert_breaks(folder, "coverage", OUT, "does not say")
    assert_breaks(folder, "left-out", OUT, engine="sglang")


def test_half_quantized_fused_set(broken):
    folder = broken("W4A16", format="gptq")
    edit_tensors(folder, lambda tensors: unquantize(tensors, K))
    assert_breaks(folder, "fused-schemes", f"{ATTENTION}.qkv_proj", K)


def test_tampered_code_and_bad_scale(broken, source):
    folder = broken("W4A16", format="gptq")
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.qweight"].view(-1)[0].bitwise_xor_(1 << 4))
    assert_breaks(folder, "nearest-codes", f"{OUT}.weight[0, 1]", source=source, nearest=True)
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.scales"].view(-1)[5].fill_(float("inf")))
    assert_breaks(folder, "scales", f"{OUT}.scales", "row 5")


def test_bits_that_the_shapes_contradict(broken):
    folder = broken("W4A16", format="gptq")
    edit_both(folder, lambda q: q.update(bits=8))
    assert_breaks(folder, "tensors", f"{Q}.qweight")
