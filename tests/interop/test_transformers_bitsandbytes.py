"""bitsandbytes and transformers load what we write and decode our weights; we read what they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.pipeline import write_checkpoint
from lowbit.plan.plan import Request, prepare
from lowbit.settings import make_settings
from models import make_model

pytestmark = pytest.mark.interop

bnb: Any = None  # until a test runs: it brings torch's compiler, which collecting need not wait for


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    global bnb
    pytest.importorskip("accelerate")
    bnb = pytest.importorskip("bitsandbytes")


FOUR_BIT = {"NF4": ("NF4", False), "FP4": ("FP4", False), "NF4-nested": ("NF4", True), "FP4-nested": ("FP4", True)}
WAYS = FOUR_BIT | {"INT8": ("INT8", False)}
QUANTIZED = 14  # linears of the two blocks
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("bnb") / "model", hidden_size=256, intermediate_size=384,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=64)  # fmt: skip


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Way → folder that the pipeline wrote, made when first asked for."""
    folders: dict[str, Path] = {}

    def folder_of(way: str, **settings) -> Path:
        key = f"{way} {settings}"
        if key not in folders:
            scheme, nested = WAYS[way]
            out = tmp_path_factory.mktemp("written") / "out"
            write_checkpoint(
                prepare(Request(model, make_settings(scheme=scheme, double_quant=nested, **settings))), out
            )
            folders[key] = out
        return folders[key]

    return folder_of


def open_codes(folder: Path):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.schemes
    return checkpoint


def load_theirs(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


def tensors_of(folder: Path, linear: str) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "model.safetensors")
    return {name.removeprefix(f"{linear}."): value for name, value in stored.items() if name.startswith(f"{linear}.")}


