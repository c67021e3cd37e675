"""ModelOpt's layouts: planned is what is packed, golden bytes, slabs, and files that survive a read and a write."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import FormatError
from lowbit.export.safetensors_writer import SafetensorsWriter
from lowbit.formats.float import write as plain
from lowbit.formats.modelopt import write as exporter
from lowbit.numerics import grid_for
from lowbit.rounding.rtn import measure_range, round_to_nearest
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import Granularity, InputRange, QuantizedTensor, RangeSearch

WRITABLE = {scheme.name: scheme for scheme in exporter.ALGORITHMS.values()}  # W8A16 with a scale per row
EVERY = pytest.mark.parametrize("scheme", WRITABLE.values(), ids=WRITABLE)
DTYPE = torch.bfloat16
ABSMAX = 21.0


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(DTYPE)


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    grid = grid_for(scheme.weight, exporter.scale_format(scheme, DTYPE))
    return round_to_nearest(weight, scheme.weight, grid, RangeSearch(), measure_range(weight, scheme.weight))


def fitting(shape: tuple[int, int], scheme: Scheme) -> tuple[int, int]:
    """With an even number of rows where a byte holds two."""
    odd = exporter.row_multiple(scheme, shape) == 2 and shape[0] % 2
    return (shape[0] + bool(odd), shape[1])


def packed(quantized: QuantizedTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    pieces = exporter.pack("l", quantized, scheme, 0, quantized.shape, DTYPE, InputRange.within(ABSMAX))
    return {piece.name.removeprefix("l."): piece.values for piece in pieces}


def rows_of(quantized: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    block = quantized.group_size
    scale = {
        Granularity.TENSOR: lambda: quantized.scale,
        Granularity.BLOCK: lambda: quantized.scale[start // block : -(-stop // block)],
    }.get(quantized.granularity, lambda: quantized.scale[start:stop])()
    return replace(quantized, codes=quantized.codes[start:stop], scale=scale)


def write(folder: Path, scheme: Scheme, quantized: QuantizedTensor, step: int | None = None) -> Path:
    """A folder with one linear, `l`, written in slabs of `step` rows."""
    folder.mkdir()
    shape = quantized.shape
    writer = SafetensorsWriter(folder, exporter.stored_tensors("l", shape, scheme, DTYPE), 10**9)
    for first in range(0, shape[0], step or shape[0]):
        slab = rows_of(quantized, first, first + (step or shape[0]))
        for piece in exporter.pack("l", slab, scheme, first, shape, DTYPE, InputRange.within(ABSMAX)):
            writer.write(piece)
    writer.close()
    schemes = {"l": scheme}
    config = {"quantization_config": exporter.quantization_config(schemes, [])}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in exporter.companion_files(schemes, []).items():
        (folder / name).write_text(json.dumps(content))
    return folder


@EVERY
@pytest.mark.parametrize("shape", [(256, 256), (33, 384), (1, 128), (300, 128)])
def test_pack_writes_exactly_what_was_planned(scheme, shape):
    shape = fitting(shape, scheme)
    pieces = exporter.pack("l", quantize(weights(shape), scheme), scheme, 0, shape, DTYPE, InputRange.within(ABSMAX))
    planned = exporter.stored_tensors("l", shape, scheme, DTYPE)
    assert {(piece.name, piece.values.dtype, tuple(piece.values.shape)) for piece in pieces} == {
        (stored.name, stored.dtype, stored.shape) for stored in planned
    }


@EVERY
def test_slabs_give_the_same_file_as_the_whole(tmp_path, scheme):
    quantized = quantize(weights((300, 256)), scheme)
    assert 128 % exporter.row_multiple(scheme, (300, 256)) == 0
    one, many = (write(tmp_path / name, scheme, quantized, by) for name, by in (("one", None), ("many", 128)))
    assert (one / "model.safetensors").read_bytes() == (many / "model.safetensors").read_bytes()


@EVERY
@pytest.mark.parametrize("shape", [(300, 128), (7, 256)])
def test_read_and_written_again_it_is_the_same_file(tmp_path, scheme, shape):
    quantized = quantize(weights(fitting(shape, scheme)), scheme)
    first = write(tmp_path / "first", scheme, quantized)
    checkpoint = open_checkpoint(first)
    assert checkpoint.schemes
    read, read_scheme = checkpoint.read_quantized("l.weight"), checkpoint.schemes["l.weight"]
    assert read_scheme == scheme
    assert torch.equal(read.codes, quantized.codes)
    assert torch.equal(read.scale, quantized.scale)
    assert torch.equal(read.decode(), quantized.decode())
    assert exporter.inexact(read, read_scheme, DTYPE) is None
    largest_code = {"FP8": 448.0, "W4AFP8_STATIC": 448.0, "NVFP4": 448.0 * 6.0, "W8A8_STATIC": 127.0}
    expected = {"l.weight": ABSMAX / largest_code[scheme.name]} if scheme.name in largest_code else {}
    assert checkpoint.input_scales == pytest.approx(expected, rel=1e-7)
    second = write(tmp_path / "second", read_scheme, read)
    for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@EVERY
def test_hf_quant_config_alone_says_the_same(tmp_path, scheme):
    quantized = quantize(weights((32, 128)), scheme)
    folder = write(tmp_path / "model", scheme, quantized)
    (folder / "config.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.schemes
    assert checkpoint.schemes["l.weight"] == scheme
    assert torch.equal(checkpoint.read("l.weight"), quantized.decode())


def test_golden_bytes_nvfp4():
    """1, −6, 0.5, 0 … in groups of 16 with scales 2 and 0.5, the second level 0.25; the even column is low."""
    codes = torch.tensor([[2, 15, 1, 0] * 4 + [7, 8, 3, 4] * 4], dtype=torch.uint8)
    grid = grid_for(SCHEMES["NVFP4"].weight, "float32")
    scale = torch.tensor([[0.5, 0.125]])
    quantized = QuantizedTensor(codes, scale, grid, Granularity.GROUP, 16, global_scale=0.25)
    tensors = packed(quantized, SCHEMES["NVFP4"])
    assert tensors["weight"].numpy().tobytes().hex() == "f201" * 4 + "8743" * 4
    assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x40, 0x30]]  # E4M3: 2.0 and 0.5
    assert tensors["weight_scale_2"].numpy().tobytes().hex() == "0000803e"
    assert tensors["weight_scale_2"].shape == tensors["input_scale"].shape == ()
    assert tensors["input_scale"].item() == ABSMAX / 2688.0
    assert "input_scale" not in packed(quantized, SCHEMES["NVFP4A16"])


def test_golden_bytes_fp8():
    codes = torch.tensor([[0x38, 0xB8, 0x7E, 0x01]], dtype=torch.uint8)
    grid = grid_for(SCHEMES["FP8"].weight, "float32")
    tensors = packed(QuantizedTensor(codes, torch.tensor([[0.75]]), grid, Granularity.TENSOR, 4), SCHEMES["FP8"])
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    assert tensors["weight"].view(torch.uint8).numpy().tobytes().hex() == "38b87e01"
    assert tensors["weight"].float().tolist() == [[1.0, -1.0, 448.0, 2.0**-9]]
    assert tensors["weight_scale"].numpy().tobytes().hex() == "0000403f"
    assert tensors["weight_scale"].shape == ()
    assert tensors["input_scale"].item() == ABSMAX / 448.0


def test_golden_bytes_mxfp8():
    codes = torch.full((1, 32), 0x38, dtype=torch.uint8)
    grid = grid_for(SCHEMES["MXFP8"].weight, "float32")
    tensors = packed(QuantizedTensor(codes, torch.tensor([[0.125]]), grid, Granularity.GROUP, 32), SCHEMES["MXFP8"])
    assert tensors["weight_scale"].tolist() == [[124]]
    assert tensors["weight_scale"].dtype == torch.uint8


def test_golden_bytes_of_packed_integers():
    """Row 2i is the low nibble, row 2i + 1 the high one: 1 over −8, −1 over 7 …; the scales are numbers of bfloat16."""
    codes = torch.tensor([[1, -1, 0, 7], [-8, 7, 3, -2]], dtype=torch.int8)
    scheme = SCHEMES["W4A16"].with_group_size(2)
    grid = grid_for(scheme.weight, "bfloat16")
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    tensors = packed(QuantizedTensor(codes, scale, grid, Granularity.GROUP, 2), scheme)
    assert tensors["weight"].numpy().tobytes().hex() == "817f30e7"
    assert tensors["weight"].shape == (1, 4)
    assert tensors["weight_scale"].dtype == tensors["pre_quant_scale"].dtype == DTYPE
    assert tensors["weight_scale"].float().tolist() == scale.tolist()
    assert tensors["pre_quant_scale"].tolist() == [1.0] * 4
    assert set(tensors) == {"weight", "weight_scale", "pre_quant_scale"}


def test_golden_bytes_of_w4a8():
    scheme = SCHEMES["W4AFP8_STATIC"].with_group_size(2)
    grid = grid_for(scheme.weight, "float16")
    codes = torch.tensor([[1, -1], [2, -2]], dtype=torch.int8)
    quantized = QuantizedTensor(codes, torch.tensor([[0.5], [1.0]]), grid, Granularity.GROUP, 2, global_scale=0.125)
    tensors = packed(quantized, scheme)
    assert tensors["weight"].numpy().tobytes().hex() == "21ef"
    assert tensors["weight_scale"].dtype == torch.float16
    assert tensors["weight_scale_2"].numpy().tobytes().hex() == "0000003e"
    assert tensors["input_scale"].item() == ABSMAX / 448.0
    assert tensors["pre_quant_scale"].dtype == DTYPE


def test_the_range_of_w4a8_brings_every_weight_within_fp8():
    scheme = SCHEMES["W4AFP8_STATIC"]
    for seed in range(4):
        quantized = quantize(weights((64, 256), seed) * 10.0**seed, scheme)
        largest = quantized.decode().abs().max().item()
        assert largest / quantized.global_scale <= 448.0
        assert largest / quantized.global_scale > 100.0  # a power of two away from it, or less
        assert torch.equal(torch.tensor(quantized.global_scale).log2() % 1, torch.tensor(0.0))


def test_golden_bytes_of_smoothquant():
    scheme = SCHEMES["W8A8_STATIC"]
    grid = grid_for(scheme.weight, "float32")
    codes = torch.tensor([[1, -1, 127, -128]], dtype=torch.int8)
    tensors = packed(QuantizedTensor(codes, torch.tensor([[0.75]]), grid, Granularity.CHANNEL, 4), scheme)
    assert tensors["weight"].dtype == torch.int8
    assert tensors["weight"].numpy().tobytes().hex() == "01ff7f80"
    assert tensors["weight_scale"].numpy().tobytes().hex() == "0000403f"
    assert tensors["weight_scale"].shape == (1,)
    assert tensors["input_scale"].item() == pytest.approx(ABSMAX / 127.0)
    dynamic = packed(QuantizedTensor(codes, torch.tensor([[0.75]]), grid, Granularity.CHANNEL, 4), SCHEMES["W8A8"])
    assert set(dynamic) == {"weight", "weight_scale"}


def test_an_odd_row_has_no_byte():
    assert "odd" in (exporter.unfit((63, 256), SCHEMES["W4A16"]) or "")
    assert exporter.unfit((63, 256), SCHEMES["W8A8"]) is None


def test_scales_that_the_models_dtype_rounds_are_named():
    """The loader casts them: what the file holds would not be what runs."""
    scheme = SCHEMES["W4A16"]
    quantized = quantize(weights((4, 128)), scheme)
    assert exporter.inexact(quantized, scheme, DTYPE) is None
    fine = replace(quantized, scale=quantized.scale * (1 + 2.0**-10))
    assert "no bfloat16 number" in str(exporter.inexact(fine, scheme, DTYPE))
    assert "no bfloat16 number" in str(exporter.inexact(fine, scheme, torch.float32))


def test_only_tensorrt_llm_knows_awq_and_int8():
    assert exporter.engine_of({"a": SCHEMES["FP8"], "b": SCHEMES["NVFP4"]}) is None
    for name in ("W4A16", "W4AFP8_STATIC", "W8A8", "W8A8_STATIC"):
        assert exporter.engine_of({"a": SCHEMES["FP8"], "b": SCHEMES[name]}) == "tensorrt-llm"


def test_block_scales_have_four_dimensions():
    """[⌈N/128⌉, 1, K/128, 1], as ModelOpt's quantizer keeps them and vLLM declares them."""
    tensors = packed(quantize(weights((200, 384)), SCHEMES["FP8_BLOCK"]), SCHEMES["FP8_BLOCK"])
    assert tensors["weight_scale"].shape == (2, 1, 3, 1)
    assert tensors["weight_scale"].dtype == torch.float32


