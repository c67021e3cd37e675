"""GPTQ: golden bytes of both versions, what was planned is what is packed, zero points that v1 cannot store, config."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.export import find_exporter
from lowbit.formats.gptq.write import GPTQ_V1, GPTQ_V2
from lowbit.numerics import grid_for
from lowbit.rounding.rtn import measure_range, round_to_nearest
from lowbit.schemes import SCHEMES, Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity, QuantizedTensor, RangeSearch

BOTH = pytest.mark.parametrize("exporter", [GPTQ_V1, GPTQ_V2], ids=["v1", "v2"])


HELD = {"W8A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16"}


def scheme_of(bits: int, symmetric: bool = True, group_size: int = -1) -> Scheme:
    granularity = Granularity.CHANNEL if group_size == -1 else Granularity.GROUP
    return scheme_of_specs(
        WeightSpec("int", bits, granularity, None if group_size == -1 else group_size, symmetric), None
    )


def random_codes(scheme: Scheme, shape: tuple[int, int], seed: int = 0, lowest_zero: int = 1) -> QuantizedTensor:
    """Any codes, scales that float16 holds, zero points from `lowest_zero` (unsigned) up."""
    generator = torch.Generator().manual_seed(seed)
    spec, half = scheme.weight, 1 << (scheme.weight.bits - 1)
    group_size = spec.columns_per_scale(shape[1])
    groups = -(-shape[1] // group_size)
    codes = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    scale = (torch.rand(shape[0], groups, generator=generator) * 0.02 + 0.001).half().float()
    zeros = torch.randint(lowest_zero - half, half, (shape[0], groups), generator=generator).to(torch.int32)
    zero_point = None if spec.symmetric else zeros
    return QuantizedTensor(codes, scale, grid_for(spec, "float16"), spec.granularity, group_size, zero_point)


def rows_of(whole: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    zero_point = None if whole.zero_point is None else whole.zero_point[first:last]
    return QuantizedTensor(
        whole.codes[first:last], whole.scale[first:last], whole.grid, whole.granularity, whole.group_size, zero_point
    )


def packed(exporter, quantized: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    pieces = exporter.pack("l", quantized, scheme, 0, quantized.shape, torch.float16)
    return {piece.name.removeprefix("l."): piece.values for piece in pieces}


def small(codes: list[list[int]], scheme: Scheme, zero_point: int | None = None) -> QuantizedTensor:
    signed = torch.tensor(codes, dtype=torch.int8)
    rows, columns = signed.shape
    zeros = None if zero_point is None else torch.full((rows, 1), zero_point, dtype=torch.int32)
    return QuantizedTensor(signed, torch.full((rows, 1), 0.5), grid_for(scheme.weight, "float16"), Granularity.CHANNEL,
                           columns, zeros)  # fmt: skip


@BOTH
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group_size"), [((64, 128), 32), ((32, 64), -1), ((96, 192), 64)])
def test_pack_writes_exactly_what_was_planned(exporter, bits, symmetric, shape, group_size):
    scheme = scheme_of(bits, symmetric, group_size)
    found = packed(exporter, random_codes(scheme, shape), scheme)
    planned = exporter.stored_tensors("l", shape, scheme, torch.bfloat16)
    assert {(f"l.{leaf}", values.dtype, tuple(values.shape)) for leaf, values in found.items()} == {
        (stored.name, stored.dtype, stored.shape) for stored in planned
    }
    assert exporter.unfit(shape, scheme) is None


@BOTH
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_slabs_give_the_same_bytes_as_the_whole(exporter, bits, symmetric):
    scheme, shape = scheme_of(bits, symmetric, 64), (160, 128)
    whole = random_codes(scheme, shape)
    expected = packed(exporter, whole, scheme)
    found = {leaf: torch.zeros_like(values) for leaf, values in expected.items()}
    step = exporter.row_multiple(scheme, shape)
    first = 0
    for rows in (step, 2 * step, 160):  # slabs of different heights
        last = min(first + rows, 160)
        pieces = exporter.pack("l", rows_of(whole, first, last), scheme, first, shape, torch.float16)
        for piece in pieces:
            assert piece.row == 0
            target = found[piece.name.removeprefix("l.")]
            if target.dim() == 1:
                target[:] = piece.values
            else:
                target[:, piece.column : piece.column + piece.values.shape[1]] = piece.values
        first = last
    for leaf, values in expected.items():
        assert torch.equal(found[leaf], values), leaf


def test_golden_bytes_4_bits_lie_down_the_columns():
    """-8..-1 → 0..7 in the nibbles of one word, element 0 lowest; the second row of the weight is the second column."""
    scheme = scheme_of(4)
    found = packed(GPTQ_V1, small([[-8, -7, -6, -5, -4, -3, -2, -1], [7] * 8], scheme), scheme)
    assert found["qweight"].tolist() == [[0x76543210, -1]]
    assert found["scales"].view(torch.int16).tolist() == [[0x3800, 0x3800]]
    assert found["g_idx"].tolist() == [0] * 8


def test_golden_bytes_2_bits():
    """Codes -2 -1 0 1 repeated → 00 01 10 11, low bits first: 0xE4 in every byte."""
    scheme = scheme_of(2)
    found = packed(GPTQ_V1, small([[-2, -1, 0, 1] * 4] * 16, scheme), scheme)
    assert found["qweight"][0, 0].item() == 0xE4E4E4E4 - (1 << 32)


def test_golden_bytes_3_bits_cross_words():
    """0..7 four times: 24 bits 0xFAC688, again and again, through three words."""
    scheme = scheme_of(3)
    found = packed(GPTQ_V1, small([[-4, -3, -2, -1, 0, 1, 2, 3] * 4] * 32, scheme), scheme)
    assert found["qweight"][:, 0].contiguous().numpy().tobytes() == bytes([0x88, 0xC6, 0xFA] * 4)


def test_golden_bytes_8_bits():
    scheme = scheme_of(8)
    found = packed(GPTQ_V1, small([[-128, 127, 0, -1]] * 4, scheme), scheme)
    assert found["qweight"][:, 0].contiguous().numpy().tobytes() == bytes([0x00, 0xFF, 0x80, 0x7F])


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, [0x55555555], [0xAAAAAAAA]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x77777777], [0x88888888]),
        (8, [0x7F7F7F7F], [0x80808080]),
    ],
)
def test_golden_bytes_symmetric_zero_points(bits, v1, v2):
    """2^(b−1) − 1 in version 1, 2^(b−1) in version 2. 3 bits: 011 011 … and 100 100 …"""
    scheme = scheme_of(bits)
    rows = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    for exporter, words in ((GPTQ_V1, v1), (GPTQ_V2, v2)):
        found = packed(exporter, small([[0] * 32] * rows, scheme), scheme)["qzeros"]
        assert [word & 0xFFFFFFFF for word in found.flatten().tolist()] == words


def test_golden_bytes_asymmetric_zero_points_lie_along_n():
    scheme = scheme_of(4, symmetric=False)
    quantized = small([[0] * 8] * 8, scheme, zero_point=0)
    quantized.zero_point[:, 0] = torch.tensor([-7, -6, -5, -4, -3, -2, -1, 7])  # zeros 1..7 and 15
    assert packed(GPTQ_V1, quantized, scheme)["qzeros"].tolist() == [[0xE6543210 - (1 << 32)]]
    assert packed(GPTQ_V2, quantized, scheme)["qzeros"].tolist() == [[0xF7654321 - (1 << 32)]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_moves_a_zero_of_0_up_with_its_codes(bits):
    """The same weights, and the neighbours keep theirs: nothing is borrowed."""
    scheme, half = scheme_of(bits, symmetric=False), 1 << (bits - 1)
    rows = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    quantized = small([[-half, half - 2] * 16] * rows, scheme, zero_point=1 - half)
    quantized.zero_point[1] = -half
    found = packed(GPTQ_V1, quantized, scheme)
    moved = quantized.codes.clone()
    moved[1] += 1
    assert torch.equal(found["qweight"], packed(GPTQ_V2, small(moved.tolist(), scheme, 0), scheme)["qweight"])
    assert found["qzeros"].abs().sum() == 0  # zeros of 1, every one
    assert GPTQ_V1.inexact(quantized, scheme, torch.float16) is None


def test_v1_refuses_a_zero_of_0_beside_the_largest_code():
    scheme = scheme_of(4, symmetric=False)
    quantized = small([[-8, 7] * 4] * 8, scheme, zero_point=-8)
    assert "zero point of 0 and use the code 15" in (GPTQ_V1.inexact(quantized, scheme, torch.float16) or "")
    with pytest.raises(
        FormatError, match=r"l: 8 of its 8 groups have a zero point of 0.*GPTQ v1 cannot store"
    ) as error:
        packed(GPTQ_V1, quantized, scheme)
    assert "gptq_v2" in error.value.hint
    assert packed(GPTQ_V2, quantized, scheme)["qzeros"].tolist() == [[0]]


def test_only_v1_asymmetric_has_a_lowest_zero_point():
    assert GPTQ_V1.lowest_zero_point(scheme_of(4, symmetric=False)) == -7
    assert GPTQ_V1.lowest_zero_point(scheme_of(4)) is None
    assert GPTQ_V2.lowest_zero_point(scheme_of(4, symmetric=False)) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_v1_quantizes_to_zero_points_that_it_can_store(bits, dtype):
    """Groups without a negative weight, with barely one, of zeros alone, without a positive one."""
    scheme = scheme_of(bits, symmetric=False, group_size=32)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    weight[:32, :64] = weight[:32, :64].abs()
    weight[4, 10], weight[8:12], weight[12:16] = -1e-4, 0.0, -weight[12:16].abs()

    def rounded(exporter):
        grid = grid_for(scheme.weight, exporter.scale_format(scheme, dtype), exporter.lowest_zero_point(scheme))
        return round_to_nearest(weight, scheme.weight, grid, RangeSearch(), measure_range(weight))

    assert "cannot store" in (GPTQ_V1.inexact(rounded(GPTQ_V2), scheme, dtype) or "")
    assert GPTQ_V1.inexact(rounded(GPTQ_V1), scheme, dtype) is None
    found = packed(GPTQ_V1, rounded(GPTQ_V1), scheme)
    assert found["qzeros"].shape == (4, 64 * bits // 32)


@BOTH
def test_inexact_names_what_would_change(exporter):
    scheme = scheme_of(4, symmetric=False)
    good = small([[0] * 8] * 8, scheme, zero_point=0)
    assert exporter.inexact(good, scheme, torch.float16) is None
    assert "no float16" in (exporter.inexact(replace(good, scale=good.scale + 1e-6), scheme, torch.float16) or "")
    assert "no float16" in (exporter.inexact(replace(good, scale=good.scale * 1e6), scheme, torch.float16) or "")
    high = replace(good, zero_point=good.zero_point + 8)
    assert "16 does not fit 4 bits" in (exporter.inexact(high, scheme, torch.float16) or "")
    permuted = replace(good, g_idx=torch.zeros(8, dtype=torch.int32))
    assert "activation order" in (exporter.inexact(permuted, scheme, torch.float16) or "")


@BOTH
@pytest.mark.parametrize(
    "name", [name for name in SCHEMES if name not in ("W8A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16")]
)
def test_schemes_that_gptq_cannot_hold_are_refused(exporter, name):
    with pytest.raises(FormatError, match=name):
        exporter.storage_format(SCHEMES[name])


@BOTH
@pytest.mark.parametrize("bits", [5, 6, 7])
def test_planar_bits_are_refused(exporter, bits):
    with pytest.raises(FormatError, match="2, 3, 4 or 8 bits"):
        exporter.storage_format(scheme_of(bits))


@pytest.mark.parametrize(
    ("bits", "shape", "said"),
    [
        (4, (8, 100), "100 columns of 4-bit"),
        (4, (12, 96), "12 rows of 4-bit"),
        (3, (64, 80), "80 columns of 3-bit"),
        (3, (48, 96), "48 rows of 3-bit"),
        (8, (6, 96), "6 rows of 8-bit"),
    ],
)
def test_shapes_that_do_not_fill_words_are_unfit(bits, shape, said):
    assert said in (GPTQ_V1.unfit(shape, scheme_of(bits)) or "")


def test_groups_that_do_not_divide_the_row_are_unfit():
    assert "192 columns do not divide into groups of 128" in (GPTQ_V1.unfit((64, 192), SCHEMES["W4A16"]) or "")


def test_scales_are_float16_and_survive_a_cast_to_the_model_dtype():
    scheme = SCHEMES["W4A16"]
    assert GPTQ_V1.scale_format(scheme, torch.bfloat16) == "bfloat16_in_float16"
    assert GPTQ_V1.scale_format(scheme, torch.float16) == "float16"
    assert GPTQ_V1.scale_format(scheme, torch.float32) == "float16"


def linears(blocks: int, *leaves: str) -> list[str]:
    return [f"model.layers.{block}.{leaf}" for block in range(blocks) for leaf in leaves]


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def override_of(config: dict, module: str):
    """What vLLM's get_dynamic_override finds: False for "-:", else the overrides, None for no match."""
    for pattern, override in config.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            return False if pattern.startswith("-:") else override
    return None


