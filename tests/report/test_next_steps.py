"""What a report proposes to try next: which commands, when, and that they run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from sample import make_diagnosis, make_evaluation, make_neighbours, make_report, make_verification
from test_html import Page
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint.base import report_path
from lowbit.cli.main import app
from lowbit.report import schema
from lowbit.report.next_steps import next_steps
from lowbit.report.page import render_html
from lowbit.report.schema import CacheCost, CacheCosts, Calibration
from models import SHORT_TEXT, make_model

OUT = Path("/models/out")
COMMAND = "lowbit quantize demo:smollm2 -o /models/out --scheme W4A16 --revision main"


def commands(**changes):
    """The commands of a sample report, each as words."""
    report = make_report(**{"command": COMMAND, **changes})
    return [shlex.split(step.command) for step in next_steps(report, OUT)]


def with_kld(kld, **changes):
    return (make_evaluation(kld_mean=kld, **changes),)


def settings_of(method, samples=None):
    settings = make_report(blocks=1).settings
    text = None if samples is None else Calibration(name="packaged", samples=samples, sequence_length=512, tokens=1)
    return settings.model_copy(update={"method": method, "calibration": text})


def with_bits(bits):
    return make_report().totals.model_copy(update={"decoder_bits_per_weight": bits})


@pytest.mark.parametrize(
    ("bits", "method", "better"),
    [(4.25, "rtn", True), (4.25, "awq", True), (8.0, "rtn", False), (4.25, "gptq", False), (4.25, "sign-sgd", False)],
)
def test_before_something_was_measured_few_bits_rounded_to_nearest_are_the_one_thing_to_better(bits, method, better):
    measure = ["lowbit", "evaluate", "/models/out", "--reference", "demo:smollm2"]
    good = shlex.split("lowbit quantize demo:smollm2 -o /models/out-good --scheme W4A16 --revision main --quality good")
    for runs in ((), (make_evaluation(kld_mean=None),)):
        found = commands(evaluation=runs, totals=with_bits(bits), settings=settings_of(method))
        assert found == [measure, good][: 1 + better]


def test_a_file_that_would_not_load_comes_first():
    words = commands(verification=make_verification(failing=True))[0]
    assert words == ["lowbit", "verify", "/models/out", "--engine", "vllm", "--reference", "demo:smollm2"]


def test_a_large_loss_is_diagnosed_and_then_made_smaller():
    first, second, *_ = commands(evaluation=with_kld(0.3))
    assert first == ["lowbit", "diagnose", "/models/out", "--reference", "demo:smollm2"]
    assert second == shlex.split(
        "lowbit quantize demo:smollm2 -o /models/out-good --scheme W4A16 --revision main --quality good"
    )


def test_what_was_diagnosed_is_not_diagnosed_again():
    assert not any(words[1] == "diagnose" for words in commands(evaluation=with_kld(0.3), diagnosis=make_diagnosis()))


@pytest.mark.parametrize(
    ("method", "level"),
    [("rtn", "good"), ("hqq", "good"), ("awq", "good"), ("gptq", "best"), ("gptq+distill", None), ("sign-sgd", None)],
)
def test_the_next_better_method_is_proposed(method, level):
    words = [word for line in commands(evaluation=with_kld(0.3), settings=settings_of(method)) for word in line]
    assert (words[words.index("--quality") + 1] if "--quality" in words else None) == level


def test_options_of_the_command_are_replaced_and_not_repeated():
    line = "lowbit quantize m -o out.gguf --scheme Q4_K_M --method hqq --imatrix measure"
    found = commands(evaluation=with_kld(0.3), command=line, settings=settings_of("hqq"))
    assert [
        "lowbit",
        *shlex.split("quantize m -o out-good.gguf --scheme Q4_K_M --imatrix measure --quality good"),
    ] in found


def test_a_part_of_a_split_file_gives_the_name_of_the_whole():
    line = "lowbit quantize m -o a/out-00001-of-00002.gguf --scheme Q4_K_M"
    assert any("a/out-good.gguf" in words for words in commands(evaluation=with_kld(0.3), command=line))


@pytest.mark.parametrize(("samples", "proposed"), [(16, True), (128, False), (512, False)])
def test_more_text_is_proposed_where_it_was_little(samples, proposed):
    found = commands(evaluation=with_kld(0.3), settings=settings_of("gptq", samples))
    assert any(words[-2:] == ["--samples", "128"] for words in found) == proposed


def test_a_text_that_has_no_more_is_not_asked_for_more():
    settings = settings_of("gptq", 16)
    text = settings.calibration.model_copy(update={"notes": ("the text has 8 000 tokens: 16 windows",)})
    settings = settings.model_copy(update={"calibration": text})
    assert not any("--samples" in words for words in commands(evaluation=with_kld(0.3), settings=settings))


def test_the_sets_whose_error_stands_out_get_more_bits():
    """The sample's worst are k_proj and q_proj of block 0, which engines fuse with v_proj, and down_proj of block 1."""
    (words,) = (words for words in commands(evaluation=with_kld(0.3)) if "--override" in words)
    assert words[words.index("-o") + 1] == "/models/out-wider"
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--override"]
    assert overrides == [
        r"^model\.layers\.1\.mlp\.down_proj$=W8A16",
        r"^model\.layers\.0\.self_attn\.(k_proj|q_proj|v_proj)$=W8A16",
    ]


