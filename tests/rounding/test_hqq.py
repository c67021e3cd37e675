"""Half-quadratic quantization."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.numerics import grid_for
from lowbit.rounding.hqq import HqqOptions, hqq
from lowbit.rounding.rtn import measure_range
from lowbit.rounding.target import GgmlTarget, GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import RangeSearch


def target(name: str, group_size: int | None = 32, lowest: int | None = None, search: str = "absmax") -> GridTarget:
    scheme = SCHEMES[name]
    spec = (scheme.with_group_size(group_size) if group_size else scheme).weight
    return GridTarget(spec, grid_for(spec, "bfloat16", lowest), RangeSearch(search))  # type: ignore[arg-type]


def heavy_tailed(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[torch.rand(rows, columns, generator=generator) < 0.02] *= 8
    return weight


def lp(weight, decoded, p=0.7):
    return (weight - decoded).abs().pow(p).sum().item()


def ten_line_reference(w, s, iterations, beta=10.0, kappa=1.01, p=0.7):
    """One group of a symmetric 4-bit grid with bfloat16 scales; w float32 [g]."""
    decode = lambda s: (w / s).round().clamp(-8, 7) * s  # noqa: E731
    best = s
    for _ in range(iterations):
        q = (w / s).round().clamp(-8, 7)
        error = (w - q * s) / s
        e = error.sign() * (error.abs() - error.abs().clamp(min=1e-12) ** (p - 1) / beta).clamp(min=0) * s
        s = ((w - e) @ q / (q @ q)).bfloat16().float()
        beta *= kappa
        best = s if lp(w, decode(s)) < lp(w, decode(best)) else best
    return decode(best)


def test_equals_ten_lines_of_torch():
    weight = heavy_tailed(6, 32)
    start = target("W4A16").fit(weight).scale
    expected = torch.stack([ten_line_reference(w, s[0], 20) for w, s in zip(weight, start, strict=True)])
    assert torch.allclose(hqq(weight, target("W4A16")).decoded, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W3A16", "W2A16", "NF4", "FP4"])
def test_beats_round_to_nearest_in_its_norm(name):
    grid = target(name, 32 if name.startswith("W") else None)
    weight = heavy_tailed() + (0.01 if name.endswith("ASYM") else 0.0)
    found, nearest = hqq(weight, grid), grid.nearest(weight)
    assert lp(weight, found.decoded) < lp(weight, nearest.decoded)
    assert torch.equal(found.decoded, found.stored.decode())


def test_no_group_is_worse_than_it_began():
    weight, grid = heavy_tailed(), target("W4A16_ASYM", search="wmse")
    before, after = ((weight - each.decoded).abs().pow(0.7).reshape(-1, 32).sum(1)
                     for each in (grid.nearest(weight), hqq(weight, grid)))  # fmt: skip
    assert (after <= before * (1 + 1e-6)).all()


def test_zero_points_are_integers_within_the_codes_that_the_file_stores():
    stored = hqq(heavy_tailed() + 0.05, target("W4A16_ASYM", lowest=-7)).stored
    assert stored.zero_point.dtype == torch.int32
    assert stored.zero_point.min() >= -7
    assert stored.zero_point.max() <= 7


def test_scales_are_what_the_file_stores():
    stored = hqq(heavy_tailed(), target("W4A16")).stored
    assert torch.equal(stored.scale, stored.scale.bfloat16().float())


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_zero_and_constant_groups(name):
    weight = heavy_tailed(4, 64)
    weight[0], weight[1, :32], weight[2, 32:] = 0.0, 0.25, -0.25
    decoded = hqq(weight, target(name)).decoded
    assert torch.equal(decoded[0], torch.zeros(64))
    assert torch.allclose(decoded[1, :32], torch.tensor(0.25), rtol=0.08)
    assert torch.allclose(decoded[2, 32:], torch.tensor(-0.25), rtol=0.08)


def test_a_short_last_group():
    weight = heavy_tailed(8, 80)
    for name in ("W4A16", "W4A16_ASYM"):
        grid = target(name)
        assert lp(weight, hqq(weight, grid).decoded) <= lp(weight, grid.nearest(weight).decoded)


def test_is_deterministic_and_no_iterations_are_round_to_nearest():
    weight, grid = heavy_tailed(), target("W4A16_ASYM")
    assert torch.equal(hqq(weight, grid).decoded, hqq(weight, grid).decoded)
    assert torch.equal(hqq(weight, grid, options=HqqOptions(iterations=0)).decoded, grid.nearest(weight).decoded)


@pytest.mark.parametrize("name", ["MXFP4A16", "NVFP4A16", "FP8"])
def test_scales_that_are_no_floats_are_refused(name):
    weight = heavy_tailed()
    spec = SCHEMES[name].weight
    grid = GridTarget(spec, grid_for(spec, "bfloat16"), RangeSearch(), measure_range(weight))
    with pytest.raises(UsageError, match=f"HQQ cannot fit {grid.name}"):
        hqq(weight, grid)


def test_ggml_types_are_refused():
    with pytest.raises(UsageError, match="HQQ cannot fit Q4_0"):
        hqq(heavy_tailed(), GgmlTarget("Q4_0"))
