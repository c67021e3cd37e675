"""IQ4_NL, IQ4_XS, MXFP4, NVFP4: codes and scales against gguf, one encoder's bytes everywhere, llama.cpp's errors."""

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
from lowbit.numerics.ggml import codebooks as FAMILY
from lowbit.numerics.ggml.blocks import per_column

NAMES = ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"]

# Relative squared errors of llama.cpp's ggml_quantize_chunk (the vendored source of llama-cpp-python 0.3.36) on
# `measured_tensor`, with its importance and without; and what of it ours must stay below.
LLAMA_CPP = {
    "IQ4_NL": (6.8645e-03, 7.8876e-03, 0.95),
    "IQ4_XS": (7.0710e-03, 8.0539e-03, 0.95),
    "MXFP4": (1.6284e-02, 1.5756e-02, 0.96),
    "NVFP4": (8.8818e-03, 8.6100e-03, 0.85),
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
    assert weighed < 0.99 * plain


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


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_of_codes_decodes_to_its_values(isa, name):
    """Byte b has codes b % 16 and b // 16, n / 2 columns apart."""
    kind = TYPES[name]
    half = [0x00, 0x38]  # 0.5 in half precision
    parameters = {
        "IQ4_NL": torch.tensor(half, dtype=torch.uint8),
        # all scales 33, so 1 on decode
        "IQ4_XS": torch.tensor([*half, 0xAA, 0xAA] + [0x11] * 4, dtype=torch.uint8),
        "MXFP4": torch.tensor([127], dtype=torch.uint8),
        "NVFP4": torch.tensor([0x38] * 4, dtype=torch.uint8),  # 1.0
    }[name]
    per_block = kind.size - len(parameters)
    pairs = torch.arange(256, dtype=torch.uint8).reshape(-1, per_block)
    blocks = torch.cat([parameters.expand(len(pairs), -1), pairs], dim=1).reshape(1, -1)
    values = torch.tensor(FAMILY.IQ4_VALUES if name.startswith("IQ4") else FAMILY.FP4_VALUES) * 0.5
    bytes_of_sub_blocks = pairs.reshape(-1, kind.group // 2)
    codes = torch.stack([bytes_of_sub_blocks & 15, bytes_of_sub_blocks >> 4], dim=1).long()
    assert torch.equal(decode(name, blocks), values[codes].reshape(1, -1))
    assert torch.equal(gguf_decode(name, blocks), decode(name, blocks))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_byte_decodes_as_in_the_gguf_package(isa, name):
    kind = TYPES[name]
    blocks = torch.full((256, kind.size), 0x7A, dtype=torch.uint8)  # 12 and −2 halves
    blocks[:, : 1 if name == "MXFP4" else 4] = torch.arange(256, dtype=torch.uint8)[:, None]
    assert same_bits(decode(name, blocks), gguf_decode(name, blocks))


def test_ocp_and_e4m3_scales_are_what_torch_calls_them():
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(FAMILY.e8m0_half(codes) * 2, codes.view(torch.float8_e8m0fnu).float())
    codes = torch.arange(0x7F, dtype=torch.uint8)
    assert torch.equal(FAMILY.ue4m3_half(codes) * 2, codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4", "NVFP4"])
def test_what_a_type_holds_exactly_comes_back(isa, name):
    """All 16 values in every sub-block; scales that halves and E4M3 hold."""
    values = torch.tensor(FAMILY.IQ4_VALUES if name == "IQ4_NL" else FAMILY.FP4_VALUES).float()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    weight = values[order].repeat(2, 8) * torch.tensor([[0.0625], [-0.25 if name == "IQ4_NL" else 0.25]])
    for importance in (None, importances(128)["ordinary"]):
        assert torch.equal(decode(name, encode(name, weight, importance)), weight)


def test_any_mxfp4_block_comes_back_exactly(isa):
    random = torch.Generator().manual_seed(6)
    blocks = torch.randint(0, 256, (200, 17), dtype=torch.uint8, generator=random)
    blocks[:, 0] = torch.arange(200) + 40
    blocks[::3, 1:] &= 0x33  # small values only: the block has another exponent, the weights are the same
    weight = decode("MXFP4", blocks)
    for importance in (None, importances(32)["ordinary"]):
        assert torch.equal(decode("MXFP4", encode("MXFP4", weight, importance)), weight)


def test_iq4_xs_holds_sub_blocks_of_either_sign_and_any_size(isa):
    """A super-block made of scales −32 … 31 of one d comes back but for half a step of the sub-scales."""
    scales = torch.tensor([-32.0, 31, -20, 13, 7, -5, 2, 0])
    values = torch.tensor(FAMILY.IQ4_VALUES).float().repeat(2)
    weight = (0.0078125 * scales[:, None] * values).reshape(1, 256)
    decoded = decode("IQ4_XS", encode("IQ4_XS", weight))
    assert relative_error(weight, decoded, None) < 1e-6


@pytest.mark.parametrize("name", ["MXFP4"])
def test_error_is_no_greater_than_the_gguf_packages(name):
    weight, _ = measured_tensor()
    theirs = torch.from_numpy(quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))
    ours = relative_error(weight, decode(name, encode(name, weight)), None)
    assert ours <= relative_error(weight, gguf_decode(name, theirs), None)


def test_iq4_scales_are_of_either_sign():
    """The values reach 127 on the negative and 113 on the positive side: a mirrored block wants the negative scale."""
    values = torch.tensor(FAMILY.IQ4_VALUES).float().repeat(2)[None] * 0.01
    signs = [encode("IQ4_NL", weight)[0, :2].view(torch.float16).sign().item() for weight in (values, -values)]
    assert signs == [1.0, -1.0]
