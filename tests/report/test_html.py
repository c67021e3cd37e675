"""The page says what the report says, and nothing in a report can become markup."""

import re
import subprocess
import sys
import time
import tomllib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from sample import (
    make_diagnosis,
    make_evaluation,
    make_neighbours,
    make_report,
    make_samples,
    make_tensors,
    make_verification,
    with_hostile_name,
)

from lowbit.calibrate.summary import InputSummary
from lowbit.report.page import TEMPLATES, environment, render_html
from lowbit.report.schema import Calibration, TensorEntry, write_text

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><b onmouseover="alert(1)">',
    "' onclick='alert(1)",
    "]]><!-- -->",
    "$title ${body} {{ body }} &lt;",
)


class Page(HTMLParser):
    """Elements with their attributes, text without script and style, and whether every element was closed."""

    VOID = frozenset({"meta", "input"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open, self.raw = [], [], [], {"script": "", "style": ""}
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]] += text
        else:
            self.words.append(text)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, name, **attributes):
        return sum(
            element == name and all(found.get(key) == value for key, value in attributes.items())
            for element, found in self.elements
        )


@pytest.fixture(scope="module")
def page():
    return Page(render_html(make_report()))


def test_the_page_is_well_formed(page):
    assert page.open == []
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize(
    "figure",
    [
        "demo:smollm2 in W4A16",
        "113.1 MB",
        "98.4 MB",
        "4.25",
        "0.04713 ± 0.00051",
        "1.0379 ± 0.0014",
        "88.74 ± 0.14 %",
        "14 s",
        "611.3 MB",
        "4.25 bits per weight, 113.1 MB (15 % larger than its source)",
        "keeps 88.7 % of the source's top tokens",
        "mean KLD 0.04713 ± 0.00051",
        "slightly worse than the source",
        "lowbit quantize demo:smollm2 -o out --scheme W4A16",
        "perplexity is 3.79 ± 0.14 % higher",
        "48 windows of 2048 tokens without overlap",
        "frankenstein.txt, 98,304 tokens",
        "vllm serve /models/smollm2-w4a16 --max-model-len 4096",
        "vLLM: 6 checks passed",
        "group size 64: 128 does not divide 576",
        "tensors are stored as Q4_1",
        "norms stay in 16 bits",
        "sha256 9f2c4be1d07a5e6c8b93f1a2d4470c55e01b6f88a7d2c93e4f5061728394a5b6",
        "avx512",
        "14 March 2026",
        "2026-03-14 09:26:53 UTC",
    ],
)
def test_the_figures_are_on_the_page(page, figure):
    joined = re.sub(r"\s+", "", page.text)
    assert re.sub(r"\s+", "", figure) in joined


def test_every_tensor_has_a_row_and_every_measured_one_a_marker(page):
    rows = [attributes for name, attributes in page.elements if name == "tr" and "data-kind" in attributes]
    assert len(rows) == 30 * 9 + 2
    assert sum(row["data-kind"] == "quantized" for row in rows) == 210
    markers = [attributes["data-t"] for name, attributes in page.elements if name == "use" and "data-t" in attributes]
    assert len(markers) == len(set(markers)) == 210
    assert {f"t{row}" for row in markers} == {row["id"] for row in rows if row["data-kind"] == "quantized"}


def test_the_worst_tensor_is_highest_in_the_plot(page):
    heights = {
        attributes["data-t"]: float(attributes["y"].rstrip("%"))
        for name, attributes in page.elements
        if name == "use" and "data-t" in attributes
    }
    tensors = make_report().tensors
    worst = max(range(len(tensors)), key=lambda row: tensors[row].relative_error or 0)
    assert min(heights, key=heights.get) == str(worst)
    assert tensors[worst].name == "model.layers.0.self_attn.k_proj.weight"


def test_the_page_refers_to_nothing_outside_itself(page):
    for _, attributes in page.elements:
        for name in ("src", "href", "action"):
            assert attributes.get(name) is None or attributes[name].startswith("#")
    assert "url(" not in page.raw["style"]
    assert "@import" not in page.raw["style"]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", page.raw["script"])


