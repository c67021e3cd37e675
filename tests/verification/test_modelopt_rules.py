"""ModelOpt folders: good ones pass, and each rule fails on a folder that breaks it alone."""

import json

import pytest
import torch
from breaking import ATTENTION, assert_breaks, edit_config, edit_tensors, failures

from models import SHORT_TEXT

Q, K, OUT = (f"{ATTENTION}.{role}_proj" for role in "qko")
STATIC = {"format": "modelopt", "calib": SHORT_TEXT, "samples": 2, "seqlen": 32}
ALGORITHMS = {
    "FP8": STATIC, "FP8_DYNAMIC": {"format": "modelopt"}, "FP8_BLOCK": {"format": "modelopt"}, "NVFP4": STATIC,
    "NVFP4A16": {"format": "modelopt"}, "MXFP8": {"format": "modelopt"},
}  # fmt: skip
# Algorithms that only TensorRT-LLM knows; it refuses the last two.
AWQ = {"W4A16": {"format": "modelopt"}, "W4AFP8_STATIC": STATIC}
INTEGERS = AWQ | {"W8A16": {"format": "modelopt", "group_size": -1}}
SMOOTHQUANT = {"W8A8_STATIC": STATIC, "W8A8": {"format": "modelopt"}}


def edit_file(folder, edit):
    """Edit what hf_quant_config.json says under "quantization"."""
    path = folder / "hf_quant_config.json"
    stated = json.loads(path.read_text())
    edit(stated["quantization"])
    path.write_text(json.dumps(stated))


@pytest.mark.parametrize("scheme", ALGORITHMS)
def test_good_folders_pass_for_vllm(good, source, scheme):
    assert failures(good(scheme, **ALGORITHMS[scheme]), source=source, nearest=True) == {}


