"""What is exact is exact bit for bit, what is not says so, and docs/conversion.md has the table of both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError, NonFiniteError, UsageError, VerificationError
from lowbit.registry import folder_formats
from models import FITS_ALL, SHORT_TEXT, make_model

DOCUMENT = Path(__file__).parent.parent / "docs" / "conversion.md"

CALIBRATION = {"calib": SHORT_TEXT, "samples": 2, "seqlen": 64}
# (format, scheme, settings) of every source in the table of the document, in its order.
SOURCES = {
    "compressed-tensors W4A16": ("compressed-tensors", "W4A16", {}),
    "compressed-tensors W4A16_ASYM": ("compressed-tensors", "W4A16_ASYM", {}),
    "compressed-tensors W8A16": ("compressed-tensors", "W8A16", {}),
    "compressed-tensors W3A16": ("compressed-tensors", "W3A16", {}),
    "compressed-tensors W8A8": ("compressed-tensors", "W8A8", {}),
    "compressed-tensors FP8": ("compressed-tensors", "FP8", CALIBRATION),
    "compressed-tensors FP8_DYNAMIC": ("compressed-tensors", "FP8_DYNAMIC", {}),
    "compressed-tensors FP8_BLOCK": ("compressed-tensors", "FP8_BLOCK", {}),
    "compressed-tensors NVFP4A16": ("compressed-tensors", "NVFP4A16", {}),
    "compressed-tensors MXFP4A16": ("compressed-tensors", "MXFP4A16", {}),
    "compressed-tensors MXFP8": ("compressed-tensors", "MXFP8", {}),
    "gptq W4A16": ("gptq", "W4A16", {}),
    "gptq_v2 W4A16_ASYM": ("gptq_v2", "W4A16_ASYM", {}),
    "gptq W8A16": ("gptq", "W8A16", {}),
    "gptq W3A16": ("gptq", "W3A16", {}),
    "awq W4A16_ASYM": ("awq", "W4A16_ASYM", {}),
    "bitsandbytes NF4": ("bitsandbytes", "NF4", {}),
    "bitsandbytes NF4, double": ("bitsandbytes", "NF4", {"double_quant": True}),
    "bitsandbytes FP4": ("bitsandbytes", "FP4", {}),
    "bitsandbytes INT8": ("bitsandbytes", "INT8", {}),
    "modelopt FP8": ("modelopt", "FP8", CALIBRATION),
    "modelopt FP8_DYNAMIC": ("modelopt", "FP8_DYNAMIC", {}),
    "modelopt W4A16": ("modelopt", "W4A16", {}),
    "modelopt W8A8": ("modelopt", "W8A8", {}),
    "modelopt W4AFP8_STATIC": ("modelopt", "W4AFP8_STATIC", CALIBRATION),
    "modelopt NVFP4A16": ("modelopt", "NVFP4A16", {}),
}  # fmt: skip
# "float" takes anything, and mxfp4 the experts of gpt-oss alone (tests/export/test_mxfp4.py); bitnet and codebook hold
# values of their own (tests/export/test_bitnet.py, tests/export/test_codebook.py).
TARGETS = [name for name in folder_formats() if name not in ("float", "mxfp4", "bitnet", "codebook")]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("conversion") / "model", **FITS_ALL)


@pytest.fixture(scope="session")
def quantized(model, tmp_path_factory):
    """source name → its folder, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(source: str) -> Path:
        if source not in made:
            format, scheme, settings = SOURCES[source]
            made[source] = tmp_path_factory.mktemp("source") / "out"
            lowbit.quantize(model, made[source], scheme=scheme, format=format, **settings)
        return made[source]

    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, decoded."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name).float() for name in checkpoint.tensors}


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def cell(report) -> str:
    """What the table says of a conversion: "exact", or the scheme that weights are rounded to."""
    linears = [tensor for tensor in report.tensors if tensor.scheme is not None]
    if all(tensor.repacked for tensor in linears):
        lost = any("activations" in note for tensor in linears for note in tensor.notes)
        return "exact, weights" if lost else "exact"
    assert not any(tensor.repacked for tensor in linears)
    return linears[0].scheme