def test_the_formats_are_found_by_name():
    assert find_exporter("gptq") is GPTQ_V1
    assert find_exporter("gptq_v2") is GPTQ_V2


@BOTH
def test_one_scheme_needs_no_overrides(exporter):
    schemes = dict.fromkeys(linears(12, *ATTENTION, *MLP), scheme_of(4, group_size=128))
    config = exporter.quantization_config(schemes, ["lm_head"])
    assert config.pop("meta")["quantizer"][0].startswith("lowbit:")
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False,
        "checkpoint_format": exporter.FORMAT, "pack_dtype": "int32",
    }  # fmt: skip


def test_quantize_config_json_says_the_same():
    schemes = dict.fromkeys(linears(1, *MLP), scheme_of(4))
    config = GPTQ_V2.quantization_config(schemes, ["lm_head"])
    assert GPTQ_V2.companion_files(schemes, ["lm_head"]) == {"quantize_config.json": config}
    assert config["group_size"] == -1


def test_other_schemes_are_overrides_of_exactly_their_linears():
    schemes = dict.fromkeys(linears(12, *ATTENTION, *MLP), scheme_of(4, group_size=128))
    different = [name for name in schemes if name.endswith("down_proj")]
    schemes |= dict.fromkeys(different, scheme_of(8, symmetric=False))
    config = GPTQ_V1.quantization_config(schemes, ["lm_head"])
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 128, True)
    assert len(config["dynamic"]) == 1
    for name in schemes:
        found = override_of(config, name)
        assert found == ({"bits": 8, "group_size": -1, "sym": False} if name in different else None), name
    assert override_of(config, "model.layers.1.mlp.down_proj_extra") is None
    assert override_of(config, "model.layers.13.mlp.down_proj") is None


