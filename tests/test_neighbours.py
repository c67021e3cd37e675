"""Planned neighbours weigh what they weigh when they are made; the command of a report makes it again."""

from __future__ import annotations

import shlex

import pytest
from typer.testing import CliRunner

import lowbit
from embedding_models import make_embedding_model
from lowbit.checkpoint.base import HTML_NAME, report_path
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


@pytest.fixture(scope="module")
def side_by_side(tiny_llama, tmp_path_factory):
    """A folder with three outputs of one model: two evaluated on the same text, one not at all."""
    folder = tmp_path_factory.mktemp("side-by-side")
    for name, scheme in (("four", "W4A16"), ("eight", "W8A16"), ("file.gguf", "Q4_0")):
        lowbit.quantize(tiny_llama, folder / name, scheme=scheme)
    return folder


def evaluated(output, windows=1):
    words = ["evaluate", output, "--text", SHORT_TEXT, "--windows", windows, "--window-tokens", 32, "--samples", 0]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    return schema.load(report_path(output))


def test_outputs_whose_reports_lie_beside_it_are_neighbours_if_measured_alike(side_by_side):
    assert not [each for each in evaluated(side_by_side / "four").neighbours if each.origin == "beside"]
    (side_by_side / "noise").mkdir()
    (side_by_side / "noise" / schema.REPORT_NAME).write_text("{")
    eight = evaluated(side_by_side / "eight")
    (four,) = [each for each in eight.neighbours if each.origin == "beside"]
    run = schema.load(side_by_side / "four").evaluation[-1]
    assert (four.label, four.scheme, four.kld_mean) == ("four", "W4A16", run.kld_mean)
    assert "W4A16" not in {each.scheme for each in eight.neighbours if each.origin == "plan"}
    file = evaluated(side_by_side / "file.gguf")
    assert {each.label for each in file.neighbours if each.origin == "beside"} == {"four", "eight"}
    assert 'class="own"' in report_path(side_by_side / "file.gguf", HTML_NAME).read_text()
    again = evaluated(side_by_side / "eight")
    assert {each.label for each in again.neighbours if each.origin == "beside"} == {"four", "file"}
    assert not [each for each in evaluated(side_by_side / "eight", windows=2).neighbours if each.origin == "beside"]


def test_planned_neighbours_have_the_published_loss_of_their_scheme(side_by_side):
    planned = {each.scheme: each.expected_loss for each in schema.load(side_by_side / "four").neighbours}
    assert planned["FP8_DYNAMIC"] == pytest.approx(0.96)
    assert planned["W3A16"] is None


def test_the_cache_is_told_in_the_types_of_the_engine(side_by_side):
    """Two layers with two heads of 32 for keys and values, trained for 256 tokens: 2 · 2 · 2 · 32 · 2 bytes a token."""
    folder = schema.load(side_by_side / "four").cache_costs
    assert folder is not None
    assert (folder.engine, folder.contexts, folder.layers, folder.bounded) == ("vllm", (256,), 2, 0)
    assert [(row.type, row.bytes) for row in folder.rows] == [("16 bits", (131072,)), ("fp8", (65536,))]
    file = schema.load(report_path(side_by_side / "file.gguf")).cache_costs
    assert file is not None
    assert [row.type for row in file.rows] == ["16 bits", "q8_0", "q4_0"]


def test_a_model_that_writes_no_text_has_no_cache(tmp_path):
    model = make_embedding_model(tmp_path / "hf", "qwen3")
    assert lowbit.quantize(model, tmp_path / "out.gguf", scheme="Q8_0").report.cache_costs is None
