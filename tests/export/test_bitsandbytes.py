"""bitsandbytes' layouts: planned is what is packed, golden bytes, slabs, and files that survive a read and a write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import FormatError
from lowbit.export import not_converted
from lowbit.export.safetensors_writer import SafetensorsWriter
from lowbit.formats.bitsandbytes import write as exporter
from lowbit.kernels.tables import CODEBOOKS
from lowbit.numerics import grid_for
from lowbit.numerics.scalar_grids import CodebookGrid
from lowbit.numerics.scales import decode_scales
from lowbit.rounding.rtn import TensorRange, measure_range, round_to_nearest
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import Granularity, NestedScale, QuantizedTensor, RangeSearch


def double(scheme: Scheme) -> Scheme:
    return replace(scheme, weight=replace(scheme.weight, scale_format="nested"))


NF4, FP4, INT8 = (SCHEMES[name] for name in ("NF4", "FP4", "INT8"))
WRITABLE = {"NF4": NF4, "FP4": FP4, "NF4-nested": double(NF4), "FP4-nested": double(FP4), "INT8": INT8}
EVERY = pytest.mark.parametrize("scheme", WRITABLE.values(), ids=WRITABLE)
DTYPE = torch.bfloat16


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(DTYPE)


def quantize(weight: torch.Tensor, scheme: Scheme, known: TensorRange | None = None) -> QuantizedTensor:
    grid = grid_for(scheme.weight, exporter.scale_format(scheme, DTYPE))
    return round_to_nearest(weight, scheme.weight, grid, RangeSearch(), known or measure_range(weight, scheme.weight))


def packed(quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype = DTYPE) -> dict[str, torch.Tensor]:
    pieces = exporter.pack("l", quantized, scheme, 0, quantized.shape, dtype)
    return {piece.name.removeprefix("l."): piece.values for piece in pieces}


def write(folder: Path, scheme: Scheme, quantized: QuantizedTensor, step: int | None = None) -> Path:
    """A folder with one linear, `l`, written in slabs of `step` rows."""
    folder.mkdir()
    shape = quantized.shape
    writer = SafetensorsWriter(folder, exporter.stored_tensors("l", shape, scheme, DTYPE), 10**9)
    for first in range(0, shape[0], step or shape[0]):
        slab = rows_of(quantized, first, first + (step or shape[0]))
        for piece in exporter.pack("l", slab, scheme, first, shape, DTYPE):
            writer.write(piece)
    writer.close()
    config = {"quantization_config": exporter.quantization_config({"l": scheme}, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows_of(quantized: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows of a whole tensor, cut at a multiple of `row_multiple`."""
    nested = quantized.nested
    if nested is not None:
        groups = nested.codes.shape[1]
        blocks = slice(start * groups // nested.block, -(-min(stop, quantized.shape[0]) * groups // nested.block))
        nested = replace(nested, codes=nested.codes[start:stop], absmax=nested.absmax[blocks])
    return replace(quantized, codes=quantized.codes[start:stop], scale=quantized.scale[start:stop], nested=nested)


@EVERY
@pytest.mark.parametrize("shape", [(160, 256), (33, 384), (1, 64), (300, 192)])
def test_pack_writes_exactly_what_was_planned(scheme, shape):
    pieces = exporter.pack("l", quantize(weights(shape), scheme), scheme, 0, shape, DTYPE)
    planned = exporter.stored_tensors("l", shape, scheme, DTYPE)
    assert {(piece.name, piece.values.dtype, tuple(piece.values.shape)) for piece in pieces} == {
        (stored.name, stored.dtype, stored.shape) for stored in planned
    }


@EVERY
@pytest.mark.parametrize("columns", [192, 256, 576])
def test_slabs_give_the_same_file_as_the_whole(tmp_path, scheme, columns):
    """Slabs are quantized by themselves, too."""
    shape = (600, columns)
    weight, step = weights(shape), 256 if columns != 256 else 64
    assert step % exporter.row_multiple(scheme, shape) == 0
    known = measure_range(weight, scheme.weight)
    whole = quantize(weight, scheme, known)
    one, many = (write(tmp_path / name, scheme, whole, by) for name, by in (("one", None), ("many", step)))
    assert (one / "model.safetensors").read_bytes() == (many / "model.safetensors").read_bytes()
    slab = quantize(weight[step : 2 * step], scheme, known)
    assert torch.equal(slab.codes, whole.codes[step : 2 * step])
    assert torch.equal(slab.scale, whole.scale[step : 2 * step])


@pytest.mark.parametrize(("columns", "multiple"), [(64, 256), (128, 128), (576, 256), (16384, 1), (1024, 16)])
def test_slabs_of_nested_scales_begin_with_a_block(columns, multiple):
    assert exporter.row_multiple(double(NF4), (512, columns)) == multiple
    assert exporter.row_multiple(NF4, (512, columns)) == exporter.row_multiple(INT8, (512, columns)) == 1


@EVERY
@pytest.mark.parametrize("shape", [(300, 192), (7, 64), (64, 1024)])
def test_read_and_written_again_it_is_the_same_file(tmp_path, scheme, shape):
    quantized = quantize(weights(shape), scheme)
    first = write(tmp_path / "first", scheme, quantized)
    checkpoint = open_checkpoint(first)
    assert checkpoint.schemes
    read = checkpoint.read_quantized("l.weight")
    assert torch.equal(read.codes, quantized.codes)
    assert torch.equal(read.scale, quantized.scale)
    assert torch.equal(read.decode(), quantized.decode())
    assert exporter.inexact(read, checkpoint.schemes["l.weight"], DTYPE) is None
    second = write(tmp_path / "second", checkpoint.schemes["l.weight"], read)
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_golden_bytes_nf4():
    """The even column is in the high nibble; codes 0..15 of two rows, −1 .. 1 and back."""
    codes = torch.arange(32, dtype=torch.uint8).reshape(1, 32) % 16
    quantized = QuantizedTensor(codes, torch.tensor([[0.5]]), CodebookGrid(CODEBOOKS["nf4"]), Granularity.GROUP, 32)
    scheme = replace(NF4, weight=replace(NF4.weight, group_size=32))
    tensors = packed(quantized, scheme)
    assert tensors["weight"].shape == (16, 1)
    assert tensors["weight"].numpy().tobytes() == bytes.fromhex("0123456789abcdef" * 2)
    assert tensors["weight.absmax"].numpy().tobytes() == bytes.fromhex("0000003f")
    assert tensors["weight.quant_map"].numpy().tobytes()[:8] == bytes.fromhex("000080bf" + "b13932bf")
    assert tensors["weight.quant_state.bitsandbytes__nf4"].numpy().tobytes() == (
        b'{"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [1, 32]}'
    )


def test_golden_bytes_nested():
    codes = torch.full((1, 64), 7, dtype=torch.uint8)
    nested = NestedScale(torch.tensor([[255]], dtype=torch.uint8), torch.tensor([0.25]), 0.75)
    grid = CodebookGrid(CODEBOOKS["fp4"], "nested")
    quantized = QuantizedTensor(codes, decode_scales(nested), grid, Granularity.GROUP, 64, nested=nested)
    tensors = packed(quantized, double(FP4), torch.float16)
    assert quantized.scale.tolist() == [[1.0]]
    assert tensors["weight"].numpy().tobytes() == b"\x77" * 32
    assert tensors["weight.absmax"].tolist() == [255]
    assert tensors["weight.nested_absmax"].tolist() == [0.25]
    assert tensors["weight.nested_quant_map"].shape == (256,)
    state = tensors["weight.quant_state.bitsandbytes__fp4"].numpy().tobytes()
    assert state.rstrip(b" ") == (
        b'{"quant_type": "fp4", "blocksize": 64, "dtype": "float16", "shape": [1, 64], "nested_blocksize": 256, '
        b'"nested_dtype": "float32", "nested_offset": 0.75}'
    )


def test_golden_bytes_int8():
    grid = grid_for(INT8.weight, "float32_over_127")
    codes = torch.tensor([[-127, 0, 1, 127]], dtype=torch.int8)
    tensors = packed(QuantizedTensor(codes, torch.tensor([[2.0]]), grid, Granularity.CHANNEL, 4), INT8)
    assert tensors["weight"].numpy().tobytes() == bytes([0x81, 0x00, 0x01, 0x7F])
    assert tensors["SCB"].tolist() == [254.0]
    assert tensors["weight_format"].tolist() == 0


@pytest.mark.parametrize("offset", [0.0, 1 / 3, -1.1754943508222875e-38, 3.4e38, 12345.678])
def test_the_length_of_the_state_does_not_depend_on_the_offset(offset):
    offset = torch.tensor(offset, dtype=torch.float32).item()
    state = exporter.quant_state(double(NF4), (64, 64), DTYPE, offset)
    assert len(state) == len(exporter.quant_state(double(NF4), (64, 64), DTYPE, 0.0))
    assert json.loads(state)["nested_offset"] == offset


@pytest.mark.parametrize("scheme", [SCHEMES[name] for name in SCHEMES if name not in ("NF4", "FP4", "INT8")])
def test_other_schemes_are_refused_by_name(scheme):
    with pytest.raises(FormatError, match=rf"\({scheme.name}\)"):
        exporter.storage_format(scheme)


def test_another_block_size_is_refused_unless_bitsandbytes_has_it():
    assert exporter.storage_format(replace(NF4, weight=replace(NF4.weight, group_size=4096))) == "nf4"
    with pytest.raises(FormatError, match="groups of 48"):
        exporter.storage_format(replace(NF4, weight=replace(NF4.weight, group_size=48)))


def test_blocks_that_would_cross_rows_are_unfit():
    assert "in_features 96 is not a multiple of 64" in (exporter.unfit((128, 96), NF4) or "")
    assert exporter.unfit((128, 128), NF4) is None
    assert exporter.unfit((128, 96), INT8) is None


def test_one_scheme_per_model():
    with pytest.raises(FormatError, match=r"2 \(INT8, NF4\)"):
        exporter.quantization_config({"a": NF4, "b": INT8}, [])


@EVERY
def test_config_says_what_the_weights_are(scheme):
    config = exporter.quantization_config({"model.a": scheme}, ["lm_head", "model.b"])
    assert config["load_in_8bit"] is (scheme is INT8)
    assert config["load_in_4bit"] is (scheme is not INT8)
    assert config["bnb_4bit_use_double_quant"] is (scheme.weight.scale_format == "nested")
    assert config["llm_int8_skip_modules"] == ["lm_head", "model.b"]
    if scheme is not INT8:
        assert config["bnb_4bit_quant_type"] == scheme.weight.number


def test_a_tied_head_is_skipped_though_nothing_lists_it():
    assert not_converted(["model.layers.0.q_proj"], []) == ["lm_head"]
    assert not_converted(["model.layers.0.q_proj", "lm_head"], []) == []


def test_skip_entries_never_catch_a_quantized_linear():
    """transformers compares ends of names too: "proj" would leave out q_proj; so would "a.1" leave out "a.1.b"."""
    assert not_converted(["model.q_proj", "a.1.b"], ["proj", "a.1"]) == ["^proj$", r"^a\.1$", "lm_head"]


@pytest.mark.interop
def test_transformers_skips_the_ignored_linears_and_no_other():
    quantizers_utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    quantized = [f"model.layers.{i}.{name}" for i in range(12) for name in ("q_proj", "mlp.gate_proj", "mlp.up_proj")]
    ignored = ["lm_head", "proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate", "layers", "head.proj"]
    entries = not_converted(quantized, ignored)
    assert [name for name in quantized if not quantizers_utils.should_convert_module(name, entries)] == []
    assert [name for name in ignored if quantizers_utils.should_convert_module(name, entries)] == []


@pytest.mark.interop
@EVERY
def test_transformers_reads_our_config_as_its_own(scheme):
    config_class = pytest.importorskip("transformers").BitsAndBytesConfig
    ours = exporter.quantization_config({"a": scheme}, ["lm_head"])
    theirs = config_class.from_dict(dict(ours)).to_dict()
    assert {key: str(getattr(value, "value", value)) for key, value in theirs.items()} == {
        key: str(value) for key, value in ours.items()
    }


def test_what_would_not_survive_is_named():
    quantized = quantize(weights((4, 128)), NF4)
    assert exporter.inexact(quantized, NF4, DTYPE) is None
    assert "activation order" in str(exporter.inexact(replace(quantized, g_idx=torch.zeros(128)), NF4, DTYPE))
    assert "groups are of 1 columns" in str(exporter.inexact(replace(quantized, group_size=1), NF4, DTYPE))
    assert "not double-quantized" in str(exporter.inexact(quantized, double(NF4), DTYPE))
    nested = quantize(weights((4, 128)), double(NF4))
    assert exporter.inexact(nested, double(NF4), DTYPE) is None
    assert exporter.inexact(nested, NF4, DTYPE) is None
    assert nested.nested is not None
    other = replace(nested, nested=replace(nested.nested, block=64))
    assert "blocks of 64" in str(exporter.inexact(other, double(NF4), DTYPE))


def test_scales_that_int8_cannot_hold_are_named_and_never_made():
    """SCB is 127 times the scale: not every float32 survives the product and the quotient."""
    scale = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)) + 1.0
    lost = scale * 127.0 / 127.0 != scale
    assert 0 < lost.sum() < 2000
    codes = torch.zeros(100_000, 1, dtype=torch.int8)
    quantized = QuantizedTensor(codes, scale, grid_for(INT8.weight, "float32"), Granularity.CHANNEL, 1)
    assert "127th" in str(exporter.inexact(quantized, INT8, DTYPE))
    assert exporter.inexact(replace(quantized, scale=scale[~lost][:, None]), INT8, DTYPE) is None
    ours = quantize(weights((20_000, 8)), INT8)
    assert exporter.inexact(ours, INT8, DTYPE) is None
    with_least = replace(ours, codes=torch.full_like(ours.codes, -128))
    assert "-128" in str(exporter.inexact(with_least, INT8, DTYPE))
