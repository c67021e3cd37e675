"""What the exporter says it will write is what it writes, and golden bytes of every layout."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats.compressed_tensors import write as exporter
from lowbit.kernels.tables import MINIFLOATS
from lowbit.numerics import grid_for
from lowbit.numerics.scalar_grids import IntGrid, MinifloatGrid
from lowbit.rounding.rtn import measure_range, round_to_nearest
from lowbit.schemes import SCHEMES, Scheme, WeightSpec
from lowbit.tensors import Granularity, InputRange, QuantizedTensor, RangeSearch

HELD = {name: scheme for name, scheme in SCHEMES.items() if not scheme.weight.is_fitted
        and name not in ("NF4", "FP4", "INT8", "W4AFP8_STATIC", "TERNARY")}  # fmt: skip


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    grid = grid_for(scheme.weight, "bfloat16")
    return round_to_nearest(weight, scheme.weight, grid, RangeSearch(), measure_range(weight))


@pytest.mark.parametrize("scheme", HELD.values(), ids=HELD)
@pytest.mark.parametrize("shape", [(160, 256), (96, 128), (33, 384)])
def test_pack_writes_exactly_what_was_planned(scheme, shape):
    weight = torch.randn(shape) * 0.05
    packed = exporter.pack("l", quantize(weight, scheme), scheme, 0, shape, torch.bfloat16, InputRange.within(2.0))
    planned = exporter.stored_tensors("l", shape, scheme, torch.bfloat16)
    assert {(piece.name, piece.values.dtype, tuple(piece.values.shape)) for piece in packed} == {
        (stored.name, stored.dtype, stored.shape) for stored in planned
    }


@pytest.mark.parametrize("scheme", HELD.values(), ids=HELD)
def test_slabs_give_the_same_bytes_as_the_whole(scheme):
    shape, step = (320, 256), max(64, exporter.row_multiple(scheme, (320, 256)))
    weight = torch.randn(shape) * 0.05
    whole = {piece.name: piece.values for piece in exporter.pack(
        "l", quantize(weight, scheme), scheme, 0, shape, torch.bfloat16, InputRange.within(2.0))}  # fmt: skip
    pieces = {name: torch.zeros_like(values) for name, values in whole.items()}
    grid = grid_for(scheme.weight, "bfloat16")
    for first in range(0, 320, step):
        slab = weight[first : first + step]
        quantized = round_to_nearest(slab, scheme.weight, grid, RangeSearch(), measure_range(weight))
        for piece in exporter.pack("l", quantized, scheme, first, shape, torch.bfloat16, InputRange.within(2.0)):
            pieces[piece.name][piece.row : piece.row + piece.values.shape[0]] = piece.values
    for name, values in whole.items():
        assert torch.equal(pieces[name].reshape(-1).view(torch.uint8), values.reshape(-1).view(torch.uint8)), name


def tensor(codes: list, grid, granularity=Granularity.GROUP, group_size=8, scale=0.5, zero_point=None, **more):
    codes = torch.tensor(codes)
    codes = codes.to(torch.int8 if isinstance(grid, IntGrid) else torch.uint8)
    scales = torch.full((codes.shape[0], 1), scale)
    return QuantizedTensor(codes, scales, grid, granularity, group_size, zero_point, **more)


def spec(number, bits, **more) -> Scheme:
    return Scheme("test", WeightSpec(number, bits, Granularity.GROUP, 8, **more), None, "")


def pack(quantized: QuantizedTensor, scheme: Scheme) -> dict:
    return {
        piece.name: piece.values for piece in exporter.pack("l", quantized, scheme, 0, quantized.shape, torch.bfloat16)
    }


def test_golden_bytes_int4():
    """code + 8, element 0 in the lowest nibble: -8 → 0, 7 → 15."""
    packed = pack(tensor([[-8, -7, -6, -5, 4, 5, 6, 7]], IntGrid(4)), spec("int", 4))
    assert packed["l.weight_packed"].numpy().tobytes() == bytes([0x10, 0x32, 0xDC, 0xFE])
    assert packed["l.weight_scale"].view(torch.uint8).numpy().tobytes() == bytes([0x00, 0x3F])
    assert packed["l.weight_shape"].tolist() == [1, 8]


def test_golden_bytes_int3_cross_byte_boundaries():
    """code + 4 = 0..7 in a dense bitstream: 000 001 010 011 100 101 110 111, low bits first."""
    packed = pack(tensor([[-4, -3, -2, -1, 0, 1, 2, 3]], IntGrid(3)), spec("int", 3))
    assert packed["l.weight_packed"].numpy().tobytes() == bytes([0x88, 0xC6, 0xFA, 0x00])


def test_golden_bytes_zero_points_are_packed_along_rows():
    zero_point = torch.tensor([[-8], [7], [0]], dtype=torch.int32)
    quantized = tensor([[0] * 8] * 3, IntGrid(4, False), zero_point=zero_point)
    packed = pack(quantized, spec("int", 4, symmetric=False))
    assert packed["l.weight_zero_point"].tolist() == [[0x0 | 0xF << 4 | 0x8 << 8]]


def test_golden_bytes_nvfp4():
    """Codes 0..7 are 0 .5 1 1.5 2 3 4 6, bit 3 the sign; scale 0.5 = 2 · 2^-2, stored as E4M3 2.0 and divisor 4."""
    grid = MinifloatGrid(MINIFLOATS["e2m1"], "e4m3")
    quantized = tensor([[1, 2, 3, 4, 5, 6, 7, 15]], grid, global_scale=0.25)
    packed = pack(quantized, spec("e2m1", 4, scale_format="e4m3"))
    assert packed["l.weight_packed"].numpy().tobytes() == bytes([0x21, 0x43, 0x65, 0xF7])
    assert packed["l.weight_scale"].view(torch.uint8).numpy().tobytes() == bytes([0x40])
    assert packed["l.weight_global_scale"].tolist() == [4.0]


def test_golden_bytes_mxfp4_scale_is_a_biased_exponent():
    grid = MinifloatGrid(MINIFLOATS["e2m1"], "e8m0")
    packed = pack(tensor([[0] * 8], grid), spec("e2m1", 4, scale_format="e8m0"))
    assert packed["l.weight_scale"].tolist() == [[126]]


@pytest.mark.parametrize(("name", "largest_code"), [("W8A8_STATIC", 127.0), ("FP8", 448.0)])
def test_static_scales_are_the_range_over_the_largest_code(name, largest_code):
    scheme = SCHEMES[name]
    quantized = quantize(torch.randn(32, 64), scheme)
    packed = exporter.pack("l", quantized, scheme, 0, (32, 64), torch.float32, InputRange.within(3.5))
    assert {piece.name: piece.values for piece in packed}["l.input_scale"].tolist() == pytest.approx(
        [3.5 / largest_code]
    )
    activations = exporter.quantization_config({"l": scheme}, [])["config_groups"]["group_0"]["input_activations"]
    assert (activations["strategy"], activations["dynamic"], activations["symmetric"]) == ("tensor", False, True)


def test_static_zero_points_stand_for_0_with_the_scale_as_it_is_stored():
    """The range −1 … 2 on 255 steps: scale 3 / 255, 0 is the code −128 + 85 = −43; in bfloat16 too."""
    scheme = SCHEMES["W8A8_STATIC_ASYM"]
    quantized = quantize(torch.randn(32, 64), scheme)
    for dtype in (torch.float32, torch.bfloat16):
        packed = exporter.pack("l", quantized, scheme, 0, (32, 64), dtype, InputRange(-1.0, 2.0))
        values = {piece.name: piece.values for piece in packed}
        assert values["l.input_scale"].float().item() == pytest.approx(3 / 255, rel=0.004)
        assert values["l.input_zero_point"].tolist() == [round(-128 + 1 / values["l.input_scale"].float().item())]
    activations = exporter.quantization_config({"l": scheme}, [])["config_groups"]["group_0"]["input_activations"]
    assert (activations["strategy"], activations["dynamic"], activations["symmetric"]) == ("tensor", False, False)


@pytest.mark.parametrize(("low", "high", "zero_point"), [(0.0, 1.0, -128), (-1.0, 0.0, 127), (-1.0, 1.0, 0)])
def test_a_zero_point_is_a_code(low, high, zero_point):
    assert InputRange(low, high).affine(8)[1] == zero_point


def test_e5m2_is_refused():
    with pytest.raises(FormatError, match="e5m2"):
        exporter.storage_format(spec("e5m2", 8))


def test_one_scheme_targets_the_class_and_several_name_their_linears():
    four, eight = SCHEMES["W4A16"], SCHEMES["W8A16"]
    one = exporter.quantization_config({"a": four, "b": four}, ["lm_head"])
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert one["ignore"] == ["lm_head"]
    two = exporter.quantization_config({"a": four, "b": eight}, [])
    assert [group["targets"] for group in two["config_groups"].values()] == [["a"], ["b"]]
    assert two["format"] == "pack-quantized"


@pytest.mark.interop
@pytest.mark.parametrize("scheme", HELD.values(), ids=HELD)
def test_compressed_tensors_accepts_our_config_and_says_it_as_it_would(scheme):
    """Parsed by their models (extra keys are forbidden) and inferred by their own rules, the format is the same."""
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig

    config = exporter.quantization_config({"a": scheme}, ["lm_head"])
    for key in ("sparsity_config", "transform_config", "version"):
        config.pop(key)
    parsed = QuantizationConfig.model_validate(config)
    group = parsed.config_groups["group_0"]
    assert CompressionFormat(group.format).value == exporter.storage_format(scheme)


def test_static_fp8_over_integers_is_refused_by_name():
    with pytest.raises(FormatError, match="static FP8 activations over integers") as caught:
        exporter.storage_format(SCHEMES["W4AFP8_STATIC"])
    assert "--format modelopt" in caught.value.hint