def table_of_the_document() -> dict[tuple[str, str], str]:
    rows = [line.strip("|").split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    header = [name.strip().strip("`") for name in rows[0]]
    found = {}
    for row in rows[2:]:
        values = [value.strip() for value in row]
        if values[0].strip("`") in SOURCES:
            found |= {(values[0].strip("`"), to): value for to, value in zip(header[1:], values[1:], strict=True)}
    return found


def test_the_table_covers_every_pair():
    assert table_of_the_document().keys() == {(source, target) for source in SOURCES for target in TARGETS}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_table_is_what_happens(source, target, quantized, tmp_path):
    report = lowbit.convert(quantized(source), tmp_path / "out", format=target).report
    happened = cell(report)
    assert same_weights(quantized(source), tmp_path / "out") == happened.startswith("exact")
    added = [tensor.relative_error for tensor in report.tensors if tensor.scheme is not None]
    assert all(error == 0 for error in added) == happened.startswith("exact")
    assert table_of_the_document()[source, target] == happened


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_is_read_and_written_back_byte_for_byte(source, quantized, tmp_path):
    folder = quantized(source)
    lowbit.convert(folder, tmp_path / "out", format=SOURCES[source][0])
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    original, written = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "out"))
    assert original == written


@pytest.mark.parametrize("source", ["gptq W4A16", "compressed-tensors W4A16", "bitsandbytes NF4"])
def test_float_writes_the_decoded_weights_in_the_dtype_of_the_model(source, quantized, tmp_path):
    report = lowbit.convert(quantized(source), tmp_path / "out", format="float").report
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    decoded, written = weights(quantized(source)), weights(tmp_path / "out")
    assert all(torch.equal(decoded[name].to(torch.bfloat16).float(), written[name]) for name in decoded)
    assert any(tensor.relative_error for tensor in report.tensors)


def test_a_scheme_that_does_not_hold_the_codes_is_rounded_to_and_reported(quantized, tmp_path):
    source = quantized("compressed-tensors W8A16")
    report = lowbit.convert(source, tmp_path / "out", format="compressed-tensors", scheme="W4A16").report
    linears = [tensor for tensor in report.tensors if tensor.scheme]
    assert all(tensor.scheme == "W4A16" and tensor.relative_error > 1e-3 for tensor in linears)
    assert all("requantized: W4A16 was asked for" in tensor.notes[0] for tensor in linears)


def test_the_scheme_that_it_has_already_is_a_repack(quantized, tmp_path):
    source = quantized("compressed-tensors W4A16")
    report = lowbit.convert(source, tmp_path / "out", format="gptq", scheme="w4a16").report
    assert all(tensor.repacked for tensor in report.tensors if tensor.scheme)


