"""Checkpoints whose config.json does not mean what it seems to, above all on fused layers."""

import json
import shutil

import pytest
from breaking import ATTENTION, BLOCK, assert_breaks, edit_config, edit_tensors, failures, split_groups

from lowbit.verification import verify
from models import make_model

Q, K, V, OUT = (f"{ATTENTION}.{role}_proj" for role in "qkvo")
QKV = f"{ATTENTION}.qkv_proj"


def group(quantization):
    return quantization["config_groups"]["group_0"]


def test_no_quantization_config(broken):
    folder = broken()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_breaks(folder, "format-known", "no quantization_config", "compressed-tensors")


def test_config_that_is_no_json(broken):
    folder = broken()
    (folder / "config.json").write_text("{")
    assert_breaks(folder, "format-known", "config.json")


def test_model_of_an_unknown_type(broken):
    folder = broken()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    assert_breaks(folder, "architecture", "unheard_of")


def test_unknown_key_in_the_arguments(broken):
    folder = broken()
    edit_config(folder, lambda q: group(q)["weights"].update(colour="blue"))
    assert_breaks(folder, "quantization-config", "config_groups.group_0.weights.colour")


def test_unknown_key_in_a_group(broken):
    folder = broken()
    edit_config(folder, lambda q: group(q).update(colour="blue"))
    assert_breaks(folder, "quantization-config", "config_groups.group_0.colour")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_bits", "4"), ("num_bits", 1), ("strategy", "rows"), ("group_size", None), ("type", "posit"),
        ("block_structure", [128, 128]), ("dynamic", True), ("scale_dtype", "torch.int4"), ("group_size", 0),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(broken, argument, value):
    folder = broken()
    edit_config(folder, lambda q: group(q)["weights"].update({argument: value}))
    assert_breaks(folder, "quantization-config", "config_groups.group_0.weights")


def test_target_that_is_no_regular_expression(broken):
    folder = broken()
    edit_config(folder, lambda q: q["ignore"].append("re:(("))
    assert_breaks(folder, "quantization-config", "re:((")


def test_no_format(broken):
    folder = broken()

    def edit(quantization):
        del quantization["format"], group(quantization)["format"]

    edit_config(folder, edit)
    assert_breaks(folder, "format", "group_0")


def test_format_of_other_numbers(broken):
    folder = broken()
    edit_config(folder, lambda q: group(q).update(format="float-quantized"))
    assert_breaks(folder, "format", "group_0", "float-quantized")


def test_sparsity_config(broken):
    folder = broken()
    edit_config(folder, lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}))
    assert_breaks(folder, "sparsity", "sparse-24-bitmask")


@pytest.mark.parametrize("order", ["group", "dynamic"])
def test_activation_order_that_permutes_columns(broken, order):
    folder = broken()
    edit_config(folder, lambda q: group(q)["weights"].update(actorder=order))
    assert_breaks(folder, "activation-order", "group_0", order)


@pytest.mark.parametrize("order", ["weight", "static", None])
def test_activation_order_that_leaves_no_trace_passes(broken, order):
    folder = broken()
    edit_config(folder, lambda q: group(q)["weights"].update(actorder=order))
    assert failures(folder) == {}


def test_activations_with_a_weight_only_format(broken):
    folder = broken()
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    edit_config(folder, lambda q: group(q).update(input_activations=activations))
    assert_breaks(folder, "activations", "group_0", "pack-quantized")


def test_fp8_activations_over_packed_4_bit_integers_pass_if_scales_are_positive(broken, good, tmp_path):
    """Kernels that round activations rescale the scales themselves."""
    folder, signed = broken(positive_scales=True), shutil.copytree(good("W4A16"), tmp_path / "signed")
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    for each in (folder, signed):
        edit_config(each, lambda q: group(q).update(input_activations=activations))
    assert failures(folder) == {}
    assert_breaks(signed, "scales", "a finite number above 0 is needed")


