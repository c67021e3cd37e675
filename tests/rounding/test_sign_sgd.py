"""Signed gradient descent on rounding, on tiny blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit.errors import NonFiniteError, UsageError
from lowbit.numerics import grid_for
from lowbit.rounding.rtn import measure_range, needs_tensor_range
from lowbit.rounding.sign_sgd import SignSGDOptions, sign_sgd_block
from lowbit.rounding.target import GgmlTarget, GridTarget, LinearSlot, Rounded
from lowbit.schemes import SCHEMES
from lowbit.tensors import RangeSearch

OPTIONS = SignSGDOptions(iterations=60, batch_windows=4, evaluations=4, bfloat16=False)


class Block(nn.Module):
    """A residual block of two linears, as wide as the tests need."""

    def __init__(self, width: int = 32, hidden: int = 48, seed: int = 0):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def correlated(windows: int = 12, tokens: int = 16, width: int = 32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -1.5, width)
    return torch.randn(windows, tokens, width, generator=generator) @ mix


def target(name: str, weight: torch.Tensor, group_size: int = 16) -> GridTarget:
    scheme = SCHEMES[name]
    spec = (scheme.with_group_size(group_size) if scheme.weight.group_size_is_free else scheme).weight
    tensor_range = measure_range(weight, spec) if needs_tensor_range(spec) else None
    return GridTarget(spec, grid_for(spec, "bfloat16"), RangeSearch(), tensor_range)


def slots(block: Block, name: str) -> dict[str, LinearSlot]:
    linears = {"up": block.up, "down": block.down}
    return {key: LinearSlot(linear, target(name, linear.weight.data)) for key, linear in linears.items()}


def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def block_loss(block: Block, rounded: dict[str, Rounded], x: torch.Tensor, wanted: torch.Tensor) -> float:
    kept = {key: getattr(block, key).weight.data for key in rounded}
    with torch.no_grad():
        for key, each in rounded.items():
            getattr(block, key).weight.data = each.decoded
        loss = (block(x) - wanted).square().mean().item()
        for key, weight in kept.items():
            getattr(block, key).weight.data = weight
    return loss


def run(name: str, options: SignSGDOptions = OPTIONS):
    """(loss of round to nearest, loss of sign-SGD, what it found)."""
    block, x = Block(), correlated()
    wanted = block(x).detach()
    found = sign_sgd_block(block, call, x, wanted, slots(block, name), options)
    nearest = {key: slot.target.nearest(slot.module.weight.data) for key, slot in slots(block, name).items()}
    return block_loss(block, nearest, x, wanted), block_loss(block, found, x, wanted), found


@pytest.mark.parametrize(
    ("name", "part"),
    [("W4A16", 0.65), ("W4A16_ASYM", 0.85), ("W3A16", 0.65), ("W2A16", 0.7), ("NVFP4A16", 0.9), ("MXFP4A16", 0.95),
     ("NF4", 0.85), ("W8A8", 0.95)],
)  # fmt: skip
def test_beats_round_to_nearest(name, part):
    before, after, found = run(name)
    assert after < part * before
    for each in found.values():
        assert torch.equal(each.decoded, each.stored.decode())


def ten_line_reference(linear, grid, x, wanted, iterations, rate):
    """Offsets of one linear alone, all windows in every batch, scales fixed."""
    w, scale = linear.weight.data, grid.fit(linear.weight.data).scale.repeat_interleave(16, dim=1)
    offset = torch.zeros_like(w, requires_grad=True)
    for iteration in range(iterations):
        position = w / scale + offset
        rounded = position + (position.round() - position).detach()
        loss = (x @ (rounded.clamp(-8, 7) * scale).T - wanted).square().mean()
        (slope,) = torch.autograd.grad(loss, offset)
        offset.data = (offset.data - rate * (1 - iteration / iterations) * slope.sign()).clamp(-0.5, 0.5)
    return ((w / scale + offset.data).round().clamp(-8, 7) * scale).detach()


def test_equals_ten_lines_of_autograd():
    linear, x = nn.Linear(32, 8, bias=False), correlated(4)
    linear.weight.data = torch.randn(8, 32, generator=torch.Generator().manual_seed(3)) * 0.1
    wanted, grid = linear(x).detach(), target("W4A16", linear.weight.data)
    options = SignSGDOptions(10, 4, 0.02, scale_rate=0.0, evaluations=1, bfloat16=False)
    found = sign_sgd_block(linear, call, x, wanted, {"one": LinearSlot(linear, grid)}, options)["one"]
    expected = ten_line_reference(linear, grid, x, wanted, 10, 0.02)
    assert torch.equal(found.decoded, expected)
    assert not torch.equal(expected, grid.nearest(linear.weight.data).decoded)


@pytest.mark.parametrize("name", ["W3A16", "W3A16_ASYM"])
def test_gradients_of_ranges_are_those_of_autograd(name):
    """One step from a clipped range moves every range the way that autograd says."""
    from lowbit.numerics.scalar_grids import IntGrid
    from lowbit.schemes import _int_group

    symmetric = name == "W3A16"
    spec = replace(_int_group(3, symmetric), group_size=16)
    grid = IntGrid(3, symmetric, "float32")
    linear, x = nn.Linear(32, 8, bias=False), correlated(2)
    linear.weight.data = torch.randn(8, 32, generator=torch.Generator().manual_seed(4)) * 0.1
    w = linear.weight.data
    clip = GridTarget(spec, grid, RangeSearch("percentile", percentile=85.0))
    wanted, start = linear(x).detach(), clip.fit(w)
    scale0, zero0 = start.scale, 0.0 if symmetric else start.zero_point.float()
    low = ((grid.qmin - zero0) * scale0).requires_grad_()
    high = ((grid.qmax - zero0) * scale0).requires_grad_()
    scale = (high - low) / 7
    zero = torch.zeros_like(scale) if symmetric else (grid.qmin - low / scale)
    zero = zero + (zero.round() - zero).detach()
    position = w.reshape(8, 2, 16) / scale[..., None] + zero[..., None]
    position = position + (position.round() - position).detach()
    decoded = ((position.clamp(grid.qmin, grid.qmax) - zero[..., None]) * scale[..., None]).reshape(8, 32)
    slopes = torch.autograd.grad((x @ decoded.T - wanted).square().mean(), (low, high))
    options = SignSGDOptions(1, 2, 0.0, evaluations=0, bfloat16=False)
    from lowbit.rounding.sign_sgd import _Tuned

    tuned = _Tuned("one", LinearSlot(linear, clip), options)
    tuned.parameter.grad = torch.autograd.grad((x @ tuned.parameter.T - wanted).square().mean(), tuned.parameter)[0]
    tuned.step(0.0, 0.01)
    if symmetric:
        # Both ends move together: the slope of a multiplier that stretches the range.
        along = (slopes[0] * low + slopes[1] * high).sign()
        assert torch.equal((tuned.low - 1).sign(), -along)
    else:
        assert torch.equal((tuned.low - 1).sign(), -(slopes[0] * low).sign())
        assert torch.equal((tuned.high - 1).sign(), -(slopes[1] * high).sign())


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "NVFP4A16"])
def test_scales_are_what_the_file_stores(name):
    for each in run(name)[2].values():
        stored = each.stored
        if name == "NVFP4A16":
            scale = stored.scale / stored.global_scale
            assert torch.equal(scale, scale.to(torch.float8_e4m3fn).float())
        else:
            assert torch.equal(stored.scale, stored.scale.bfloat16().float())
        assert torch.equal(stored.decode(), each.decoded)


def test_powers_of_two_stay():
    block = Block()
    _, _, found = run("MXFP4A16")
    nearest = target("MXFP4A16", block.up.weight.data).nearest(block.up.weight.data)
    assert torch.equal(found["up"].stored.scale, nearest.stored.scale)


def test_is_deterministic_and_depends_on_the_seed():
    first, second = run("W4A16")[2], run("W4A16")[2]
    other = run("W4A16", replace(OPTIONS, seed=1))[2]
    assert torch.equal(first["down"].stored.codes, second["down"].stored.codes)
    assert not torch.equal(first["down"].stored.codes, other["down"].stored.codes)


def test_the_module_is_left_as_it_was():
    block, x = Block(), correlated()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    parameters = dict(block.named_parameters())
    sign_sgd_block(block, call, x, block(x).detach(), slots(block, "W4A16"), OPTIONS)
    assert dict(block.named_parameters()) == parameters
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.parameters())


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "NF4", "NVFP4A16"])
def test_begins_with_the_codes_it_is_given(name):
    block, x = Block(), correlated()
    wanted, given = block(x).detach(), {}
    for key, slot in slots(block, name).items():
        rounded = slot.target.nearest(slot.module.weight.data)
        moved = rounded.stored.codes.roll(1, dims=1)
        stored = replace(rounded.stored, codes=moved)
        given[key] = replace(slot, start=Rounded(stored, stored.decode()))
    found = sign_sgd_block(block, call, x, wanted, given, replace(OPTIONS, iterations=0))
    for key, slot in given.items():
        assert slot.start is not None
        assert torch.equal(found[key].decoded, slot.start.decoded)


def test_a_start_is_never_made_worse():
    block, x = Block(), correlated(4)
    wanted = block(x).detach()
    options = replace(OPTIONS, learning_rate=5.0, evaluation_windows=4)
    found = sign_sgd_block(block, call, x, wanted, slots(block, "W4A16"), options)
    nearest = {key: slot.target.nearest(slot.module.weight.data) for key, slot in slots(block, "W4A16").items()}
    assert block_loss(block, found, x, wanted) <= block_loss(block, nearest, x, wanted) * (1 + 1e-5)


def test_a_loss_that_is_not_finite_ends_it():
    block, x = Block(), correlated(6)
    wanted = block(x).detach()
    seed = next(s for s in range(50) if 0 not in judged_windows(6, 2, s))
    wanted[0] = torch.nan
    options = replace(OPTIONS, evaluation_windows=2, seed=seed)
    found = sign_sgd_block(block, call, x, wanted, slots(block, "W4A16"), options)
    assert "not finite in iteration" in found["up"].notes[0]
    assert all(each.decoded.isfinite().all() for each in found.values())


def judged_windows(windows: int, count: int, seed: int) -> list[int]:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def test_an_output_that_is_not_finite_is_refused():
    block, x = Block(), correlated()
    with pytest.raises(NonFiniteError):
        sign_sgd_block(block, call, x, torch.full_like(x, torch.nan), slots(block, "W4A16"), OPTIONS)
    assert isinstance(block.up.weight, nn.Parameter)
    assert block.up.weight.isfinite().all()


def test_zero_rows_constant_groups_and_a_short_last_group():
    block, x = Block(width=40), correlated(width=40)
    block.up.weight.data[0] = 0.0
    block.up.weight.data[1, :16] = 0.5
    found = sign_sgd_block(block, call, x, block(x).detach(), slots(block, "W4A16"), OPTIONS)
    assert found["up"].stored.scale.shape == (48, 3)
    assert found["up"].decoded.isfinite().all()
    assert found["up"].decoded.shape == (48, 40)


def test_bfloat16_ends_near_float32():
    _, exact, _ = run("W4A16")
    before, rough, _ = run("W4A16", replace(OPTIONS, bfloat16=True))
    assert rough < 0.8 * before
    assert rough < 2 * exact


def test_ggml_types_and_mismatched_windows_are_refused():
    block, x = Block(), correlated()
    slot = {"up": LinearSlot(block.up, GgmlTarget("Q4_0"))}
    with pytest.raises(UsageError, match="cannot tune Q4_0"):
        sign_sgd_block(block, call, x, x, slot, OPTIONS)
    with pytest.raises(UsageError, match="same windows"):
        sign_sgd_block(block, call, x, x[:3], slots(block, "W4A16"), OPTIONS)


def test_groups_in_activation_order_are_refused():
    block, x = Block(), correlated()
    slot = slots(block, "W4A16")["up"]
    nearest = slot.target.nearest(block.up.weight.data)
    stored = replace(nearest.stored, g_idx=torch.arange(32).flip(0).int() // 16)
    with pytest.raises(UsageError, match="activation order"):
        sign_sgd_block(block, call, x, x, {"up": replace(slot, start=Rounded(stored, nearest.decoded))}, OPTIONS)
