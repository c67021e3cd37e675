"""Q2_K … Q6_K: decoded as the gguf package decodes, encoded to the same bytes everywhere, better than ggml does."""

import gguf
import pytest
import torch

from lowbit import kernels
from lowbit.numerics.ggml import decode, encode, find_type, kquants
from lowbit.numerics.ggml.blocks import per_column

# Relative weighted errors of llama-quantize's encoders (ggml 0.9, quantize_q2_K …) on the weights of `_recorded()`,
# (without, with) importance; the error is weighed with the importance, or with 1.
LLAMA = {
    "Q2_K": (0.126565, 0.065696),
    "Q3_K": (0.038443, 0.028937),
    "Q4_K": (0.0084396, 0.0064810),
    "Q5_K": (0.0021458, 0.0017513),
    "Q6_K": (0.00057997, 0.00046486),
}
# Where the file keeps the high bytes of its halves: with bit 6 cleared they are finite.
HIGH_BYTES = {"Q2_K": (81, 83), "Q3_K": (109,), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,)}
ISAS = kernels.available_isas()


def _recorded():
    torch.manual_seed(20)
    weight = torch.randn(64, 1024) * torch.rand(64, 1) * (1 + torch.rand(64, 1024) ** 8 * 4)
    return weight, torch.rand(1024) ** 4 + 0.01


def _gguf_decode(name, blocks):
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]).copy())


def _same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _finite_blocks(name, rows, count):
    """Random bytes of blocks whose halves are finite, subnormal ones included."""
    blocks = torch.randint(0, 256, (rows, count * find_type(name).size), dtype=torch.uint8)
    for at in HIGH_BYTES[name]:
        blocks.view(-1, find_type(name).size)[:, at] &= 0xBF
    return blocks


def _error(weight, made, importance=None):
    weights = 1.0 if importance is None else importance.double()
    return (weights * (weight - made).double() ** 2).sum().item()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", LLAMA)
def test_every_byte_decodes_as_the_gguf_package_does(isa, name):
    size = find_type(name).size
    every = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, size)  # every code, sub-scale and minimum
    for at in HIGH_BYTES[name]:
        every[:, at - 1 : at + 1] = torch.tensor([-0.3], dtype=torch.float16).view(torch.uint8)
    torch.manual_seed(0)
    for blocks in (every, _finite_blocks(name, 5, 7)):
        expected = _gguf_decode(name, blocks)
        with kernels.use_isa(isa):
            assert _same_bits(decode(name, blocks), expected)
        assert _same_bits(kquants.decode(find_type(name), blocks), expected)


def _hard_rows():
    torch.manual_seed(1)
    rows = {
        "normal": torch.randn(3, 1280) * 0.02,
        "heavy tails": torch.randn(2, 1280) ** 5,
        "zeros": torch.zeros(1, 1280),
        "positive": torch.rand(1, 1280) + 1,
        "negative": -torch.rand(1, 1280) - 1,
        "constants": torch.tensor([[-0.1], [0.7]]).expand(2, 1280),
        "zero sub-blocks": torch.randn(1, 80, 16).mul((torch.arange(80) % 3 > 0)[:, None]).reshape(1, 1280),
        "subnormal": torch.randn(1, 1280) * 1e-41,
        "below every half": torch.randn(1, 1280) * 1e-10,
        "about the smallest half": torch.randn(3, 1280) * torch.tensor([[1e-7], [1e-5], [1e-3]]),
        "about the largest half": torch.randn(2, 1280) * torch.tensor([[1e6], [1e8]]),
        "huge": torch.randn(1, 1280) * 1e37,
        "one outlier": torch.nn.functional.one_hot(torch.tensor([700]), 1280).float() * 9 + 0.01,
        "alone": torch.nn.functional.one_hot(torch.tensor([700]), 1280).float(),
        "ties": torch.randint(-3, 4, (2, 1280)).float(),
    }
    return torch.cat(list(rows.values()))  # 23 rows of 5 super-blocks: no multiple of 16


def _importances():
    torch.manual_seed(2)
    some = torch.rand(1280) ** 4
    some[256:512] = 0
    some[600:640] = 0
    return {"none": None, "mixed": some, "zero": torch.zeros(1280), "tiny": some * 1e-38, "huge": some * 1e38}


@pytest.mark.parametrize("importance", _importances().values(), ids=_importances())
@pytest.mark.parametrize("name", LLAMA)
def test_every_instruction_set_makes_the_bytes_of_the_reference(name, importance):
    weight = _hard_rows()
    expected = kquants.encode(find_type(name), weight, importance)
    made = decode(name, expected)
    assert made.isfinite().all()
    assert not made[5].any()  # zeros
    for isa in (isa for isa in ISAS if isa != "reference"):
        with kernels.use_isa(isa):
            assert torch.equal(encode(name, weight, importance), expected)
            assert torch.equal(
                encode(name, weight[:1, :1024], None if importance is None else importance[:1024]),
                expected[:1, : find_type(name).row_bytes(1024)],
            )
            for dtype in (torch.bfloat16, torch.float16):
                narrow = weight.clamp(-6e4, 6e4).to(dtype)
                assert torch.equal(encode(name, narrow, importance), encode(name, narrow.float(), importance))


