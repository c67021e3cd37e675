"""The page in headless Chromium: no errors, no sideways scrolling, and every control does what it says."""

import re

import pytest
from sample import make_evaluation, make_report, with_hostile_name

from browser import CHROMIUM, chromium, probe
from lowbit.calibrate.summary import InputSummary
from lowbit.report.compared import Compared, Comparison
from lowbit.report.page import render_comparison, render_html
from lowbit.report.schema import Calibration

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
]


@pytest.fixture(scope="module")
def html():
    return render_html(make_report())


@pytest.mark.parametrize(
    "width", [pytest.param(1280, marks=pytest.mark.slow), 390, pytest.param(320, marks=pytest.mark.slow)]
)
def test_nothing_overflows_sideways(html, tmp_path, width):
    found = probe(html, tmp_path, width=width)
    assert found["width"] == width
    assert found["content"] <= width


def test_the_page_runs_under_its_own_policy_without_complaint(html, tmp_path):
    (tmp_path / "report.html").write_text(html)
    ran = chromium(tmp_path, "--dump-dom", (tmp_path / "report.html").as_uri())
    assert "CONSOLE" not in ran.stderr
    assert '<html lang="en" class="live">' in ran.stdout


def test_a_hostile_name_runs_nothing(tmp_path):
    (tmp_path / "report.html").write_text(render_html(with_hostile_name("<script>document.title='ran'</script>")))
    ran = chromium(tmp_path, "--dump-dom", (tmp_path / "report.html").as_uri())
    assert "<title>demo:smollm2 in W4A16" in ran.stdout
    assert "CONSOLE" not in ran.stderr


def test_the_address_finds_a_tensor(html, tmp_path):
    script = """
      found.hits = document.querySelectorAll("#plot .hit").length;
      found.rows = shown();
      found.boxes = [...document.querySelectorAll(".find")].map((box) => box.value);
      found.tip = $("#tip").textContent;
      found.counts = [...document.querySelectorAll(".found")].map((output) => output.textContent);"""
    found = probe(html, tmp_path, script, fragment="#find=layers.3.mlp.down_proj")
    assert found["hits"] == 1
    assert found["rows"] == ["model.layers.3.mlp.down_proj.weight"]
    assert found["boxes"] == ["layers.3.mlp.down_proj"] * 2
    assert found["tip"].startswith("model.layers.3.mlp.down_proj.weight")
    assert found["counts"] == ["1 of 210 tensors", "1 of 272 tensors"]


def test_typing_filters_and_names_the_finding_in_the_address(html, tmp_path):
    script = """
      const type = (text) => { $("#find-table").value = text; $("#find-table").dispatchEvent(new Event("input")); };
      type("layers.1. K_PROJ");
      found.rows = shown();
      found.address = location.hash;
      type("no such tensor");
      found.none = [...document.querySelectorAll(".found")].map((output) => output.textContent);
      type("");
      found.all = shown().length;
      found.cleared = location.hash;"""
    found = probe(html, tmp_path, script)
    assert found["rows"] == ["model.layers.1.self_attn.k_proj.weight"]
    assert found["address"] == "#find=layers.1.%20K_PROJ"
    assert found["none"] == ["no tensor matches"] * 2
    assert found["all"] == 272
    assert found["cleared"] == ""


def test_the_table_sorts_by_number_and_by_name(html, tmp_path):
    script = """
      const header = (i) => $(`#tensors-table thead th:nth-child(${i})`);
      const click = (i) => header(i).querySelector("button").click();
      click(4); found.worst = shown()[0]; found.direction = header(4).ariaSort;
      click(4); found.unmeasured = shown()[0];
      click(1); found.first = shown().slice(0, 4); found.reset = header(4).ariaSort;"""
    found = probe(html, tmp_path, script)
    assert found["worst"] == "model.layers.0.self_attn.k_proj.weight"
    assert (found["direction"], found["reset"]) == ("descending", "none")
    assert found["unmeasured"] == "model.embed_tokens.weight"
    assert found["first"][1] == "model.layers.0.input_layernorm.weight"


def test_roles_and_kinds_filter(html, tmp_path):
    script = """
      const down = $('.legend [data-role="down_proj"]');
      down.click();
      found.pressed = down.ariaPressed; found.hits = document.querySelectorAll("#plot .points .hit").length;
      found.rows = shown().length;
      down.click();
      $("#kind").value = "alone"; $("#kind").dispatchEvent(new Event("change"));
      found.alone = shown().length;"""
    found = probe(html, tmp_path, script)
    assert (found["pressed"], found["hits"], found["rows"], found["alone"]) == ("true", 30, 30, 62)


