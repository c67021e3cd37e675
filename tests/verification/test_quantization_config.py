"""The strict parser of quantization_config: schemes by name, matching by compressed-tensors' rules."""

import random

import pytest

from lowbit.checkpoint.compressed_tensors_config import parse_quantization_config
from lowbit.errors import CheckpointError
from lowbit.schemes import SCHEMES, ActivationSpec
from lowbit.tensors import Granularity

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def config(*groups, ignore=(), **others):
    named = {f"group_{index}": group for index, group in enumerate(groups)}
    stated = {"quant_method": "compressed-tensors", "config_groups": named, "ignore": list(ignore), **others}
    return parse_quantization_config({"quantization_config": stated})


def group(targets=("Linear",), weights=W4, **others):
    return {"targets": list(targets), "weights": weights, "format": "pack-quantized", **others}


def test_w4a16_is_read_as_the_scheme_of_that_name():
    (parsed,) = config(group()).groups
    assert parsed.scheme == SCHEMES["W4A16"]
    assert parsed.format == "pack-quantized"


def test_another_group_size_keeps_the_name():
    parsed = config(group(weights={**W4, "group_size": 32})).scheme_of("model.layers.0.mlp.down_proj")
    assert (parsed.name, parsed.weight.group_size) == ("W4A16", 32)


def test_channel_scales_stated_as_group_size_minus_one():
    parsed = config(group(weights={"num_bits": 4, "group_size": -1})).scheme_of("x")
    assert (parsed.name, parsed.weight.granularity, parsed.weight.group_size) == ("W4A16", Granularity.CHANNEL, None)


def test_scheme_without_a_name_is_called_by_its_bits():
    parsed = config(group(weights={**W4, "num_bits": 6})).scheme_of("x")
    assert (parsed.name, parsed.weight.bits) == ("W6A16", 6)


def test_asymmetric_activations_are_told_apart():
    activations = {**INT8, "symmetric": False}
    parsed = config(group(format="int-quantized", input_activations=activations)).scheme_of("x")
    assert parsed.activation == ActivationSpec("int", 8, "token", symmetric=False)


def test_group_without_a_format_takes_the_global_one():
    stated = group()
    del stated["format"]
    assert config(stated, format="pack-quantized").groups[0].format == "pack-quantized"
    assert config(stated, format="mixed-precision").groups[0].format is None


def test_exact_names_win_over_regexes_and_those_over_classes():
    eight, six = {**W4, "num_bits": 8}, {**W4, "num_bits": 6}
    parsed = config(group(), group(["re:.*down_proj"], eight), group(["model.layers.1.mlp.down_proj"], six))
    assert parsed.scheme_of("model.layers.0.self_attn.q_proj").weight.bits == 4
    assert parsed.scheme_of("model.layers.0.mlp.down_proj").weight.bits == 8
    assert parsed.scheme_of("model.layers.1.mlp.down_proj").weight.bits == 6


def test_ignore_wins_and_regexes_are_anchored_at_the_start_only():
    parsed = config(group(), ignore=["lm_head", "re:model.layers.0"])
    assert parsed.scheme_of("lm_head") is None
    assert parsed.scheme_of("model.layers.0.mlp.down_proj") is None
    assert parsed.scheme_of("text.model.layers.0.mlp.down_proj") is not None
    assert parsed.scheme_of("model.embed_tokens", class_name="Embedding") is None


def test_group_that_quantizes_no_weights_is_left_out():
    assert config(group(), group(["LlamaAttention"], None)).groups[0].name == "group_0"
    assert len(config(group(), group(["LlamaAttention"], None)).groups) == 1


def test_error_names_the_key_and_what_was_found():
    with pytest.raises(CheckpointError, match=r"config_groups\.group_0\.weights\.num_bits is 'four'"):
        config(group(weights={**W4, "num_bits": "four"}))


@pytest.mark.parametrize("stated", [None, {}, {"quant_method": "gptq"}, {"quant_method": "compressed-tensors"}])
def test_config_without_groups_is_refused(stated):
    with pytest.raises(CheckpointError):
        parse_quantization_config({"quantization_config": stated})


@pytest.mark.interop
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC",
                                  "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8"])  # fmt: skip
def test_presets_of_compressed_tensors_are_read_as_the_schemes_of_their_names(name):
    from compressed_tensors.quantization import preset_name_to_scheme

    stated = preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
    (parsed,) = config(stated).groups
    assert parsed.scheme == SCHEMES[name]


@pytest.mark.interop
def test_matching_agrees_with_compressed_tensors():
    import torch
    from compressed_tensors.utils.match import is_match, match_targets

    names = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.v_proj", "x.model.layers.0.v_proj"]
    targets = ["Linear", *names, "re:.*v_proj$", "re:model.*", r"re:.*\.v_proj", "re:lm", "re:.*Linear", "Embedding"]
    module, chosen = torch.nn.Linear(1, 1), random.Random(0)
    for _ in range(500):
        here = chosen.sample(targets, 4)
        ignore = chosen.sample(targets, chosen.randint(0, 2))
        parsed = config(group(here[:2]), group(here[2:], {**W4, "num_bits": 8}), ignore=ignore)
        for name in names:
            matched = match_targets(name, module, here) if not is_match(name, module, ignore) else []
            expected = parsed.targets[matched[0]] if matched else None
            assert parsed.group_of(name) == expected, (name, here, ignore)