def test_a_dry_run_writes_nothing(quantized, tmp_path):
    from lowbit.api import dry_convert

    prepared = dry_convert(quantized("awq W4A16_ASYM"), format="compressed-tensors")
    assert all(tensor.making == "repacked" for tensor in prepared.plan.quantized)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_quantized_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="not a quantized folder"):
        lowbit.convert(model, tmp_path / "out", format="gptq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["auto", "zip"])
def test_a_format_that_names_nothing_is_refused(format, quantized, tmp_path):
    with pytest.raises(UsageError, match="format"):
        lowbit.convert(quantized("gptq W4A16"), tmp_path / "out", format=format)


def test_an_unknown_quant_method_is_named(quantized, tmp_path):
    folder = copied(quantized("gptq W4A16"), tmp_path / "in", quant_method="qurious")
    with pytest.raises(CheckpointError, match="the quant_method 'qurious'"):
        lowbit.convert(folder, tmp_path / "out", format="awq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("claim", ["awq", "bitsandbytes", "compressed-tensors", "modelopt", "fp8"])
def test_a_config_that_claims_another_format_is_refused(claim, quantized, tmp_path):
    config = {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "load_in_4bit": True,
              "bnb_4bit_quant_type": "nf4"}  # fmt: skip
    folder = copied(quantized("gptq W4A16"), tmp_path / "in", quant_method=claim, **config)
    with pytest.raises(CheckpointError):
        lowbit.convert(folder, tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("bits", 8), ("group_size", 64)])
def test_shapes_that_do_not_fit_the_declared_bits_or_group_are_refused(key, value, quantized, tmp_path):
    folder = copied(quantized("gptq W4A16"), tmp_path / "in", **{key: value})
    with pytest.raises(CheckpointError, match=r"shape|needed|fit"):
        lowbit.convert(folder, tmp_path / "out", format="awq")


def test_a_partly_quantized_model_is_refused(quantized, model, tmp_path):
    """One linear in 16 bits that config.json says is quantized."""
    from safetensors.torch import load_file, save_file

    folder = copied(quantized("compressed-tensors W4A16"), tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{name}.{leaf}"]
    tensors[f"{name}.weight"] = load_file(model / "model.safetensors")[f"{name}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(f"config.json quantizes {name}")):
        lowbit.convert(folder, tmp_path / "out", format="gptq")


def copied(folder: Path, to: Path, **quantization) -> Path:
    """A copy with other words in its quantization_config."""
    import shutil

    shutil.copytree(folder, to)
    for extra in ("quantize_config.json", "quant_config.json", "lowbit-report.json"):
        (to / extra).unlink(missing_ok=True)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] |= quantization
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("to", [{"format": "float"}, {"format": "gptq"}, {"format": "gguf", "scheme": "Q8_0"}])
def test_a_scale_that_is_no_number_is_the_source_s_fault(tiny_llama, tmp_path, to):
    source = lowbit.quantize(tiny_llama, tmp_path / "W4A16", scheme="W4A16", group_size=32).path
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"][3, 1] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"W4A16.model.safetensors: tensor .*down.* holds NaN or inf"):
        lowbit.convert(source, tmp_path / ("out.gguf" if to["format"] == "gguf" else "out"), **to)
    assert [path.name for path in tmp_path.iterdir()] == ["W4A16"]


@pytest.mark.parametrize("setting", [{"double_quant": True}, {"outliers": 0.5}, {"group_size": 32}, {"range": "mse"}])
def test_what_goes_with_a_scheme_is_refused_without_one(quantized, tmp_path, setting):
    """And no scheme is blamed that nobody named."""
    flag = "--" + next(iter(setting)).replace("_", "-")
    with pytest.raises(UsageError, match=rf"^{flag}.* is read only by") as caught:
        lowbit.convert(quantized("compressed-tensors W4A16"), tmp_path / "out", format="gptq", **setting)
    assert "W4A16" not in str(caught.value)


def test_a_folder_is_not_named_as_a_gguf_file(quantized, model, tmp_path):
    """Engines, and `lowbit verify`, take NAME.gguf for a file."""
    with pytest.raises(UsageError, match="gptq is written as a folder"):
        lowbit.convert(quantized("compressed-tensors W4A16"), tmp_path / "out.gguf", format="gptq")
    with pytest.raises(UsageError, match="gptq is written as a folder"):
        lowbit.quantize(model, tmp_path / "out.gguf", format="gptq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", [name for name in folder_formats() if name not in ("float", "mxfp4")])
def test_the_command_that_is_named_for_a_float_model_works(model, format, tmp_path):
    with pytest.raises(UsageError) as caught:
        lowbit.convert(model, tmp_path / "out", format=format)
    words = (caught.value.hint or "").partition("lowbit quantize ")[2].split()
    assert words[0] == str(model)
    given = dict(zip((word.removeprefix("--") for word in words[1:-2:2]), words[2:-2:2], strict=True))
    lowbit.dry_run(model, output=tmp_path / "out", **given)


def test_two_schemes_of_one_name_are_told_apart(model, tmp_path):
    fine = lowbit.quantize(model, tmp_path / "fine", format="gptq", scheme="W4A16", group_size=32).path
    done = lowbit.convert(fine, tmp_path / "out", format="gptq", scheme="W4A16", group_size=128)
    notes = {note for tensor in done.report.tensors for note in tensor.notes}
    said = "requantized: W4A16 in groups of 128 was asked for, and does not hold codes of W4A16 in groups of 32"
    assert said in notes


def test_a_percentile_that_clips_too_much_is_blamed_and_not_lowbit(quantized, model, tmp_path):
    asked = {"range": "percentile", "percentile": 60}
    with pytest.raises(VerificationError, match=r"--percentile 60 clips too much: .*relative error"):
        lowbit.convert(quantized("gptq W4A16"), tmp_path / "out", format="bitsandbytes", scheme="INT8", **asked)
    with pytest.raises(VerificationError, match=r"--percentile 60 clips too much") as caught:
        lowbit.quantize(model, tmp_path / "out", scheme="W8A16", **asked)
    assert "bug" not in f"{caught.value} {caught.value.hint}"