def test_the_plot_answers_to_keys_pointer_and_click(html, tmp_path):
    script = """
      const plot = $("#plot");
      const press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      press("ArrowRight"); found.first = $("#tip b").textContent;
      press("ArrowRight"); found.right = $("#tip b").textContent;
      press("ArrowDown"); found.down = $("#tip b").textContent;
      press("Enter"); found.address = location.hash;
      press("Escape"); found.hidden = $("#tip").hidden;
      const mark = $("#plot .points use:last-child").getBoundingClientRect();
      const at = { clientX: mark.left + mark.width / 2, clientY: mark.top + mark.height / 2, bubbles: true };
      plot.dispatchEvent(new PointerEvent("pointermove", at)); found.pointed = $("#tip b").textContent;"""
    found = probe(html, tmp_path, script)
    assert found["first"] == "model.layers.0.self_attn.q_proj.weight"
    assert found["right"] == "model.layers.1.self_attn.q_proj.weight"
    assert found["down"] == "model.layers.1.self_attn.k_proj.weight"
    assert re.fullmatch(r"#t\d+", found["address"])
    assert found["hidden"] is True
    assert found["pointed"] == "model.layers.29.mlp.down_proj.weight"


def test_any_tensor_can_be_picked_by_list_arrow_and_heat_map(html, tmp_path):
    script = """
      const pick = $("#pick"), shape = () => $("#h-source").getAttribute("d") + $("#h-decoded").getAttribute("d");
      const facts = () => [...document.querySelectorAll("#h-facts dd")].map((dd) => dd.textContent);
      found.options = pick.options.length;
      found.first = $("#picked").textContent; found.before = shape(); found.drawn = facts();
      $("#pick-next").click(); found.next = $("#picked").textContent;
      pick.value = [...pick.options].find((option) => option.text === "model.layers.2.mlp.up_proj.weight").value;
      pick.dispatchEvent(new Event("change"));
      found.picked = $("#picked").textContent; found.facts = facts(); found.label = $("#h-picture").ariaLabel;
      found.changed = shape() !== found.before;
      const cell = document.querySelector("#heat-weights rect:not(.here)");
      cell.dispatchEvent(new MouseEvent("click", { bubbles: true }));
      found.clicked = $("#picked").textContent; found.here = cell.classList.contains("here");
      found.title = cell.textContent;
      pick.focus(); found.focus = document.activeElement === pick;"""
    found = probe(html, tmp_path, script)
    assert found["options"] == 210
    assert found["first"] == "model.layers.0.self_attn.k_proj.weight"
    assert found["next"] == "model.layers.0.self_attn.v_proj.weight"
    assert found["picked"] == "model.layers.2.mlp.up_proj.weight"
    assert found["facts"][1:4] == ["W4A16", "4.25", "1536\u00a0×\u00a0576"]
    assert "up_proj" in found["label"]
    assert found["changed"]
    assert found["clicked"] == "model.layers.0.self_attn.q_proj.weight"
    assert found["title"].startswith("block 0, q_proj")
    assert found["here"]
    assert found["focus"]


def test_picking_a_tensor_marks_the_activations_it_reads(tmp_path):
    record = InputSummary(name="model.layers.1.mlp_input", block=1, tokens=64, low=-3, step=0.1, codes="AQL/")
    report = make_report(blocks=2)
    tensors = tuple(
        tensor.model_copy(update={"reads": record.name}) if tensor.role == "up_proj" and tensor.block == 1 else tensor
        for tensor in report.tensors
    )
    calibration = Calibration(name="text", samples=1, sequence_length=64, tokens=64, inputs=(record,))
    settings = report.settings.model_copy(update={"calibration": calibration})
    html = render_html(report.model_copy(update={"tensors": tensors, "settings": settings}))
    script = """
      const input = () => [...document.querySelectorAll("#h-facts dd")].pop().textContent;
      const pick = (name) => {
        $("#pick").value = [...$("#pick").options].find((option) => option.text === name).value;
        $("#pick").dispatchEvent(new Event("change"));
      };
      found.before = input(); found.marked = !!$(".strips .here");
      pick("model.layers.1.mlp.up_proj.weight");
      found.after = input(); found.here = $(".strips .here").title;"""
    found = probe(html, tmp_path, script)
    assert (found["before"], found["marked"]) == ("not recorded", False)
    assert found["after"] == found["here"] == record.name


def test_the_script_draws_what_python_drew(html, tmp_path):
    """The tensor that is drawn without a script looks the same once the script has run."""
    drawn = [re.search(rf'<path d="([^"]*)"[^>]*id="{name}"', html).group(1) for name in ("h-source", "h-decoded")]
    facts = re.findall(r"<dd>([^<]*)</dd>", html[html.index('id="h-facts"') :])[:5]
    script = """
      found.drawn = ["#h-source", "#h-decoded"].map((name) => $(name).getAttribute("d"));
      found.facts = [...document.querySelectorAll("#h-facts dd")].map((dd) => dd.textContent);"""
    found = probe(html, tmp_path, script)
    assert found["drawn"] == drawn
    assert [re.sub(r"\s", " ", fact) for fact in found["facts"]] == [re.sub(r"\s", " ", fact) for fact in facts]


