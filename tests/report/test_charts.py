"""Charts and heat maps: places and colours are those of the figures, and what was not measured is not drawn."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from sample import make_evaluation, make_histogram, make_report, make_tensors

from lowbit.report import verdict
from lowbit.report.activations import activation_strips, channel_bins
from lowbit.report.chart import HEIGHT, Mark, on_front, quality_chart, quality_table
from lowbit.report.heatmap import STEPS, Cell, heat_map
from lowbit.report.histogram import bins_of, outline, weights_figure
from lowbit.report.quality import heat_maps, report_marks, size_and_quality
from lowbit.report.schema import BINS, InputRecord

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
    at = spots(quality_chart([A, B, C, D, PLANNED]) or "")
    assert set(at) == {"A", "B", "C", "D"}
    assert at["A"][0] == at["B"][0] < at["C"][0] < at["D"][0]
    assert at["A"][1] < at["B"][1] < at["D"][1] < at["C"][1]
    assert all(0 < x < 100 and 0 < y < HEIGHT for x, y in at.values())


def test_divergence_is_logarithmic():
    marks = [Mark(name, size, 4, kld) for name, size, kld in (("a", 10, 1.0), ("b", 20, 0.1), ("c", 30, 0.01))]
    at = spots(quality_chart(marks) or "")
    assert at["b"][1] - at["a"][1] == pytest.approx(at["c"][1] - at["b"][1], abs=0.2)


def test_a_divergence_of_zero_sits_on_the_floor():
    at = spots(quality_chart([A, Mark("Z", 200_000_000, 16, 0.0, 0.0)]) or "")
    assert at["Z"][1] == HEIGHT


def test_a_planned_size_has_no_quality():
    chart, table = quality_chart([A, C, PLANNED]) or "", quality_table([A, C, PLANNED])
    assert "P would be" in chart
    assert "P" not in spots(chart)
    row = table[table.index(">P<") :]
    assert row[: row.index("</tr>")].count("–") == 2


def test_labels_of_neighbouring_points_keep_apart():
    marks = [Mark(f"m{i}", 100_000_000 + i, 4, 0.1 + 0.0001 * i) for i in range(6)]
    chart = quality_chart(marks) or ""
    down = sorted(float(y) for y in re.findall(r'<text x="[\d.]+%" y="([\d.]+)" dx', chart))
    assert len(down) == 6
    assert min(later - earlier for earlier, later in pairwise(down)) >= 16.9


def test_a_report_without_neighbours_or_with_one_model_has_no_chart():
    assert size_and_quality(make_report(blocks=1, neighbours=())) is None
    report = make_report(blocks=1)
    planned = report.model_copy(update={"neighbours": report.neighbours[:1]})
    section = size_and_quality(planned) or ""
    assert 'class="quality"' not in section
    assert "lowbit compare OUT OTHER --reference demo:smollm2" in section
    assert 'class="quality"' in (size_and_quality(report) or "")


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
    assert verdict.words(make_evaluation(kld_mean=kld, kld_se=error)) == expected


def test_the_limits_are_on_the_page():
    text = verdict.explained()
    for limit, words in verdict.LEVELS:
        assert words in text
        assert math.isinf(limit) or f"{limit:g}" in text


def shades(picture: str) -> dict[str, int]:
    """Row of the tensor table → step of colour."""
    return {row: int(step) for step, row in re.findall(r'class="h(\d)" data-t="(\d+)"', picture)}


def test_the_worst_cell_is_the_darkest():
    tensors = make_tensors(30)
    found = shades(heat_maps(tensors) or "")
    assert len(found) == 210
    worst = max(range(len(tensors)), key=lambda row: tensors[row].relative_error or 0)
    assert found[str(worst)] == STEPS - 1 == max(found.values())
    assert min(found.values()) == 0


def test_of_experts_the_cell_shows_the_worst():
    cells = [Cell(0, "up_proj", value, row) for row, value in enumerate((0.01, 0.5, 0.02))] + [
        Cell(1, "up_proj", 0.01, 3)
    ]
    found = shades(heat_map("m", "Errors", cells, str) or "")
    assert found == {"1": STEPS - 1, "3": 0}


def test_linear_maps_start_at_zero_and_negative_is_zero():
    cells = [Cell(block, "q_proj", value, block) for block, value in enumerate((-0.5, 0.0, 0.45, 0.9))]
    found = shades(heat_map("m", "KLD", cells, str, logarithmic=False) or "")
    assert found == {"0": 0, "1": 0, "2": 4, "3": STEPS - 1}


def test_nothing_measured_draws_nothing():
    assert heat_map("m", "Errors", [], str) is None
    assert heat_maps(make_tensors(0)) is None
    bare = [tensor.model_copy(update={"histogram": None}) for tensor in make_tensors(1)]
    assert weights_figure(bare) is None
    assert activation_strips(()) is None


def test_exact_tensors_are_the_palest():
    cells = [Cell(0, "q_proj", 0.0, 0), Cell(1, "q_proj", 0.0, 1)]
    assert set(shades(heat_map("m", "Errors", cells, str) or "").values()) == {0}


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
    assert f'data-row="{worst}"' in (weights_figure(tensors) or "")


def record(low: float, step: float, codes: str, name: str = "model.layers.0.self_attn.q_proj") -> InputRecord:
    return InputRecord(name=name, block=0, tokens=2048, low=low, step=step, codes=codes)


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
    assert len(strips) < 20_000
