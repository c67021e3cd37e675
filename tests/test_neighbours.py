"""Planned neighbours weigh what they weigh when they are made; the command of a report makes it again."""

from __future__ import annotations

import shlex

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.report import schema
from models import SHORT_TEXT


@pytest.mark.parametrize(("scheme", "output"), [("W4A16", "out"), ("Q4_K_M", "out.gguf")])
def test_a_planned_size_is_that_of_the_files(tiny_llama, tmp_path, scheme, output):
    made = lowbit.quantize(tiny_llama, tmp_path / output, scheme=scheme)
    neighbours = made.report.neighbours
    assert {each.origin for each in neighbours} == {"plan"}
    own = made.report.totals.bytes_out
    assert sum(each.bytes < own for each in neighbours) <= 2
    assert sum(each.bytes > own for each in neighbours) <= 2
    assert scheme not in {each.scheme for each in neighbours}
    for each in neighbours:
        folder = tmp_path / each.scheme
        folder.mkdir()
        written = lowbit.quantize(tiny_llama, folder / output, scheme=each.scheme).report
        assert written.totals.bytes_out == each.bytes
        assert written.totals.decoder_bits_per_weight == pytest.approx(each.bits_per_weight)


def test_the_command_names_what_was_asked_for(tiny_llama, tmp_path):
    overrides, ignore = {"down_proj$": "W8A16"}, ("layers.1.*[.]o_proj",)
    done = lowbit.quantize(tiny_llama, tmp_path / "a b", scheme="W4A16", group_size=32, overrides=overrides,
                           ignore=ignore, bias_correction=False)  # fmt: skip
    assert shlex.split(done.report.command or "") == [
        "lowbit", "quantize", str(tiny_llama), "-o", str(tmp_path / "a b"), "--scheme", "W4A16", "--group-size", "32",
        "--override", "down_proj$=W8A16", "--ignore", "layers.1.*[.]o_proj",
    ]  # fmt: skip


def test_the_command_makes_the_same_bytes(tiny_llama, tmp_path):
    lowbit.quantize(tiny_llama, tmp_path / "out", scheme="W4A16", group_size=32, overrides={"down_proj$": "W8A16"})
    words = shlex.split(schema.load(tmp_path / "out").command or "")
    words[words.index("-o") + 1] = str(tmp_path / "again")
    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert done.exit_code == 0
    first, again = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_a_conversion_says_convert(tiny_llama, tmp_path):
    lowbit.quantize(tiny_llama, tmp_path / "ct", scheme="W4A16", group_size=32)
    converted = lowbit.convert(tmp_path / "ct", tmp_path / "gptq", format="gptq")
    words = shlex.split(converted.report.command or "")
    assert words == ["lowbit", "convert", str(tmp_path / "ct"), "-o", str(tmp_path / "gptq"), "--format", "gptq"]


def test_every_tensor_of_a_run_has_a_histogram(tiny_llama, tmp_path):
    for output, scheme in (("out", "W4A16"), ("out.gguf", "Q4_0"), ("gptq", "W4A16")):
        method = (
            {"method": "gptq", "calib": SHORT_TEXT, "samples": 2, "seqlen": 32, "expert_tokens": 64}
            if output == "gptq"
            else {}
        )
        report = lowbit.quantize(tiny_llama, tmp_path / output, scheme=scheme, **method).report
        for tensor in report.tensors:
            assert tensor.histogram is not None, tensor.name
            assert tensor.scheme is None or tensor.histogram.decoded is not None