def test_tensors_that_do_not_stand_out_and_formats_that_mix_nothing_get_no_override():
    even = make_report()
    tensors = tuple(t.model_copy(update={"relative_error": t.relative_error and 0.01}) for t in even.tensors)
    assert not any("--override" in words for words in commands(evaluation=with_kld(0.3), tensors=tensors))
    awq = even.output.model_copy(update={"format": "awq"})
    assert not any("--override" in words for words in commands(evaluation=with_kld(0.3), output=awq))


def test_rounded_activations_that_cost_most_are_smoothed():
    runs = (*with_kld(0.02), *with_kld(0.5, activations="simulated"))
    settings = settings_of("rtn").model_copy(update={"scheme": "W8A8"})
    line = "lowbit quantize m -o out --scheme W8A8"
    found = commands(evaluation=runs, settings=settings, command=line)
    assert shlex.split("lowbit quantize m -o out-smooth --scheme W8A8 --method smoothquant") in found
    weights = (*with_kld(0.4), *with_kld(0.5, activations="simulated"))
    assert not any("smoothquant" in words for words in commands(evaluation=weights, settings=settings, command=line))


def test_what_is_close_may_be_smaller():
    found = commands(evaluation=with_kld(0.004))
    assert found == [shlex.split("lowbit quantize demo:smollm2 -o /models/out-W3A16 --revision main --scheme W3A16")]
    measured = tuple(each for each in make_neighbours() if each.origin != "plan")
    assert commands(evaluation=with_kld(0.004), neighbours=measured) == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"calib": "a.txt", "seqlen": 64}, ""),
        ({"calib": "a.txt", "double_quant": True, "ignore": ("x",)}, "--ignore x"),
    ],
)
def test_options_that_the_changed_run_would_refuse_are_left_out(given, kept):
    scheme = "W8A8_STATIC"
    settings = settings_of("rtn").model_copy(update={"scheme": scheme, "given": {"scheme": scheme} | given})
    neighbours = make_neighbours()
    smallest = min(neighbours, key=lambda each: each.bytes).model_copy(update={"scheme": "NVFP4A16", "bytes": 1})
    words = {"calib": "--calib a.txt", "seqlen": "--seqlen 64", "double_quant": "--double-quant"}
    line = " ".join(words.get(name, "--ignore x") for name in given)
    found = commands(evaluation=with_kld(0.001), settings=settings, neighbours=(smallest,),
                     command=f"lowbit quantize m -o /models/out --scheme {scheme} {line}")  # fmt: skip
    assert found == [shlex.split(f"lowbit quantize m -o /models/out-NVFP4A16 {kept} --scheme NVFP4A16")]