def test_the_page_of_several_models_fits_and_runs_clean(tmp_path):
    models = tuple(
        Compared(label, label, (make_evaluation(size, kld_mean=kld, scheme=label),), "measured", make_report())
        for label, size, kld in (("W4A16", 113_000_000, 0.2), ("FP8_DYNAMIC", 163_000_000, 0.02))
    )
    page = render_comparison(Comparison("demo:smollm2", models))
    for width in (1280, 320):
        (tmp_path / str(width)).mkdir()
        found = probe(page, tmp_path / str(width), width=width)
        assert found["content"] <= width
    (tmp_path / "compare.html").write_text(page)
    ran = chromium(tmp_path, "--dump-dom", (tmp_path / "compare.html").as_uri())
    assert "CONSOLE" not in ran.stderr
    assert '<html lang="en" class="live">' in ran.stdout


def test_without_scripts_everything_but_the_picker_is_there(html, tmp_path):
    still = re.sub(r"<script>.*</script>", "", html, flags=re.S)
    (tmp_path / "page.html").write_text(still)
    picture = tmp_path / "still.png"
    chromium(tmp_path, "--window-size=1280,2000", f"--screenshot={picture}", (tmp_path / "page.html").as_uri())
    assert picture.stat().st_size > 50_000
    dump = chromium(tmp_path, "--dump-dom", (tmp_path / "page.html").as_uri()).stdout
    for part in ('id="h-source"', 'id="heat-weights"', 'class="quality"', 'id="samples"', 'id="tensors-table"'):
        assert part in dump
    assert 'class="live"' not in dump


def test_what_is_wider_than_the_screen_says_so(html, tmp_path):
    """A line stands over each table that scrolls, and over no other; at phone width no column is hidden."""
    script = """
      const shown = (note) => getComputedStyle(note).display !== "none";
      found.notes = [...document.querySelectorAll(".sideways")].map((note) => {
        const box = note.nextElementSibling;
        return [shown(note), box.scrollWidth > box.clientWidth + 1];
      });
      found.hidden = [...document.querySelectorAll("th, td")].filter((cell) => !shown(cell)).length;"""
    for width in (1280, 390):
        (tmp_path / str(width)).mkdir()
        found = probe(html, tmp_path / str(width), script, width=width)
        assert all(said == wide for said, wide in found["notes"])
        assert sum(wide for _, wide in found["notes"]) >= (2 if width == 390 else 0)
        assert found["hidden"] == 0


def test_a_row_address_marks_the_row(html, tmp_path):
    found = probe(html, tmp_path, 'found.here = $("tr.here th").textContent;', fragment="#t3", width=390)
    assert found["here"] == "model.layers.0.self_attn.q_proj.weight"


def test_dark_and_light_follow_the_system(html, tmp_path):
    script = "found.paper = getComputedStyle(document.body).backgroundColor;"
    (tmp_path / "light").mkdir()
    (tmp_path / "dark").mkdir()
    light = probe(html, tmp_path / "light", script)
    dark = probe(html, tmp_path / "dark", script, flags=("--force-dark-mode",))
    assert light["paper"] == "rgb(255, 255, 255)"
    assert dark["paper"] == "rgb(18, 20, 23)"


@pytest.mark.slow
def test_two_thousand_tensors_stay_responsive(tmp_path):
    """Ten times the tensors take about ten times as long to find, clear and sort.

    Loaded without a frame and without virtual time, in which every clock stands still.
    """
    script = """<script>
      const clock = (act) => Math.min(...[1, 2, 3].map(() => {
        const from = performance.now();
        act();
        document.body.offsetHeight;  // lay out now
        return performance.now() - from;
      }));
      const box = document.querySelector("#find-plot");
      const find = () => { box.value = "layers.1.mlp.down_proj"; box.dispatchEvent(new Event("input")); };
      const clear = () => { box.value = ""; box.dispatchEvent(new Event("input")); };
      const sort = () => document.querySelector("#tensors-table thead th:nth-child(4) button").click();
      const layout = () => { document.body.style.display = "none"; document.body.offsetHeight;
                             document.body.style.display = ""; };
      const times = [1, 2, 3].map(() => [layout, find, clear, sort].map(clock));
      document.body.dataset.times = times[0].map((_, act) => Math.min(...times.map((row) => row[act]))).join(" ");
    </script></body>"""
    html = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render_html(make_report(blocks=222)), count=1
    )
    (tmp_path / "page.html").write_text(html.replace("</body>", script))
    dump = chromium(tmp_path, "--dump-dom", (tmp_path / "page.html").as_uri()).stdout
    times = [float(time) for time in re.search(r'data-times="([^"]*)"', dump).group(1).split()]
    assert min(times) > 0
    assert max(times[1:]) < 5 * times[0], "of laying out the whole page once"


def test_a_screenshot_is_taken(html, tmp_path):
    (tmp_path / "report.html").write_text(html)
    picture = tmp_path / "report.png"
    chromium(tmp_path, "--window-size=1280,2000", f"--screenshot={picture}", (tmp_path / "report.html").as_uri())
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000
