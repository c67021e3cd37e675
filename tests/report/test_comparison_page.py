"""The page of several models: every figure, who beats whom, that sizes differ; hostile text stays text."""

from __future__ import annotations

import re

import pytest
from sample import draw, make_evaluation, make_report
from test_html import HOSTILE, Page

from cache_figures import make_cache
from lowbit.report.caches import cache_rows
from lowbit.report.compared import Compared, Comparison, sizes_differ, summary
from lowbit.report.page import render_comparison
from lowbit.report.plot import block_errors, error_curves


def model(label, size, kld, report=True, **changes):
    run = make_evaluation(size, kld_mean=kld, kld_se=0.001, **changes)
    return Compared(label, f"/models/{label}", (run,), "measured", make_report(3) if report else None)


def comparison(*models):
    return Comparison("demo:smollm2", models or (model("A", 113_000_000, 0.2), model("B", 163_000_000, 0.02)))


@pytest.fixture(scope="module")
def page():
    simulated = make_evaluation(163_000_000, kld_mean=0.031, activations="simulated", kld_p99=0.777)
    alone = make_evaluation(163_000_000, kld_mean=0.02, samples=())
    other = Compared("B", "/models/B", (alone, simulated), "report", make_report(3))
    return Page(render_comparison(comparison(model("A", 113_000_000, 0.2), other, model("C", 90_000_000, 0.9, False))))


def test_the_page_is_well_formed_and_self_contained(page):
    assert page.open == []
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    for _, attributes in page.elements:
        for name in ("src", "href", "action"):
            assert attributes.get(name) is None or attributes[name].startswith("#")
    targets = {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes}
    assert targets <= set(identities)


@pytest.mark.parametrize(
    "words",
    [
        "demo:smollm2 in 3 versions",
        "0.2000 ± 0.0010",
        "0.777",
        "weights alone",
        "activations rounded",
        "from its report",
        "measured now",
        "113.0 MB",
        "Why is the sky blue?",
        "lowbit did not make it",
        "lowbit quantize demo:smollm2 -o out",
    ],
)
def test_the_figures_are_on_the_page(page, words):
    assert re.sub(r"\s+", "", words) in re.sub(r"\s+", "", page.text)


def test_models_of_different_size_are_said_to_be():
    models = comparison().models
    assert "44\u00a0% more than A" in sizes_differ(models)
    assert "of equal size" in sizes_differ((models[0], model("C", 113_500_000, 0.3)))


def test_who_is_closest_smallest_and_beaten():
    words = summary((model("A", 100, 0.2), model("B", 100, 0.1), model("C", 200, 0.01)))
    assert words.startswith("Closest to the source is C")
    assert "B beats A" in words
    assert "beats C" not in words
    assert "beats B" not in words


def test_a_difference_within_the_error_beats_nobody():
    assert "beats" not in summary((model("A", 100, 0.2), model("B", 100, 0.1985)))


def test_one_model_can_be_closest_and_smallest():
    assert "and it is the smallest" in summary((model("A", 100, 0.1), model("B", 200, 0.2)))


def test_block_errors_are_weighted_by_the_number_of_weights():
    tensors = make_report(2).tensors
    members = [tensor for tensor in tensors if tensor.block == 1 and tensor.relative_error is not None]
    weights = [tensor.shape[0] * tensor.shape[1] for tensor in members]
    expected = sum(w * (t.relative_error or 0) for w, t in zip(weights, members, strict=True)) / sum(weights)
    assert block_errors(tensors)[1] == pytest.approx(expected)
    assert set(block_errors(tensors)) == {0, 1}


def test_curves_need_a_report():
    stranger = comparison(model("A", 1, 0.1, report=False), model("B", 2, 0.1, report=False))
    assert 'id="errors"' not in render_comparison(stranger)
    assert error_curves({}) is None
    tensors = {each.label: each.report.tensors for each in comparison().models if each.report}
    assert draw("error_curves", error_curves(tensors)).count("<polyline") == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    sample = make_evaluation().samples[0]
    spoken = sample.quantized.model_copy(update={"token": text, "rest": text}) if sample.quantized else None
    said = sample.model_copy(update={"prompt": text, "shared": text, "quantized": spoken})
    run = make_evaluation(model=text, scheme=text, reference=text, protocol=text, notes=(text,), samples=(said,))
    report = make_report(1, command=text)
    other = Compared(text, text, (run,), "measured", report)
    made = Page(render_comparison(Comparison(text, (other, Compared("B", text, (run,), "report", None)))))
    assert made.open == []
    assert (made.count("script"), made.count("img")) == (1, 0)
    assert not any(key.startswith("on") for _, attributes in made.elements for key in attributes)


def with_caches(label, *rows):
    made = model(label, 113_000_000, 0.2)
    return Compared(label, made.path, made.evaluations, "report", make_report(2, kv_cache=rows))


def test_caches_of_the_reports_are_a_row_each():
    models = (with_caches("A", make_cache("q8_0", 0.0002), make_cache("q4_0", 0.0317)),
              with_caches("B", make_cache("q4_0", 0.0471)), model("C", 90_000_000, 0.9, False))  # fmt: skip
    rows = cache_rows(models)
    assert [row.name for row in rows] == ["q8_0 at 512", "q4_0 at 512"]
    assert [cell.replace("\u00a0", " ").split(" ")[0] for cell in rows[1].cells] == ["0.0317", "0.0471", "–"]
    made = Page(render_comparison(comparison(*models)))
    assert made.open == []
    assert "q4_0at512" in re.sub(r"\s+", "", made.text)
    assert "0.0471" in made.text
    assert [each["kv_cache"] != [] for each in comparison(*models).to_dict()["models"]] == [True, True, False]


@pytest.mark.parametrize(
    "other", [{"context": 1024}, {"protocol": "second-half"}, {"windows": 8}, {"bos": True}, {"text": "cd"}]
)
def test_figures_that_were_measured_otherwise_stand_in_another_row(other):
    if "text" in other:
        other = {"text": make_cache("q4_0", 0.03).text.model_copy(update={"sha256": "cd" * 32})}
    models = with_caches("A", make_cache("q4_0", 0.03)), with_caches("B", make_cache("q4_0", 0.04, **other))
    assert [[cell is not None for cell in row.figures] for row in cache_rows(models)] == [[True, False], [False, True]]


def test_without_figures_of_caches_there_is_no_section():
    assert 'id="kv-cache"' not in render_comparison(comparison())
    assert 'id="kv-cache"' in render_comparison(
        comparison(with_caches("A", make_cache("q4_0", 0.03)), model("B", 9, 1))
    )
