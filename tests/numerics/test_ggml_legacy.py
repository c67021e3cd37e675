"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: all codes against gguf, one encoder's bytes everywhere, llama.cpp's errors."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import gguf
import pytest
import torch
from gguf.quants import quantize

from ggml_rows import gguf_decode, hard_rows, importances, measured_tensor, relative_error, same_bits
from lowbit import kernels
from lowbit.numerics.ggml import TYPES, decode, encode
from lowbit.numerics.ggml import legacy as FAMILY
from lowbit.numerics.ggml.blocks import per_column

NAMES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]

# Relative squared errors of llama.cpp's ggml_quantize_chunk (the vendored source of llama-cpp-python 0.3.36) on
# `measured_tensor`, with its importance and without; and what of it ours must stay below.
LLAMA_CPP = {
    "Q4_0": (9.9969e-03, 1.1651e-02, 0.95),
    "Q4_1": (5.5054e-03, 8.0808e-03, 0.95),
    "Q5_0": (2.5193e-03, 2.9012e-03, 0.95),
    "Q5_1": (1.2966e-03, 1.8555e-03, 0.95),
    "Q8_0": (4.6775e-05, 4.5496e-05, 1.0),
}


@pytest.fixture(params=kernels.available_isas())
def isa(request):
    """Every instruction set of this machine, and the reference."""
    with kernels.use_isa(request.param):
        yield request.param


def columns_of(name):
    """An odd number of blocks, so that neither a tile of 16 sub-blocks nor of 2 super-blocks divides them."""
    return TYPES[name].weights * (3 if TYPES[name].weights > 32 else 5)


@cache
def reference_blocks(name, which):
    with kernels.use_isa("reference"):
        return encode(name, hard_rows(columns_of(name)), importances(columns_of(name))[which])


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_decode_as_the_gguf_package_decodes_them(isa, name):
    random = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (6, TYPES[name].size * 41), dtype=torch.uint8, generator=random)
    assert same_bits(decode(name, blocks), gguf_decode(name, blocks))


@pytest.mark.parametrize("which", importances(32))
@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_set_makes_the_bytes_of_the_reference(name, which):
    weight, importance = hard_rows(columns_of(name)), importances(columns_of(name))[which]
    expected = reference_blocks(name, which)
    for each in kernels.available_isas()[:-1]:
        with kernels.use_isa(each):
            assert torch.equal(encode(name, weight, importance), expected), each


@pytest.mark.parametrize("which", importances(32))
@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_decode_to_finite_weights_and_zeros_to_zeros(name, which):
    weight = hard_rows(columns_of(name))
    decoded = gguf_decode(name, reference_blocks(name, which))
    assert decoded.isfinite().all()
    assert (decoded[2] == 0).all()
    # a row is never made worse than leaving it out
    assert (((weight - decoded).double() ** 2).sum(1) <= (weight.double() ** 2).sum(1))[[0, 1, 3, 4, 8]].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_weights_make_the_bytes_of_their_float32(isa, name, dtype):
    weight = hard_rows(columns_of(name))[[0, 1, 2, 11]].to(dtype)
    importance = importances(columns_of(name))["ordinary"]
    assert torch.equal(encode(name, weight, importance), encode(name, weight.float(), importance))


@pytest.mark.parametrize("with_importance", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_error_is_below_llama_cpps(name, with_importance):
    weight, importance = measured_tensor()
    if not with_importance:
        importance = None
    error = relative_error(weight, decode(name, encode(name, weight, importance)), importance)
    weighted, plain, margin = LLAMA_CPP[name]
    assert error < margin * (weighted if with_importance else plain)


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_error_it_weighs(name):
    weight, importance = measured_tensor()
    decoded = [decode(name, encode(name, weight, by)) for by in (importance, None)]
    weighed, plain = (relative_error(weight, each, importance) for each in decoded)
    assert weighed == plain if name == "Q8_0" else weighed < 0.99 * plain


@pytest.mark.parametrize("name", NAMES)
def test_pack_is_the_inverse_of_unpack_and_what_is_unpacked_decodes_alike(name):
    random = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 256, (4, TYPES[name].size * 9), dtype=torch.uint8, generator=random)
    kind = TYPES[name]
    parts = FAMILY.unpack(kind, blocks)
    assert torch.equal(FAMILY.pack(kind, parts), blocks)
    values = FAMILY.value(kind, parts.codes)
    decoded = per_column(parts.scale, values.shape[1]) * values
    if parts.offset is not None:
        decoded = decoded + per_column(parts.offset, values.shape[1])
    assert same_bits(decoded, gguf_decode(name, blocks))