@pytest.mark.parametrize("scheme", [scheme for name, scheme in SCHEMES.items() if name not in WRITABLE])
def test_other_schemes_are_refused_by_name(scheme):
    with pytest.raises(FormatError, match=f"cannot hold {scheme.name};"):
        exporter.storage_format(scheme)


@pytest.mark.parametrize(("name", "columns"), [("NVFP4", 24), ("MXFP8", 80), ("FP8_BLOCK", 192)])
def test_rows_that_groups_do_not_divide_are_unfit(name, columns):
    assert str(columns) in (exporter.unfit((64, columns), SCHEMES[name]) or "")
    assert exporter.unfit((63, 256), SCHEMES[name]) is None


def test_a_global_scale_that_float32_rounds_is_named():
    """compressed-tensors stores the divisor; float32 has no exact reciprocal of 3000."""
    scheme = SCHEMES["NVFP4A16"]
    stored = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[None]
    divisor = torch.tensor(3000.0, dtype=torch.float32)
    codes = torch.zeros((1, 126 * 16), dtype=torch.uint8)
    grid = grid_for(scheme.weight, "float32")
    quantized = QuantizedTensor(codes, stored / divisor, grid, Granularity.GROUP, 16, global_scale=1 / divisor.item())
    assert "multiplies its E4M3 scales" in str(exporter.inexact(quantized, scheme, DTYPE))
    powers = replace(quantized, scale=stored / 2048.0, global_scale=1 / 2048.0)
    assert exporter.inexact(powers, scheme, DTYPE) is None


