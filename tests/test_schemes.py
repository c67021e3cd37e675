from dataclasses import replace

import pytest

from lowbit.errors import UsageError
from lowbit.schemes import SCHEMES, find_scheme, scheme_of_specs
from lowbit.tensors import Granularity

NAMED_IN_DESIGN = [
    "W8A16",
    "W4A16",
    "W4A16_ASYM",
    "W3A16",
    "W2A16",
    "W8A8",
    "W8A8_STATIC",
    "W4A8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "W4AFP8",
    "NVFP4",
    "NVFP4A16",
    "MXFP4",
    "MXFP4A16",
    "MXFP8",
]


@pytest.mark.parametrize("name", NAMED_IN_DESIGN)
def test_every_scheme_is_found_whatever_its_case(name):
    assert find_scheme(name.lower()) is SCHEMES[name]


def test_unknown_scheme_names_its_neighbours():
    with pytest.raises(UsageError) as caught:
        find_scheme("W4A17")
    assert "W4A16" in caught.value.hint


def test_group_size_makes_another_scheme_of_the_same_name():
    scheme = find_scheme("W4A16").with_group_size(32)
    assert (scheme.name, scheme.weight.group_size) == ("W4A16", 32)
    assert SCHEMES["W4A16"].weight.group_size == 128


def test_group_size_minus_one_is_one_scale_per_row():
    assert find_scheme("W4A16").with_group_size(-1).weight.granularity is Granularity.CHANNEL


def test_groups_of_integer_activations_follow_those_of_the_weights():
    scheme = find_scheme("W4A4_GROUP").with_group_size(64)
    assert scheme.activation is not None
    assert (scheme.weight.group_size, scheme.activation.group_size) == (64, 64)
    whole = find_scheme("W4A4_GROUP").with_group_size(-1)
    assert whole.activation == replace(SCHEMES["W4A4"].activation, symmetric=False)


@pytest.mark.parametrize("size", [32, 128])
def test_a_file_with_groups_of_another_size_has_the_same_name(size):
    scheme = find_scheme("W4A4_GROUP").with_group_size(size)
    assert scheme_of_specs(scheme.weight, scheme.activation) == scheme


def test_e5m2_is_answered_with_what_runs():
    with pytest.raises(UsageError, match="no engine's format has linears in E5M2") as caught:
        find_scheme("FP8_E5M2")
    assert "FP8_DYNAMIC" in caught.value.hint
    assert "--kv-cache fp8_e5m2" in caught.value.hint


def test_channel_int8_can_be_grouped():
    assert find_scheme("W8A8").with_group_size(128).weight.granularity is Granularity.GROUP


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_schemes_that_fix_their_group_size_refuse_another(name):
    with pytest.raises(UsageError, match="by definition"):
        find_scheme(name).with_group_size(64)


@pytest.mark.parametrize("size", [0, -2])
def test_senseless_group_size_is_refused(size):
    with pytest.raises(UsageError, match="not a positive number"):
        find_scheme("W4A16").with_group_size(size)


def test_a_near_name_is_proposed_once():
    with pytest.raises(UsageError) as caught:
        find_scheme("MLX4")
    assert caught.value.hint.split().count("MXFP4") == 1