@pytest.mark.parametrize("name", NAMES)
def test_round_finds_the_codes_that_the_encoder_chose(name):
    weight, importance = measured_tensor()
    kind = TYPES[name]
    parts = FAMILY.unpack(kind, encode(name, weight, importance))
    assert (FAMILY.round(kind, weight, parts) == parts.codes).float().mean() > 0.9999
    # one column of a sub-block at a time
    first = replace(parts, scale=parts.scale[:, :1], offset=None if parts.offset is None else parts.offset[:, :1])
    assert torch.equal(FAMILY.round(kind, weight[:, 3:4], first), FAMILY.round(kind, weight, parts)[:, 3:4])


def block_of_codes(name, codes, d, m=0.0):
    """One block, uint8 [1, size], put together bit by bit."""
    halves = torch.tensor([d, m] if name.endswith("1") else [d], dtype=torch.float16).view(torch.uint8).tolist()
    if name == "Q8_0":
        return torch.tensor([halves + [code & 255 for code in codes]], dtype=torch.uint8)
    fifth = sum((code >> 4) << j for j, code in enumerate(codes))
    high = list(fifth.to_bytes(4, "little")) if name[1] == "5" else []
    low = [codes[j] & 15 | (codes[j + 16] & 15) << 4 for j in range(16)]
    return torch.tensor([halves + high + low], dtype=torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes_to_its_formula(isa, name):
    bits, lowest = {"Q4_0": (4, -8), "Q4_1": (4, 0), "Q5_0": (5, -16), "Q5_1": (5, 0), "Q8_0": (8, -128)}[name]
    m = -0.75 if name.endswith("1") else 0.0
    for start in range(0, 2**bits, 32):
        codes = [(start + j) % 2**bits for j in range(32)]
        stored = [code + lowest for code in codes] if name == "Q8_0" else codes
        block = block_of_codes(name, stored, 0.125, m)
        expected = torch.tensor([[(code + lowest) * 0.125 + m for code in codes]])
        assert torch.equal(decode(name, block), expected)
        assert torch.equal(gguf_decode(name, block), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_type_holds_exactly_comes_back(isa, name):
    """Codes that span the range; d and m whose products are exact.

    No column matters so little that its error is lost in the rounding of the sums.
    """
    bits = int(name[1])
    codes = (torch.arange(320).reshape(2, 160) * 7 + torch.arange(160) // 32) % 2**bits
    lowest = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -128}.get(name, 0)
    values = (codes + lowest).clamp(min=-127).float()
    if name == "Q8_0":
        values[:, ::32] = 127
    weight = values * 0.0625 - (0.5 if name.endswith("1") else 0)
    uneven = torch.linspace(1e-3, 1, 160) ** 2 + 1e-3
    for importance in (None, uneven):
        assert torch.equal(decode(name, encode(name, weight, importance)), weight)


@pytest.mark.parametrize("name", NAMES)
def test_error_is_no_greater_than_the_gguf_packages(name):
    weight, _ = measured_tensor()
    theirs = torch.from_numpy(quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))
    ours = relative_error(weight, decode(name, encode(name, weight)), None)
    assert ours <= relative_error(weight, gguf_decode(name, theirs), None)


def test_q4_0_uses_a_negative_scale_where_the_largest_weight_is_positive():
    weight = torch.linspace(-0.7, 0.8, 32)[None]
    assert torch.equal(encode("Q4_0", weight)[0, :2].view(torch.float16).sign(), torch.tensor([-1.0]).half())