def test_what_else_would_not_survive_is_named():
    quantized = quantize(weights((4, 128)), SCHEMES["MXFP8"])
    assert exporter.inexact(quantized, SCHEMES["MXFP8"], DTYPE) is None
    permuted = replace(quantized, g_idx=torch.zeros(128, dtype=torch.int32))
    assert "activation order" in str(exporter.inexact(permuted, SCHEMES["MXFP8"], DTYPE))
    odd = replace(quantized, scale=quantized.scale * 1.5)
    assert "power of two" in str(exporter.inexact(odd, SCHEMES["MXFP8"], DTYPE))
    assert exporter.inexact(quantize(weights((4, 128)), SCHEMES["FP8"]), SCHEMES["FP8"], DTYPE) is None


def test_companion_has_the_keys_that_vllm_requires():
    schemes = {"model.layers.0.mlp.up_proj": SCHEMES["NVFP4"]}
    [(name, content)] = exporter.companion_files(schemes, ["lm_head"]).items()
    assert name == "hf_quant_config.json"
    assert content["producer"]["name"] == "modelopt"
    assert content["quantization"] == {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"],
    }  # fmt: skip


def test_several_schemes_are_listed_layer_by_layer(tmp_path):
    """…and the lists of exceptions are gone: what is not listed is not quantized."""
    schemes = {"a.q_proj": SCHEMES["FP8"], "a.up_proj": SCHEMES["NVFP4"], "a.down_proj": SCHEMES["FP8_BLOCK"]}
    config = exporter.quantization_config(schemes, ["lm_head", "a.gate"])
    layers = {
        "a.q_proj": {"quant_algo": "FP8"},
        "a.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "a.down_proj": {"quant_algo": "fp8_pb_wo"},
    }
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == layers
    assert config["ignore"] == []
    assert exporter.hf_quant_config(schemes, [])["quantization"]["quantized_layers"] == layers


