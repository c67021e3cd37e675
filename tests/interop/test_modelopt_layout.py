"""ModelOpt's own export code against ours: the two configuration files, and the packed bytes.

The code is an extract in external/, which needs nothing but torch; with nvidia-modelopt installed, its own
`convert_hf_quant_config_format` is asked too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.formats.modelopt import write as exporter
from lowbit.numerics import grid_for
from lowbit.rounding.rtn import measure_range, round_to_nearest
from lowbit.schemes import SCHEMES
from lowbit.tensors import InputRange, RangeSearch

sys.path.insert(0, str(Path(__file__).parents[2] / "external"))
import modelopt_convert_hf_config
import modelopt_export

pytestmark = pytest.mark.interop

# What ModelOpt calls our schemes inside, and the block size that it keeps beside it.
FORMATS = {
    "FP8": ("fp8", 0), "FP8_DYNAMIC": ("fp8_pc_pt", 0), "FP8_BLOCK": ("fp8_pb_wo", 128), "NVFP4": ("nvfp4", 16),
    "NVFP4A16": ("w4a16_nvfp4", 16), "MXFP8": ("mxfp8", 32), "W4A16": ("int4_awq", 128),
    "W4AFP8_STATIC": ("w4a8_awq", 128), "W8A16": ("int8_wo", 0), "W8A8_STATIC": ("int8_sq", 0),
}  # fmt: skip
OURS = SCHEMES | {"W8A16": SCHEMES["W8A16"].with_group_size(-1)}
LINEARS = [f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
CONVERTERS = [modelopt_convert_hf_config]
if importlib.util.find_spec("modelopt") is not None:
    from modelopt.torch.export import convert_hf_config

    CONVERTERS.append(convert_hf_config)


def their_quantization(schemes: dict[str, str]) -> dict:
    """What `get_quant_config` of ModelOpt writes under "quantization"."""
    layers = {"lm_head.quantization": modelopt_export.QUANTIZATION_NONE}
    for linear, name in schemes.items():
        layers[f"{linear}.quantization"], layers[f"{linear}.awq_block_size"] = FORMATS[name]
    return modelopt_export.process_layer_quant_config(layers)


@pytest.mark.parametrize("name", FORMATS)
def test_hf_quant_config_of_one_scheme(name):
    schemes = dict.fromkeys(LINEARS, name)
    ours = exporter.hf_quant_config(dict.fromkeys(LINEARS, OURS[name]), ["lm_head"])["quantization"]
    assert ours == their_quantization(schemes)
    assert list(ours) == list(their_quantization(schemes))


@pytest.mark.parametrize("chosen", [
    ("FP8", "NVFP4", "FP8_BLOCK", "MXFP8"), ("W4A16", "W8A8_STATIC", "W8A16", "W4AFP8_STATIC"),
])  # fmt: skip
def test_hf_quant_config_of_several(chosen):
    schemes = dict(zip(LINEARS, chosen, strict=True))
    ours = exporter.hf_quant_config({linear: OURS[name] for linear, name in schemes.items()}, ["lm_head"])
    assert ours["quantization"] == their_quantization(schemes)


@pytest.mark.parametrize("converter", CONVERTERS, ids=lambda converter: converter.__name__)
@pytest.mark.parametrize("name", [*FORMATS, "several"])
@pytest.mark.filterwarnings("ignore:Unsupported quantization algorithm 'fp8_pb_wo'")
def test_config_json(converter, name):
    names = list(FORMATS) if name == "several" else [name] * 6
    schemes = {f"model.layers.{layer}.up_proj": OURS[each] for layer, each in enumerate(names)}
    ours = exporter.quantization_config(schemes, ["lm_head"])
    assert ours == converter.convert_hf_quant_config_format(exporter.hf_quant_config(schemes, ["lm_head"]))


@pytest.mark.parametrize("name", ["NVFP4", "NVFP4A16"])
def test_their_dequantizer_reads_our_nvfp4(name):
    scheme, shape = SCHEMES[name], (48, 128)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grid = grid_for(scheme.weight, "float32")
    quantized = round_to_nearest(weight, scheme.weight, grid, RangeSearch(), measure_range(weight, scheme.weight))
    stored = {
        p.name: p.values
        for p in exporter.pack("l", quantized, scheme, 0, shape, torch.bfloat16, InputRange.within(4.0))
    }
    theirs = modelopt_export.nvfp4_dequantize(
        stored["l.weight"], torch.float32, shape, stored["l.weight_scale"], stored["l.weight_scale_2"], 16
    )
    assert torch.equal(theirs, quantized.decode())


def test_their_quantizer_chooses_our_codes():
    """Given the scales; −0 is theirs as +0, and of the same value."""
    scheme, shape = SCHEMES["NVFP4A16"], (48, 128)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grid = grid_for(scheme.weight, "float32")
    quantized = round_to_nearest(weight, scheme.weight, grid, RangeSearch(), measure_range(weight, scheme.weight))
    stored = {p.name: p.values for p in exporter.pack("l", quantized, scheme, 0, shape, torch.bfloat16)}
    theirs = modelopt_export.nvfp4_quantize(weight, 16, stored["l.weight_scale"], stored["l.weight_scale_2"])
    scales = (stored["l.weight_scale"], stored["l.weight_scale_2"])
    decoded = [modelopt_export.nvfp4_dequantize(codes, torch.float32, shape, *scales, 16)
               for codes in (theirs, stored["l.weight"])]  # fmt: skip
    assert torch.equal(*decoded)


@pytest.mark.parametrize("name", ["W4A16", "W4AFP8_STATIC"])
def test_their_packer_writes_our_bytes(name):
    """Given the scales of ours; codes of −8..7 both."""
    scheme, shape = SCHEMES[name], (48, 256)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    grid = grid_for(scheme.weight, exporter.scale_format(scheme, torch.bfloat16))
    quantized = round_to_nearest(weight, scheme.weight, grid, RangeSearch(), measure_range(weight, scheme.weight))
    pieces = exporter.pack("l", quantized, scheme, 0, shape, torch.bfloat16, InputRange.within(4.0))
    stored = {piece.name: piece.values for piece in pieces}
    theirs = modelopt_export.pack_int4_in_uint8(quantized.decode(), stored["l.weight_scale"].float(), 128)
    assert torch.equal(stored["l.weight"], theirs)


def test_their_int8_is_ours():
    """`to_quantized_weight` of int8_sq is one line: round, clamp to −128..127."""
    scheme, shape = SCHEMES["W8A8_STATIC"], (48, 256)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grid = grid_for(scheme.weight, "float32")
    quantized = round_to_nearest(weight, scheme.weight, grid, RangeSearch())
    pieces = exporter.pack("l", quantized, scheme, 0, shape, torch.bfloat16, InputRange.within(4.0))
    stored = {piece.name: piece.values for piece in pieces}
    theirs = (quantized.decode() / stored["l.weight_scale"][:, None]).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(stored["l.weight"], theirs)


def test_we_read_their_int4(tmp_path):
    """W4A16_AWQ with scales of −7..7 and of columns, as AWQ makes it."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    scale = weight.reshape(64, 2, 128).abs().amax(2) / 7.0
    packed = modelopt_export.pack_int4_in_uint8(weight, scale, 128)
    columns = torch.rand(256, generator=torch.Generator().manual_seed(4)) + 0.5
    tensors = {"l.weight": packed, "l.weight_scale": scale, "l.pre_quant_scale": columns}
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = '{"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": null, "group_size": 128, "exclude_modules": []}'
    (tmp_path / "hf_quant_config.json").write_text(f'{{"quantization": {quantization}}}')
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.schemes
    by_weight = scale.repeat_interleave(128, 1)
    expected = (weight / by_weight).round().clamp(-8, 7) * by_weight
    assert torch.equal(checkpoint.read("l.weight"), expected * columns)
