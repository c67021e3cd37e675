"""What is learned of a stored weight is what a file holds: every scheme and every ggml type."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.numerics import ggml, grid_for
from lowbit.numerics.scales import storable_scale
from lowbit.numerics.straight_through import changed_half, changed_integer, changed_scale, straight_through
from lowbit.rounding.learnable import learnable
from lowbit.rounding.target import GgmlTarget, GridTarget, ScaledBlocks
from lowbit.schemes import SCHEMES
from lowbit.tensors import QuantizedTensor, RangeSearch

NESTED = replace(SCHEMES["NF4"].weight, scale_format="nested")
GRIDS = {name: scheme.weight for name, scheme in SCHEMES.items()} | {"NF4 nested": NESTED}
QUANTIZED = [name for name, kind in ggml.TYPES.items() if kind.family != "plain"]


def grid_target(name: str, model_dtype: str = "bfloat16") -> GridTarget:
    return GridTarget(GRIDS[name], grid_for(GRIDS[name], model_dtype), RangeSearch())


def weight(rows: int = 8, columns: int = 512, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator) * 0.05 * spread


def rounded(target, w):
    return target.with_range([w]).nearest(w)


def decoded(target, stored) -> torch.Tensor:
    if isinstance(stored, QuantizedTensor):
        return stored.decode()
    if isinstance(stored, ScaledBlocks):
        return ggml.decode(target.name, stored.blocks) * stored.scale
    return ggml.decode(target.name, stored)


def targets():
    grids = [pytest.param(grid_target(name), id=name) for name in GRIDS]
    types = [pytest.param(GgmlTarget(name), id=f"ggml {name}") for name in QUANTIZED]
    return [*grids, *types, pytest.param(GgmlTarget("NVFP4", scaled=True), id="ggml NVFP4 scaled")]


@pytest.mark.parametrize("target", targets())
def test_no_change_is_the_weight_as_it_came(target):
    found = rounded(target, weight())
    one = learnable(target, found.stored)
    assert torch.equal(one.decoded(one.start()), found.decoded)
    assert torch.equal(one.decoded({}), found.decoded)
    assert torch.equal(decoded(target, one.stored(one.start())), found.decoded)


@pytest.mark.parametrize("target", targets())
def test_the_file_decodes_to_what_was_trained(target):
    """At changes that move no coarse scale, some, and all of them to their limits."""
    one = learnable(target, rounded(target, weight()).stored)
    for size in (0.01, 0.2, 3.0):
        generator = torch.Generator().manual_seed(1)
        changes = {name: torch.randn(shape, generator=generator) * size for name, shape in one.shapes.items()}
        trained = one.decoded(changes)
        assert torch.isfinite(trained).all(), size
        assert torch.equal(decoded(target, one.stored(changes)), trained), size
        if changes and size > 0.1 and "absmax" not in changes:  # its few blocks may all keep theirs
            assert not torch.equal(trained, one.decoded({})), size


@pytest.mark.parametrize("target", targets())
def test_a_written_change_is_a_start(target):
    """What was trained can be trained again: read back, it is the same weight."""
    one = learnable(target, rounded(target, weight()).stored)
    changes = {name: torch.full(shape, 0.11) for name, shape in one.shapes.items()}
    again = learnable(target, one.stored(changes))
    assert again.shapes == one.shapes
    assert torch.equal(again.decoded(again.start()), one.decoded(changes))


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "NF4", "INT8"])
@pytest.mark.parametrize("model_dtype", ["bfloat16", "float16"])
def test_scales_stay_storable(name, model_dtype):
    target = grid_target(name, model_dtype)
    one = learnable(target, rounded(target, weight()).stored)
    changes = {"scale": torch.randn(one.shapes["scale"], generator=torch.Generator().manual_seed(2)) * 0.3}
    stored = one.stored(changes)
    assert isinstance(stored, QuantizedTensor)
    scale_format = target.grid.scale_format
    assert torch.equal(stored.scale, storable_scale(stored.scale, scale_format, stored.global_scale))
    assert (stored.scale > 0).all()


@pytest.mark.parametrize("target", targets())
def test_gradients_are_those_of_the_unrounded_formula(target):
    """Straight through: ∂w/∂change of a scale is w, summed over what shares the scale."""
    one = learnable(target, rounded(target, weight()).stored)
    of_weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(3))
    found = one.gradients(one.start(), of_weight)
    assert found.keys() == one.shapes.keys()
    product = (of_weight * one.decoded({})).double()
    if "scale" in found and isinstance(one.stored({}), QuantizedTensor):
        stored = one.stored({})
        if found["scale"].shape == (8, 512 // stored.group_size):
            expected = product.reshape(8, -1, stored.group_size).sum(2)
            assert torch.allclose(found["scale"].double(), expected, rtol=1e-4, atol=1e-5)
    if set(found) == {"d", "scales"} or set(found) == {"d"}:  # no offset of its own
        expected = product.reshape(8, found["d"].shape[1], -1).sum(2)
        assert torch.allclose(found["d"].double(), expected, rtol=1e-4, atol=1e-5)
        if "scales" in found and target.name != "IQ4_XS":
            expected = product.reshape(8, found["scales"].shape[1], -1).sum(2)
            assert torch.allclose(found["scales"].double(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_what_has_no_scale_of_its_own_is_fixed():
    """One scale per tensor may be shared with a fused set; floats have none."""
    w = weight()
    assert learnable(grid_target("FP8"), rounded(grid_target("FP8"), w).stored).shapes == {}
    half = GgmlTarget("F16")
    one = learnable(half, rounded(half, w).stored)
    assert one.shapes == {}
    assert torch.equal(one.decoded({}), w.half().float())


def test_groups_in_activation_order_share_scales_across_columns():
    """GPTQ files with act-order: the scale of a column is that of its g_idx."""
    target = grid_target("W4A16")
    order = torch.randperm(512, generator=torch.Generator().manual_seed(4))
    groups = torch.arange(512).div(128, rounding_mode="floor")[order].int()
    stored = replace(rounded(target, weight()).stored, g_idx=groups)
    one = learnable(target, stored)
    changes = {"scale": torch.randn(one.shapes["scale"], generator=torch.Generator().manual_seed(5)) * 0.1}
    assert torch.equal(one.decoded(changes), one.stored(changes).decode())
    found = one.gradients(one.start(), torch.ones(8, 512))["scale"]
    expected = torch.stack([stored.decode()[:, groups == group].sum(1) for group in range(4)], dim=1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_rows_that_groups_do_not_divide():
    target = grid_target("W4A16")
    one = learnable(target, rounded(target, weight(columns=320)).stored)
    changes = {"scale": torch.full(one.shapes["scale"], 0.05)}
    assert torch.equal(one.decoded(changes), one.stored(changes).decode())
    assert one.gradients(changes, torch.ones(8, 320))["scale"].shape == one.shapes["scale"]


def test_groups_of_zeros_stay_zero():
    w = weight()
    w[:, :256] = 0
    for target in (grid_target("W4A16"), grid_target("NF4 nested"), GgmlTarget("Q4_K"), GgmlTarget("NVFP4")):
        one = learnable(target, rounded(target, w).stored)
        changes = {name: torch.full(shape, 0.3) for name, shape in one.shapes.items()}
        assert (one.decoded(changes)[:, :256] == 0).all()


def test_double_quantization_makes_no_scale_negative():
    """A block of scales that would reach 0 keeps its absmax."""
    target = grid_target("NF4 nested")
    one = learnable(target, rounded(target, weight()).stored)
    changes = {"absmax": torch.full(one.shapes["absmax"], 3.0)}
    stored = one.stored(changes)
    assert (stored.scale > 0).all()
    assert torch.equal(stored.decode(), one.decoded(changes))


def test_straight_through_by_hand():
    wanted = torch.tensor([0.3, 0.8], requires_grad=True)
    out = straight_through(wanted, torch.tensor([0.25, 1.0]))
    assert out.tolist() == [0.25, 1.0]
    out.sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.tolist() == [1.0, 1.0]


def test_changes_by_hand():
    two = torch.log(torch.tensor(2.0))
    assert changed_scale(torch.tensor([1.0, 0.5]), two.expand(2), "bfloat16").tolist() == [2.0, 1.0]
    # powers of two: nearest by exponent, whether up or down
    steps = torch.tensor([0.34, 0.36, -0.34, -0.36])
    assert changed_scale(torch.ones(4), steps, "e8m0").tolist() == [1.0, 2.0, 1.0, 0.5]
    # E4M3 has eighths between 1 and 2
    assert changed_scale(torch.ones(2), torch.tensor([0.05, 0.08]), "e4m3").tolist() == [1.0, 1.125]
    assert changed_half(torch.tensor([60000.0]).half(), torch.ones(1)).tolist() == [65504.0]
    # the factor 2·s + 1 of an i-quant: 7 · 1.2 is nearest to 9
    assert changed_integer(torch.tensor([3]), torch.tensor([0.1824]), 0, 15, slope=2, zero=1).tolist() == [4.0]
    assert changed_integer(torch.tensor([15]), torch.tensor([1.0]), 0, 15).tolist() == [15.0]
