"""GPTQ, bit for bit: AutoGPTQ 0.7.1 and GPTQModel 7.7 pack the same weights to the same words, and decode ours.

The packers are extracts in external/, which need nothing but torch, numpy and transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "external"))

import auto_gptq_pack
import gptqmodel_pack

from lowbit.checkpoint import open_checkpoint
from lowbit.formats.gptq.write import GPTQ_V1, GPTQ_V2
from lowbit.numerics import grid_for
from lowbit.schemes import WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity, QuantizedTensor

CASES = pytest.mark.parametrize(
    ("bits", "symmetric", "shape", "group_size"),
    [
        (bits, symmetric, shape, group_size)
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
        for shape, group_size in (((32, 64), 32), ((64, 128), 64), ((96, 64), -1))
    ],
)


def quantized_of(bits, symmetric, shape, group_size, lowest_zero=1):
    """Random codes; powers of two as scales, so that the packers' own rounding cannot be of another opinion."""
    generator = torch.Generator().manual_seed(bits)
    channel = group_size == -1
    granularity = Granularity.CHANNEL if channel else Granularity.GROUP
    spec = WeightSpec("int", bits, granularity, None if channel else group_size, symmetric)
    half, groups = 1 << (bits - 1), 1 if channel else shape[1] // group_size
    codes = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    scale = torch.exp2(torch.randint(-9, -3, (shape[0], groups), generator=generator).float())
    zeros = torch.randint(lowest_zero - half, half, (shape[0], groups), generator=generator).to(torch.int32)
    columns = shape[1] if channel else group_size
    quantized = QuantizedTensor(
        codes, scale, grid_for(spec, "float16"), granularity, columns, None if symmetric else zeros
    )
    return quantized, scheme_of_specs(spec, None)


def packed(exporter, quantized, scheme):
    pieces = exporter.pack("l", quantized, scheme, 0, quantized.shape, torch.float16)
    return {piece.name.removeprefix("l."): piece.values for piece in pieces}


def zeros_of(quantized, bits):
    """Unsigned zero points, float32 [N, G], as the packers take them."""
    half = 1 << (bits - 1)
    if quantized.zero_point is None:
        return torch.full(quantized.scale.shape, float(half))
    return (quantized.zero_point + half).float()


