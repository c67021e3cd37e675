"""Scales of either sign: which groups get a negative one, what it gains, and that whatever moves scales keeps it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.numerics import grid_for
from lowbit.numerics.scalar_grids import IntGrid
from lowbit.numerics.scales import storable_scale
from lowbit.rounding.descent import RefineOptions, refine
from lowbit.rounding.hessian import InputData
from lowbit.rounding.hqq import hqq
from lowbit.rounding.learnable import learnable
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats, RangeSearch
from models import SHORT_TEXT

MSE = RangeSearch("mse")


def weights(rows: int = 48, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05


def target(name: str = "W4A16", signed: bool = True) -> GridTarget:
    spec = SCHEMES[name].with_group_size(32).weight
    return GridTarget(spec, grid_for(spec, "bfloat16", signed_scales=signed), MSE)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_equals_a_plain_loop_over_both_signs(bits):
    grid, weight = IntGrid(bits, signed_scales=True), weights()
    found = grid.fit(weight, 32, MSE).scale
    for row in range(len(weight)):
        for group in range(3):
            w = weight[row, 32 * group : 32 * group + 32]
            least = float("inf")
            for sign in (1, -1):
                for ratio in [1.0, *grid.clip_ratios(MSE)] if sign == 1 else grid.clip_ratios(MSE):
                    scale = sign * (w.abs().max() * ratio * (2.0 / (2**bits - 1))).bfloat16().float()
                    codes = (w / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                    error = (w - codes * scale).square().sum().item()
                    least = min(least, error)
            one = grid.fit(w[None], 32, MSE)
            error = (w - grid.decode(grid.round(w[None], one, 32), one, 32)).square().sum().item()
            assert error == pytest.approx(least, rel=1e-5)
            assert found[row, group] == one.scale


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_is_worse_and_many_are_better(bits):
    weight = weights()
    signed, positive = IntGrid(bits, signed_scales=True), IntGrid(bits)
    both, one = (grid.error(weight, grid.fit(weight, 32, MSE), 32) for grid in (signed, positive))
    assert bool((both <= one).all())
    assert both.sum() < 0.92 * one.sum()


def test_the_end_that_has_the_code_more_is_exact():
    codes = torch.tensor([[-7.0, 8.0, 3.0, 0.0], [7.0, -8.0, 3.0, 0.0]])
    grid = IntGrid(4, signed_scales=True)
    params = grid.fit(
        codes * 0.25, 4, RangeSearch("mse", smallest=14 / 16, steps=2)
    )  # 15/16 of absmax / 7.5 is absmax / 8
    assert params.scale.tolist() == [[-0.25], [0.25]]
    assert torch.equal(grid.decode(grid.round(codes * 0.25, params, 4), params, 4), codes * 0.25)


def test_groups_of_zeros_ties_and_searches_without_candidates_stay_positive():
    grid = IntGrid(4, signed_scales=True)
    even = torch.tensor([[0.5, -0.5, 0.25, -0.25], [0.0, 0.0, 0.0, 0.0]])
    assert bool((grid.fit(even, 4, MSE).scale > 0).all())
    for method in ("absmax", "percentile"):
        assert bool((grid.fit(weights(), 32, RangeSearch(method)).scale > 0).all())


def test_a_storable_scale_has_the_sign_of_the_wanted_one():
    wanted = torch.tensor([0.3, -0.3, -1e-45, -1e39, 0.0])
    for name in ("bfloat16", "float16", "bfloat16_in_float16", "float32"):
        scale = storable_scale(wanted, name)
        assert scale[:4].sign().tolist()[:3] == [1, -1, -1]
        assert scale[1] == -scale[0]
        assert scale[4] == 1


def test_what_moves_scales_keeps_their_sign():
    weight, grid = weights(24, 128), target()
    start = grid.nearest(weight)
    signs = start.stored.scale.sign()
    assert 0 < int((signs < 0).sum()) < signs.numel()
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(1))
    stats = LayerStats(len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), x.T @ x)
    refined = refine(weight, grid, InputData(stats), RefineOptions(correction=0, anew=False, sweeps=2), start.stored)
    assert torch.equal(refined.stored.scale.sign(), signs)
    assert bool((refined.stored.scale != start.stored.scale).any())
    assert (x @ (weight - refined.decoded).T).square().sum() < (x @ (weight - start.decoded).T).square().sum()
    one = learnable(grid, start.stored)
    moved = one.stored({"scale": torch.full_like(start.stored.scale, 0.02)})
    assert torch.allclose(moved.scale, start.stored.scale * 1.0202, rtol=0.01)
    assert torch.equal(hqq(weight, grid).stored.scale.sign(), grid.fit(weight).scale.sign())


@pytest.mark.parametrize(
    ("settings", "negative"),
    [
        ({"scheme": "W4A16"}, True),
        ({"scheme": "W3A16", "group_size": 32}, True),
        ({"scheme": "W2A16", "method": "gptq"}, True),
        ({"scheme": "W4A16", "format": "gptq"}, True),
        ({"scheme": "W4A16", "positive_scales": True}, False),
        ({"scheme": "W4A16", "range": "absmax"}, False),
        ({"scheme": "W4A16", "format": "modelopt"}, False),
        ({"scheme": "W8A16"}, False),
        ({"scheme": "W4A8"}, False),
        ({"scheme": "W4A4"}, False),
    ],
    ids=str,
)
def test_which_files_have_negative_scales(tiny_llama, tmp_path, settings, negative):
    text = {"calib": SHORT_TEXT, "samples": 4, "seqlen": 48} if "method" in settings else {}
    done = lowbit.quantize(tiny_llama, tmp_path / "out", **(settings | text))
    scales = [tensor.float() for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
              if name.endswith(("scale", "scales"))]  # fmt: skip
    assert any(bool((scale < 0).any()) for scale in scales) == negative
    assert done.report.settings.given.get("positive_scales") == settings.get("positive_scales")
    checks = {check.rule: check for check in lowbit.verify(tmp_path / "out", reference=tiny_llama).checks}
    assert checks["scales"].passed
    assert checks["relative-error"].passed


@pytest.mark.parametrize("output", ["gptq", "awq", "float", "compressed-tensors"])
def test_a_conversion_keeps_every_weight(tiny_llama, tmp_path, output):
    start = lowbit.quantize(tiny_llama, tmp_path / "start", scheme="W4A16", group_size=32, format="gptq").path
    done = lowbit.convert(start, tmp_path / "out", format=output).path
    before, after = lowbit.inspect(start), lowbit.inspect(done)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(before.read(name).bfloat16(), after.read(name).bfloat16())
