"""TQ1_0, TQ2_0: exact on ternary weights, the least error otherwise, the same bytes on every instruction set."""

import gguf
import numpy as np
import pytest
import torch

from lowbit import kernels
from lowbit.numerics.ggml import decode, encode, find_type, ternary

TYPES = ["TQ1_0", "TQ2_0"]
ISAS = kernels.available_isas()


def _gguf_decode(name, blocks):
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]).copy())


def _same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _finite_blocks(name, count):
    """Random bytes of blocks, half of them with a finite d, subnormal ones included."""
    blocks = torch.randint(0, 256, (3, count * find_type(name).size), dtype=torch.uint8)
    blocks.view(-1, find_type(name).size)[:, -1] &= 0xBB
    return blocks


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", TYPES)
def test_every_byte_decodes_as_the_gguf_package_does(isa, name):
    size = find_type(name).size
    every = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, size)
    every[:, -2:] = torch.tensor([0.3], dtype=torch.float16).view(torch.uint8)
    torch.manual_seed(0)
    with kernels.use_isa(isa):
        for blocks in (every, _finite_blocks(name, 7)):
            assert _same_bits(decode(name, blocks), _gguf_decode(name, blocks))


def _hard_rows():
    torch.manual_seed(1)
    ternary_row = 0.75 * torch.randint(-1, 2, (1280,)).float()
    rows = {
        "normal": torch.randn(3, 1280) * 0.02,
        "heavy tails": torch.randn(2, 1280) ** 5,
        "zeros": torch.zeros(1, 1280),
        "constant": torch.full((1, 1280), -0.1),
        "ternary": ternary_row[None],
        "subnormal": torch.randn(1, 1280) * 1e-41,
        "below every half": torch.randn(1, 1280) * 1e-10,
        "about the smallest half": torch.randn(1, 1280) * 1e-7,
        "huge": torch.randn(1, 1280) * 1e37,
        "one outlier": torch.nn.functional.one_hot(torch.tensor([700]), 1280).float() * 9 + 0.01,
        "ties": torch.randint(-3, 4, (2, 1280)).float(),
    }
    return torch.cat(list(rows.values()))


def _importances():
    torch.manual_seed(2)
    some = torch.rand(1280) ** 4
    some[256:512] = 0
    some[600:640] = 0
    return {"none": None, "mixed": some, "zero": torch.zeros(1280), "tiny": some * 1e-38, "huge": some * 1e38}


@pytest.mark.parametrize("importance", _importances().values(), ids=_importances())
@pytest.mark.parametrize("name", TYPES)
def test_every_instruction_set_makes_the_bytes_of_the_reference(name, importance):
    weight = _hard_rows()
    expected = ternary.encode(find_type(name), weight, importance)
    assert decode(name, expected).isfinite().all()
    for isa in ISAS:
        with kernels.use_isa(isa):
            assert torch.equal(encode(name, weight, importance), expected)
            for dtype in (torch.bfloat16, torch.float16):
                narrow = weight.clamp(-6e4, 6e4).to(dtype)
                assert torch.equal(encode(name, narrow, importance), encode(name, narrow.float(), importance))


@pytest.mark.parametrize("name", TYPES)
def test_the_error_is_the_least_of_all_scales(name):
    """Against every one of the 31744 halves as d, and its best codes."""
    torch.manual_seed(3)
    x = torch.randn(2, 256, dtype=torch.float64) * torch.tensor([[0.02], [3.0]])
    x[1] = x[1] ** 3
    importance = torch.rand(256, dtype=torch.float64) ** 3
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    made = decode(name, encode(name, x.float(), importance.float())).double()
    for row in range(2):
        kept = x[row].abs() > halves[:, None] / 2
        errors = (importance * (x[row].abs() - halves[:, None] * kept) ** 2).sum(1)
        assert (importance * (x[row] - made[row]) ** 2).sum() <= errors.min() * (1 + 1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_ternary_weights_come_back_exactly(name):
    torch.manual_seed(4)
    scales = torch.rand(64, 1).half().float() * torch.logspace(-4, 4, 64)[:, None].half().float()
    weight = scales.half().float() * torch.randint(-1, 2, (64, 512))
    for importance in (None, torch.rand(512) + 0.001):
        assert torch.equal(decode(name, encode(name, weight, importance)), weight)


def test_the_error_is_far_below_that_of_the_largest_weight_as_scale():
    """Which is how ggml and the gguf package choose d."""
    torch.manual_seed(5)
    weight = torch.randn(8, 1024)
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.TQ2_0)
    error = (weight - _gguf_decode("TQ2_0", torch.from_numpy(theirs))).square().sum()
    assert (weight - decode("TQ2_0", encode("TQ2_0", weight))).square().sum() < 0.35 * error


@pytest.mark.parametrize("name", TYPES)
def test_encoding_ternary_weights_makes_the_bytes_of_the_gguf_package(name):
    torch.manual_seed(6)
    weight = torch.randint(-1, 2, (5, 1024)).float() * 0.5
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(encode(name, weight).numpy(), theirs)


def test_golden_bytes():
    q = torch.zeros(1, 256)
    q[0, 0], q[0, 1], q[0, 32] = 1, -1, 1
    assert encode("TQ2_0", q)[0, :3].tolist() == [0b01011010, 0b01010100, 0b01010101]
    # base 3, most significant first: 22111 = 229, 01111 = 40, 11111 = 121; each · 256 / 243, rounded up
    assert encode("TQ1_0", q)[0, :3].tolist() == [242, 43, 128]
    assert encode("TQ1_0", q)[0, -2:].tolist() == [0x00, 0x3C]


@pytest.mark.parametrize("name", TYPES)
def test_pack_undoes_unpack(name):
    torch.manual_seed(7)
    kind = find_type(name)
    blocks = encode(name, torch.randn(3, 768))
    if name == "TQ2_0":
        blocks = torch.cat([blocks, torch.randint(0, 256, blocks.shape, dtype=torch.uint8)])
    unpacked = ternary.unpack(kind, blocks)
    assert torch.equal(ternary.pack(kind, unpacked), blocks)
    finite = unpacked.scale.isfinite().all(dim=1)
    decoded = unpacked.scale.repeat_interleave(256, dim=1) * ternary.value(kind, unpacked.codes)
    assert torch.equal(decoded[finite], decode(name, blocks)[finite])