def costs(largest, types=("16 bits", "fp8")):
    rows = tuple(CacheCost(type=name, bits=16, bytes=(1000, largest)) for name in types)
    return CacheCosts(engine="vllm", contexts=(2048, 131072), rows=rows, layers=30, bounded=0)


def test_a_cache_larger_than_the_weights_is_measured_in_fewer_bits():
    large = commands(evaluation=with_kld(0.004), cache_costs=costs(10**10), neighbours=())
    assert large == [["lowbit", "evaluate", "/models/out", "--kv-cache", "fp8_e4m3"]]
    assert commands(evaluation=with_kld(0.004), cache_costs=costs(10**6), neighbours=()) == []
    assert commands(evaluation=with_kld(0.004), cache_costs=costs(10**10, ("16 bits",)), neighbours=()) == []


def test_nothing_is_proposed_where_no_command_names_the_model():
    assert commands(evaluation=with_kld(0.3), command=None) == []


def test_a_conversion_is_diagnosed_but_not_quantized_anew():
    found = commands(evaluation=with_kld(0.3), command="lowbit convert a -o b --format gptq")
    assert [words[1] for words in found] == ["diagnose"]


def test_the_page_has_the_steps_and_the_size_of_the_cache():
    report = make_report(evaluation=with_kld(0.3), cache_costs=costs(123_456_789_000), command=COMMAND)
    report = report.model_copy(update={"next_steps": next_steps(report, OUT)})
    page = Page(render_html(report))
    assert "What to try next" in page.text
    assert "131,072 tokens" in page.text
    assert "123.5 GB" in page.text
    for step in report.next_steps:
        assert step.command in page.text


def test_without_steps_there_is_no_section():
    assert 'id="next"' not in render_html(make_report(next_steps=()))


def test_published_losses_stand_beside_planned_neighbours_and_no_others():
    planned, *others = make_neighbours()
    planned = planned.model_copy(update={"expected_loss": 3.04})
    text = Page(render_html(make_report(neighbours=(planned, *others)))).text
    assert "planned, 3.0 % worse at 8B" in text
    assert text.count("worse at 8B") == 1
    assert "at 8 billion weights" in text


@pytest.mark.parametrize(("scheme", "name"), [("W4A16", "out"), ("Q4_K_M", "out.gguf")])
def test_every_proposed_command_runs(tmp_path, scheme, name):
    """On a tiny random model, whose loss is made large in the report so that everything is proposed."""
    model = make_model(tmp_path / "tiny", num_hidden_layers=1)
    made = lowbit.quantize(model, tmp_path / name, scheme=scheme)
    assert made.report.cache_costs is not None
    few_bits = made.report.totals.decoder_bits_per_weight < 5  # not in Q4_K_M, whose mix of so small a model is wider
    assert few_bits == (scheme == "W4A16")
    assert [step.command.split()[1] for step in made.report.next_steps] == ["evaluate", "quantize"][: 1 + few_bits]
    short = ["--text", SHORT_TEXT, "--windows", "1", "--window-tokens", "32"]
    run(made.report.next_steps[0].command, [*short, "--samples", "0"])
    report = schema.load(report_path(tmp_path / name))
    loud = report.tensors[[tensor.scheme is not None for tensor in report.tensors].index(True)]
    tensors = tuple(t.model_copy(update={"relative_error": 1.0}) if t is loud else t for t in report.tensors)
    worse = report.model_copy(update={"tensors": tensors, "evaluation": with_kld(0.3)})
    steps = next_steps(worse, tmp_path / name)
    assert [step.command.split()[1] for step in steps] == ["diagnose", "quantize", "quantize"]
    for step in steps:
        extra = [*short, "--budget", "2"] if " diagnose " in step.command else []
        extra = ["--calib", SHORT_TEXT, "--samples", "8", "--seqlen", "32"] if "--quality" in step.command else extra
        run(step.command, extra)
    ending = ".gguf" if scheme == "Q4_K_M" else ""
    assert all((tmp_path / f"out-{what}{ending}").exists() for what in ("good", "wider"))


def run(command, extra):
    done = CliRunner().invoke(app, [*shlex.split(command)[1:], *extra])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"{command}\n{done.output}"
