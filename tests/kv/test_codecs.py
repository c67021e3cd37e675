import math
import re

import pytest
import torch
from torch import Tensor

from lowbit.errors import ShapeError
from lowbit.kv import codecs
from lowbit.kv.codecs import (
    Affine,
    BlockFloat4,
    GgmlBlock,
    LloydMax,
    Minifloat,
    NonUniform,
    PerTokenHead,
    RotatedInt4,
    SideFacts,
)
from lowbit.kv.types import CACHE_TYPES


def states(head_dim: int = 64, tokens: int = 70, seed: int = 0) -> Tensor:
    """[2, 3, tokens, head_dim] with one channel that is always large, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, tokens, head_dim, generator=generator)
    values[..., 5] += 8.0
    return values


def facts(values: Tensor) -> SideFacts:
    flat = values.transpose(0, 1).flatten(1, 2)
    ends = [flat.quantile(at, dim=1) for at in (0.005, 0.995)]
    books = {bits: torch.linspace(-1, 1, 2**bits) for bits in (2, 3, 4)}
    return SideFacts(values.abs().amax((0, 2, 3)), *ends, books)


def relative(values: Tensor, rounded: Tensor) -> float:
    return float((values - rounded).norm() / values.norm())


@pytest.mark.parametrize("name", CACHE_TYPES)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_every_type_keeps_shape_and_zero_and_loses_little(name, side):
    codec, values = getattr(CACHE_TYPES[name], side), states()
    rounded = codec.round_trip(values, facts(values))
    assert rounded.shape == values.shape
    assert rounded.dtype == torch.float32
    bits = codec.bits(64)
    # A rough law that holds for all of them: an error that halves with every bit.
    assert relative(values, rounded) < (0.8 if bits <= 3 else 4 * 2.0 ** -min(bits, 6))
    zeros = torch.zeros(1, 3, 40, 64)
    assert codec.round_trip(zeros, facts(values)).abs().max() < (3.0 if codec.needs == "distribution" else 1e-5)


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_a_token_does_not_see_the_batch(name):
    values = states()
    known = facts(values)
    for codec in (CACHE_TYPES[name].keys, CACHE_TYPES[name].values):
        if codec != Affine(8, solved=True, group=64) and not getattr(codec, "solved", False):
            torch.testing.assert_close(codec.round_trip(values, known)[1:], codec.round_trip(values[1:], known))


def test_fp8_by_hand_and_saturating():
    x = torch.tensor([0.3, 17.3, 448.0, 1e4, -1e9]).expand(1, 1, 1, 5)
    # e4m3: steps of 1/32 below 0.5 (0.3 → 0.3125), of 2 from 16 to 32, largest 448; e5m2: 2 mantissa bits
    assert Minifloat("e4m3").round_trip(x)[0, 0, 0].tolist() == [0.3125, 18.0, 448.0, 448.0, -448.0]
    assert Minifloat("e5m2").round_trip(x)[0, 0, 0].tolist() == [0.3125, 16.0, 448.0, 10240.0, -57344.0]


def test_fp8_scales_per_layer_and_head():
    x = torch.tensor([[1.0, 0.5], [100.0, 37.0]]).reshape(1, 2, 1, 2)
    ranges = SideFacts(torch.tensor([1.0, 100.0]))
    by_head = Minifloat("e4m3", "head").round_trip(x, ranges)
    by_layer = Minifloat("e4m3", "tensor").round_trip(x, ranges)
    scale = torch.tensor([1.0, 100.0]).reshape(1, 2, 1, 1) / 448
    assert torch.equal(by_head, (x / scale).to(torch.float8_e4m3fn).float() * scale)
    assert torch.equal(by_layer, (x / scale[:, 1:]).to(torch.float8_e4m3fn).float() * scale[:, 1:])


def test_int8_per_token_head_equals_its_formula():
    x = states()
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(PerTokenHead("int8").round_trip(x), (x * (1 / scale)).round().clamp(-128, 127) * scale)


def test_vllms_int4_equals_its_kernel_value_by_value():
    """A loop over one vector, after `_reshape_cache_int4_kernel` and `single_rht`."""
    x = states()[0, 0, 0]
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2.0 * torch.bernoulli(torch.full((64,), 0.5), generator=generator) - 1.0
    matrix = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(64)] for i in range(64)])
    turned = matrix @ (signs * x)
    low = float(turned.min())
    scale = (turned.max() - turned.min()) / 15.0
    zero = min(15, max(0, int(-low / float(scale) + 0.5)))
    codes = [min(15, max(0, int(float(y) / float(scale) + zero + 0.5))) for y in turned]
    kept = (scale.reshape(1).view(torch.int32) & -16).view(torch.float32)
    decoded = torch.tensor([(q - zero) * float(kept) for q in codes])
    expected = signs * (matrix @ decoded) / 64
    torch.testing.assert_close(
        RotatedInt4().round_trip(x.reshape(1, 1, 1, 64))[0, 0, 0], expected, rtol=1e-5, atol=1e-5
    )


def test_nvfp4_by_hand():
    x = torch.zeros(1, 1, 1, 16)
    x[..., :5] = torch.tensor([6.0, -2.4, 1.3, 0.2, 0.3])
    # scale E4M3(6 / 6) = 1; E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6
    assert BlockFloat4().round_trip(x)[0, 0, 0, :5].tolist() == [6.0, -2.0, 1.5, 0.0, 0.5]


def test_nvfp4_of_small_values_needs_the_calibrated_scale():
    x = states() * 1e-4
    known = facts(x)
    assert relative(x, BlockFloat4().round_trip(x)) > 0.3  # block scales below E4M3's smallest
    assert relative(x, BlockFloat4("tensor").round_trip(x, known)) < 0.12


def test_four_over_six_is_never_worse_than_six():
    x = states(seed=3)
    plain, searched = BlockFloat4().round_trip(x), BlockFloat4("one", "4over6").round_trip(x)
    groups = [(each - x).unflatten(-1, (-1, 16)).square().sum(-1) for each in (searched, plain)]
    assert (groups[0] <= groups[1] + 1e-9).all()
    assert (groups[0] < groups[1] - 1e-6).any()


def test_affine_groups_lie_along_the_head_or_the_tokens():
    x = states(tokens=70)
    head = Affine(4, "head", 32).round_trip(x)
    assert torch.equal(head[1, 2, 3, 32:], Affine(4).round_trip(x[1, 2, 3, 32:].reshape(1, 1, 1, 32)).flatten())
    tokens = Affine(4, "tokens", 32).round_trip(x)
    column = x[1, 2, 32:64, 7].reshape(1, 1, 1, 32)
    assert torch.equal(tokens[1, 2, 32:64, 7], Affine(4).round_trip(column).flatten())
    rest = x[1, 2, 64:, 7].reshape(1, 1, 1, 6)  # the last group is short
    assert torch.equal(tokens[1, 2, 64:, 7], Affine(4).round_trip(rest).flatten())


def test_keys_with_a_large_channel_are_better_off_per_channel():
    """KIVI's point: an outlier channel costs every value of its token, but not of its own channel."""
    x = states(tokens=64)
    assert relative(x, Affine(2, "tokens", 32).round_trip(x)) < 0.7 * relative(x, Affine(2, "head", 32).round_trip(x))