@pytest.mark.parametrize(("engine", "schemes"), [
    ("sglang", ("FP8", "NVFP4", "NVFP4A16", "MXFP8")),
    ("tensorrt-llm", ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP8")),
])  # fmt: skip
def test_each_engine_knows_its_algorithms(good, engine, schemes):
    from lowbit.verification import verify

    for scheme in ALGORITHMS:
        verification = verify(good(scheme, **ALGORITHMS[scheme]), engine=engine)
        unknown = [check.rule for check in verification.failed]
        assert unknown == ([] if scheme in schemes else ["modelopt-algorithm"]), (scheme, verification.failed)
        assert not verification.broken


def test_transformers_would_take_codes_for_weights(good):
    from lowbit.verification import verify

    verification = verify(good("FP8", **STATIC), engine="transformers")
    assert [check.rule for check in verification.failed] == ["engine-loader"]
    assert "skips the quantization" in verification.failed[0].detail


def test_absent_file(broken):
    folder = broken("FP8_DYNAMIC", format="modelopt")
    (folder / "hf_quant_config.json").unlink()
    assert_breaks(folder, "modelopt-file", "hf_quant_config.json", engine="tensorrt-llm")
    assert failures(folder) == {}


@pytest.mark.parametrize("key", ["group_size", "kv_cache_quant_algo", "exclude_modules"])
def test_key_that_vllm_needs_for_nvfp4(broken, key):
    folder = broken("NVFP4A16", format="modelopt")
    edit_file(folder, lambda q: q.pop(key))
    assert_breaks(folder, "modelopt-file", key)


def test_file_alone_is_enough(broken, source):
    folder = broken("NVFP4A16", format="modelopt")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert failures(folder, source=source, nearest=True) == {}


@pytest.mark.parametrize(("key", "value", "said"), [
    ("kv_cache_quant_algo", "FP8", "kv_cache"), ("group_size", 32, "group_size"),
    ("exclude_modules", ["lm_head", "model.layers.0*"], "model.layers.0*"),
])  # fmt: skip
def test_files_that_contradict_each_other(broken, key, value, said):
    folder = broken("NVFP4A16", format="modelopt")
    edit_file(folder, lambda q: q.update({key: value}))
    assert_breaks(folder, "modelopt-agreement", said, "hf_quant_config.json")


def test_files_of_two_algorithms_cannot_be_opened(broken):
    folder = broken("NVFP4A16", format="modelopt")
    edit_file(folder, lambda q: q.update(quant_algo="FP8"))
    assert_breaks(folder, "quantization-config", "FP8", "W4A16_NVFP4")


@pytest.mark.parametrize(("scheme", "leaf"), [
    ("FP8", "input_scale"), ("NVFP4", "input_scale"), ("NVFP4", "weight_scale_2"), ("NVFP4A16", "weight_scale"),
])  # fmt: skip
def test_missing_scale(broken, scheme, leaf):
    folder = broken(scheme, **ALGORITHMS[scheme])
    edit_tensors(folder, lambda tensors: tensors.pop(f"{OUT}.{leaf}"))
    assert_breaks(folder, "modelopt-scales", f"{OUT}.{leaf}")


def test_columns_that_do_not_divide(broken):
    folder = broken("NVFP4A16", format="modelopt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 200}))
    assert_breaks(folder, "groups-fit", "200 in_features")


def test_global_scales_that_a_fused_set_does_not_share(broken):
    folder = broken("NVFP4A16", format="modelopt")
    edit_tensors(folder, lambda tensors: tensors[f"{K}.weight_scale_2"].mul_(2))
    assert_breaks(folder, "fused-global-scales", f"{ATTENTION}.qkv_proj", f"{K}.weight_scale_2")


def test_input_scales_that_a_fused_set_does_not_share(broken):
    folder = broken("NVFP4", **STATIC)
    edit_tensors(folder, lambda tensors: tensors[f"{K}.input_scale"].mul_(2))
    assert_breaks(folder, "fused-global-scales", f"{K}.input_scale")


def test_activation_scale_that_is_no_positive_number(broken):
    folder = broken("FP8", **STATIC)
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.input_scale"].fill_(float("nan")))
    assert_breaks(folder, "activation-scales", f"{OUT}.input_scale")


def test_second_level_of_zero(broken):
    folder = broken("NVFP4A16", format="modelopt")
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.weight_scale_2"].zero_())
    assert_breaks(folder, "scales", f"{OUT}.weight_scale_2")


def test_list_that_covers_part_of_a_fused_set(broken):
    folder = broken("FP8_DYNAMIC", format="modelopt", ignore=(r"\.0\.self_attn\.[qkv]_proj$",))

    def drop(stated, key):
        stated[key] = [entry for entry in stated[key] if not entry.startswith(K[:-1])]

    edit_config(folder, lambda q: drop(q, "ignore"))
    edit_file(folder, lambda q: drop(q, "exclude_modules"))
    assert_breaks(folder, "left-out", f"{ATTENTION}.qkv_proj", "some of")


def test_left_out_sets_pass(good, source):
    folder = good("FP8_DYNAMIC", format="modelopt", ignore=(r"\.0\.self_attn\.[qkv]_proj$", r"\.1\.mlp\."))
    assert failures(folder, source=source, nearest=True) == {}


def test_mixed_algorithms_pass(good, source):
    folder = good("NVFP4A16", format="modelopt", overrides={r"\.down_proj$": "FP8_DYNAMIC"})
    assert failures(folder, source=source, nearest=True) == {}


def test_tied_output_layer_that_is_not_excluded(broken):
    folder = broken("FP8_DYNAMIC", format="modelopt", model="tied")
    edit_config(folder, lambda q: q.update(ignore=[]))
    edit_file(folder, lambda q: q.update(exclude_modules=[]))
    assert_breaks(folder, "left-out", "lm_head")


def test_partly_quantized_model_that_nobody_announced(broken):
    folder = broken("FP8_DYNAMIC", format="modelopt")

    def unquantize(tensors):
        del tensors[f"{OUT}.weight_scale"]
        tensors[f"{OUT}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)

    edit_tensors(folder, unquantize)
    assert_breaks(folder, "coverage", OUT)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16", "MXFP8"])
def test_one_tampered_code(broken, source, scheme):
    folder = broken(scheme, format="modelopt")
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.weight"].view(torch.uint8).view(-1)[0].bitwise_xor_(3))
    assert_breaks(folder, "nearest-codes", f"{OUT}.weight[0, 0]", source=source, nearest=True)


@pytest.mark.parametrize("scheme", INTEGERS)
def test_good_integers_pass_for_tensorrt_llm(good, source, scheme):
    folder = good(scheme, **INTEGERS[scheme])
    assert failures(folder, source=source, nearest=True, engine="tensorrt-llm") == {}
    assert list(failures(folder, source=source, nearest=True)) == ["modelopt-algorithm"]  # of vLLM


@pytest.mark.parametrize("scheme", SMOOTHQUANT)
def test_no_engine_loads_int8_activations_from_this_format(good, source, scheme):
    folder = good(scheme, **SMOOTHQUANT[scheme])
    for engine in ("vllm", "sglang", "tensorrt-llm"):
        assert list(failures(folder, source=source, nearest=True, engine=engine)) == ["modelopt-algorithm"]


@pytest.mark.parametrize("scheme", AWQ)
def test_a_single_linear_without_scales_of_its_input(broken, scheme):
    folder = broken(scheme, **AWQ[scheme])
    edit_tensors(folder, lambda tensors: tensors.pop(f"{OUT}.pre_quant_scale"))
    verification = assert_breaks(folder, "tensorrt-awq", f"{OUT}.pre_quant_scale is absent", engine="tensorrt-llm")
    assert not verification.broken
    assert [check.outcome for check in verification.failed] == ["refuses"]


def test_scales_of_inputs_of_another_dtype(broken):
    folder = broken("W4AFP8_STATIC", **STATIC)

    def widen(tensors):
        tensors[f"{OUT}.pre_quant_scale"] = tensors[f"{OUT}.pre_quant_scale"].float()

    edit_tensors(folder, widen)
    assert_breaks(folder, "tensorrt-awq", f"{OUT}.pre_quant_scale is F32", engine="tensorrt-llm")


def test_groups_that_no_kernel_takes(good):
    folder = good("W4A16", format="modelopt", group_size=32)
    assert_breaks(folder, "tensorrt-awq", "group size 32; kernels take 64 and 128", engine="tensorrt-llm")


def test_scales_of_a_fused_input_are_not_read(broken):
    folder = broken("W4A16", format="modelopt")
    edit_tensors(folder, lambda tensors: tensors.update({f"{K}.pre_quant_scale": torch.full((128,), 2.0)}))
    verification = assert_breaks(folder, "tensorrt-input-scales", f"{K}.pre_quant_scale", engine="tensorrt-llm")
    assert [check.outcome for check in verification.failed] == ["misreads"]


def test_scales_of_a_fused_input_that_differ(broken):
    folder = broken("W4AFP8_STATIC", **STATIC)
    names = [name.replace(".q_proj", f".{role}_proj") for name in [Q] for role in "qkv"]
    columns = torch.full((128,), 2.0, dtype=torch.bfloat16)
    edit_tensors(folder, lambda tensors: tensors.update({f"{name}.pre_quant_scale": columns.clone() for name in names}))
    assert failures(folder, engine="tensorrt-llm") == {}
    edit_tensors(folder, lambda tensors: tensors[f"{K}.pre_quant_scale"].mul_(2))
    assert_breaks(folder, "tensorrt-input-scales", "qkv_proj: its members have different", engine="tensorrt-llm")


def test_ones_that_cost_a_multiplication(broken):
    folder = broken("W4AFP8_STATIC", **STATIC)
    ones = torch.ones(128, dtype=torch.bfloat16)
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.pre_quant_scale": ones}))
    verification = assert_breaks(folder, "tensorrt-needless-scales", "qkv_proj", engine="tensorrt-llm")
    assert [check.outcome for check in verification.failed] == ["costs"]


def test_ranges_that_a_fused_set_does_not_share(broken):
    folder = broken("W4AFP8_STATIC", **STATIC)
    edit_tensors(folder, lambda tensors: tensors[f"{K}.weight_scale_2"].mul_(2))
    assert_breaks(folder, "fused-global-scales", f"{K}.weight_scale_2", engine="tensorrt-llm")


def test_a_missing_range(broken):
    folder = broken("W4AFP8_STATIC", **STATIC)
    edit_tensors(folder, lambda tensors: tensors.pop(f"{OUT}.weight_scale_2"))
    assert_breaks(folder, "modelopt-scales", f"{OUT}.weight_scale_2", engine="tensorrt-llm")


def test_experts_in_w4a16(good):
    folder = good("W4A16", model="qwen3_moe", format="modelopt")
    detail = failures(folder, engine="tensorrt-llm")["tensorrt-awq"]
    assert "is an expert in W4A16_AWQ" in detail


def test_groups_of_64_are_too_small_for_fp8_activations(good):
    folder = good("W4AFP8_STATIC", group_size=64, **STATIC)
    assert_breaks(folder, "tensorrt-awq", "group size 64; kernels take 128", engine="tensorrt-llm")


@pytest.mark.parametrize("scheme", INTEGERS)
def test_one_tampered_integer(broken, source, scheme):
    folder = broken(scheme, **INTEGERS[scheme])
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.weight"].view(torch.uint8).view(-1)[0].bitwise_xor_(3))
    assert_breaks(folder, "nearest-codes", f"{OUT}.weight[0, 0]", source=source, nearest=True, engine="tensorrt-llm")


def test_sglang_drops_the_scales_of_a_cache_that_it_does_not_read(good):
    from lowbit.verification import verify

    folder = good("W4A16", kv_cache="fp8", calib=SHORT_TEXT, samples=2, seqlen=32)
    assert [check.rule for check in verify(folder, engine="sglang").failed] == ["cache-scales-read"]
    assert verify(folder, engine="vllm").ok