def read_v(folder, exporter, scheme, tensors, **more):
    config = exporter.quantization_config({"l": scheme}, []) | more
    folder.mkdir()
    save_file({f"l.{leaf}": values.contiguous() for leaf, values in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return open_checkpoint(folder).read_quantized("l.weight")  # type: ignore[attr-defined]


@CASES
def test_autogptq_packs_the_same_words_and_decodes_ours(tmp_path, bits, symmetric, shape, group_size):
    quantized, scheme = quantized_of(bits, symmetric, shape, group_size)
    ours = packed(GPTQ_V1, quantized, scheme)
    theirs = auto_gptq_pack.QuantLinear(bits, group_size, shape[1], shape[0])
    linear = SimpleNamespace(weight=torch.nn.Parameter(quantized.decode()), bias=None)
    theirs.pack(linear, quantized.scale.clone(), zeros_of(quantized, bits), None)
    assert torch.equal(ours["qweight"], theirs.qweight)
    assert torch.equal(ours["qzeros"], theirs.qzeros)
    assert torch.equal(ours["scales"], theirs.scales.half())
    theirs.qweight, theirs.qzeros = ours["qweight"], ours["qzeros"]
    assert torch.equal(theirs.dequantize().t(), quantized.decode())
    assert torch.equal(read_v(tmp_path / "m", GPTQ_V1, scheme, ours).decode(), quantized.decode())


@CASES
def test_gptqmodel_packs_the_same_words(tmp_path, bits, symmetric, shape, group_size):
    quantized, scheme = quantized_of(bits, symmetric, shape, group_size, lowest_zero=0)
    columns = shape[1] if group_size == -1 else group_size
    theirs = gptqmodel_pack.QuantLinear(bits, torch.arange(shape[1]) // columns)
    theirs.pack_original(quantized.decode(), quantized.scale, zeros_of(quantized, bits))
    ours = packed(GPTQ_V2, quantized, scheme)
    assert torch.equal(ours["qweight"], theirs.qweight)
    assert torch.equal(ours["qzeros"], theirs.qzeros)
    assert torch.equal(ours["scales"], theirs.scales)
    assert torch.equal(ours["g_idx"], theirs.g_idx.to(torch.int32))
    assert torch.equal(read_v(tmp_path / "m", GPTQ_V2, scheme, ours).decode(), quantized.decode())


@CASES
def test_gptqmodel_turns_our_version_1_into_our_version_2_and_back(bits, symmetric, shape, group_size):
    quantized, scheme = quantized_of(bits, symmetric, shape, group_size)
    v1, v2 = packed(GPTQ_V1, quantized, scheme)["qzeros"], packed(GPTQ_V2, quantized, scheme)["qzeros"]
    assert torch.equal(gptqmodel_pack.convert_gptq_v1_to_v2_format_module(v1, bits), v2)
    assert torch.equal(gptqmodel_pack.convert_gptq_v2_to_v1_format_module(v2, bits), v1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_gptqmodel_borrowed_are_read_as_they_were(tmp_path, bits):
    """Version 1 by GPTQModel, with zero points of 0: whole words less 1 in every field, which runs over neighbours."""
    quantized, scheme = quantized_of(bits, False, (64, 128), 32, lowest_zero=0)
    assert quantized.zero_point is not None
    assert (quantized.zero_point == -(1 << (bits - 1))).any() or bits == 8
    quantized.zero_point[:3, 0] = -(1 << (bits - 1))
    tensors = packed(GPTQ_V2, quantized, scheme)
    tensors["qzeros"] = gptqmodel_pack.convert_gptq_v2_to_v1_format_module(tensors["qzeros"], bits)
    found = read_v(tmp_path / "m", GPTQ_V1, scheme, tensors, meta={"quantizer": "gptqmodel:7.7.0"})
    assert torch.equal(found.zero_point, quantized.zero_point)
    assert torch.equal(found.decode(), quantized.decode())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_autogptq_damages_the_neighbours_of_a_zero_point_of_0(bits):
    """Why version 1 must never be given one: −1 sets every bit above it."""
    quantized, _ = quantized_of(bits, False, (32, 64), 32)
    assert quantized.zero_point is not None
    quantized.zero_point[0, 0] = -(1 << (bits - 1))
    theirs = auto_gptq_pack.QuantLinear(bits, 32, 64, 32)
    linear = SimpleNamespace(weight=torch.nn.Parameter(quantized.decode()), bias=None)
    theirs.pack(linear, quantized.scale.clone(), zeros_of(quantized, bits), None)
    assert theirs.qzeros[0, 0] == -1


@pytest.mark.parametrize("settings", [
    {"format": "gptq", "scheme": "W4A16"},
    {"format": "gptq", "scheme": "W3A16"},
    {"format": "gptq", "scheme": "W4A16_ASYM"},
    {"format": "gptq_v2", "scheme": "W4A16_ASYM"},
    {"format": "gptq_v2", "scheme": "W8A16", "ignore": [r"layers\.0\.mlp\.down_proj"]},
], ids=lambda settings: f"{settings['format']}-{settings['scheme']}")  # fmt: skip
def test_transformers_with_gptqmodel_decodes_our_bits(tmp_path, settings):
    """GPTQModel multiplies in float16. It is in no extra: see docs/interop.md for how to install it."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    pytest.importorskip("optimum.gptq", reason="optimum is not installed")
    from transformers import AutoModelForCausalLM, GPTQConfig

    from lowbit.pipeline import write_checkpoint
    from lowbit.plan.plan import Request, prepare
    from lowbit.settings import make_settings
    from models import make_model

    make_model(tmp_path / "model")
    out = tmp_path / "out"
    write_checkpoint(prepare(Request(tmp_path / "model", make_settings(group_size=32, **settings))), out)
    kernels = GPTQConfig(bits=4, backend="gptq_torch")
    loaded = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float16, device_map="cpu", quantization_config=kernels
    )
    checkpoint = open_checkpoint(out)
    decoded = {
        name: module.dequantize_weight() for name, module in loaded.named_modules() if hasattr(module, "qweight")
    }
    assert {f"{name}.weight" for name in decoded} == set(checkpoint.schemes)  # type: ignore[attr-defined]
    for name, weight in decoded.items():
        assert torch.equal(weight.t(), checkpoint.read(f"{name}.weight").half()), name