def test_hqq_offsets_lower_the_norm_that_they_are_solved_for():
    x = states(tokens=64)
    plain, solved = Affine(2, group=64).round_trip(x), Affine(2, group=64, solved=True).round_trip(x)
    assert (x - solved).abs().mean() < 0.97 * (x - plain).abs().mean()


def test_rotation_helps_where_one_channel_is_large():
    x = states()
    assert relative(x, Affine(4, rotated=True).round_trip(x)) < 0.8 * relative(x, Affine(4).round_trip(x))


@pytest.mark.parametrize(("head_dim", "keys", "values"), [(64, 64, 64), (128, 128, 64), (192, 64, 64), (96, 0, 0)])
def test_llama_cpp_rotates_keys_by_the_largest_power_of_two_and_values_by_64(head_dim, keys, values):
    x = states(head_dim)
    for side, size in (("keys", keys), ("values", values)):
        expected = codecs.blocks.round_trip("q4_0", codecs.hadamard(x, size) if size else x)
        expected = codecs.hadamard(expected, size) if size else expected
        assert torch.equal(GgmlBlock("q4_0", side).round_trip(x), expected)


def test_lloyd_max_centroids_are_the_published_ones():
    """Max 1960, table I: 4 levels 0.4528, 1.510; 8 levels 0.2451, 0.7560, 1.344, 2.152."""
    torch.testing.assert_close(codecs.lloyd_max_centroids(2)[2:], torch.tensor([0.4528, 1.510]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        codecs.lloyd_max_centroids(3)[4:], torch.tensor([0.2451, 0.7560, 1.344, 2.152]), rtol=1e-3, atol=1e-3
    )


def test_turboquant_keys_keep_their_length():
    x = states()
    rounded = LloydMax(3).round_trip(x)
    torch.testing.assert_close(rounded.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=1e-3)


def test_hadamard_is_orthogonal_and_its_own_inverse():
    x = states(128)
    torch.testing.assert_close(codecs.hadamard(codecs.hadamard(x, 64), 64), x, rtol=1e-5, atol=1e-5)
    matrix = codecs.sylvester(8)
    assert torch.equal(matrix @ matrix, 8 * torch.eye(8))


def test_kvquant_keeps_outliers_and_uses_the_codebook_for_the_rest():
    x = states()
    known = facts(x)
    keys = NonUniform(4, "channel").round_trip(x, known)
    outside = (x < known.low[:, None]) | (x > known.high[:, None])
    assert 0.005 < outside.float().mean() < 0.03
    assert torch.equal(keys[outside], x[outside].half().float())
    assert (keys != x)[~outside].float().mean() > 0.9
    values = NonUniform(4, "token").round_trip(x, known)
    # Of 3 heads × 64 values, one at each end: 1 % of 192.
    kept = (values == x.half().float()).transpose(1, 2).flatten(2).sum(-1)
    assert (kept >= 2).all()


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("q8_0", 80), ("nvfp4", 72), ("int4_per_token_head", 96), ("quarot4", 80), ("turboquant_4bit_nc", 80),
     ("kivi2", 80), ("quanto_int4", 80), ("int4_hadamard", 96), ("int4", 80)],
)  # fmt: skip
def test_heads_that_do_not_divide_are_named(name, head_dim):
    with pytest.raises(ShapeError, match=f"{name}.*{head_dim} values") as error:
        CACHE_TYPES[name].check(head_dim, head_dim)
    assert re.match("a type without (blocks along the head|a rotation) fits, such as", error.value.hint)


def test_bits_count_the_scales():
    expected = {
        "q8_0": 8.5, "q5_1": 6.0, "q4_0": 4.5, "nvfp4": 4.5, "fp8_e4m3": 8.0, "int8_per_token_head": 8.25,
        "int4_per_token_head": 4.25, "kivi2": 3.0, "int4": 4.5, "int2": 2.5, "kvquant4": 4.32, "lmdeploy_int4": 4.25,
        "turboquant_4bit_nc": (4 + 16 / 128 + 4 + 32 / 128) / 2, "turboquant_k8v4": (8 + 4 + 32 / 128) / 2,
    }  # fmt: skip
    assert {name: CACHE_TYPES[name].bits(128) for name in expected} == pytest.approx(expected)
    assert math.isclose(CACHE_TYPES["fp8_e4m3"].bits(192, 128), 8.0)