def test_overrides_reach_the_fused_names_of_vllm():
    schemes = dict.fromkeys(linears(2, *ATTENTION, *MLP), scheme_of(4))
    schemes |= dict.fromkeys(linears(1, *ATTENTION[:3]), scheme_of(8))
    config = GPTQ_V1.quantization_config(schemes, [])
    assert override_of(config, "model.layers.0.self_attn.qkv_proj")["bits"] == 8
    assert override_of(config, "model.layers.1.self_attn.qkv_proj") is None
    assert override_of(config, "model.layers.0.mlp.gate_up_proj") is None


def test_overrides_reach_the_experts_of_vllm():
    experts = [f"model.layers.{b}.mlp.experts.{e}.{p}_proj" for b in (0, 1) for e in (0, 1) for p in ("gate", "down")]
    schemes = dict.fromkeys(linears(2, *ATTENTION), scheme_of(4)) | dict.fromkeys(experts, scheme_of(4))
    schemes |= {name: scheme_of(8) for name in experts if name.startswith("model.layers.1.")}
    config = GPTQ_V1.quantization_config(schemes, [])
    assert override_of(config, "model.layers.1.mlp.experts")["bits"] == 8
    assert override_of(config, "model.layers.0.mlp.experts") is None


def test_ignored_linears_of_blocks_are_said_for_every_loader():
    schemes = dict.fromkeys(linears(2, *ATTENTION, "mlp.gate_proj"), scheme_of(4))
    ignored = [*linears(2, "mlp.gate"), "lm_head"]
    config = GPTQ_V1.quantization_config(schemes, ignored)
    for name in ignored[:2]:
        assert override_of(config, name) is False
    for name in schemes:
        assert override_of(config, name) is None
    assert override_of(config, "lm_head") is None
    (parts,) = config["modules_in_block_to_quantize"]
    assert all(any(part in name for part in parts) for name in schemes)
    assert not any(any(part in name for part in parts) for name in ignored)


def test_the_same_linear_ignored_in_one_block_needs_whole_names():
    schemes = dict.fromkeys(linears(2, *MLP), scheme_of(4))
    del schemes["model.layers.0.mlp.down_proj"]
    config = GPTQ_V1.quantization_config(schemes, ["model.layers.0.mlp.down_proj"])
    assert config["modules_in_block_to_quantize"] == [list(schemes)]


def test_a_quantized_head_is_said():
    schemes = dict.fromkeys([*linears(1, *MLP), "lm_head"], scheme_of(4))
    assert GPTQ_V1.quantization_config(schemes, [])["lm_head"] is True
