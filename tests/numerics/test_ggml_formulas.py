"""What single families of ggml types promise: codes by their formula, golden bytes, weights that come back exactly."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from ggml_rows import gguf_decode, hard_rows, relative_error, same_bits, small_student_case, uneven_rows_case
from lowbit import kernels
from lowbit.kernels.choice import compiled
from lowbit.numerics.ggml import codebooks, decode, encode, find_type, iquants, kquants
from lowbit.numerics.ggml.iquant_layout import grid
from lowbit.numerics.ggml.types import Blocks, weights_of

ISAS = kernels.available_isas()
LEGACY = {"Q4_0": (4, -8), "Q4_1": (4, 0), "Q5_0": (5, -16), "Q5_1": (5, 0), "Q8_0": (8, -128)}  # bits, lowest
KQUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
IQUANTS = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPILED_ONLY = pytest.mark.skipif(kernels.isa() == "reference", reason="there are no compiled kernels here")


@pytest.fixture
def random():
    return torch.Generator().manual_seed(3)


def decoded_alike(name, blocks):
    """What every instruction set and the gguf package decode."""
    expected = gguf_decode(name, blocks)
    for isa in ISAS:
        with kernels.use_isa(isa):
            assert same_bits(decode(name, blocks), expected), isa
    return expected


def comes_back(name, weight, importances=(None,)):
    """On every instruction set, exactly."""
    for isa in ISAS:
        with kernels.use_isa(isa):
            for importance in importances:
                assert torch.equal(decode(name, encode(name, weight, importance)), weight), isa


def squared_error(weight, decoded):
    return (weight - decoded).double().square().sum().item()


# F32, F16, BF16


def all_floats(random):
    """Finite bit patterns from all over float32, with all ties of halves and bfloat16 among them."""
    every_half = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([every_half.view(torch.float16).float(), every_half.view(torch.bfloat16).float()])
    exact = exact[exact.isfinite()].view(torch.int32)
    near = [exact + step for step in (0, 1, -1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001)]
    anything = torch.randint(-(2**31), 2**31 - 1, (9999,), dtype=torch.int64, generator=random).to(torch.int32)
    values = torch.cat([*near, anything]).view(torch.float32)
    return values[values.isfinite()]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers_are_converted_as_torch_converts(name, random):
    values = all_floats(random)
    weight = values[: len(values) // 3 * 3].reshape(3, -1)
    for isa in ISAS:
        with kernels.use_isa(isa):
            blocks = encode(name, weight, torch.ones(weight.shape[1]))
            assert torch.equal(blocks, weight.to(PLAIN[name]).view(torch.uint8)), isa
            for dtype in (torch.bfloat16, torch.float16):
                narrow = weight.clamp(-6e4, 6e4).to(dtype)
                assert torch.equal(encode(name, narrow), narrow.to(PLAIN[name]).view(torch.uint8)), isa


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_number_decodes(name, random):
    every = all_floats(random) if name == "F32" else torch.arange(65536, dtype=torch.int32).to(torch.int16)
    decoded_alike(name, every[None].contiguous().view(torch.uint8))


def test_halves_overflow_to_inf_as_in_torch():
    blocks = encode("F16", torch.tensor([[65519.0, 65520.0, -1e9]]))
    assert decode("F16", blocks).tolist() == [[65504.0, torch.inf, -torch.inf]]


# Q4_0, Q4_1, Q5_0, Q5_1, Q8_0


def legacy_block(name, codes, d, m=0.0):
    """One block, uint8 [1, size], put together bit by bit."""
    halves = torch.tensor([d, m] if name.endswith("1") else [d], dtype=torch.float16).view(torch.uint8).tolist()
    if name == "Q8_0":
        return torch.tensor([halves + [code & 255 for code in codes]], dtype=torch.uint8)
    fifth = sum((code >> 4) << j for j, code in enumerate(codes))
    high = list(fifth.to_bytes(4, "little")) if name[1] == "5" else []
    low = [codes[j] & 15 | (codes[j + 16] & 15) << 4 for j in range(16)]
    return torch.tensor([halves + high + low], dtype=torch.uint8)


@pytest.mark.parametrize("name", LEGACY)
def test_every_code_decodes_to_its_formula(name):
    bits, lowest = LEGACY[name]
    m = -0.75 if name.endswith("1") else 0.0
    for start in range(0, 2**bits, 32):
        codes = [(start + j) % 2**bits for j in range(32)]
        stored = [code + lowest for code in codes] if name == "Q8_0" else codes
        expected = torch.tensor([[(code + lowest) * 0.125 + m for code in codes]])
        assert torch.equal(decoded_alike(name, legacy_block(name, stored, 0.125, m)), expected)


@pytest.mark.parametrize("name", LEGACY)
def test_what_a_legacy_type_holds_comes_back(name):
    """Codes that span the range; d and m whose products are exact.

    No column matters so little that its error is lost in the rounding of the sums.
    """
    bits, lowest = LEGACY[name]
    codes = (torch.arange(320).reshape(2, 160) * 7 + torch.arange(160) // 32) % 2**bits
    values = (codes + lowest).clamp(min=-127).float()
    if name == "Q8_0":
        values[:, ::32] = 127
    weight = values * 0.0625 - (0.5 if name.endswith("1") else 0)
    comes_back(name, weight, (None, torch.linspace(1e-3, 1, 160) ** 2 + 1e-3))


def test_q4_0_uses_a_negative_scale_where_the_largest_weight_is_positive():
    weight = torch.linspace(-0.7, 0.8, 32)[None]
    assert torch.equal(encode("Q4_0", weight)[0, :2].view(torch.float16).sign(), torch.tensor([-1.0]).half())


# IQ4_NL, IQ4_XS, MXFP4, NVFP4

IQ4 = torch.tensor(codebooks.IQ4_VALUES).float()
FP4 = torch.tensor(codebooks.FP4_VALUES).float()
HALF = [0x00, 0x38]  # 0.5 in half precision
ONE_HALF = {
    "IQ4_NL": HALF,
    "IQ4_XS": [*HALF, 0xAA, 0xAA] + [0x11] * 4,  # all scales 33, so 1 on decode
    "MXFP4": [127],
    "NVFP4": [0x38] * 4,  # 1.0
}


@pytest.mark.parametrize("name", ONE_HALF)
def test_every_pair_of_codes_decodes_to_its_values(name):
    """Byte b has codes b % 16 and b // 16, n / 2 columns apart."""
    kind, parameters = find_type(name), torch.tensor(ONE_HALF[name], dtype=torch.uint8)
    pairs = torch.arange(256, dtype=torch.uint8).reshape(-1, kind.size - len(parameters))
    blocks = torch.cat([parameters.expand(len(pairs), -1), pairs], dim=1).reshape(1, -1)
    bytes_of_sub_blocks = pairs.reshape(-1, kind.group // 2)
    codes = torch.stack([bytes_of_sub_blocks & 15, bytes_of_sub_blocks >> 4], dim=1).long()
    values = (IQ4 if name.startswith("IQ4") else FP4) * 0.5
    assert torch.equal(decoded_alike(name, blocks), values[codes].reshape(1, -1))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_byte_decodes_as_in_the_gguf_package(name):
    blocks = torch.full((256, find_type(name).size), 0x7A, dtype=torch.uint8)  # 12 and −2 halves
    blocks[:, : len(ONE_HALF[name])] = torch.arange(256, dtype=torch.uint8)[:, None]
    decoded_alike(name, blocks)


def test_ocp_and_e4m3_scales_are_what_torch_calls_them():
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(codebooks.e8m0_half(codes) * 2, codes.view(torch.float8_e8m0fnu).float())
    codes = torch.arange(0x7F, dtype=torch.uint8)
    assert torch.equal(codebooks.ue4m3_half(codes) * 2, codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4", "NVFP4"])
def test_what_a_codebook_type_holds_comes_back(name, random):
    """All 16 values in every sub-block; scales that halves and E4M3 hold."""
    values = (IQ4 if name == "IQ4_NL" else FP4)[torch.randperm(16, generator=random)]
    weight = values.repeat(2, 8) * torch.tensor([[0.0625], [-0.25 if name == "IQ4_NL" else 0.25]])
    comes_back(name, weight, (None, torch.rand(128, generator=random) ** 3))


def test_any_mxfp4_block_comes_back_exactly(random):
    blocks = torch.randint(0, 256, (200, 17), dtype=torch.uint8, generator=random)
    blocks[:, 0] = torch.arange(200) + 40
    blocks[::3, 1:] &= 0x33  # small values only: the block has another exponent, the weights are the same
    comes_back("MXFP4", decode("MXFP4", blocks), (None, torch.rand(32, generator=random) ** 3))


def test_iq4_xs_holds_sub_blocks_of_either_sign_and_any_size():
    """A super-block made of scales −32 … 31 of one d comes back but for half a step of the sub-scales."""
    scales = torch.tensor([-32.0, 31, -20, 13, 7, -5, 2, 0])
    weight = (0.0078125 * scales[:, None] * IQ4.repeat(2)).reshape(1, 256)
    for isa in ISAS:
        with kernels.use_isa(isa):
            assert relative_error(weight, decode("IQ4_XS", encode("IQ4_XS", weight)), None) < 1e-6


def test_iq4_scales_are_of_either_sign():
    """The values reach 127 on the negative and 113 on the positive side: a mirrored block wants the negative scale."""
    weight = IQ4.repeat(2)[None] * 0.01
    signs = [encode("IQ4_NL", rows)[0, :2].view(torch.float16).sign().item() for rows in (weight, -weight)]
    assert signs == [1.0, -1.0]


# TQ1_0, TQ2_0


def test_golden_bytes_of_ternary_weights():
    q = torch.zeros(1, 256)
    q[0, 0], q[0, 1], q[0, 32] = 1, -1, 1
    assert encode("TQ2_0", q)[0, :3].tolist() == [0b01011010, 0b01010100, 0b01010101]
    # base 3, most significant first: 22111 = 229, 01111 = 40, 11111 = 121; each · 256 / 243, rounded up
    assert encode("TQ1_0", q)[0, :3].tolist() == [242, 43, 128]
    assert encode("TQ1_0", q)[0, -2:].tolist() == [0x00, 0x3C]


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_come_back_exactly_and_make_the_bytes_of_the_gguf_package(name, random):
    scales = torch.rand(64, 1, generator=random).half().float() * torch.logspace(-4, 4, 64)[:, None].half().float()
    signs = torch.randint(-1, 2, (64, 512), generator=random)
    comes_back(name, scales.half().float() * signs, (None, torch.rand(512, generator=random) + 0.001))
    theirs = gguf.quants.quantize((signs * 0.5).numpy().astype(np.float32), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(encode(name, signs * 0.5).numpy(), theirs)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_the_error_is_the_least_of_all_scales(name, random):
    """Against every one of the 31744 halves as d, and its best codes."""
    x = torch.randn(2, 256, dtype=torch.float64, generator=random) * torch.tensor([[0.02], [3.0]])
    x[1] = x[1] ** 3
    importance = torch.rand(256, dtype=torch.float64, generator=random) ** 3
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    decoded = decode(name, encode(name, x.float(), importance.float())).double()
    for row in range(2):
        kept = x[row].abs() > halves[:, None] / 2
        errors = (importance * (x[row].abs() - halves[:, None] * kept) ** 2).sum(1)
        assert (importance * (x[row] - decoded[row]) ** 2).sum() <= errors.min() * (1 + 1e-5)


def test_the_error_is_far_below_that_of_the_largest_weight_as_scale(random):
    """Which is how ggml and the gguf package choose d."""
    weight = torch.randn(8, 1024, generator=random)
    theirs = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.TQ2_0))
    ours = decode("TQ2_0", encode("TQ2_0", weight))
    assert squared_error(weight, ours) < 0.35 * squared_error(weight, gguf_decode("TQ2_0", theirs))


# Q1_0, Q2_0


def test_every_byte_of_one_and_two_bit_codes_decodes_to_its_formula():
    """All 256 bytes, at d = −0.75."""
    every = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    blocks = torch.cat([torch.tensor([[0x00, 0xBA]], dtype=torch.uint8).expand(16, 2), every], dim=1)
    bits = [[-0.75 if byte >> bit & 1 else 0.75 for byte in row for bit in range(8)] for row in every.tolist()]
    assert torch.equal(decoded_alike("Q1_0", blocks), torch.tensor(bits))
    pairs = [[-0.75 * ((byte >> 2 * at & 3) - 1) for byte in row for at in range(4)] for row in every.tolist()]
    assert torch.equal(decoded_alike("Q2_0", blocks), torch.tensor(pairs))


def test_golden_bytes_of_one_and_two_bits():
    signs = torch.full((1, 128), -0.5)
    signs[0, [0, 9, 127]] = 0.5
    assert encode("Q1_0", signs)[0].tolist() == [0x00, 0x38, 1, 2, *[0] * 13, 128]
    levels = torch.zeros(1, 64)
    levels[0, [0, 1, 2, 63]] = torch.tensor([0.25, -0.25, 0.5, 0.5])
    assert encode("Q2_0", levels)[0].tolist() == [0x00, 0x34, 0b01110010, *[0b01010101] * 14, 0b11010101]


def test_weights_that_models_of_one_and_two_bits_have_come_back(random):
    signs = torch.randint(0, 2, (8, 256), generator=random) * 2.0 - 1
    scales = torch.rand(8, 1, generator=random).half().float()
    comes_back("Q1_0", signs * scales, (None, torch.rand(256, generator=random) + 0.01))
    ternary = torch.randint(-1, 2, (8, 256), generator=random) * scales
    comes_back("Q2_0", ternary, (None, torch.rand(256, generator=random) + 0.01))
    levels = torch.randint(-1, 3, (8, 256), generator=random) * scales
    comes_back("Q2_0", levels)
    comes_back("Q2_0", -levels)


def test_the_scale_of_signs_is_the_best_there_is(random):
    """Against all halves; of two bits the search comes within half a percent of it."""
    x = torch.randn(2, 128, dtype=torch.float64, generator=random) * 0.02
    importance = torch.rand(128, dtype=torch.float64, generator=random) ** 3
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    halves = halves[halves < 1]
    ones = decode("Q1_0", encode("Q1_0", x.float(), importance.float())).double()
    twos = decode("Q2_0", encode("Q2_0", x.float(), importance.float())).double()
    for row in range(2):
        errors = (importance * (x[row].abs() - halves[:, None]) ** 2).sum(1)
        assert (importance * (x[row] - ones[row]) ** 2).sum() <= errors.min() * (1 + 1e-5)
        for block in (slice(0, 64), slice(64, 128)):
            d = torch.cat([halves[1:], -halves[1:]])[:, None]
            levels = (x[row, block] / d).round().clamp(-1, 2) * d
            least = (importance[block] * (x[row, block] - levels) ** 2).sum(1).min()
            assert (importance[block] * (x[row, block] - twos[row, block]) ** 2).sum() <= least * 1.005


# Q2_K, Q3_K, Q4_K, Q5_K, Q6_K


@pytest.mark.parametrize("name", KQUANTS)
def test_hard_rows_keep_what_a_k_quant_can_keep(name):
    """Each row against rounding every super-block to one scale: no row is ruined by another one's size."""
    ordinary = ("normal", "heavy tails", "fifth powers", "zeros", "constant", "positive", "negative", "zero sub-blocks",
                "constant that no half is", "small", "large", "one outlier", "alone", "ties")  # fmt: skip
    rows = hard_rows(1280)
    weight = torch.stack([rows[row] for row in ordinary])
    decoded = decode(name, encode(name, weight))
    steps = 2.0 ** (torch.tensor(float(name[1])) - 1)
    blocks = weight.view(len(weight), -1, 256)
    scale = blocks.abs().amax(-1, keepdim=True) / (steps - 0.5)
    naive = (torch.div(blocks, scale).round().clamp(-steps, steps - 1) * scale).view_as(weight).nan_to_num(0)
    for row, which in enumerate(ordinary):
        most = squared_error(weight[row], naive[row]) + 1e-9 * weight[row].square().sum()
        assert squared_error(weight[row], decoded[row]) <= most, which


@pytest.mark.parametrize("name", KQUANTS)
def test_weights_that_a_k_quant_holds_come_back_almost_exactly(name):
    """Exactly in most super-blocks of 2, 3 and 6 bits, in fewer where sub-blocks leave out the outer codes."""
    weight, _ = uneven_rows_case()
    held = decode(name, encode(name, weight))
    again = decode(name, encode(name, held))
    assert squared_error(held, again) < 0.05 * squared_error(weight, held)
    if name in ("Q2_K", "Q3_K", "Q6_K"):
        assert (held == again).view(-1, 256).all(1).float().mean() > 0.8


@pytest.mark.parametrize("name", KQUANTS)
def test_every_code_and_sub_scale_of_k_quants_decodes_to_its_formula(name, random):
    """From codes, sub-scales and minima that `pack` puts together."""
    kind = find_type(name)
    groups = 256 // kind.group
    top = {"Q2_K": 16, "Q3_K": 64, "Q6_K": 256}.get(name, 64)
    zero = {"Q3_K": 4, "Q6_K": 32}.get(name, 0)
    codes = (torch.arange(top * 256) % 2 ** int(name[1])).reshape(top, 256).to(torch.uint8)
    scales = (torch.arange(top)[:, None] - (top // 2 if zero else 0)).expand(top, groups).to(torch.int8)
    stored = {"d": torch.full((top, 1), 0.5, dtype=torch.float16), "scales": scales}
    expected = 0.5 * scales.float().repeat_interleave(kind.group, 1) * (codes.float() - zero)
    if not zero:
        minima = torch.randint(0, top, (top, groups), generator=random).to(torch.int8)
        stored |= {"dmin": torch.full((top, 1), 0.25, dtype=torch.float16), "minima": minima}
        expected = expected - 0.25 * minima.float().repeat_interleave(kind.group, 1)
    assert torch.equal(decoded_alike(name, kquants.pack(kind, codes, stored)), expected)


# IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S


@pytest.mark.parametrize("name", IQUANTS)
def test_every_code_of_i_quants_decodes_as_the_gguf_package_does(name):
    """Every point, sign and sub-scale, at d = 0.25; `unpack` gives the codes back."""
    kind = find_type(name)
    empty = iquants.unpack(kind, torch.zeros((1, kind.size), dtype=torch.uint8))
    bits = iquants._CODES[name]
    points = 2 if name == "IQ3_XXS" else 1
    every = torch.arange(1 << bits.point_bits)
    signs = torch.arange(1 << bits.sign_bits)
    codes = torch.cat([every * sum(1 << bits.point_bits * i for i in range(points)), signs << bits.point_bits * points])
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % empty.codes.shape[1])).reshape(1, -1).int()
    count = codes.shape[1] // empty.codes.shape[1]
    scales = torch.arange(count * empty.stored["scale"].shape[1], dtype=torch.int32) % iquants._SEARCH[name].sub_scales
    stored = {"d": torch.full((1, count), 0.25, dtype=torch.float16), "scale": scales[None]}
    if "shift" in empty.stored:
        stored["shift"] = torch.arange(count * 8, dtype=torch.int32)[None] % 2
    blocks = iquants.pack(kind, codes, stored)
    decoded_alike(name, blocks)
    assert torch.equal(iquants.unpack(kind, blocks).codes, codes)


@pytest.mark.parametrize("name", IQUANTS)
def test_rounding_to_the_scales_of_blocks_is_no_worse_than_their_codes(name):
    kind = find_type(name)
    weight, importance = small_student_case()
    weight, importance = weight[:2, :512], importance[:512]
    blocks = iquants.unpack(kind, encode(name, weight, importance))
    codes = iquants.round(kind, weight, blocks, importance)
    ours, theirs = (weights_of(kind, each, blocks) for each in (codes, blocks.codes))
    assert relative_error(weight, ours, importance) <= (1 + 1e-5) * relative_error(weight, theirs, importance)


@pytest.mark.parametrize("name", IQUANTS)
def test_rounding_finds_the_nearest_code_of_all(name, random):
    """Against every code there is, for single codes, with scales of both signs."""
    kind, code = find_type(name), iquants._CODES[name]
    weight = torch.randn(3, code.columns, generator=random)
    importance = torch.rand(code.columns, generator=random) + 0.1
    scale = torch.tensor([[0.7], [-0.9], [1.3]]) / grid(name).float().square().mean().sqrt()
    params = Blocks(torch.empty((3, 0), dtype=torch.int32), scale, scale / 8 if name == "IQ1_S" else None)
    nearest = iquants.round(kind, weight, params, importance)
    point_bits = code.point_bits * (code.columns // grid(name).shape[1])
    points = torch.arange(1 << point_bits, dtype=torch.int32)
    for row in range(3):
        natural = (weight[row] * scale[row] < 0).int()[: code.sign_bits]
        natural = int((natural << torch.arange(len(natural))).sum())
        signs = [natural] + [natural ^ 1 << bit for bit in range(code.sign_bits)]  # two flips are never better
        every = (points | torch.tensor(signs, dtype=torch.int32)[:, None] << point_bits).reshape(-1, 1)
        one = replace(params, scale=scale[row][:, None])
        one = replace(one, offset=None if params.offset is None else params.offset[row][:, None])
        errors, ours = (
            (importance * (weight[row] - weights_of(kind, codes, one)) ** 2).sum(dim=1)
            for codes in (every, nearest[row][None])
        )
        assert torch.allclose(ours, errors.amin(), rtol=1e-4)


@COMPILED_ONLY
def test_the_core_refuses_a_grid_that_is_not_one():
    core = compiled(torch.device("cpu"))
    assert core is not None
    points, number = grid("IQ3_S"), find_type("IQ3_S").number
    core.set_ggml_grid(number, points)  # once more is fine
    for wrong in (points[:256], points.flip(0), points[:, :2]):
        with pytest.raises(ValueError, match="grid"):
            core.set_ggml_grid(number, wrong.contiguous())


@COMPILED_ONLY
def test_the_core_says_so_when_it_has_no_grid():
    found = importlib.util.find_spec("lowbit.kernels._core")
    assert found is not None
    path = found.origin
    script = f"""
import importlib.util
import numpy as np
spec = importlib.util.spec_from_file_location("_core", {path!r})  # alone: lowbit.kernels imports torch
_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_core)
core = _core.Isa(_core.available_isas()[0])
core.ggml_decode(21, np.zeros((1, 110), np.uint8), np.zeros((1, 256), np.float32))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "RuntimeError: the grid of this ggml type has not been set" in process.stderr
