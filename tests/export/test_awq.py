"""AWQ: golden bytes, what was planned is what is packed, what it cannot hold is refused, names that collide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats.awq import write as exporter
from lowbit.numerics import grid_for
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import Granularity, QuantizedTensor

ASYM, SYM = SCHEMES["W4A16_ASYM"], SCHEMES["W4A16"]


def random_codes(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    spec = scheme.weight
    group_size = spec.columns_per_scale(shape[1])
    groups = shape[1] // group_size
    codes = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    scale = (torch.rand(shape[0], groups, generator=generator) * 0.02 + 0.001).half().float()
    zeros = torch.randint(-8, 8, (shape[0], groups), generator=generator).to(torch.int32)
    zero_point = None if spec.symmetric else zeros
    return QuantizedTensor(codes, scale, grid_for(spec, "float16"), spec.granularity, group_size, zero_point)


def rows_of(whole: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    zero_point = None if whole.zero_point is None else whole.zero_point[first:last]
    return replace(whole, codes=whole.codes[first:last], scale=whole.scale[first:last], zero_point=zero_point)


def packed(quantized: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    pieces = exporter.pack("l", quantized, scheme, 0, quantized.shape, torch.float16)
    return {piece.name.removeprefix("l."): piece.values for piece in pieces}


@pytest.mark.parametrize("scheme", [ASYM, SYM], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("shape", "group_size"), [((64, 128), 32), ((8, 96), -1), ((40, 192), 64)])
def test_pack_writes_exactly_what_was_planned(scheme, shape, group_size):
    scheme = scheme.with_group_size(group_size)
    found = packed(random_codes(scheme, shape), scheme)
    planned = exporter.stored_tensors("l", shape, scheme, torch.bfloat16)
    assert {(f"l.{leaf}", values.dtype, tuple(values.shape)) for leaf, values in found.items()} == {
        (stored.name, stored.dtype, stored.shape) for stored in planned
    }
    assert exporter.unfit(shape, scheme) is None


@pytest.mark.parametrize("scheme", [ASYM, SYM], ids=lambda scheme: scheme.name)
def test_slabs_give_the_same_bytes_as_the_whole(scheme):
    whole, shape = random_codes(scheme, (72, 256)), (72, 256)
    expected = packed(whole, scheme)
    found = {leaf: torch.zeros_like(values) for leaf, values in expected.items()}
    first = 0
    for last in (8, 32, 72):
        for piece in exporter.pack("l", rows_of(whole, first, last), scheme, first, shape, torch.float16):
            target = found[piece.name.removeprefix("l.")]
            target[:, piece.column : piece.column + piece.values.shape[1]] = piece.values
        first = last
    for leaf, values in expected.items():
        assert torch.equal(found[leaf], values), leaf
    assert exporter.row_multiple(scheme, shape) == 8


def test_golden_bytes():
    """Rows 0..7 hold the codes 0..7 (u = 8..15): nibbles from the lowest are rows 0 2 4 6 1 3 5 7, so 8 A C E 9 B D F.

    The other column holds −8 in row 1 alone: u = 0 in nibble 4. Zero points 1..8: nibbles 1 3 5 7 2 4 6 8.
    """
    codes = torch.tensor([[row, -8 if row == 1 else 7] for row in range(8)], dtype=torch.int8)
    zeros = torch.arange(1, 9, dtype=torch.int32).reshape(8, 1) - 8
    scheme = ASYM.with_group_size(-1)
    scale = torch.full((8, 1), 0.5)
    found = packed(
        QuantizedTensor(codes, scale, grid_for(scheme.weight, "float16"), Granularity.CHANNEL, 2, zeros), scheme
    )
    assert [word & 0xFFFFFFFF for word in found["qweight"].flatten().tolist()] == [0xFDB9ECA8, 0xFFF0FFFF]
    assert [word & 0xFFFFFFFF for word in found["qzeros"].flatten().tolist()] == [0x86427531]
    assert found["scales"].view(torch.int16).tolist() == [[0x3800] * 8]


def test_symmetric_schemes_get_zero_points_of_8():
    found = packed(random_codes(SYM, (16, 128)), SYM)["qzeros"]
    assert [word & 0xFFFFFFFF for word in found.flatten().tolist()] == [0x88888888] * 2


@pytest.mark.parametrize("name", sorted(set(SCHEMES) - {"W4A16", "W4A16_ASYM"}))
def test_schemes_that_awq_cannot_hold_are_refused(name):
    with pytest.raises(FormatError, match=name):
        exporter.storage_format(SCHEMES[name])


def test_rows_that_do_not_fill_words_are_unfit():
    assert "12 rows do not fill 32-bit words" in (exporter.unfit((12, 128), ASYM) or "")


def test_groups_that_do_not_divide_the_row_are_unfit():
    assert "192 columns do not divide into groups of 128" in (exporter.unfit((64, 192), ASYM) or "")


def test_scales_are_float16_and_survive_a_cast_to_the_model_dtype():
    assert exporter.scale_format(ASYM, torch.bfloat16) == "bfloat16_in_float16"
    assert exporter.scale_format(ASYM, torch.float16) == "float16"


def test_inexact_names_what_would_change():
    good = random_codes(ASYM, (8, 128))
    assert exporter.inexact(good, ASYM, torch.float16) is None
    assert "no float16" in (exporter.inexact(replace(good, scale=good.scale + 1e-7), ASYM, torch.float16) or "")
    assert good.zero_point is not None
    high = replace(good, zero_point=good.zero_point + 16)
    assert "does not fit 4 bits" in (exporter.inexact(high, ASYM, torch.float16) or "")
    permuted = replace(good, g_idx=torch.zeros(128, dtype=torch.int32))
    assert "activation order" in (exporter.inexact(permuted, ASYM, torch.float16) or "")


@pytest.mark.parametrize(("scheme", "sym"), [(ASYM, False), (SYM, True)])
def test_the_config(scheme, sym):
    config = exporter.quantization_config({"model.layers.0.mlp.up_proj": scheme}, ["lm_head"])
    assert config.pop("meta")["quantizer"][0].startswith("lowbit:")
    assert config == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head"], "sym": sym,
    }  # fmt: skip
    assert exporter.companion_files({"a": scheme}, []) == {}


def test_one_scale_per_row_is_group_size_minus_1():
    config = exporter.quantization_config({"a": ASYM.with_group_size(-1)}, [])
    assert config["group_size"] == -1
    assert config["modules_to_not_convert"] is None


def test_a_quantized_head_is_said():
    assert exporter.quantization_config({"a": ASYM, "lm_head": ASYM}, [])["lm_head"] is True


@pytest.mark.parametrize("other", [SYM, ASYM.with_group_size(32)])
def test_mixed_schemes_are_refused(other):
    with pytest.raises(FormatError, match=r"one scheme for a whole model; a has .*, b has|b .*"):
        exporter.quantization_config({"a": ASYM, "b": other}, [])


def test_a_name_that_a_quantized_one_contains_cannot_be_ignored():
    """Qwen2-MoE's router `mlp.gate` beside a dense `mlp.gate_proj`."""
    schemes = {"model.layers.0.mlp.gate_proj": ASYM}
    with pytest.raises(FormatError, match=r"cannot leave model\.layers\.0\.mlp\.gate alone.*gate_proj"):
        exporter.quantization_config(schemes, ["model.layers.0.mlp.gate"])
    assert exporter.quantization_config(schemes, ["model.layers.1.mlp.gate"])
