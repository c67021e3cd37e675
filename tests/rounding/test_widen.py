"""A wider grid holds the same weights, exactly, and the cheapest comes first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.numerics import grid_for
from lowbit.rounding.rtn import measure_range, round_to_nearest
from lowbit.rounding.widen import widened, wider_specs
from lowbit.schemes import SCHEMES, WeightSpec
from lowbit.tensors import Granularity, RangeSearch

COLUMNS = 256
SPECS = {name: scheme.weight for name, scheme in SCHEMES.items() if scheme.weight.number not in ("nf4", "fp4")}
SPECS["W3A16 per row"] = WeightSpec("int", 3, Granularity.CHANNEL)
SPECS["W2A16 asymmetric"] = WeightSpec("int", 2, Granularity.GROUP, 64, symmetric=False)


def rounded(spec: WeightSpec):
    weight = torch.randn(128, COLUMNS, generator=torch.Generator().manual_seed(7)) * 0.05
    return round_to_nearest(weight, spec, grid_for(spec, "bfloat16"), RangeSearch(), measure_range(weight, spec))


@pytest.mark.parametrize("name", SPECS)
def test_every_wider_spec_decodes_to_the_same_bits(name):
    quantized = rounded(SPECS[name])
    specs = list(wider_specs(SPECS[name], COLUMNS))
    assert specs[0] == SPECS[name]
    for spec in specs:
        wide = widened(quantized, spec)
        assert torch.equal(wide.decode(), quantized.decode()), spec
        assert wide.scale.shape == spec.granularity.scale_shape(128, COLUMNS, spec.columns_per_scale(COLUMNS))
        assert (wide.zero_point is None) == spec.symmetric
        assert wide.codes.min() >= -(1 << spec.bits - 1) or spec.number != "int"


def test_symmetric_is_within_asymmetric_and_narrow_within_full():
    specs = list(wider_specs(SPECS["INT8"], COLUMNS))
    assert replace(SPECS["INT8"], narrow=False) in specs
    assert replace(SPECS["INT8"], narrow=False, symmetric=False) in specs


def test_a_scale_per_row_is_within_groups_and_group_128_within_64_but_not_back():
    specs = list(wider_specs(SPECS["W4A16"], COLUMNS))
    assert {spec.group_size for spec in specs} == {128, 64, 32}
    sizes = {spec.group_size for spec in wider_specs(WeightSpec("int", 4, Granularity.CHANNEL), COLUMNS)}
    assert sizes == {None, 128, 64, 32}
    assert {spec.group_size for spec in wider_specs(WeightSpec("int", 4, Granularity.GROUP, 32), COLUMNS)} == {32}


def test_three_bits_are_within_four_and_nothing_gets_narrower():
    bits = [spec.bits for spec in wider_specs(SPECS["W3A16"], COLUMNS)]
    assert bits == sorted(bits)
    assert set(bits) == {3, 4, 8}


def test_minifloats_stay_what_they_are():
    for name in ("NVFP4A16", "MXFP4A16", "FP8_BLOCK"):
        assert list(wider_specs(SPECS[name], COLUMNS)) == [SPECS[name]]
    assert [spec.granularity for spec in wider_specs(SPECS["FP8"], COLUMNS)] == ["tensor", "channel"]
