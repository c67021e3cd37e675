"""BitNet's layout: golden bytes, transformers' own packer and logits, training to it, and every way it can be bad."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from changed_folders import change_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError, FormatError
from lowbit.evaluation.activations import simulated_activations
from lowbit.formats.bitnet import write as exporter
from lowbit.formats.compressed_tensors.write import storage_format
from lowbit.schemes import SCHEMES
from lowbit.train.fake_quantize import absmean_ternary
from models import SHORT_TEXT, make_model

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bitnet") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def ternary(source, tmp_path_factory):
    return lowbit.quantize(source, tmp_path_factory.mktemp("bitnet") / "out", scheme="TERNARY").path


@pytest.fixture
def damaged(ternary, tmp_path):
    """What makes a copy of the folder with changed tensors and config."""
    folder = shutil.copytree(ternary, tmp_path / "damaged")
    return partial(change_folder, folder)


def test_four_quarters_of_the_rows_share_a_byte():
    codes = torch.tensor([[-1, 0], [1, 1], [0, -1], [1, 0], [-1, 1], [0, 0], [1, -1], [-1, 1]], dtype=torch.int8)
    # byte of rows 0, 2, 4, 6: codes −1, 0, −1, 1 → 0, 1, 0, 2; bit 7 → 0: 10 00 01 00
    assert exporter.pack_rows(codes).tolist() == [[0b10000100, 0b00100001], [0b00011010, 0b10010110]]


@pytest.mark.parametrize("shape", [(4, 1), (8, 5), (64, 33)])
def test_the_bytes_are_those_of_transformers(shape):
    from transformers.integrations.bitnet import pack_weights

    codes = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(exporter.pack_rows(codes), pack_weights(codes.clone()))


def test_rounding_is_that_of_bitnet(source, ternary):
    """s = mean |w| of the matrix, codes = clamp(rint(w / s), −1, 1)."""
    weight = lowbit.inspect(source).read(f"{NAME}.weight")
    torch.testing.assert_close(lowbit.inspect(ternary).read(f"{NAME}.weight"), absmean_ternary(weight))
    scale = load_file(ternary / "model.safetensors")[f"{NAME}.weight_scale"]
    assert scale.item() == pytest.approx(weight.abs().mean().item(), rel=1e-6)


def test_rows_can_be_read_in_slabs(ternary):
    checkpoint = open_checkpoint(ternary)
    whole = checkpoint.read(f"{NAME}.weight")
    parts = [checkpoint.read(f"{NAME}.weight", start, min(start + 37, 192)) for start in range(0, 192, 37)]
    assert torch.equal(torch.cat(parts), whole)


def of_transformers(folder):
    """The model that transformers loads, with the ops that it would compile left as they are."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits_of_lowbit(folder, ids):
    model, _ = lowbit.load(folder)
    checkpoint = lowbit.inspect(folder)
    schemes = {name.removesuffix(".weight"): scheme for name, scheme in checkpoint.schemes.items()}
    with torch.no_grad(), simulated_activations(model, schemes, {}):
        return model(ids).logits


@pytest.fixture
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_transformers_computes_the_same_logits(ternary, damaged, linear_class):
    """As it was written; and as BitLinear has it, with the reciprocal for a scale."""
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear

    def invert(tensors):
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = 1 / tensors[name]

    folder = ternary if linear_class == "autobitlinear" else damaged(invert, linear_class="bitlinear")
    theirs = of_transformers(folder)
    assert isinstance(theirs.model.layers[0].mlp.up_proj, AutoBitLinear | BitLinear)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = theirs(ids).logits
    wanted = logits_of_lowbit(folder, ids)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4 * wanted.abs().max().item())


@pytest.mark.usefixtures("uncompiled")
def test_what_was_trained_is_what_transformers_computes(source, tmp_path):
    ids = torch.arange(40)[None]
    model, tokenizer = lowbit.load(source)
    lowbit.train.prepare(model.requires_grad_(True), "TERNARY")
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    done = lowbit.train.export(model, tmp_path / "out", tokenizer=tokenizer)
    theirs = of_transformers(done.path)
    with torch.no_grad():
        wanted, found = model(ids).logits, theirs(ids).logits
        for name, module in theirs.named_modules():
            if hasattr(module, "weight_scale"):
                assert torch.equal(module.weight * module.weight_scale, model.get_submodule(name).weight), name
    # Inputs halfway between two of 255 codes may go either way.
    assert (found - wanted).square().mean().sqrt() < 0.02 * wanted.std()


def test_weights_beyond_the_scale_learn_too(source):
    """Four in ten weights are larger than the mean of all; the scale follows them."""
    model, _ = lowbit.load(source)
    lowbit.train.prepare(model.requires_grad_(True), "TERNARY", activations=False)
    model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    module = model.get_submodule(NAME)
    original = module.parametrizations.weight.original
    beyond = original.abs() > original.abs().mean()
    assert 0.3 < beyond.float().mean() < 0.6
    assert (original.grad[beyond] != 0).float().mean() > 0.9
    with torch.no_grad():
        before = module.weight.max().item()
        original.mul_(2)
        assert module.weight.max().item() == pytest.approx(2 * before, rel=1e-6)