@pytest.mark.parametrize("name", LLAMA)
def test_hard_rows_keep_what_the_type_can_keep(name):
    """Each row against rounding every sub-block of 256 to one scale: no row is ruined by another one's size."""
    weight = _hard_rows()[[0, 1, 2, 3, 4, 6, 7, 8, 9, 14, 15]]
    made = decode(name, encode(name, weight))
    steps = 2.0 ** (torch.tensor(float(name[1])) - 1)
    blocks = weight.view(len(weight), -1, 256)
    scale = blocks.abs().amax(-1, keepdim=True) / (steps - 0.5)
    naive = (torch.div(blocks, scale).round().clamp(-steps, steps - 1) * scale).view_as(weight)
    for row in range(len(weight)):
        assert _error(weight[row], made[row]) <= _error(weight[row], naive[row]) + 1e-9 * weight[row].square().sum()


@pytest.mark.parametrize("name", LLAMA)
def test_weights_beyond_the_type_saturate(name):
    weight = torch.tensor([3e38, -3e38]).repeat(128)[None]
    made = decode(name, encode(name, weight))
    assert made.isfinite().all()
    assert (made.sign() == weight.sign()).all() or name in ("Q2_K", "Q4_K", "Q5_K")
    assert made.abs().amax() > 65504


@pytest.mark.parametrize("name", LLAMA)
def test_the_error_is_smaller_than_that_of_llama_quantize(name):
    weight, importance = _recorded()
    for weights, theirs in zip((None, importance), LLAMA[name], strict=True):
        made = decode(name, encode(name, weight, weights))
        assert _error(weight, made, weights) / _error(weight, torch.zeros(1), weights) < 0.97 * theirs


@pytest.mark.parametrize("name", LLAMA)
def test_importance_moves_the_error_to_where_it_matters_less(name):
    weight, importance = _recorded()
    with_importance, without = (decode(name, encode(name, weight, weights)) for weights in (importance, None))
    assert _error(weight, with_importance, importance) < 0.97 * _error(weight, without, importance)
    assert _error(weight, with_importance) > _error(weight, without)


@pytest.mark.parametrize("name", LLAMA)
def test_a_constant_factor_of_the_importance_changes_nothing(name):
    weight, importance = _recorded()
    assert torch.equal(encode(name, weight[:8], importance), encode(name, weight[:8], importance * 2.0**40))


@pytest.mark.parametrize("name", LLAMA)
def test_weights_that_the_type_holds_come_back_almost_exactly(name):
    """Exactly in most super-blocks of 2, 3 and 6 bits, in fewer where sub-blocks leave out the outer codes."""
    weight, _ = _recorded()
    held = decode(name, encode(name, weight))
    again = decode(name, encode(name, held))
    assert _error(held, again) < 0.05 * _error(weight, held)
    if name in ("Q2_K", "Q3_K", "Q6_K"):
        assert (held == again).view(-1, 256).all(1).float().mean() > 0.8


@pytest.mark.parametrize("name", LLAMA)
def test_pack_is_the_inverse_of_unpack(name):
    torch.manual_seed(3)
    blocks = _finite_blocks(name, 4, 5)
    kind = find_type(name)
    unpacked = kquants.unpack(kind, blocks)
    assert unpacked.codes.shape == (4, 5 * 256)
    assert unpacked.scale.shape == (4, 5 * 256 // kind.group)
    assert torch.equal(kquants.pack(kind, unpacked), blocks)


@pytest.mark.parametrize("name", LLAMA)
def test_round_takes_the_nearest_code(name):
    weight, importance = _recorded()
    kind = find_type(name)
    params = kquants.unpack(kind, encode(name, weight, importance))
    codes = kquants.round(kind, weight, params)
    every = torch.arange(2 ** int(name[1]), dtype=torch.uint8)[:, None, None]
    values = per_column(params.scale, 1024) * kquants.value(kind, every)
    if params.offset is not None:
        values = values + per_column(params.offset, 1024)
    made = decode(name, kquants.pack(kind, params.with_codes(codes)))
    assert torch.equal((weight - made).abs(), (weight - values).abs().amin(0))
    assert torch.equal(codes[:, 512:528], kquants.round(kind, weight[:, 512:528], _slice(params, kind, 512, 528)))


def _slice(params, kind, start, stop):
    groups = slice(start // kind.group, -(-stop // kind.group))
    offset = None if params.offset is None else params.offset[:, groups]
    return type(params)(params.codes, params.scale[:, groups], offset)