def test_fp8_activations_over_unpacked_integers(broken):
    """vLLM has a scheme for these only where the codes are packed."""
    folder = broken("W4A8")
    edit_config(folder, lambda q: group(q)["input_activations"].update(type="float"))
    assert_breaks(folder, "engine-limits", "group_0", "pack-quantized")


def test_no_activations_with_a_format_that_needs_them(broken):
    folder = broken("W8A8")
    edit_config(folder, lambda q: group(q).update(input_activations=None))
    assert_breaks(folder, "engine-limits", "group_0")


def test_kv_cache_scheme_whose_scales_are_absent(broken):
    folder = broken()
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    edit_config(folder, lambda q: q.update(kv_cache_scheme=scheme))
    assert_breaks(folder, "kv-cache-scales", "layer 0 has no k_scale", "layer 0 has no v_scale")


def test_kv_cache_scheme_of_integers(broken):
    folder = broken()
    edit_config(folder, lambda q: q.update(kv_cache_scheme={"num_bits": 8, "type": "int", "strategy": "tensor"}))
    assert_breaks(folder, "kv-cache", "kv_cache_scheme")


def test_asymmetric_q_beside_symmetric_k_and_v(broken):
    folder = broken()
    edit_config(folder, lambda q: split_groups(q, [Q], symmetric=False))
    assert_breaks(folder, "fused-schemes", QKV, Q, "asymmetric")


def test_k_with_another_group_size(broken):
    folder = broken()
    edit_config(folder, lambda q: split_groups(q, [K], group_size=32))
    assert_breaks(folder, "fused-schemes", K, "group 32")
    assert_breaks(folder, "tensors", f"{K}.weight_scale")


def test_one_scheme_in_two_groups_passes(broken):
    folder = broken()
    edit_config(folder, lambda q: split_groups(q, [K]))
    assert failures(folder) == {}


def test_another_scheme_outside_of_fused_sets_passes(good, source):
    folder = good("W4A16", overrides={"o_proj$": "W8A16"}, group_size=32)
    assert failures(folder, source=source, nearest=True) == {}


def test_ignore_pattern_that_hits_part_of_a_fused_set(broken):
    folder = broken()
    edit_config(folder, lambda q: q["ignore"].append(r"re:.*\.0\.self_attn\.(q|k)_proj$"))
    assert_breaks(folder, "fused-ignore", Q, K, QKV)
    assert_breaks(folder, "fused-schemes", QKV)


def test_ignored_v_proj_regex_that_hits_qkv_proj(broken):
    folder = broken()
    edit_config(folder, lambda q: q["ignore"].append("re:.*v_proj$"))
    assert_breaks(folder, "fused-patterns", "re:.*v_proj$", QKV, r"re:.*\.v_proj$")
    assert_breaks(folder, "engine-groups", QKV)


def test_targeted_up_proj_regex_that_hits_gate_up_proj(broken):
    folder = broken()
    edit_config(folder, lambda q: split_groups(q, ["re:.*up_proj$"], group_size=32))
    assert_breaks(folder, "fused-patterns", "re:.*up_proj$", f"{BLOCK}.mlp.gate_up_proj")


def test_class_target_that_older_releases_prefer_to_names_in_fused_layers(broken):
    folder = broken()
    edit_config(folder, lambda q: split_groups(q, [Q, K, V], group_size=32))
    assert_breaks(folder, "engine-groups", QKV)


def test_output_layer_that_only_its_class_targets(good, broken):
    """vLLM's class of an output layer is ParallelLMHead, in which "Linear" does not occur."""
    folder = broken()
    edit_config(folder, lambda q: q.update(ignore=[]))
    assert_breaks(folder, "engine-groups", "lm_head")


def test_regex_that_hits_the_embedding(broken):
    folder = broken()
    edit_config(folder, lambda q: group(q).update(targets=["re:model.*"]))
    assert_breaks(folder, "engine-groups", "model.embed_tokens")


def test_tied_output_layer_that_is_quantized(broken):
    folder = broken()
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert_breaks(folder, "coverage", "lm_head", "model.embed_tokens.weight")