def test_excluded_names_never_catch_a_quantized_linear():
    """vLLM takes an entry for a substring as well, and knows gate_proj and up_proj as gate_up_proj."""
    quantized = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.shared.gate_proj"]
    ignored = ["model.layers.0.mlp.gate", "model.layers.0.mlp.shared", "model.layers.1.mlp.up_proj"]
    entries = exporter.exclude_modules(quantized, ignored)
    known = [*quantized, "model.layers.0.mlp.gate_up_proj", "model.layers.11.mlp.gate_up_proj"]
    assert [name for name in known if any(entry in name or fnmatch(name, entry) for entry in entries)] == []
    assert [name for name in ignored if not any(fnmatch(name, entry) for entry in entries)] == []
    assert "lm_head" in entries
    assert "lm_head" not in exporter.exclude_modules(["lm_head"], [])


def test_plain_weights_are_decoded_and_cast():
    scheme = SCHEMES["NVFP4A16"]
    quantized = quantize(weights((40, 64)), scheme)
    pieces = plain.pack("l", quantized, scheme, 8, (48, 64), DTYPE)
    assert [(piece.name, piece.row, piece.values.dtype) for piece in pieces] == [("l.weight", 8, DTYPE)]
    assert torch.equal(pieces[0].values, quantized.decode().to(DTYPE))
    [stored] = plain.stored_tensors("l", (48, 64), scheme, DTYPE)
    assert (stored.name, stored.dtype, stored.shape) == ("l.weight", DTYPE, (48, 64))
    assert plain.quantization_config({"l": scheme}, []) == plain.companion_files({"l": scheme}, []) == {}


def test_a_cast_that_loses_bits_says_so():
    grid = grid_for(SCHEMES["W8A8"].weight, "float32")
    codes = torch.tensor([[1, 127, -128, 0]], dtype=torch.int8)
    fits = QuantizedTensor(codes, torch.tensor([[0.5]]), grid, Granularity.CHANNEL, 4)
    assert plain.inexact(fits, SCHEMES["W8A8"], torch.bfloat16) is None
    loses = replace(fits, scale=torch.tensor([[1.0 + 2.0**-10]]))
    assert plain.inexact(loses, SCHEMES["W8A8"], torch.bfloat16) == "3 of 4 decoded weights are no bfloat16"
    overflows = replace(fits, scale=torch.tensor([[1024.0]]))
    assert "2 of 4" in str(plain.inexact(overflows, SCHEMES["W8A8"], torch.float16))
    assert plain.inexact(replace(fits, scale=torch.tensor([[torch.nan]])), SCHEMES["W8A8"], torch.bfloat16) is None
