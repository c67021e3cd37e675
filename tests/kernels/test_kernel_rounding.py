"""Ranges, integer rounding, decoding and errors: each instruction set against the reference, and known answers."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import kernels
from lowbit.kernels import reference
from lowbit.kernels.tables import E2M1, MINIFLOATS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the vector widths of every instruction set, and the unrolled group sizes.
LENGTHS = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 600]
COMPILED = [isa for isa in kernels.available_isas() if isa != "reference"]
# Sums are float32 within 256 columns.
SUM_TOLERANCE = {"rtol": 1e-5, "atol": 0}


def affine_case(columns, group_size, dtype, generator, rows=3):
    """w, scale and zero_point of a 4-bit grid that clips a little."""
    w = torch.randn(rows, columns, generator=generator).to(dtype)
    groups = -(-columns // group_size)
    scale = torch.rand(rows, groups, generator=generator) * 0.2 + 0.15
    return w, scale, torch.randint(-8, 8, (rows, groups), generator=generator).to(torch.int32)


@pytest.mark.parametrize("columns", LENGTHS)
def test_every_kernel_is_the_reference(columns, random):
    for dtype, group_size in product(DTYPES, {columns, 16, 5, min(columns, 128)}):
        w, scale, zero_point = affine_case(columns, group_size, dtype, random)
        importance = torch.rand(columns, generator=random) + 0.1
        cases = [(None, zeros, scale) for zeros in (None, zero_point)]
        cases += [(fmt, None, scale / fmt.max_value * 10) for fmt in MINIFLOATS.values()]
        expected = [every_result(reference, w, group_size, importance, *case) for case in cases]
        expected_range = torch.stack(reference.group_range(w, group_size))
        for isa in COMPILED:
            with kernels.use_isa(isa):
                assert torch.equal(torch.stack(kernels.group_range(w, group_size)), expected_range), isa
                for case, (exact, sums) in zip(cases, expected, strict=True):
                    ours = every_result(kernels, w, group_size, importance, *case)
                    assert torch.equal(ours[0][0], exact[0]), (isa, dtype, group_size, case[0])
                    assert torch.equal(ours[0][1], exact[1]), (isa, dtype, group_size, case[0])
                    torch.testing.assert_close(ours[1], sums, **SUM_TOLERANCE)


def every_result(module, w, group_size, importance, fmt, zero_point, scale):
    """((codes, decoded), all sums of errors) of one format, by `kernels` or `reference`."""
    if fmt is None:
        codes = module.round_int(w, group_size, scale, zero_point, -8, 7)
        decoded = module.decode_int(codes, group_size, scale, zero_point)
    else:
        codes = module.round_minifloat(w, group_size, scale, fmt)
        decoded = module.decode_table(codes, group_size, scale, fmt)
    sums = []
    for weights, by_magnitude in product((None, importance), (False, True)):
        if fmt is None:
            sums.append(module.error_int(w, group_size, scale, zero_point, -8, 7, weights, by_magnitude))
        else:
            sums.append(module.error_minifloat(w, group_size, scale, fmt, weights, by_magnitude))
    total = torch.tensor(module.squared_error(w, codes, group_size, scale, zero_point, fmt))
    return (codes, decoded), torch.cat([torch.stack(sums).flatten(), total])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_is_read_exactly(isa, dtype):
    patterns = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    w = patterns[patterns.isfinite()]
    low, high = kernels.group_range(w[:, None], 1)
    exact = w.to(torch.float32)[:, None] + 0.0
    assert torch.equal(low, exact)
    assert torch.equal(high, exact)
    # Multiplying by a power of two is exact, so the codes depend on nothing but how the number was read.
    w, scale = w[None], torch.full((1, 1), 2.0**-10)
    assert torch.equal(kernels.round_int(w, w.shape[1], scale, None, -128, 127),
                       kernels.round_int(w.float(), w.shape[1], scale, None, -128, 127))  # fmt: skip


def test_integer_ties_go_to_even_and_values_saturate(isa):
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 7.4, 7.5, 8.5, -8.5, -9.5, 1e30, -1e30, 0.0, -0.0]])
    codes = kernels.round_int(w, 16, torch.ones(1, 1), None, -8, 7)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 6, 7, 7, 7, -8, -8, 7, -8, 0, 0]]


def test_the_zero_point_is_added_after_rounding(isa):
    w = torch.tensor([[0.5, 1.5, -0.5, 0.0, 20.0, -20.0]])
    codes = kernels.round_int(w, 6, torch.ones(1, 1), torch.tensor([[-3]], dtype=torch.int32), -8, 7)
    assert codes.tolist() == [[-3, -1, -3, -3, 7, -8]]


def test_division_is_true_division(isa):
    # 0.45 / 0.3 is the tie 1.5 in float32; 0.45 * (1 / 0.3) is not.
    w, scale = torch.tensor([[0.45]]), torch.tensor([[0.3]])
    expected = torch.round(w / scale).to(torch.int8)
    assert torch.equal(kernels.round_int(w, 1, scale, None, -8, 7), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_the_error_is_at_most_half_a_step_in_range(bits, columns, group_size, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    w = torch.randn(2, columns, generator=generator)
    low, high = kernels.group_range(w, group_size)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale, zero_point = torch.maximum(-low, high) / qmax, None
    else:
        scale = (high - low) / (qmax - qmin - 1)
        zero_point = (qmin - torch.round(low / scale)).to(torch.int32).clamp(qmin, qmax)
    for isa in kernels.available_isas():
        with kernels.use_isa(isa):
            codes = kernels.round_int(w, group_size, scale, zero_point, qmin, qmax)
            error = (w - kernels.decode_int(codes, group_size, scale, zero_point)).abs()
        step = scale.repeat_interleave(group_size, dim=1)[:, :columns]
        assert (error <= step * 0.5 * (1 + 1e-5) + 1e-6).all()


def test_a_nan_of_either_sign_shows_at_both_ends_of_its_group_only(isa):
    for dtype, position, bad in product(DTYPES, (0, 15, 16, 37), (math.nan, -math.nan)):
        w = torch.ones(2, 38, dtype=dtype)
        w[1, position] = math.copysign(bad, math.copysign(1, bad))
        low, high = kernels.group_range(w, 19)
        expected = torch.zeros(2, 2, dtype=torch.bool)
        expected[1, position // 19] = True
        assert torch.equal(low.isnan(), expected)
        assert torch.equal(high.isnan(), expected)


def test_infinities_show_at_their_end(isa):
    for dtype in DTYPES:
        w = torch.tensor([[1, math.inf, -2, 3], [1, -math.inf, -2, 3]], dtype=dtype)
        low, high = kernels.group_range(w, 4)
        assert low.tolist() == [[-2], [-math.inf]]
        assert high.tolist() == [[math.inf], [3]]


def test_a_range_of_negative_zeros_is_zero(isa):
    low, high = kernels.group_range(torch.full((1, 4), -0.0), 4)
    assert math.copysign(1, low.item()) == math.copysign(1, high.item()) == 1


def test_a_known_error_sum(isa):
    w = torch.tensor([[0.25, 1.0, -0.75, 2.5, 9.0]])
    codes_error = [0.25, 0, 0.25, 0.5, 2]
    importance = torch.tensor([1.0, 2, 4, 8, 16])
    plain = kernels.error_int(w, 3, torch.ones(1, 2), None, -8, 7)
    weighed = kernels.error_int(w, 3, torch.ones(1, 2), None, -8, 7, importance)
    squares = [error**2 for error in codes_error]
    assert plain.tolist() == [[sum(squares[:3]), sum(squares[3:])]]
    assert weighed.tolist() == [[squares[0] + 4 * squares[2], 8 * squares[3] + 16 * squares[4]]]


def test_squared_error_shows_nan(isa):
    w = torch.ones(2, 300)
    w[0, 5] = math.nan
    result = kernels.squared_error(w, torch.ones(2, 300, dtype=torch.int8), 300, torch.ones(2, 1))
    assert all(math.isnan(value) for value in result)


def test_empty_tensors(isa):
    w, scale = torch.empty(0, 32), torch.empty(0, 2)
    assert kernels.round_int(w, 16, scale, None, -8, 7).shape == (0, 32)
    assert kernels.round_minifloat(w, 16, scale, E2M1).shape == (0, 32)
    assert kernels.group_range(w, 16)[0].shape == (0, 2)
    assert kernels.squared_error(w, torch.empty(0, 32, dtype=torch.int8), 16, scale) == (0, 0, 0)


def test_slices_expanded_scales_and_parameters_are_accepted(isa, random):
    w = torch.nn.Parameter(torch.randn(6, 64, generator=random))
    scale = torch.full((1, 1), 0.3).expand(6, 1)
    codes = kernels.round_int(w[:, 8:24], 16, scale, None, -8, 7)
    whole = kernels.round_int(w.detach(), 64, scale, None, -8, 7)
    assert torch.equal(codes, whole[:, 8:24])
    assert torch.equal(kernels.decode_int(whole[:, ::2], 32, scale, None), whole[:, ::2] * scale)


def test_wrong_shapes_are_refused(isa):
    with pytest.raises(ValueError, match=r"\[N, G\]|row and group"):
        kernels.round_int(torch.ones(4, 32), 16, torch.ones(4, 1), None, -8, 7)


def test_row_slabs_in_threads_give_the_same_codes(isa, random):
    w, scale, zero_point = affine_case(256, 32, torch.bfloat16, random, rows=64)
    whole = kernels.round_int(w, 32, scale, zero_point, -8, 7)
    slabs = [slice(start, start + 8) for start in range(0, 64, 8)]
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda rows: kernels.round_int(w[rows], 32, scale[rows], zero_point[rows], -8, 7), slabs)
        assert torch.equal(torch.cat(list(parts)), whole)
