"""F32, F16, BF16 of GGUF: torch's conversions, on every instruction set."""

import gguf
import numpy as np
import pytest
import torch

from lowbit import kernels
from lowbit.numerics.ggml import decode, encode, find_type, plain

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _floats():
    """Bit patterns from all over float32, with all ties of halves and bfloat16 among them; finite."""
    torch.manual_seed(0)
    every_half = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([every_half.view(torch.float16).float(), every_half.view(torch.bfloat16).float()])
    exact = exact[exact.isfinite()].view(torch.int32)
    near = [exact + step for step in (0, 1, -1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001)]
    anything = torch.randint(-(2**31), 2**31 - 1, (9999,), dtype=torch.int64).to(torch.int32)
    values = torch.cat([*near, anything]).view(torch.float32)
    return values[values.isfinite()]


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("name", DTYPES)
def test_conversion_is_that_of_torch(isa, name):
    values = _floats()
    weight = values[: len(values) // 3 * 3].reshape(3, -1)
    with kernels.use_isa(isa):
        blocks = encode(name, weight, torch.ones(weight.shape[1]))
        assert torch.equal(blocks, weight.to(DTYPES[name]).view(torch.uint8))
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.clamp(-6e4, 6e4).to(dtype)
            assert torch.equal(encode(name, narrow), narrow.to(DTYPES[name]).view(torch.uint8))


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("name", DTYPES)
def test_every_number_decodes_as_the_gguf_package_does(isa, name):
    patterns = torch.arange(65536, dtype=torch.int32)
    every = _floats()[None] if name == "F32" else patterns.to(torch.int16)[None]
    blocks = every.contiguous().view(torch.uint8)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    with kernels.use_isa(isa):
        decoded = decode(name, blocks).numpy()
    nans = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(decoded), nans)
    np.testing.assert_array_equal(decoded.view(np.int32)[~nans], expected.view(np.int32)[~nans])


def test_halves_overflow_to_inf_as_in_torch():
    assert decode("F16", encode("F16", torch.tensor([[65519.0, 65520.0, -1e9]]))).tolist() == [
        [65504.0, torch.inf, -torch.inf]
    ]


@pytest.mark.parametrize("name", DTYPES)
def test_pack_undoes_unpack(name):
    kind = find_type(name)
    blocks = encode(name, torch.randn(3, 7))
    unpacked = plain.unpack(kind, blocks)
    assert torch.equal(plain.pack(kind, unpacked), blocks)
    assert torch.equal(unpacked.scale * plain.value(kind, unpacked.codes), decode(name, blocks))