def test_only_our_own_script_is_allowed_to_run(page):
    policies = [
        attributes["content"] for name, attributes in page.elements if name == "meta" and "http-equiv" in attributes
    ]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'")
    assert "script-src 'sha256-" in policies[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tensor_name_stays_text(name):
    page = Page(render_html(with_hostile_name(name, notes=(name,), scheme=name, role=name)))
    assert page.open == []
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert name in page.words


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_every_other_field(text):
    report = make_report(
        blocks=1,
        versions={text: text},
        evaluation=(make_evaluation(model=text, reference=text, protocol=text),),
        lowbit=text,
    )
    source = report.source.model_copy(update={"model": text, "architecture": text, "notes": (text,)})
    settings = report.settings.model_copy(update={"scheme": text, "method": text, "given": {"ignore": (text,)}})
    check = make_verification().checks[0].model_copy(update={"rule": text, "detail": text})
    verification = make_verification().model_copy(update={"engine": text, "checks": (check,)})
    serve = (report.serve[0].model_copy(update={"engine": text, "command": text}),)
    changes = {"source": source, "settings": settings, "verification": verification, "serve": serve}
    page = Page(render_html(report.model_copy(update=changes)))
    assert page.open == []
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_samples_neighbours_and_diagnosis(text):
    spoken = make_samples()[0]
    parts = {name: getattr(spoken, name).model_copy(update={"token": text, "rest": text})
             for name in ("reference", "quantized")}  # fmt: skip
    said = spoken.model_copy(update={"prompt": text, "shared": text} | parts)
    neighbours = tuple(each.model_copy(update={"label": text}) for each in make_neighbours())
    record = InputSummary(name=text, block=0, tokens=8, low=0, step=0.1, codes="AQL/")
    calibration = Calibration(name=text, samples=1, sequence_length=8, tokens=8, inputs=(record,))
    base = make_report(blocks=1)
    settings = base.settings.model_copy(update={"calibration": calibration})
    report = base.model_copy(
        update={"evaluation": (make_evaluation(samples=(said,)),), "neighbours": neighbours, "command": text,
                "settings": settings, "diagnosis": make_diagnosis(text)}
    )  # fmt: skip
    page = Page(render_html(report))
    assert page.open == []
    assert (page.count("script"), page.count("img"), page.count("b", onmouseover="alert(1)")) == (1, 0, 0)
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def test_both_answers_are_shown_and_the_token_where_they_part_is_marked():
    page = Page(render_html(make_report(blocks=1)))
    assert page.count("mark") == 2
    for words in (
        "Why is the sky blue?",
        "process called scattering.",
        "way light travels.",
        "the same to the end, 7 tokens",
        "parts at token 7; the source gave this one 72 %",
        "the source gave this one 20 %",
    ):
        assert re.sub(r"\s+", "", words) in re.sub(r"\s+", "", page.text)


def test_a_diagnosis_has_its_verdict_map_and_commands():
    report = make_report(blocks=2, diagnosis=make_diagnosis())
    page = Page(render_html(report))
    for words in ("k_proj of block 0 has doubled scales", "lowbit quantize demo:smollm2 -o out --override k_proj=W8A16",
                  "within the noise", "a bright cold day", "Sensitivity"):  # fmt: skip
        assert re.sub(r"\s+", "", words) in re.sub(r"\s+", "", page.text)
    assert page.count("div", id="heat-sensitivity") == 1
    assert page.count("section", id="damage") == 1


def test_the_numbers_behind_the_histograms_are_in_the_table(page):
    held = [attributes["data-h"] for name, attributes in page.elements if "data-h" in attributes]
    assert len(held) == 210
    reach, values, rows, source, decoded = held[0].split(" ")
    assert (reach, values, rows, len(source), len(decoded)) == ("0.31", "16128", "28", 168, 168)


def test_characters_that_do_not_print_are_shown_as_escapes(tmp_path):
    report = with_hostile_name("model.\u202egnp.weight\x00\n\ud800")
    write_text(render_html(report), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "model.\\u202egnp.weight\\u0000\\u000a\\ud800" in text
    assert "\u202e" not in text


def test_templates_escape_what_they_print_and_mark_nothing_safe():
    drawn = environment().from_string('<b title="{{ x }}">{{ x }}{{ y }}</b>').render(x='<i>"&\u202e\u00a0', y=None)
    assert drawn == '<b title="&lt;i&gt;&#34;&amp;\\u202e\u00a0">&lt;i&gt;&#34;&amp;\\u202e\u00a0</b>'
    assert environment().autoescape is True
    for path in TEMPLATES.glob("*.j2"):
        assert not re.search(r"\|\s*safe|autoescape|\|\s*xmlattr|raw", path.read_text()), path


def test_a_misspelt_field_of_a_template_is_an_error():
    with pytest.raises(UndefinedError):
        environment().from_string("{{ report.sorce }}").render(report=make_report(blocks=1))


def test_jinja_is_imported_when_a_page_is_written_and_the_files_of_the_page_lie_in_the_package():
    script = "import sys, lowbit.report.page, lowbit.reporting; print('jinja2' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
    files = {path.name for path in resources.files("lowbit.report").joinpath("templates").iterdir()}
    assert {"page.html.j2", "report.html.j2", "comparison.html.j2", "report.css", "report.js", "page.js"} <= files
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["scikit-build"]["wheel"]["packages"] == ["src/lowbit"]
    assert any(each.startswith("jinja2") for each in project["project"]["dependencies"])


def test_a_figure_that_nobody_measured_has_no_row():
    compared = [name for name in make_evaluation().model_dump() if name.startswith(("kld", "same", "ppl_r", "delta"))]
    alone = make_evaluation(reference=None, reference_from="none", **dict.fromkeys(compared))
    text = Page(render_html(make_report(blocks=2, evaluation=(alone,)))).text
    assert "KL divergence, mean" not in text
    assert "23.82" in text


def test_wide_tables_say_so(page):
    """Nothing is hidden at phone width: what does not fit is scrolled to, and a line says so."""
    assert page.count("p", **{"class": "sideways"}) == 3
    narrow = page.raw["style"][page.raw["style"].index("@media (max-width: 600px)") :]
    narrow = narrow[: narrow.index("@media print")]
    hidden = [line for line in narrow.splitlines() if "display: none" in line]
    assert [line.split("{")[0].strip() for line in hidden] == [".quality .alternate"]  # every second tick of an axis


def test_a_failed_verification_leads_the_page():
    page = Page(render_html(make_report(blocks=2, verification=make_verification(failing=True))))
    assert "vLLM: 1 of 7 checks failed" in page.text
    assert "vLLM would refuse this checkpoint or misread it." in page.text
    assert "768 columns per rank" in page.text
    rules = [attributes.get("class") for name, attributes in page.elements if name == "li" and "class" in attributes]
    assert rules[0] == "bad"


def test_what_was_not_done_is_said_and_how_to_do_it():
    text = Page(render_html(make_report(blocks=2, verification=None, evaluation=(), serve=()))).text
    assert "not verified against an engine" in text
    assert "has not been measured yet" in text
    assert "lowbit evaluate OUT --reference demo:smollm2" in text
    assert "lowbit verify OUT --engine vllm" in text


def test_an_evaluation_without_reference_claims_no_comparison():
    compared = [name for name in make_evaluation().model_dump() if name.startswith(("kld", "same", "ppl_r", "delta"))]
    alone = make_evaluation(reference=None, reference_from="none", **dict.fromkeys(compared))
    text = Page(render_html(make_report(blocks=2, evaluation=(alone,)))).text
    assert "it was not compared with the source model" in text
    assert "top tokens" not in text
    assert "worse than the source" not in text


def test_several_evaluations_stand_side_by_side_under_their_names():
    runs = (make_evaluation(scheme="FP8"), make_evaluation(scheme="FP8", activations="simulated", kld_mean=0.0777))
    page = Page(render_html(make_report(blocks=2, evaluation=runs)))
    assert "FP8, activations rounded" in page.text
    assert "0.07770 ±" in page.text.replace("\u00a0", " ")


def test_a_change_within_twice_its_error_is_called_unmeasurable():
    evaluation = make_evaluation(ppl_ratio=1.001, ppl_ratio_se=0.0009)
    assert "did not change measurably" in Page(render_html(make_report(blocks=2, evaluation=(evaluation,)))).text


def test_unrounded_activations_are_flagged_where_the_scheme_rounds_them():
    settings = make_report(blocks=1).settings
    warning = "activations were not rounded in the evaluation"
    dynamic = settings.model_copy(update={"scheme": "FP8_DYNAMIC"})
    assert warning in Page(render_html(make_report(blocks=1, settings=dynamic))).text
    assert warning not in Page(render_html(make_report(blocks=1, settings=settings))).text


def test_a_larger_output_is_called_larger():
    assert "15 % larger than its source" in Page(render_html(make_report())).text.replace("\u00a0", " ")


def test_a_much_larger_output_is_a_multiple():
    totals = make_report(blocks=1).totals.model_copy(update={"bytes_in": 100, "bytes_out": 480})
    assert "4.8 times the size of its source" in Page(render_html(make_report(blocks=1, totals=totals))).text


def test_exact_and_outside_tensors_are_plotted_too():
    head = TensorEntry(name="lm_head.weight", role="lm_head", shape=(8, 8), scheme="W8A16", bits_per_weight=8.25,
                       bytes=66, relative_error=0.0, max_error=0.0)  # fmt: skip
    page = Page(render_html(make_report(blocks=2, tensors=(*make_tensors(2), head))))
    assert "exact" in page.text
    assert page.count("use", y="100.00%") == 1


def test_a_report_without_any_tensor_renders():
    page = Page(render_html(make_report(blocks=1, tensors=())))
    assert "No tensor has a measured error" in page.text
    assert page.open == []


def test_a_model_of_32_blocks_stays_under_two_megabytes():
    runs = (make_evaluation(), make_evaluation(activations="simulated"))
    text = render_html(make_report(blocks=32, evaluation=runs, diagnosis=make_diagnosis()))
    assert len(text.encode()) < 600_000


def test_the_page_of_two_thousand_tensors_takes_no_more_for_each_and_stays_small():
    reports = [make_report(blocks=blocks) for blocks in (222, 222 // 6)]
    assert len(reports[0].tensors) == 2000

    def cpu_time(report):
        times = []
        for _ in range(3):
            began = time.process_time()
            render_html(report)
            times.append(time.process_time() - began)
        return min(times)

    large, small = map(cpu_time, reports)
    assert large < 3 * 6 * small
    assert len(render_html(reports[0]).encode()) < 2_000_000