def four_bit_layer(tensors: dict[str, torch.Tensor], shape: tuple[int, ...]):
    """A Linear4bit around stored tensors, as transformers builds it."""
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.float32)
    stats = {name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"}
    layer.weight = bnb.nn.Params4bit.from_prequantized(tensors["weight"], stats, device="cpu", module=layer)
    return layer


@pytest.mark.parametrize("way", FOUR_BIT)
def test_linear4bit_decodes_to_our_weights_bit_for_bit(written, way):
    folder = written(way)
    checkpoint = open_codes(folder)
    assert len(checkpoint.schemes) == QUANTIZED
    for name in checkpoint.schemes:
        layer = four_bit_layer(tensors_of(folder, name.removesuffix(".weight")), checkpoint.tensors[name].shape)
        decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert decoded.dtype == torch.bfloat16  # the dtype of the source, as the quant_state says
        assert torch.equal(decoded, checkpoint.read(name).to(torch.bfloat16))
        layer.weight.quant_state.dtype = torch.float32
        decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(decoded, checkpoint.read(name))


@pytest.mark.parametrize("way", FOUR_BIT)
def test_linear4bit_computes_with_our_weights(written, way):
    folder = written(way)
    checkpoint = open_codes(folder)
    weight = checkpoint.read(f"{FIRST}.weight")
    layer = four_bit_layer(tensors_of(folder, FIRST), weight.shape)
    layer.support_avx512bf16_for_cpu = False  # its kernel rounds scales and inputs to bfloat16
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = layer(x)
    assert torch.allclose(theirs, x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_linear8bit_decodes_to_our_weights_but_for_the_last_bit(written):
    folder = written("INT8")
    checkpoint = open_codes(folder)
    assert len(checkpoint.schemes) == QUANTIZED
    for name in checkpoint.schemes:
        tensors = tensors_of(folder, name.removesuffix(".weight"))
        theirs = bnb.functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
        assert torch.allclose(theirs, checkpoint.read(name), rtol=3e-7, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_int8_codes_are_those_of_bitsandbytes(seed):
    """But for weights that lie halfway between two codes, to the last bit of the division."""
    from lowbit.numerics import grid_for
    from lowbit.rounding.rtn import round_to_nearest
    from lowbit.schemes import SCHEMES
    from lowbit.tensors import RangeSearch

    weight = (torch.randn(300, 200, generator=torch.Generator().manual_seed(seed)) * 0.05).to(torch.float16)
    theirs, scb, _ = bnb.functional.int8_vectorwise_quant(weight.clone())
    spec = SCHEMES["INT8"].weight
    ours = round_to_nearest(weight, spec, grid_for(spec, "float32_over_127"), RangeSearch())
    assert torch.allclose(ours.scale[:, 0] * 127, scb, rtol=2e-7, atol=0)
    differing = ours.codes != theirs
    assert differing.float().mean() < 1e-3
    halfway = (weight.float() / ours.scale).frac().abs()[differing]
    assert torch.allclose(halfway, torch.full_like(halfway, 0.5), atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_transformers_loads_it_and_quantizes_the_same_linears(written, way):
    folder = written(way, ignore=(r"\.1\.mlp\.down_proj$",))
    kind = bnb.nn.Linear8bitLt if way == "INT8" else bnb.nn.Linear4bit
    theirs = {name for name, module in load_theirs(folder).named_modules() if isinstance(module, kind)}
    assert theirs == {name.removesuffix(".weight") for name in open_codes(folder).schemes}
    assert len(theirs) == QUANTIZED - 1


@pytest.mark.parametrize("way", WAYS)
def test_logits_of_transformers_are_those_of_our_decoded_weights(written, way):
    from lowbit.architecture.loading import load

    folder = written(way)
    theirs, (ours, _) = load_theirs(folder), load(folder)
    for parameter in theirs.parameters():  # transformers keeps what is not quantized in the dtype of the file
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in theirs.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32  # pyright: ignore[reportArgumentType]
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        a, b = theirs(ids).logits.float(), ours(ids).logits.float()
    if way in FOUR_BIT:
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    else:  # activations are quantized too, which `load` leaves alone
        divergence = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()
        assert divergence < 5e-3


@pytest.mark.parametrize("way", WAYS)
def test_what_transformers_saves_reads_as_what_it_computes_with(model, tmp_path, way):
    """Their own quantization of the same model, saved by them."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    scheme, nested = WAYS[way]
    wanted = BitsAndBytesConfig(load_in_8bit=True) if way == "INT8" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=scheme.lower(), bnb_4bit_use_double_quant=nested)  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map="cpu", quantization_config=wanted
    )
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = open_codes(tmp_path / "theirs")
    assert len(checkpoint.schemes) == QUANTIZED
    for name, module in theirs.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(decoded, checkpoint.read(f"{name}.weight").to(torch.bfloat16)), name
        elif isinstance(module, bnb.nn.Linear8bitLt):
            decoded = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            assert torch.allclose(decoded, checkpoint.read(f"{name}.weight"), rtol=3e-7, atol=0), name


@pytest.mark.parametrize("number", ["NF4", "FP4"])
def test_our_file_is_theirs_byte_for_byte(model, tmp_path, written, number):
    """Without a range search and without double quantization: all tensors of every linear, names and bytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=number.lower())
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map="cpu", quantization_config=wanted
    )
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", written(number, range="absmax"))
    )
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((40, 96), 64), ((33, 30), 64), ((7, 5), 32), ((600, 100), 32)])
def test_blocks_that_cross_rows_decode_as_bitsandbytes_decodes_them(tmp_path, nested, shape, block):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, None, None, block, nested, "nf4")
    tensors = {f"l.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file(tensors | {"l.weight": packed}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}}'
    )
    # As one long row: for rows of 96, the CPU kernel of 0.50 takes the wrong scales (the error is 6 times as large).
    state.shape = torch.Size([1, shape[0] * shape[1]])
    decoded = bnb.functional.dequantize_4bit(packed, state).reshape(shape)
    assert torch.equal(open_codes(tmp_path).read("l.weight"), decoded)
    assert (decoded - weight).square().mean() < 0.02


def test_inputs_of_int8_linears_are_rounded_as_bitsandbytes_rounds_them(written):
    """Its product, on the CPU, against ours of x̂ and the decoded weight; x with two outlier columns."""
    from lowbit.numerics.activations import quantize_llm_int8

    checkpoint = open_codes(written("INT8"))
    codes = load_file(written("INT8") / "model.safetensors")
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    x[2, 7], x[5, 100] = 30.0, -8.0
    state = bnb.MatmulLtState()
    state.CB, state.SCB = codes[f"{FIRST}.weight"], codes[f"{FIRST}.SCB"]
    assert checkpoint.int8_threshold is not None
    state.has_fp16_weights, state.threshold, state.is_training = False, checkpoint.int8_threshold, False
    expected = bnb.matmul(x.half(), state.CB, state=state).float()
    found = quantize_llm_int8(x.half().float(), checkpoint.int8_threshold) @ checkpoint.read(f"{FIRST}.weight").t()
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    plain = x @ checkpoint.read(f"{FIRST}.weight").t()
    assert (found - plain).norm() > 2 * (found - expected).norm()
