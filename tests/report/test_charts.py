"""Charts and heat maps: places and colours are those of the figures, and what was not measured is not drawn."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from sample import draw, make_diagnosis, make_evaluation, make_histogram, make_report, make_tensors

from lowbit.calibrate.summary import InputSummary
from lowbit.report.chart import HEIGHT, Mark, on_front, quality_chart, report_marks, size_rows
from lowbit.report.heatmap import (
    FAITHFUL,
    LEAST_DECIBELS,
    LEAST_NATS,
    ROW,
    STEPS,
    Cell,
    activation_strips,
    channel_bins,
    error_maps,
    heat_map,
    sensitivity,
)
from lowbit.report.page import render_html
from lowbit.report.plot import bins_of, error_plot, outline, weights_figure
from lowbit.report.summary import LEVELS, quality_limits, quality_words
from lowbit.rounding.histogram import BINS

A = Mark("A", 100_000_000, 4.0, 0.2, 0.01)
B = Mark("B", 100_000_000, 4.0, 0.1, 0.01)
C = Mark("C", 150_000_000, 8.0, 0.01, 0.001)
D = Mark("D", 160_000_000, 8.5, 0.02, 0.001)
PLANNED = Mark("P", 120_000_000, 5.0)


def test_the_front_is_what_none_beats_in_both():
    marks = [A, B, C, D, PLANNED]
    assert [mark.label for mark in marks if on_front(mark, marks)] == ["B", "C"]


def test_equal_models_are_both_on_the_front():
    twin = Mark("B2", B.bytes, B.bits_per_weight, B.kld, B.kld_se)
    assert on_front(B, [B, twin])
    assert on_front(twin, [B, twin])


def test_the_chart_needs_two_measured_models():
    assert quality_chart([A, PLANNED]) is None
    assert quality_chart([]) is None
    assert quality_chart([A, B]) is not None


def spots(chart: str) -> dict[str, tuple[float, float]]:
    """Label → (percent across, pixels down), from the titles of the markers."""
    found = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)" class="spot[^"]*"><g>.*?<title>(\w+):', chart)
    return {label: (float(x), float(y)) for x, y, label in found}


def test_larger_is_to_the_right_and_worse_is_higher():
    at = spots(draw("quality_chart", quality_chart([A, B, C, D, PLANNED])))
    assert set(at) == {"A", "B", "C", "D"}
    assert at["A"][0] == at["B"][0] < at["C"][0] < at["D"][0]
    assert at["A"][1] < at["B"][1] < at["D"][1] < at["C"][1]
    assert all(0 < x < 100 and 0 < y < HEIGHT for x, y in at.values())


def test_divergence_is_logarithmic():
    marks = [Mark(name, size, 4, kld) for name, size, kld in (("a", 10, 1.0), ("b", 20, 0.1), ("c", 30, 0.01))]
    at = spots(draw("quality_chart", quality_chart(marks)))
    assert at["b"][1] - at["a"][1] == pytest.approx(at["c"][1] - at["b"][1], abs=0.2)


def test_a_divergence_of_zero_sits_on_the_floor():
    at = spots(draw("quality_chart", quality_chart([A, Mark("Z", 200_000_000, 16, 0.0, 0.0)])))
    assert at["Z"][1] == HEIGHT


def test_a_planned_size_has_no_quality():
    chart, table = draw("quality_chart", quality_chart([A, C, PLANNED])), draw("size_table", size_rows([A, C, PLANNED]))
    assert "P would be" in chart
    assert "P" not in spots(chart)
    row = table[table.index(">P<") :]
    assert row[: row.index("</tr>")].count("–") == 2


def test_labels_of_neighbouring_points_keep_apart():
    marks = [Mark(f"m{i}", 100_000_000 + i, 4, 0.1 + 0.0001 * i) for i in range(6)]
    chart = draw("quality_chart", quality_chart(marks))
    down = sorted(float(y) for y in re.findall(r'<text x="[\d.]+%" y="([\d.]+)" dx', chart))
    assert len(down) == 6
    assert min(later - earlier for earlier, later in pairwise(down)) >= 16.9


def test_a_report_without_neighbours_or_with_one_model_has_no_chart():
    assert 'id="quality"' not in render_html(make_report(blocks=1, neighbours=()))
    report = make_report(blocks=1)
    planned = render_html(report.model_copy(update={"neighbours": report.neighbours[:1]}))
    assert 'class="quality"' not in planned
    assert "lowbit compare OUT OTHER --reference demo:smollm2" in planned
    assert 'class="quality"' in render_html(report)


def test_the_model_of_the_report_is_the_headline_evaluation():
    runs = (make_evaluation(kld_mean=0.3), make_evaluation(kld_mean=0.4, activations="simulated"))
    own = report_marks(make_report(blocks=1, evaluation=runs))[0]
    assert (own.own, own.kld) == (True, 0.4)


@pytest.mark.parametrize(
    ("kld", "error", "expected"),
    [
        (0.001, 0.0001, "practically the same as the source"),
        (0.005, 0.0, "practically the same as the source"),
        (0.0051, 0.0, "very close to the source"),
        (0.19, 0.004, "noticeably worse than the source"),
        (0.1, 0.004, "slightly worse than the source or noticeably worse than the source"),
        (7.0, 0.1, "much worse than the source"),
        (-0.0001, 0.001, "practically the same as the source"),
    ],
)
def test_the_verdict_follows_the_limits(kld, error, expected):
    assert quality_words(make_evaluation(kld_mean=kld, kld_se=error)) == expected


def test_the_limits_are_on_the_page():
    text, named = render_html(make_report(blocks=1)), quality_limits()
    for (limit, words), (span, called) in zip(LEVELS, named, strict=True):
        assert words == called
        assert f"<tr><td>{span}</td><td>{called}</td></tr>" in text
        assert math.isinf(limit) or f"{limit:g}" in span


def shades(picture: str) -> dict[str, int]:
    """Row of the tensor table → step of colour."""
    return {row: int(step) for step, row in re.findall(r'class="h(\d)" data-t="(\d+)"', picture)}


def test_the_worst_cell_is_the_darkest():
    tensors = make_tensors(30)
    found = shades("".join(draw("heat_map", each) for each in error_maps(tensors)))
    assert len(found) == 210
    worst = max(range(len(tensors)), key=lambda row: tensors[row].relative_error or 0)
    assert found[str(worst)] == STEPS - 1 == max(found.values())
    assert min(found.values()) == 0


def test_of_experts_the_cell_shows_the_worst():
    cells = [Cell(0, "up_proj", value, row) for row, value in enumerate((0.01, 0.5, 0.02))] + [
        Cell(1, "up_proj", 0.01, 3)
    ]
    found = shades(draw("heat_map", heat_map("m", "Errors", cells, str)))
    assert found == {"1": STEPS - 1, "3": 0}


def test_linear_maps_start_at_zero_and_negative_is_zero():
    cells = [Cell(block, "q_proj", value, block) for block, value in enumerate((-0.5, 0.0, 0.45, 0.9))]
    found = shades(draw("heat_map", heat_map("m", "KLD", cells, str, logarithmic=False)))
    assert found == {"0": 0, "1": 0, "2": 4, "3": STEPS - 1}


def test_two_decibels_of_noise_look_like_noise():
    """The colours span LEAST_DECIBELS whatever the tensors do, so nothing of a sound model is dark."""
    cells = [Cell(block, "q_proj", 0.01 * 10 ** (0.2 * block / 19), block) for block in range(20)]
    view = heat_map("m", "Errors", cells, str)
    assert view is not None
    assert max(shades(draw("heat_map", view)).values()) <= 2
    assert float(view.most) == pytest.approx(0.01 * 10 ** (LEAST_DECIBELS / 10), rel=0.03)


def test_what_is_as_good_as_exact_is_pale_whatever_else_the_map_holds():
    """Q8_0 beside Q5_0: 0.003 % and 0.2 % of the squared norm."""
    cells = [Cell(block, role, error, None) for block in range(30)
             for role, error in (("attn_v", 3e-5), ("attn_q", 2e-3))]  # fmt: skip
    view = heat_map("m", "Errors", cells, str)
    assert view is not None
    assert {cell.step for cell in view.cells} == {0, 3}
    assert view.least == f"{FAITHFUL} or less"


def test_a_contribution_that_nobody_would_notice_is_pale():
    view = heat_map("m", "KLD", [Cell(0, "q_proj", LEAST_NATS / 10, 0)], str, logarithmic=False)
    assert shades(draw("heat_map", view)) == {"0": 0}
    view = heat_map("m", "KLD", [Cell(0, "q_proj", 2 * LEAST_NATS, 0)], str, logarithmic=False)
    assert shades(draw("heat_map", view)) == {"0": STEPS - 1}


def test_rows_of_nothing_are_left_out_by_name_and_columns_stay():
    cells = [Cell(0, "q_proj", 0.1, 0), Cell(1, "up_proj", 0.0, 1), Cell(2, "up_proj", -0.2, 2)]
    view = heat_map("m", "KLD", cells, str, logarithmic=False)
    assert view is not None
    assert (view.roles, view.left_out, view.columns) == (["q_proj"], ["up_proj"], 3)
    drawn = draw("heat_map", view)
    assert "stands out of the noise: up_proj." in drawn
    assert f'height="{ROW + 22}"' in drawn
    assert heat_map("m", "KLD", cells[1:], str, logarithmic=False) is None


def test_sensitivity_has_the_sets_that_matter():
    report = make_report(blocks=2)
    view = sensitivity(make_diagnosis().contributions, report.tensors)
    assert view is not None
    assert (view.roles, view.left_out) == (["qkv_proj"], ["down_proj"])


def test_many_blocks_are_said_to_be_wider_than_a_telephone():
    narrow, wide = (draw("heat_map", error_maps(make_tensors(blocks))[0]) for blocks in (30, 80))
    assert 'class="sideways"' not in narrow
    assert '<p class="sideways">80 blocks, wider than the screen' in wide
    assert '<p class="sideways">81 columns' in draw(
        "error_plot", error_plot([*make_tensors(80), make_tensors(1)[3].model_copy(update={"block": None})])
    )


def test_nothing_measured_draws_nothing():
    assert heat_map("m", "Errors", [], str) is None
    assert error_maps(make_tensors(0)) == []
    bare = [tensor.model_copy(update={"histogram": None}) for tensor in make_tensors(1)]
    assert weights_figure(bare) is None
    assert activation_strips(()) is None


def test_exact_tensors_are_the_palest():
    cells = [Cell(0, "q_proj", 0.0, 0), Cell(1, "q_proj", 0.0, 1)]
    assert set(shades(draw("heat_map", heat_map("m", "Errors", cells, str))).values()) == {0}


def test_the_outline_has_the_heights_of_the_counts():
    histogram = make_histogram(0.01)
    shares = bins_of(histogram.source)
    assert max(shares) == shares[BINS // 2] == 1
    path = outline(histogram.source)
    heights = [float(y) for y in re.findall(r"V([\d.]+)H", path)]
    assert heights == pytest.approx([100 - 96 * share**0.5 for share in shares], abs=0.051)


def test_the_tensor_of_largest_error_is_shown_first():
    tensors = make_tensors(3)
    worst = max(range(len(tensors)), key=lambda row: tensors[row].relative_error or 0)
    assert f'data-row="{worst}"' in draw("weights_figure", weights_figure(tensors))


def record(low: float, step: float, codes: str, name: str = "model.layers.0.self_attn.q_proj") -> InputSummary:
    return InputSummary(name=name, block=0, tokens=2048, low=low, step=step, codes=codes)


def test_channels_are_counted_by_quarter_doublings_of_their_rms():
    codes = "AAEBAv8="  # 0, 1, 1, 2, 255: a channel of zeros, then log2 mean x² of low, low, low + step, low + 254 step
    bins = channel_bins(record(-4.0, 4 / 254, codes))
    assert bins == {-8: 3, 0: 1}


@pytest.mark.parametrize("codes", ["not base64!", "AAAA", ""])
def test_damaged_statistics_draw_nothing(codes):
    assert activation_strips([record(0.0, 1.0, codes)]) is None


def test_statistics_of_absurd_range_stay_small():
    strips = activation_strips([record(-1e9, 1e7, "AQL/"), record(0.0, 3.0, "AQL/")])
    assert strips is not None
    assert len(draw("strips", strips)) < 20_000
