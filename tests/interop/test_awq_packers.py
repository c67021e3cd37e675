"""AWQ, bit for bit: AutoAWQ 0.2.9 packs the same weights to the same words, and decodes ours to our weights.

The packer is an extract in external/, which needs nothing but torch.
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

import autoawq_pack

from lowbit.checkpoint import open_checkpoint
from lowbit.formats.awq import write as exporter
from lowbit.numerics import grid_for
from lowbit.schemes import SCHEMES
from lowbit.tensors import QuantizedTensor

CASES = pytest.mark.parametrize(
    ("name", "shape", "group_size"),
    [
        (name, shape, group_size)
        for name in ("W4A16", "W4A16_ASYM")
        for shape, group_size in (((32, 64), 32), ((64, 128), 64), ((96, 64), -1))
    ],
)


@CASES
def test_autoawq_packs_the_same_words_and_decodes_ours(tmp_path, name, shape, group_size):
    scheme = SCHEMES[name].with_group_size(group_size)
    generator = torch.Generator().manual_seed(7)
    columns = shape[1] if group_size == -1 else group_size
    codes = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    scale = torch.exp2(torch.randint(-9, -3, (shape[0], shape[1] // columns), generator=generator).float())
    zeros = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int32)
    zero_point = None if scheme.weight.symmetric else zeros
    quantized = QuantizedTensor(
        codes, scale, grid_for(scheme.weight, "float16"), scheme.weight.granularity, columns, zero_point
    )

    pieces = exporter.pack("l", quantized, scheme, 0, shape, torch.float16)
    ours = {piece.name.removeprefix("l."): piece.values for piece in pieces}
    linear = SimpleNamespace(weight=torch.nn.Parameter(quantized.decode()), bias=None, in_features=shape[1])
    unsigned = torch.full(scale.shape, 8.0) if zero_point is None else (zeros + 8).float()
    theirs = autoawq_pack.from_linear(linear, 4, columns, scale.t().contiguous(), unsigned.t().contiguous())
    for leaf in ("qweight", "qzeros", "scales"):
        assert torch.equal(ours[leaf], getattr(theirs, leaf)), leaf

    decoded = autoawq_pack.dequantize_gemm(ours["qweight"], ours["qzeros"], ours["scales"], 4, columns)
    assert torch.equal(decoded.float().t(), quantized.decode())

    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": exporter.quantization_config({"l": scheme}, [])})
    )
    save_file({f"l.{leaf}": getattr(theirs, leaf).contiguous() for leaf in ours}, tmp_path / "model.safetensors")
    assert torch.equal(open_checkpoint(tmp_path).read("l.weight"), quantized.decode())


def test_autoawq_lets_codes_out_of_range_run_over_their_neighbours():
    """Why codes must be clamped before they are packed: 16 in row 0 shows as 1 in row 2, the next nibble."""
    weight = torch.zeros(32, 32)
    weight[0, 0] = 16.0
    linear = SimpleNamespace(weight=torch.nn.Parameter(weight), bias=None, in_features=32)
    theirs = autoawq_pack.from_linear(linear, 4, 32, torch.ones(1, 32), torch.zeros(1, 32))
    decoded = autoawq_pack.dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, 32)
    assert decoded[0, 0] == 0
    assert decoded[0, 2] == 1


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_transformers_with_gptqmodel_decodes_our_bits(tmp_path, name):
    """GPTQModel multiplies in float16. It is in no extra: see docs/interop.md for how to install it."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    from transformers import AutoModelForCausalLM, AwqConfig

    from lowbit.pipeline import write_checkpoint
    from lowbit.plan.plan import Request, prepare
    from lowbit.settings import make_settings
    from models import make_model

    make_model(tmp_path / "model")
    out, settings = tmp_path / "out", {"ignore": [r"layers\.0\.mlp\.down_proj"]}
    write_checkpoint(
        prepare(Request(tmp_path / "model", make_settings(format="awq", scheme=name, group_size=32, **settings))), out
    )
    kernels = AwqConfig(bits=4, backend="torch_awq")
    loaded = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float16, device_map="cpu", quantization_config=kernels
    )
    checkpoint = open_checkpoint(out)
    quantized = {name: module for name, module in loaded.named_modules() if hasattr(module, "qweight")}
    assert {f"{name}.weight" for name in quantized} == set(checkpoint.schemes)  # type: ignore[attr-defined]
    for name, module in quantized.items():
        inputs = torch.zeros(1, module.in_features)
        weight = module._dequantize_weight_for_inference(inputs, dtype=torch.float16)
        assert torch.equal(weight.t(), checkpoint.read(f"{name}.weight").half()), name
