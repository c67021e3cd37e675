"""Every ggml type: decoded as the gguf package decodes, encoded to the same bytes everywhere, with llama.cpp's errors.

What is special to one type stands in `FACTS`; formulas, golden bytes and single families are in `test_ggml_formulas`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import gguf
import pytest
import torch
from gguf.quants import quantize
from torch import Tensor

from ggml_rows import (
    gguf_decode,
    hard_rows,
    importances,
    relative_error,
    same_bits,
    small_student_case,
    student_case,
    uneven_rows_case,
)
from lowbit import kernels
from lowbit.errors import ShapeError
from lowbit.numerics.ggml import TYPES, decode, encode, encode_measured, squared_error
from lowbit.numerics.ggml.grid import GgmlGrid, IntLevels
from lowbit.numerics.ggml.types import family, weights_of

ISAS = kernels.available_isas()
COMPILED = [isa for isa in ISAS if isa != "reference"]


@dataclass(frozen=True)
class Facts:
    """What is special to one type.

    halves      bytes of a block where numbers in half precision begin
    llama       relative squared errors of llama.cpp's encoder (`ggml_quantize_chunk`) on the weights of `case`: with
                their importance (the errors weighed with it) and without; None where it was not recorded
    margin      what part of them ours stay below
    gain        importance lowers the error it weighs below this part; 1: importance is not used
    gguf        our error is at most this part of the gguf package's, where that has an encoder
    digest      of the bytes of the first weights of `student_case`, with importance and without
    """

    halves: tuple[int, ...] = ()
    case: Callable[[], tuple[Tensor, Tensor]] = student_case
    llama: tuple[float | None, float | None] = (None, None)
    margin: float = 0.95
    gain: float = 0.99
    gguf: float | None = None
    digest: str = ""


K = {"case": uneven_rows_case, "margin": 0.97, "gain": 0.97}
I = {"case": small_student_case, "margin": 0.9, "gain": 0.97}  # noqa: E741
FACTS = {
    "F32": Facts(gain=1, gguf=1, digest="4b4966d7aa2b2ba2"),
    "F16": Facts((0,), gain=1, gguf=1, digest="71a10b53e394bcb8"),
    "BF16": Facts(gain=1, gguf=1, digest="b6954624d8e622b3"),
    "Q4_0": Facts((0,), llama=(9.9969e-03, 1.1651e-02), gguf=1, digest="4a69c7c37ff5bee5"),
    "Q4_1": Facts((0, 2), llama=(5.5054e-03, 8.0808e-03), gguf=1, digest="d2a6498fa46a15ef"),
    "Q5_0": Facts((0,), llama=(2.5193e-03, 2.9012e-03), gguf=1, digest="7c515722d50ab86b"),
    "Q5_1": Facts((0, 2), llama=(1.2966e-03, 1.8555e-03), gguf=1, digest="d0c071df85ab3c80"),
    "Q8_0": Facts((0,), llama=(4.6775e-05, 4.5496e-05), margin=1, gain=1, gguf=1, digest="0b3e3db837c98783"),
    "Q1_0": Facts((0,), llama=(0.452705, None), margin=0.99, gain=0.995, digest="5243314d7e66a728"),
    "Q2_0": Facts((0,), llama=(0.569688, 0.553686), margin=0.3, digest="0bdc8ce7b58e4467"),
    "Q2_K": Facts((80, 82), llama=(0.065696, 0.126565), digest="f2a4f751ec8019ea", **K),
    "Q3_K": Facts((108,), llama=(0.028937, 0.038443), digest="cc375cf232fc4e12", **K),
    "Q4_K": Facts((0, 2), llama=(0.0064810, 0.0084396), digest="49caa044761d97cb", **K),
    "Q5_K": Facts((0, 2), llama=(0.0017513, 0.0021458), digest="a209743683d4d5e9", **K),
    "Q6_K": Facts((208,), llama=(0.00046486, 0.00057997), digest="97e0cd5ea6ec0155", **K),
    "IQ4_NL": Facts((0,), llama=(6.8645e-03, 7.8876e-03), digest="af57cb2d31d73dd1"),
    "IQ4_XS": Facts((0,), llama=(7.0710e-03, 8.0539e-03), digest="f4c1dbfe01ea3459"),
    "MXFP4": Facts(llama=(1.6284e-02, 1.5756e-02), margin=0.96, gguf=1, digest="c69ab5e63b1e85fa"),
    "NVFP4": Facts(llama=(8.8818e-03, 8.6100e-03), margin=0.85, digest="3ee84c434fe41bc0"),
    "TQ1_0": Facts((52,), gain=0.996, gguf=0.4, digest="046579570b1a4c35"),
    "TQ2_0": Facts((64,), gain=0.996, gguf=0.4, digest="282fbd2c1a939072"),
    "IQ1_S": Facts((0,), llama=(0.215887, None), digest="f0da91ff79d340d6", **I),
    "IQ1_M": Facts(llama=(0.149821, None), digest="bbe8db88df91bf7b", **I),
    "IQ2_XXS": Facts((0,), llama=(0.095476, None), digest="ccd79dc5c7fd4952", **I),
    "IQ2_XS": Facts((0,), llama=(0.070143, None), digest="8eb8391c0a877a1f", **I),
    "IQ2_S": Facts((0,), llama=(0.060754, None), digest="75095e19375249e6", **I),
    "IQ3_XXS": Facts((0,), llama=(0.021988, None), digest="0bdad5af7fb1b2cf", **I),
    "IQ3_S": Facts((0,), llama=(0.017102, None), digest="6fd993f24e79f458", **I),
}
EVERY_TYPE = pytest.mark.parametrize("name", TYPES)
QUANTIZED = pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.family != "plain"])


def test_every_type_has_its_facts():
    assert list(FACTS) == list(TYPES)


def columns_of(name: str) -> int:
    """An odd number of blocks, so that neither a tile of 16 sub-blocks nor of 2 super-blocks divides the rows'."""
    if TYPES[name].family == "i" or name == "IQ4_XS":
        return 256  # in torch their search takes its time
    return {256: 768, 128: 384, 64: 192}.get(TYPES[name].weights, 160)


