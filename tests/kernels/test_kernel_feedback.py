"""Rounding with error feedback: each instruction set against the reference, and known answers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit import kernels
from lowbit.kernels.feedback import feedback_codebook, feedback_int, feedback_minifloat, subtract_product
from lowbit.kernels.tables import E2M1, E4M3, E5M2, FP4, NF4
from lowbit.numerics.ggml import find_type
from lowbit.numerics.ggml.iquant_layout import grid, hand_over, index_of
from lowbit.numerics.ggml.iquant_search import nearest_points

COMPILED = [isa for isa in kernels.available_isas() if isa != "reference"]
IQUANTS = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]


def case(random, rows=5, columns=70):
    """w, spread with entries on both sides of a zero diagonal, scale, offset, zero_point."""
    w = torch.randn(rows, columns, generator=random)
    spread = 0.2 * torch.randn(columns, columns, generator=random)
    spread.fill_diagonal_(0.0)
    scale = 0.1 + 0.2 * torch.rand(rows, columns, generator=random)
    scale[0, :7] = 0.0
    offset = 0.3 * torch.randn(rows, columns, generator=random)
    return w, spread, scale, offset, torch.randint(-8, 8, (rows, columns), generator=random).to(torch.int32)


def run(number, parts, span, descend):
    """(w, codes, decoded) afterwards."""
    w, spread, scale, offset, zero_point = parts
    w, decoded = w.clone(), torch.zeros_like(w)
    codes = torch.zeros(w.shape, dtype=torch.int8 if number in ("int", "zero", "offset") else torch.uint8)
    out = (codes, decoded, descend)
    if number in ("int", "zero", "offset"):
        chosen = (offset if number == "offset" else None, zero_point if number == "zero" else None)
        feedback_int(w, spread, span, scale, *chosen, (-8, 7), *out)
    elif number in (NF4, FP4):
        feedback_codebook(w, spread, span, scale * 5, number, *out)
    else:
        feedback_minifloat(w, spread, span, scale.clamp(min=0.01), number, *out)
    return w, codes, decoded


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize("number", ["int", "zero", "offset", NF4, FP4, E2M1, E4M3, E5M2], ids=str)
def test_every_instruction_set_gives_the_bits_of_the_reference(isa, number, descend, random):
    for rows, columns, span in ((1, 9, (0, 9, 4)), (37, 70, (0, 70, 32)), (7, 130, (5, 97, 128)), (3, 1, (0, 1, 8))):
        parts = case(random, rows, columns)
        with kernels.use_isa("reference"):
            expected = run(number, parts, span, descend)
        with kernels.use_isa(isa):
            found = run(number, parts, span, descend)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("isa", COMPILED)
def test_products_are_the_bits_of_the_reference(isa, random):
    for rows, depth, columns in ((1, 1, 1), (7, 33, 65), (12, 128, 200), (5, 200, 64)):
        w, change = torch.randn(rows, columns, generator=random), torch.randn(rows, depth, generator=random)
        spread = torch.randn(depth, columns, generator=random)
        for begin, end in ((0, columns), (columns // 3, columns), (columns // 3, columns // 2)):
            ours, theirs = w.clone(), w.clone()
            with kernels.use_isa(isa):
                subtract_product(ours, change, spread, begin, end)
            with kernels.use_isa("reference"):
                subtract_product(theirs, change, spread, begin, end)
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours[:, begin:end], (w - change @ spread)[:, begin:end], rtol=1e-4, atol=1e-4)


def test_without_spread_it_is_rounding(isa, random):
    w, spread, scale, _, zero_point = case(random)
    scale = scale.clamp(min=0.01)
    parts = (w, torch.zeros_like(spread), scale, None, zero_point)
    for number, expected in (
        ("int", kernels.round_int(w, 1, scale, None, -8, 7)),
        ("zero", kernels.round_int(w, 1, scale, zero_point, -8, 7)),
        (NF4, kernels.round_codebook(w, 1, scale * 5, NF4)),
        (FP4, kernels.round_codebook(w, 1, scale * 5, FP4)),
        (E4M3, kernels.round_minifloat(w, 1, scale, E4M3)),
        (E2M1, kernels.round_minifloat(w, 1, scale, E2M1)),
    ):
        after, codes, _ = run(number, parts, (0, 70, 16), False)
        assert torch.equal(codes, expected)
        assert torch.equal(after, w)


def test_a_known_answer(isa):
    # 0.6 rounds to 1, 0.4 too little; half of that comes off the next: 0.4 + 0.2 = 0.6 rounds to 1, and so on.
    w, spread = torch.tensor([[0.6, 0.4, 0.4]]), torch.tensor([[0, 0.5, 0], [0, 0, 0.5], [0, 0, 0]])
    codes, decoded = torch.zeros(1, 3, dtype=torch.int8), torch.zeros(1, 3)
    feedback_int(w, spread, (0, 3, 2), torch.ones(1, 3), None, None, (-8, 7), codes, decoded)
    assert codes.tolist() == [[1, 1, 1]]
    torch.testing.assert_close(w, torch.tensor([[0.6, 0.6, 0.6]]))


def test_columns_outside_the_span_keep_their_codes(isa, random):
    w, codes, decoded = run("int", case(random), (10, 20, 4), False)
    for outside in (codes[:, :10], codes[:, 20:], decoded[:, 20:]):
        assert not outside.any()
    before = case(torch.Generator().manual_seed(20240229))[0]
    assert torch.equal(w[:, :11], before[:, :11])
    assert not torch.equal(w[:, 20:], before[:, 20:])


def test_rows_do_not_depend_on_each_other(isa, random):
    parts = case(random, rows=48)
    whole = run("zero", parts, (0, 70, 32), False)
    w, spread, *others = parts
    slabs = [slice(start, start + 5) for start in range(0, 48, 5)]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda s: run("zero", (w[s], spread, *(x[s] for x in others)), (0, 70, 32), False), slabs))
    for index in range(3):
        assert torch.equal(torch.cat([part[index] for part in rows]), whole[index])


@pytest.mark.parametrize("isa", COMPILED)
def test_wrong_shapes_are_refused(isa, random):
    w, spread, scale, _, _ = case(random)
    codes = torch.zeros(w.shape, dtype=torch.int8)
    with kernels.use_isa(isa):
        with pytest.raises(ValueError, match=r"spread must be \[K, K\]"):
            feedback_int(w, spread[:-1], (0, 70, 8), scale, None, None, (-8, 7), codes, w)
        with pytest.raises(ValueError, match="columns must lie within"):
            feedback_int(w, spread, (0, 71, 8), scale, None, None, (-8, 7), codes, w)
        with pytest.raises(ValueError, match=r"spread \[B, K\]"):
            subtract_product(w, w, spread[:-1], 0, 70)


@pytest.mark.parametrize("name", IQUANTS)
@pytest.mark.parametrize("isa", COMPILED)
def test_nearest_points_of_lattices_are_the_references(isa, name, random):
    kind, index = find_type(name), index_of(name)
    for count in (1, 31, 100):
        x = torch.randn(count, grid(name).shape[1], generator=random)
        w = torch.rand(x.shape, generator=random) + 0.01
        scaled = (0.02 + 0.1 * torch.rand(count, 1, generator=random)) * index.levels
        entry, cost = torch.empty(count, dtype=torch.int32), torch.empty(count)
        with kernels.use_isa(isa):
            core = kernels.compiled(x.device)
            hand_over(core, kind)
            core.iq_nearest(kind.number, x, w, scaled, entry, cost)
        expected = nearest_points(index, x, w, scaled)
        assert torch.equal(entry.long(), expected[0])
        assert torch.equal(cost, expected[1])