def test_the_command_trains_it(source, tmp_path):
    course = lowbit.train.Course(steps=4, windows=8, window_tokens=24, learning_rate=1e-3, distill=True)
    done = lowbit.finetune(source, tmp_path / "out", scheme="TERNARY", data=SHORT_TEXT, course=course)
    assert done.report.output.format == "bitnet"
    (note,) = (note for note in done.report.source.notes if note.startswith("trained 4 steps"))
    assert "rose" not in note
    assert lowbit.verify(done.path, engine="transformers").ok


def test_compressed_tensors_holds_the_codes_as_what_engines_multiply(ternary, tmp_path):
    """Three values as 8-bit codes with one scale: vLLM loads no 2-bit weights with 8-bit activations."""
    done = lowbit.convert(ternary, tmp_path / "out", format="compressed-tensors")
    assert {entry.scheme for entry in done.report.tensors if entry.scheme} == {"W8A8_TENSOR"}
    assert all(entry.repacked for entry in done.report.tensors if entry.scheme)
    assert lowbit.verify(done.path, engine="vllm").ok
    assert torch.equal(lowbit.inspect(done.path).read(f"{NAME}.weight"), lowbit.inspect(ternary).read(f"{NAME}.weight"))
    two_bits = replace(SCHEMES["W2A16"], name="W2A8", activation=SCHEMES["W8A8"].activation)
    with pytest.raises(FormatError, match=r"2-bit integers with 8-bit activations \(W2A8\), but no engine loads them"):
        storage_format(two_bits)


def test_codes_survive_on_wider_grids(ternary, tmp_path):
    """Floats, and the same format again; other codes are not rounded to three values unasked."""
    wide = lowbit.convert(ternary, tmp_path / "float", format="float")
    assert torch.equal(
        load_file(wide.path / "model.safetensors")[f"{NAME}.weight"].float(),
        lowbit.inspect(ternary).read(f"{NAME}.weight"),
    )
    again = lowbit.convert(ternary, tmp_path / "again", format="bitnet")
    theirs, ours = load_file(again.path / "model.safetensors"), load_file(ternary / "model.safetensors")
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_conversion_does_not_round_to_three_values_unasked(source, tmp_path):
    quantized = lowbit.quantize(source, tmp_path / "W4A16", scheme="W4A16", group_size=32).path
    with pytest.raises(FormatError, match="would ruin a model that was not trained so"):
        lowbit.convert(quantized, tmp_path / "out", format="bitnet")
    asked = lowbit.convert(quantized, tmp_path / "out", format="bitnet", scheme="TERNARY")
    assert asked.report.output.format == "bitnet"


def test_eight_bits_hold_three_values(ternary, tmp_path):
    done = lowbit.convert(ternary, tmp_path / "out", format="compressed-tensors", scheme="W8A8")
    name = f"{NAME}.weight"
    assert torch.equal(lowbit.inspect(done.path).read(name), lowbit.inspect(ternary).read(name))
    assert all(tensor.repacked for tensor in done.report.tensors if tensor.scheme is not None)


def test_what_it_does_not_hold():
    for name in ("W2A16", "W8A8", "NF4"):
        with pytest.raises(FormatError, match="holds TERNARY only"):
            exporter.storage_format(SCHEMES[name])
    assert exporter.unfit((6, 8), SCHEMES["TERNARY"]) == "6 rows do not fill bytes of 4"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"linear_class": "trilinear"}, "linear_class is 'trilinear'"),
        ({"quantization_mode": "online"}, "quantization_mode is 'online'"),
        ({"use_rms_norm": True}, "puts a norm in front of every linear"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"modules_to_not_convert": ["("]}, "modules_to_not_convert"),
    ],
)
def test_a_config_that_is_not_understood(damaged, config, said):
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(damaged(**config))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_no_scale(damaged, value):
    folder = damaged(lambda tensors: tensors[f"{NAME}.weight_scale"].fill_(value))
    with pytest.raises(CheckpointError, match="a positive number is needed"):
        open_checkpoint(folder).read(f"{NAME}.weight")


def test_the_code_that_is_not_ternary(damaged):
    folder = damaged(lambda tensors: tensors[f"{NAME}.weight"][0, 0].fill_(0xFF))
    with pytest.raises(CheckpointError, match="holds the code 3"):
        open_checkpoint(folder).read(f"{NAME}.weight")


def test_a_scale_that_is_absent(damaged):
    folder = damaged(lambda tensors: tensors.pop(f"{NAME}.weight_scale"))
    with pytest.raises(CheckpointError, match=r"up_proj.*weight_scale"):
        open_checkpoint(folder)


def test_a_scale_for_each_row_is_refused(damaged):
    folder = damaged(lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.ones(192)}))
    with pytest.raises(CheckpointError, match=r"weight_scale"):
        open_checkpoint(folder)