@cache
def rows_of(name: str) -> Tensor:
    rows = torch.stack(list(hard_rows(columns_of(name)).values()))
    # those that a half overflows on are for `test_weights_beyond_the_type_saturate`
    return rows.clamp(-6e4, 6e4) if name == "F16" else rows


@cache
def hard_cases(name: str) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Weights, importance, and blocks as the reference makes them: without importance, and with all kinds side by side.

    Those of i-quants are the reference's for two of the kinds, and for the others one instruction set's.
    """
    rows, kinds = rows_of(name), importances(columns_of(name))
    given = {which: importance for which, importance in kinds.items() if importance is not None}
    slow = TYPES[name].family == "i"
    by_reference = {"uneven": given.pop("uneven")} if slow else given
    cases = [("reference", None), ("reference", by_reference)] + ([(COMPILED[-1], given)] if slow and COMPILED else [])
    encoded = []
    for isa, importance in cases:
        weight = rows if importance is None else rows.repeat(1, len(importance))
        joined = None if importance is None else torch.cat(list(importance.values()))
        with kernels.use_isa(isa):
            encoded.append((weight, joined, encode(name, weight, joined)))
    return encoded


def random_blocks(name: str, rows: int, count: int) -> Tensor:
    random = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (rows, TYPES[name].size * count), dtype=torch.uint8, generator=random)


def blocks_of_every_byte(name: str) -> Tensor:
    """256 blocks, each of one byte, but for a scale of −0.3."""
    blocks = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, TYPES[name].size)
    for at in FACTS[name].halves if TYPES[name].weights > 1 else ():
        blocks[:, at : at + 2] = torch.tensor([-0.3], dtype=torch.float16).view(torch.uint8)
    return blocks


@EVERY_TYPE
def test_bytes_decode_as_the_gguf_package_decodes_them(name):
    for blocks in (blocks_of_every_byte(name), random_blocks(name, 6, 41), random_blocks(name, 1, 1)):
        expected = gguf_decode(name, blocks)
        for isa in ISAS:
            with kernels.use_isa(isa):
                assert same_bits(decode(name, blocks), expected), isa


@EVERY_TYPE
def test_every_instruction_set_makes_the_bytes_of_the_reference(name):
    for weight, importance, blocks in hard_cases(name):
        for isa in COMPILED:
            with kernels.use_isa(isa):
                assert torch.equal(encode(name, weight, importance), blocks), isa


@EVERY_TYPE
def test_16_bit_weights_make_the_bytes_of_their_float32(name):
    for isa in COMPILED or ISAS:
        with kernels.use_isa(isa):
            for weight, importance, _ in hard_cases(name):
                for dtype in (torch.bfloat16, torch.float16):
                    narrow = weight.clamp(-6e4, 6e4).to(dtype)
                    assert torch.equal(encode(name, narrow, importance), encode(name, narrow.float(), importance)), isa


@EVERY_TYPE
def test_hard_rows_decode_to_finite_weights_and_zeros_to_zeros(name):
    """And no row is made worse than leaving it out."""
    names = list(hard_rows(columns_of(name)))
    for weight, importance, blocks in hard_cases(name):
        decoded = gguf_decode(name, blocks)
        assert decoded.isfinite().all()
        assert not decoded[names.index("zeros")].any()
        if importance is None:
            worse = (weight - decoded).double().square().sum(1) > weight.double().square().sum(1)
            assert not [names[row] for row in worse.nonzero()[:, 0]]


@EVERY_TYPE
def test_blocks_do_not_influence_each_other(name):
    kind, weight = TYPES[name], rows_of(name)
    importance = importances(weight.shape[1])["uneven"]
    assert importance is not None
    together = encode(name, weight, importance)
    assert torch.equal(torch.cat([encode(name, row[None], importance) for row in weight]), together)
    first = encode(name, weight[:1, : kind.weights], importance[: kind.weights])
    assert torch.equal(first, together[:1, : kind.size])


@EVERY_TYPE
def test_bytes_are_those_recorded(name):
    """On every machine: a change of any encoder shows here."""
    weight, importance = student_case()
    weight, importance = weight[:2, :512], importance[:512]
    blocks = torch.cat([encode(name, weight, importance), encode(name, weight)])
    assert hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16] == FACTS[name].digest


@EVERY_TYPE
def test_weights_that_are_not_finite_show_in_the_sums(name):
    """Of errors, which come with the blocks; of finite weights they are the sums over what was decoded."""
    weight, importance = student_case()
    weight, importance = weight[:3, :256].clone(), importance[:256]
    for isa in ISAS:
        with kernels.use_isa(isa):
            blocks, sums = encode_measured(name, weight, importance)
            error = (weight - decode(name, blocks)).double()
            expected = (error.square().sum().item(), weight.double().square().sum().item(), error.abs().max().item())
            assert sums == pytest.approx(expected, rel=1e-5, abs=1e-12), isa
            assert squared_error(name, weight, blocks) == pytest.approx(expected, rel=1e-5, abs=1e-12), isa
            for bad in (math.nan, math.inf, -math.inf):
                broken = weight.clone()
                broken[1, 77] = bad
                assert all(math.isnan(value) for value in encode_measured(name, broken, importance)[1]), (isa, bad)


@QUANTIZED
def test_weights_beyond_the_type_saturate(name):
    """To finite weights, of their sign where a type has both signs in a sub-block."""
    kind = TYPES[name]
    weight = torch.tensor([3e38, -3e38]).repeat(kind.weights // 2)[None]
    for isa in ISAS:
        with kernels.use_isa(isa):
            decoded = decode(name, encode(name, weight))
            assert decoded.isfinite().all()
            if name != "NVFP4":
                assert decoded.abs().amax() >= 65504 if kind.family != "i" else decoded.abs().amax() > 4000
            has_minimum = family(kind).unpack(kind, encode(name, weight)).offset is not None
            assert (decoded.sign() == weight.sign()).all() or has_minimum or name == "IQ1_M"


@EVERY_TYPE
def test_empty_and_ragged_rows(name):
    kind = TYPES[name]
    for isa in ISAS:
        with kernels.use_isa(isa):
            assert encode(name, torch.empty(0, kind.weights)).shape == (0, kind.size)
            assert encode(name, torch.empty(3, 0)).shape == (3, 0)
            assert decode(name, torch.empty(0, kind.size, dtype=torch.uint8)).shape == (0, kind.weights)
            if kind.weights > 1:
                with pytest.raises(ShapeError, match="whole blocks"):
                    encode(name, torch.zeros(1, kind.weights + 1))
            with pytest.raises(ShapeError, match="whole blocks"):
                decode(name, torch.zeros(1, kind.size + 1, dtype=torch.uint8))


@QUANTIZED
def test_error_is_below_llama_cpps(name):
    facts = FACTS[name]
    if TYPES[name].family == "i" and kernels.isa() == "reference":
        pytest.skip("the reference makes the same bytes, slowly")
    weight, importance = facts.case()
    for theirs, by in zip(facts.llama, (importance, None), strict=True):
        if theirs is not None:
            assert relative_error(weight, decode(name, encode(name, weight, by)), by) < facts.margin * theirs


@EVERY_TYPE
def test_importance_lowers_the_error_it_weighs(name):
    """At the cost of the others, and whatever its size."""
    weight, importance = FACTS[name].case()
    weight, importance = weight[:8, :512], importance[:512]
    blocks = encode(name, weight, importance)
    assert torch.equal(encode(name, weight, importance * 2.0**40), blocks)
    with_importance, without = decode(name, blocks), decode(name, encode(name, weight))
    if FACTS[name].gain == 1:
        assert torch.equal(with_importance, without)
        return
    weighed = relative_error(weight, without, importance)
    assert relative_error(weight, with_importance, importance) < FACTS[name].gain * weighed
    assert relative_error(weight, with_importance, None) > relative_error(weight, without, None)


@EVERY_TYPE
def test_error_is_no_greater_than_the_gguf_packages(name):
    part = FACTS[name].gguf
    if part is None:
        with pytest.raises((NotImplementedError, KeyError)):  # Q2_0 it does not even know
            quantize(student_case()[0].numpy(), gguf.GGMLQuantizationType[name])
        return
    weight, _ = student_case()
    theirs = gguf_decode(name, torch.from_numpy(quantize(weight.numpy(), gguf.GGMLQuantizationType[name]).view("u1")))
    ours = decode(name, encode(name, weight))
    assert relative_error(weight, ours, None) <= part * relative_error(weight, theirs, None)


@EVERY_TYPE
def test_pack_is_the_inverse_of_unpack_and_what_is_unpacked_decodes_alike(name):
    kind = TYPES[name]
    blocks = random_blocks(name, 4, 9)
    if name == "TQ1_0":  # several bytes stand for the same five codes; encoders make one of them
        blocks = encode(name, torch.randn(4, 9 * 256, generator=torch.Generator().manual_seed(5)))
    unpacked = family(kind).unpack(kind, blocks)
    assert unpacked.scale.shape == (4, 9 * kind.weights // kind.group)
    assert torch.equal(family(kind).pack(kind, unpacked.codes, unpacked.stored), blocks)
    assert same_bits(weights_of(kind, unpacked.codes, unpacked), gguf_decode(name, blocks))


@pytest.mark.parametrize("name", [name for name in TYPES if GgmlGrid(name).levels is not None])
def test_round_takes_the_nearest_code(name):
    """Of all codes there are, in any slice of the columns; the encoder of types with one scale chose the same."""
    kind, levels = TYPES[name], GgmlGrid(name).levels
    weight, importance = FACTS[name].case()
    params = family(kind).unpack(kind, encode(name, weight, importance))
    codes = family(kind).round(kind, weight, params)
    if kind.family in ("legacy", "codebook"):
        assert (codes == params.codes).float().mean() > 0.9999
    every = range(16)
    if isinstance(levels, IntLevels):
        every = range(levels.lowest + levels.zero, levels.highest + levels.zero + 1)
    least = torch.full_like(weight, torch.inf)
    for code in every:
        values = weights_of(kind, torch.full_like(codes, code), params)
        least = torch.minimum(least, (weight - values).abs())
    off = (weight - weights_of(kind, codes, params)).abs()
    if kind.family == "k":
        assert torch.equal(off, least)
    else:  # weights are multiplied by the inverse of the scale: what lies at a tie may go either way
        assert (off <= least * (1 + 1e-5)).all()
    for start, stop in ((0, 1), (35, 36), (512, 528)):
        part = GgmlGrid(name).at(params, start, stop)
        assert torch.equal(family(kind).round(kind, weight[:, start:stop], part), codes[:, start:stop])
