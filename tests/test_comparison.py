"""`lowbit compare`: several models measured on the same text, figures of reports reused, neighbours in reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit import comparison
from lowbit.cli.main import app
from lowbit.comparison import add_to_reports, compare, named
from lowbit.errors import UsageError
from lowbit.report import schema
from lowbit.report.compared import Compared
from lowbit.reporting import add_to_report

ASKED = {"windows": 2, "window_tokens": 32, "samples": 1}


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    """Two folders of the same source."""
    folder = tmp_path_factory.mktemp("made")
    for scheme in ("W4A16", "W8A16"):
        lowbit.quantize(tiny_llama, folder / scheme, scheme=scheme, group_size=32)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 20)
    return path


@pytest.fixture(scope="module")
def first(made, tiny_llama, text):
    return compare([made / "W4A16", made / "W8A16"], tiny_llama, text, **ASKED)


def test_every_model_is_measured_against_the_same_reference(first, tiny_llama):
    assert [model.label for model in first.models] == ["W4A16", "W8A16"]
    assert {model.origin for model in first.models} == {"measured"}
    assert {model.headline.reference for model in first.models} == {str(tiny_llama)}
    four, eight = (model.headline for model in first.models)
    assert four.kld_mean > eight.kld_mean > 0
    assert four.file_bytes < eight.file_bytes
    assert len(four.samples) == len(eight.samples) == 1


def test_it_is_what_evaluate_measures(first, made, tiny_llama, text):
    [row] = lowbit.evaluate(made / "W4A16", tiny_llama, text, windows=2, window_tokens=32)
    assert row.kld_mean == first.models[0].headline.kld_mean


def test_the_reports_get_figures_and_neighbours_and_are_used_next_time(first, made, tiny_llama, text, monkeypatch):
    assert len(add_to_reports(first)) == 2
    report = schema.load(made / "W4A16")
    neighbours = {each.label: each for each in report.neighbours}
    assert neighbours["W8A16"].origin == "compare"
    assert neighbours["W8A16"].kld_mean == first.models[1].headline.kld_mean
    assert report.evaluation == first.models[0].evaluations
    assert [each.scheme for each in report.neighbours].count("W8A16") == 1

    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(comparison, "evaluate", refuse)
    again = compare([made / "W4A16", made / "W8A16"], tiny_llama, text, **ASKED)
    assert {model.origin for model in again.models} == {"report"}
    assert [model.headline for model in again.models] == [model.headline for model in first.models]
    for change in ({"windows": 3}, {"window_tokens": 16}, {"protocol": "second-half"}, {"samples": 2}, {"fresh": True}):
        with pytest.raises(AssertionError, match="measured again"):
            compare([made / "W4A16", made / "W8A16"], tiny_llama, text, **(ASKED | change))


def test_another_text_or_reference_is_measured_anew(first, made, tiny_llama, text, tmp_path, monkeypatch):
    from models import make_model

    add_to_reports(first)
    measured = []
    actual = comparison.evaluate
    monkeypatch.setattr(comparison, "evaluate", lambda path, *a, **k: measured.append(path) or actual(path, *a, **k))
    other_text = tmp_path / "other.txt"
    other_text.write_text(text.read_text().upper())
    compare([made / "W4A16", made / "W8A16"], tiny_llama, other_text, **ASKED)
    assert len(measured) == 2
    compare([made / "W4A16", made / "W8A16"], make_model(tmp_path / "other", seed=5), text, **ASKED)
    assert len(measured) == 4


def test_the_source_comes_from_the_first_report(made, tiny_llama, text):
    assert compare([made / "W4A16", made / "W8A16"], text=text, **ASKED).reference == str(tiny_llama)


def test_one_model_or_one_twice_is_refused(made, tiny_llama, text, first):
    with pytest.raises(UsageError, match="cannot be compared"):
        compare([made / "W4A16"], tiny_llama, text, **ASKED)
    with pytest.raises(UsageError, match="given twice"):
        named([first.models[0], first.models[0]])
    with pytest.raises(UsageError, match="no report that names its source"):
        compare([tiny_llama, made / "W4A16"], text=text, **ASKED)


def test_labels_grow_until_they_differ(first):
    one = first.models[0]
    gptq = replace(one, path="/x/gptq", report=with_settings(one.report, method="gptq"))
    assert [model.label for model in named([one, gptq])] == ["W4A16 rtn", "W4A16 gptq"]
    elsewhere = replace(one, path="/x/other")
    labels = [model.label for model in named([one, elsewhere, first.models[1]])]
    assert labels == ["W4A16 rtn compressed-tensors W4A16", "W4A16 rtn compressed-tensors other", "W8A16"]


def with_settings(report, **changes):
    return report.model_copy(update={"settings": report.settings.model_copy(update=changes)})


def test_a_model_without_a_report_is_called_by_its_folder(first):
    run = first.models[0].headline.model_copy(update={"scheme": None})
    stranger = Compared("/x/theirs", "/x/theirs", (run,), "measured")
    assert named([stranger, first.models[1]])[0].label == "theirs"


def test_the_command_writes_page_json_and_reports(made, tiny_llama, text, tmp_path):
    page = tmp_path / "compare.html"
    arguments = ["compare", made / "W4A16", made / "W8A16", "--reference", tiny_llama, "--text", text, "--windows", 2,
                 "--window-tokens", 32, "--samples", 1, "-o", page, "--json"]  # fmt: skip
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert [model["label"] for model in found["models"]] == ["W4A16", "W8A16"]
    assert all(model["on_front"] for model in found["models"])
    assert page.read_text().startswith("<!doctype html>")
    assert any(each.origin == "compare" for each in schema.load(made / "W8A16").neighbours)


def test_the_command_prints_a_table_and_says_that_sizes_differ(made, tiny_llama, text):
    arguments = ["compare", made / "W4A16", made / "W8A16", "--reference", tiny_llama, "--text", text, "--windows", 2,
                 "--window-tokens", 32, "--samples", 0, "--no-report"]  # fmt: skip
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    assert "W8A16" in done.stdout
    assert "not of equal size" in done.stdout


def test_evaluating_again_keeps_the_neighbours(first, made, tiny_llama, text):
    add_to_reports(first)
    [row] = lowbit.evaluate(made / "W4A16", tiny_llama, text, windows=2, window_tokens=32)
    report = add_to_report(made / "W4A16", evaluation=(row,))
    assert [each.label for each in report.neighbours if each.origin == "compare"] == ["W8A16"]
