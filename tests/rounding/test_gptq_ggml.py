"""GPTQ on ggml types: every type gains, and what is packed is what was decoded."""

from dataclasses import replace

import pytest
import torch
from gptq_cases import problem, stats_of, with_hessian

from lowbit import kernels
from lowbit.numerics import ggml
from lowbit.numerics.ggml import TYPES
from lowbit.numerics.ggml.grid import GgmlGrid
from lowbit.rounding.error import layer_error
from lowbit.rounding.gptq import GPTQOptions, gptq
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import GgmlTarget

QUANTIZED = [name for name, kind in TYPES.items() if kind.family != "plain"]
SCALAR = [name for name in QUANTIZED if GgmlGrid(name).columns_per_code == 1]
OPTIONS = GPTQOptions(refine=0)


def plain_error(name, weight, stats):
    return layer_error(weight, GgmlTarget(name).nearest(weight, stats.mean_sq).decoded, stats.hessian)


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_type_beats_its_encoder_on_correlated_inputs(name):
    weight, stats = problem(rows=20, columns=512)
    found = gptq(weight, GgmlTarget(name), InputData(stats), OPTIONS)
    assert isinstance(found.stored, torch.Tensor)
    assert found.stored.dtype == torch.uint8
    assert torch.equal(ggml.decode(name, found.stored), found.decoded)
    assert layer_error(weight, found.decoded, stats.hessian) < 0.6 * plain_error(name, weight, stats)


@pytest.mark.parametrize("name", SCALAR)
def test_refining_lowers_the_error_and_packs_what_it_decoded(name):
    weight, stats = problem(rows=6, columns=512)
    data = InputData(stats)
    damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(512)
    errors = []
    for sweeps in range(3):
        found = gptq(weight, GgmlTarget(name), data, replace(OPTIONS, refine=sweeps))
        assert torch.equal(ggml.decode(name, found.stored), found.decoded)
        errors.append(layer_error(weight, found.decoded, damped))
    assert errors[2] <= errors[1] * (1 + 1e-6)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", QUANTIZED)
def test_without_correlations_it_is_the_nearest_code_of_the_encoders_scales(name):
    weight, stats = problem(rows=3, columns=512)
    importance = stats.hessian.diagonal()
    found = gptq(
        weight, GgmlTarget(name), InputData(with_hessian(importance.diag())), replace(OPTIONS, weighting="diagonal")
    )
    grid = GgmlGrid(name)
    params = grid.fit(weight, importance)
    # Lattices weigh a column with its damped diagonal, as `cost` does where nothing is correlated.
    codes = grid.round(weight, params, importance + 0.01 * importance.mean())
    if grid.columns_per_code > 1:
        assert (grid.decode(codes, params) == found.decoded).float().mean() > 0.99
    else:
        # Encoders round by a reciprocal in some types, which differs at ties only.
        assert (grid.decode(codes, params) - found.decoded).abs().max() <= 1.001 * params.scale.abs().max()
        assert (grid.decode(codes, params) == found.decoded).float().mean() > 0.999


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "IQ2_XS", "IQ3_S"])
def test_every_instruction_set_makes_the_same_blocks(name):
    weight, stats = problem(rows=2, columns=256)
    data = InputData(stats)
    made = []
    for isa in kernels.available_isas():
        with kernels.use_isa(isa):
            made.append(gptq(weight, GgmlTarget(name), data, OPTIONS).stored)
    for other in made[1:]:
        assert torch.equal(other, made[0])


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "IQ4_NL", "IQ3_XXS"])
def test_threads_do_not_change_anything(name):
    weight, stats = problem(rows=130, columns=256)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(gptq(weight, GgmlTarget(name), InputData(stats), OPTIONS).stored)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("name", QUANTIZED)
def test_dead_columns_one_token_and_zero_rows(name):
    weight, stats = problem(rows=3, columns=512)
    weight = weight.clone()
    weight[1] = 0
    hessian = stats.hessian.clone()
    hessian[100:140], hessian[:, 100:140] = 0, 0
    one = torch.randn(1, 512, generator=torch.Generator().manual_seed(6))
    for each in (with_hessian(hessian), stats_of(one)):
        found = gptq(weight, GgmlTarget(name), InputData(each), replace(OPTIONS, refine=1))
        assert found.decoded.isfinite().all()
        assert not found.decoded[1].any() or name.startswith("IQ1")
        assert torch.equal(ggml.decode(name, found.stored), found.decoded)


def test_floats_are_rounded_to_nearest():
    weight, stats = problem(rows=3, columns=512)
    for name in ("F32", "F16", "BF16"):
        found = gptq(weight, GgmlTarget(name), InputData(stats), OPTIONS)
        assert torch.equal(found.stored, GgmlTarget(name).nearest(weight).stored)
