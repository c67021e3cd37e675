"""`GgmlGrid`: error feedback written against it helps on every type, and what it packs is what it decoded."""

import importlib
from functools import lru_cache

import pytest
import torch

from lowbit.errors import ShapeError, UsageError
from lowbit.numerics.ggml import TYPES, decode, encode
from lowbit.numerics.ggml.grid import GgmlGrid

QUANTIZED = [name for name, kind in TYPES.items() if kind.family != "plain"]
COLUMNS = 512


@lru_cache
def _problem(rows=8):
    """A weight and a Hessian with strong correlations between its columns."""
    torch.manual_seed(0)
    mixing = torch.randn(COLUMNS // 8, COLUMNS) + 0.3 * torch.randn(COLUMNS // 8, 1)
    inputs = torch.randn(4 * COLUMNS, COLUMNS // 8) @ mixing + 2 * torch.randn(4 * COLUMNS, COLUMNS)
    hessian = inputs.T @ inputs / len(inputs)
    return 0.05 * torch.randn(rows, COLUMNS), hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)


def _gptq(grid, weight, hessian):
    """(codes, params, decoded): round the next columns, and spread their error over those to the right."""
    left, v = weight.clone(), grid.columns_per_code
    upper = torch.linalg.cholesky(hessian.double().inverse(), upper=True).float()
    codes, params = [], []
    for start in range(0, COLUMNS, v):
        if start % grid.block == 0:
            block = slice(start, start + grid.block)
            params.append(grid.fit(left[:, block], hessian.diagonal()[block]))
        now, here = slice(start, start + v), grid.at(params[-1], start % grid.block, start % grid.block + v)
        codes.append(grid.round(left[:, now], here, hessian.diagonal()[now]))
        error = left[:, now] - grid.decode(codes[-1], here)
        left[:, start + v :] -= torch.linalg.solve(upper[now, now].T, error.T).T @ upper[now, start + v :]
        left[:, now] -= error
    return torch.cat(codes, dim=1), grid.join(params), left


@pytest.mark.parametrize("name", QUANTIZED)
def test_error_feedback_lowers_the_error_that_the_hessian_weighs(name):
    weight, hessian = _problem()
    grid = GgmlGrid(name)
    codes, params, decoded = _gptq(grid, weight, hessian)
    assert torch.equal(decode(name, grid.pack(codes, params)), grid.decode(codes, params))
    torch.testing.assert_close(decoded, grid.decode(codes, params), rtol=1e-5, atol=1e-6)  # left − (left − q)
    plain = decode(name, encode(name, weight, hessian.diagonal()))

    def error(made):
        return torch.einsum("nk,kl,nl->", weight - made, hessian, weight - made)

    assert error(decoded) < 0.75 * error(plain)


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "IQ4_XS", "TQ1_0", "IQ2_XS"])
def test_error_feedback_without_correlations_is_rounding(name):
    weight, hessian = _problem(rows=2)
    grid = GgmlGrid(name)
    importance = hessian.diagonal()
    codes, params, _ = _gptq(grid, weight, importance.diag())
    whole = grid.fit(weight, importance)
    assert torch.equal(codes, grid.round(weight, whole, importance))
    assert torch.equal(grid.pack(codes, params), grid.pack(codes, whole))


@pytest.mark.parametrize("name", TYPES)
def test_fit_and_round_of_whole_rows_come_close_to_the_encoder(name):
    weight, hessian = _problem(rows=4)
    grid = GgmlGrid(name)
    blocks = encode(name, weight, hessian.diagonal())
    params = grid.fit(weight, hessian.diagonal())
    codes = grid.round(weight, params, hessian.diagonal())
    ours, theirs = grid.decode(codes, params), decode(name, blocks)
    assert torch.equal(decode(name, grid.pack(codes, params)), ours)

    def error(made):
        return (hessian.diagonal() * (weight - made) ** 2).sum()

    assert error(ours) <= error(theirs) * 1.001


@pytest.mark.parametrize("name", TYPES)
def test_parts_are_as_the_whole_and_unpack_is_the_inverse_of_pack(name):
    weight, hessian = _problem(rows=3)
    grid = GgmlGrid(name)
    v = grid.columns_per_code
    params = grid.fit(weight)
    codes = grid.round(weight, params, hessian.diagonal())
    decoded = grid.decode(codes, params)
    for start in (0, 40, 248, COLUMNS - 8):
        here = grid.at(params, start, start + 8)
        part = grid.round(weight[:, start : start + 8], here, hessian.diagonal()[start : start + 8])
        assert torch.equal(part, codes[:, start // v : (start + 8) // v])
        assert torch.equal(grid.decode(part, here), decoded[:, start : start + 8])
    blocks = encode(name, weight, torch.ones(COLUMNS))
    codes, params = grid.unpack(blocks)
    assert torch.equal(grid.pack(codes, params), blocks)
    assert torch.equal(grid.decode(codes, params), decode(name, blocks))


def test_bits_of_codes_and_parameters_make_the_block():
    for name, kind in TYPES.items():
        grid = GgmlGrid(name)
        parameter_bits = 8 * kind.size - grid.bits * kind.weights / grid.columns_per_code
        assert parameter_bits == int(parameter_bits), name
        assert (parameter_bits == 0) == (kind.family == "plain")
        assert grid.columns_per_code in ((4, 8) if kind.family == "i" else (1,))


def test_symmetric_types_have_no_offset():
    symmetric = {name for name in TYPES if GgmlGrid(name).symmetric}
    assert set(TYPES) - symmetric >= {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}
    assert symmetric >= {"Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "IQ4_NL", "TQ2_0", "IQ2_XS", "IQ3_S"}


def test_grids_are_found_by_name_and_compare_equal():
    assert GgmlGrid("q4_k") == GgmlGrid("Q4_K")
    assert GgmlGrid("q4_k").name == "Q4_K"
    with pytest.raises(UsageError, match="there is no ggml type"):
        GgmlGrid("Q4_L")


def test_params_of_other_columns_are_refused():
    grid = GgmlGrid("TQ2_0")
    codes = torch.ones(2, 256, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="256 columns of codes, and params of 512 columns"):
        grid.pack(codes, grid.fit(torch.randn(2, 512)))
    one_column = grid.at(grid.fit(torch.randn(2, 256)), 7, 8)
    with pytest.raises(ShapeError, match="params of single columns cannot be packed"):
        grid.pack(codes, one_column)


def test_every_family_has_what_the_grid_needs():
    for name in ("plain", "legacy", "low_bits", "kquants", "codebooks", "ternary", "iquants"):
        module = importlib.import_module(f"lowbit.numerics.ggml.{name}")
        for call in ("encode", "unpack", "pack", "value", "round"):
            assert callable(getattr(module, call)), f"{name}.{call}"