def test_global_scales_that_a_fused_set_does_not_share(broken):
    folder = broken("NVFP4A16")
    edit_tensors(folder, lambda tensors: tensors[f"{K}.weight_global_scale"].mul_(2))
    assert_breaks(folder, "fused-global-scales", QKV, f"{K}.weight_global_scale")


def test_group_size_that_no_kernel_takes(good):
    assert "group size 16" in failures(good("W4A16", group_size=16))["engine-limits"]
    assert failures(good("W4A16", group_size=16), engine="transformers") == {}


def test_float32_model_with_fp8_weights(broken):
    folder = broken("FP8_DYNAMIC")
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    assert_breaks(folder, "engine-dtype", "float32", Q)


def test_tensor_parallel_sizes_that_do_not_fit_are_named(good):
    from lowbit.verification import verify

    checks = {check.rule: check for check in verify(good("W4A16")).checks}
    assert checks["tensor-parallel"].passed
    assert checks["tensor-parallel"].detail.startswith("tensor parallel sizes that fit: 1; 2 does not: ")
    assert f"{OUT}: 64 columns a rank, groups of 128" in checks["tensor-parallel"].detail
    smaller = {check.rule: check for check in verify(good("W4A16", group_size=32)).checks}
    blocks = {check.rule: check for check in verify(good("FP8_BLOCK")).checks}
    assert f"{Q}: 64 rows a rank, blocks of 128" in blocks["tensor-parallel"].detail
    assert smaller["tensor-parallel"].detail.startswith("tensor parallel sizes that fit: 1, 2, 4; 8 does not: ")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_inputs_that_groups_of_activations_do_not_divide(tmp_path, monkeypatch, engine):
    """A plan leaves such a layer in 16 bits; another tool might not. The block of weights may be ragged by itself."""
    from lowbit.pipeline import write_checkpoint
    from lowbit.plan.plan import Request, prepare
    from lowbit.schemes import ActivationSpec
    from lowbit.settings import make_settings
    from lowbit.verification import verify
    from models import make_model

    ragged = make_model(tmp_path / "ragged", hidden_size=128, intermediate_size=320, num_hidden_layers=1)
    request = Request(ragged, make_settings(scheme="FP8_BLOCK"), threads=1)
    left = {tensor.name: tensor.reason for tensor in prepare(request).plan.tensors}
    says = "engines quantize its input in groups of 128, which do not divide 320 in_features"
    assert left["model.layers.0.mlp.down_proj.weight"] == says
    with monkeypatch.context() as patch:
        patch.setattr(ActivationSpec, "unfit", lambda self, columns: None)
        write_checkpoint(prepare(request), tmp_path / "out")
    failed = {check.rule: check.detail for check in verify(tmp_path / "out", engine=engine).failed}
    assert "320 in_features" in failed["groups-fit"]


def test_fused_set_that_blocks_straddle(tmp_path, monkeypatch):
    """A plan never makes one; another tool might."""
    from lowbit.pipeline import write_checkpoint
    from lowbit.plan import folder
    from lowbit.plan.plan import Request, prepare
    from lowbit.settings import make_settings
    from models import make_model

    monkeypatch.setattr(folder, "_leave_whole_sets", lambda tensors, *others: tensors)
    narrow = make_model(tmp_path / "narrow", hidden_size=128, num_key_value_heads=2, head_dim=32)
    write_checkpoint(prepare(Request(narrow, make_settings(scheme="FP8_BLOCK"), threads=1)), tmp_path / "out")
    assert_breaks(tmp_path / "out", "fused-blocks", K, "64 rows")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size"])
def test_numbers_that_the_files_cannot_hold_fail_a_rule_at_once(tmp_path, key):
    folder = make_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: 10**9}))
    checks = {check.rule: check for check in verify(folder).failed}
    assert f"{key} is 1000000000" in checks["architecture"].detail


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8_BLOCK"])
def test_a_width_of_zero(broken, scheme):
    """Scales per row span a row of no columns."""
    folder = broken(scheme)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 0}))
    assert failures(folder)
