"""One table of options: what is set comes back from the command line, the recipe and the report; what a run would not
read is refused; a new row is seen everywhere.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.cli.options import Sections, of_table, with_groups
from lowbit.errors import UsageError
from lowbit.knobs import GPTQ, METHODS, PANELS, Facts, Knob, Row, Table, command_line
from lowbit.methods import parse_method
from lowbit.numerics import grid_for
from lowbit.patterns import check_patterns
from lowbit.report import schema
from lowbit.rounding.gptq import CORRECTION, CORRECTION_WITH_ROWS, STREAM_CORRECTION, GPTQOptions
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.settings import READ_BY_REFINE, RunOptions, Settings, make_settings, refuse_unread
from lowbit.tensors import RangeSearch

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ROWS = Settings.rows()


def typed(line: str, table: type[Table] = Settings, command: str = "quantize") -> dict[str, Any]:
    """What the command gets of a line, by the parser that users have."""
    words = shlex.split(line)
    assert words[:2] == ["lowbit", command]
    params = COMMANDS[command].make_context(command, words[2:]).params
    group = of_table(table)
    return group.value({option.name: params[option.name] for option in group.options})


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
PATTERNS = st.sampled_from(["down_proj$", r"\.0\.", "^a=b$", "(q|k|v)_proj", "it's", "-x", " ", "[.]é", "="])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "scheme": st.sampled_from([*SCHEMES, "q4_k_m", "w4a16"]),
    "method": st.sampled_from(
        ["rtn", "hqq", "awq+gptq", "AWQ", "gptq+sign-sgd", "smooth+gptq", "distill", "awq+distill"]
    ),
    "overrides": st.dictionaries(PATTERNS, st.sampled_from(["W8A16", "FP8_DYNAMIC", "Q6_K"]), max_size=3),
    "method_overrides": st.dictionaries(PATTERNS, st.sampled_from(["rtn", "gptq", "hqq"]), max_size=3),
    "ignore": st.lists(PATTERNS, max_size=3).map(tuple),
    "percentile": st.floats(50, 100, exclude_min=True),
    "activation_percentile": st.floats(50, 100, exclude_min=True),
    "hessian": st.sampled_from(["guided", "guided:1", "guided:16", "kronecker"]),
    "damping": st.floats(0, 1, exclude_min=True),
    "correction": st.floats(0, 1),
    "stream_correction": st.floats(0, 1),
    "shrinkage": st.floats(0, 1),
    "distill_rate": st.floats(0, 0.1, exclude_min=True),
    "outliers": st.floats(0, 5, exclude_min=True),
    "rotation_rate": st.floats(0, 100, exclude_min=True),
    "group_size": st.integers(-1, 4096),
    "shard_size": st.integers(1_000_000, 10**13),
    "seed": st.integers(-(10**9), 10**9),
}


def values_of(row: Row) -> st.SearchStrategy[Any]:
    if row.name in VALUES:
        return VALUES[row.name]
    if row.choices:
        return st.sampled_from(row.choices)
    if row.kind is bool:
        return st.booleans()
    if row.kind is int:
        return st.integers(4, 10**6)
    assert row.kind is str, f"say what values {row.name} takes"
    return TEXT


def some_settings(values: dict[str, Any]) -> Settings:
    """Without what contradicts another: a level of quality stands for a method, and some methods change outputs."""
    if "quality" in values:
        values.pop("method", None)
    if values.get("hessian") == "kronecker" and any(row.online is None for row in parse_method(
        values.get("method", "rtn")).transforms):  # fmt: skip
        del values["hessian"]
    return make_settings(None, **values)


SETTINGS = st.fixed_dictionaries({}, optional={name: values_of(row) for name, row in ROWS.items()}).map(some_settings)


@given(SETTINGS)
def test_settings_come_back_from_the_command_line(settings):
    line = command_line("quantize", "model", "out", settings.given)
    assert make_settings(None, **typed(line)) == settings


@given(settings=SETTINGS)
def test_settings_come_back_from_a_report_and_its_command_line(settings):
    told = schema.ReportSettings(scheme="W4A16", method="rtn", range="wmse", given=settings.given)
    read = schema.ReportSettings.model_validate_json(json.dumps(told.model_dump(mode="json")), strict=True)
    assert make_settings(None, **read.given) == settings
    assert make_settings(None, **typed(command_line("quantize", "model", "out", read.given))) == settings


@given(settings=SETTINGS)
def test_settings_come_back_from_a_recipe(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(settings.given))), encoding="utf-8")
    assert make_settings(path) == settings


@given(st.fixed_dictionaries({}, optional={"device": TEXT, "max_memory": st.integers(1, 10**15),
                                           "resume": st.booleans()}))  # fmt: skip
def test_how_a_run_is_made_comes_back_too(values):
    options = RunOptions(**values)
    assert RunOptions(**typed(command_line("quantize", "model", "out", options.given), RunOptions)) == options


@pytest.mark.parametrize("command", ["quantize", "estimate"])
def test_every_setting_is_an_option_of_the_command(command):
    flags = {flag for param in COMMANDS[command].params for flag in param.opts}
    assert {row.flag for row in ROWS.values()} <= flags


@pytest.mark.parametrize("name", ROWS)
def test_a_false_zero_or_empty_value_is_not_lost(name):
    """0 is given, where None, a switch that is off and an empty list are not."""
    settings = make_settings(None, seed=0, correction=0.0, refine=0, calib="", pure=False, ignore=())
    assert settings.given == {"seed": 0, "correction": 0.0, "refine": 0, "calib": ""}
    assert make_settings(None, **typed(command_line("quantize", "m", "o", settings.given))) == settings


def test_a_new_row_is_seen_by_the_command_line_the_recipe_the_report_and_the_printer(tmp_path):
    """One field, and nothing else, makes a setting."""

    class Larger(Settings):
        rank: Annotated[int | None, Field(ge=1), Knob("Rank of the correction", METHODS, GPTQ, absent="none")] = None

    taken: list[Larger] = []

    def make(model, settings):
        taken.append(Larger(**settings))

    make.__annotations__ = {"model": str, "settings": Annotated[dict[str, Any], of_table(Larger)]}
    one = typer.Typer(rich_markup_mode=None)
    one.command(cls=Sections)(with_groups(make))
    settings = Larger(**yaml.safe_load("method: gptq\nrank: 8"))
    line = shlex.split(command_line("quantize", "m", "o", settings.given))
    assert line[-2:] == ["--rank", "8"]
    assert CliRunner().invoke(one, ["m", *line[5:]], catch_exceptions=False).exit_code == 0
    assert taken == [settings]
    told = schema.ReportSettings(scheme="W4A16", method="gptq", range="wmse", given=settings.given)
    assert Larger(**told.given) == settings
    assert "Rank of the correction. [default: none]" in " ".join(CliRunner().invoke(one, ["--help"]).stdout.split())
    with pytest.raises(UsageError, match="--rank 8 is read only by GPTQ"):
        refuse_unread(Larger(rank=8))


# ── what is read by which run ─────────────────────────────────────────────────────────────────────────────────────────

RUNS: dict[str, tuple[dict[str, Any], Facts]] = {
    "folder rtn": ({"scheme": "W4A16"}, Facts()),
    "folder gptq": ({"scheme": "W4A16", "method": "gptq"}, Facts()),
    "folder sign-sgd": ({"scheme": "W4A16", "method": "sign-sgd"}, Facts()),
    "folder distill": ({"scheme": "W4A16", "method": "gptq+distill"}, Facts()),
    "folder static": ({"scheme": "FP8"}, Facts()),
    "gguf rtn": ({"scheme": "Q4_0"}, Facts(gguf=True)),
    "gguf gptq": ({"scheme": "Q4_0", "method": "gptq"}, Facts(gguf=True)),
    "refine": ({"scheme": "W4A16", "method": "refine"}, Facts()),
    "gguf measure": ({"scheme": "Q4_0", "imatrix": "measure"}, Facts(gguf=True)),
    "gguf copy": ({"scheme": "Q4_0"}, Facts(gguf=True, copies_header=True)),
    "convert": ({"format": "gptq"}, Facts(converts=True, takes_scheme=False, rounds=False)),
    "convert anew": ({"format": "gptq", "scheme": "W4A16"}, Facts(converts=True)),
    "decode": ({"format": "float"}, Facts(converts=True, decodes=True, takes_scheme=False, rounds=False)),
}
CALIBRATED = {"folder gptq", "folder sign-sgd", "folder distill", "folder static", "gguf gptq", "refine"}
BLOCKWISE = {"folder gptq", "folder sign-sgd", "folder distill", "gguf gptq", "refine"}
CORRECTED = {"folder gptq", "folder distill", "gguf gptq"}
HESSIAN = CORRECTED | {"refine"}
FOLDERS = {name for name in RUNS if name.startswith("folder")} | {"refine"}
GGUF = {name for name in RUNS if name.startswith("gguf")}
QUANTIZED = FOLDERS | GGUF
# Setting → (a value, what must be set too for it to be read, the runs that read it then).
READ: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "scheme": ("W8A16", {}, set(RUNS) - {"decode"}),
    "method": ("gptq", {}, QUANTIZED),
    "quality": ("good", {"method": "gptq"}, QUANTIZED),
    "format": ("auto", {}, set(RUNS)),
    "loader": ("transformers", {}, FOLDERS),
    "group_size": (32, {}, FOLDERS | {"convert anew"}),
    "overrides": ({"x": "W8A16"}, {}, QUANTIZED),
    "ignore": (("x",), {}, QUANTIZED),
    "range": ("mse", {}, (FOLDERS - {"folder static"}) | {"convert anew"}),  # FP8 has a scale per tensor
    "percentile": (99.0, {"range": "percentile"}, (FOLDERS - {"folder static"}) | {"convert anew"}),
    "double_quant": (True, {"scheme": "NF4"}, FOLDERS | {"convert anew"}),
    "positive_scales": (True, {"scheme": "W4A16"}, FOLDERS | {"convert anew"}),
    "outliers": (0.5, {"scheme": "KMEANS4"}, FOLDERS | {"convert anew"}),
    "kv_cache": ("fp8", {}, FOLDERS | {"convert", "convert anew", "decode"}),
    "shard_size": (10**9, {}, set(RUNS)),
    "calib": ("text.txt", {}, CALIBRATED | {"gguf measure"}),
    "samples": (16, {}, CALIBRATED | {"gguf measure"}),
    "seqlen": (64, {}, CALIBRATED | {"gguf measure"}),
    "seed": (1, {"calib": "c4"}, CALIBRATED),
    "compute": ("float32", {}, CALIBRATED),
    "activation_range": ("mse", {}, {"folder static"}),
    "activation_percentile": (99.0, {"activation_range": "percentile"}, {"folder static"}),
    "all_experts": (True, {}, BLOCKWISE),
    "bias_correction": (True, {}, BLOCKWISE - {"refine"}),
    "method_overrides": ({"x": "hqq"}, {}, (BLOCKWISE | FOLDERS) - {"refine"}),
    "hessian": ("guided:4", {}, HESSIAN),
    "rotation_steps": (9, {"method": "spinquant+gptq"}, QUANTIZED),
    "rotation_rate": (0.5, {"method": "spinquant+gptq"}, QUANTIZED),
    "damping": (0.02, {}, HESSIAN),
    "shrinkage": (0.02, {}, HESSIAN),
    "correction": (0.5, {}, HESSIAN),
    "stream_correction": (0.2, {}, HESSIAN),
    "correction_samples": (4, {}, HESSIAN),
    "refine": (2, {}, CORRECTED),
    "expert_tokens": (8, {}, HESSIAN),
    "allow_fallback": (True, {}, BLOCKWISE - {"refine"}),
    "sweeps": (2, {}, {"refine"}),
    "codes_only": (True, {}, {"refine"}),
    "iterations": (10, {}, {"folder sign-sgd"}),
    "distill_samples": (8, {}, {"folder distill"}),
    "distill_steps": (10, {}, {"folder distill"}),
    "distill_rate": (0.002, {}, {"folder distill"}),
    "imatrix": ("measure", {}, GGUF),
    "pure": (True, {}, GGUF),
    "output_type": ("Q8_0", {}, GGUF),
    "token_embedding_type": ("Q8_0", {}, GGUF),
    "tensor_type_file": ("rules.txt", {}, GGUF),
    "modelfile": (True, {}, GGUF),
    "mmproj": (True, {}, {"gguf rtn", "gguf copy"}),  # of the others, it refuses what they have beside
    "pre_tokenizer": ("llama-bpe", {}, GGUF - {"gguf copy"}),
    "no_tokenizer": (True, {}, GGUF - {"gguf copy"}),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_setting_is_read_or_refused(name):
    value, also, readers = READ[name]
    for run, (settings, facts) in RUNS.items():
        chosen = make_settings(None, **(settings | also | {name: value}))
        refused = {ROWS[each].flag for each in (name, *also, *(settings if name == "mmproj" else ()))}
        error = refusal(chosen, facts)
        assert (error is None) == (run in readers), f"{run}: {error}"
        if error is not None:
            assert str(error).split()[0] in refused, run
            assert "leave it out" in (error.hint or ""), run


def refusal(chosen: Settings, facts: Facts) -> UsageError | None:
    try:
        refuse_unread(chosen, None, facts)
    except UsageError as error:
        return error
    return None


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_these_settings_is_not_refused(run):
    settings, facts = RUNS[run]
    refuse_unread(make_settings(None, **settings), None, facts)


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"range": "mse", "percentile": 99.0}, "--percentile 99.0"),
        ({"double_quant": True}, "--double-quant"),
        ({"scheme": "FP8", "activation_percentile": 99.0}, "--activation-percentile 99.0"),
        ({"method": "gptq", "correction": 0.0, "correction_samples": 4}, "--correction-samples 4"),
        ({"method": "gptq", "correction": 0.0, "stream_correction": 0.4}, "--stream-correction 0.4"),
        ({"method": "gptq+sign-sgd", "correction_samples": 4}, "--correction-samples 4"),
        ({"method": "gptq", "seed": 3}, "--seed 3"),
        ({"method": "awq", "damping": 0.1}, "--damping 0.1"),
        ({"scheme": "Q4_0", "method_overrides": {"x": "rtn"}}, "--method-override"),
        ({"scheme": "Q4_0", "method": "hqq"}, "--method hqq"),
        ({"scheme": "Q4_0", "imatrix": "file", "samples": 4}, "--samples 4"),
        ({"scheme": "Q4_0", "imatrix": "measure", "compute": "float32"}, "--compute float32"),
    ],
)
def test_what_depends_on_another_setting_is_refused_without_it(settings, unread):
    with pytest.raises(UsageError) as caught:
        refuse_unread(make_settings(None, **settings))
    assert str(caught.value).startswith(f"{unread} is read only by ")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_range_search_is_asked_of_the_schemes_that_have_one(scheme):
    """--range that changes nothing is refused, and one that changes something is not."""
    spec, decoded = SCHEMES[scheme].weight, []
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    for search in (RangeSearch("absmax"), RangeSearch("percentile", percentile=60.0)):
        target = GridTarget(spec, grid_for(spec, "bfloat16"), search)
        target = target.ranged(target.measured(weight)) if target.needs_range else target
        decoded.append(target.nearest(weight).decoded)
    changes = not torch.equal(*decoded)
    assert (refusal(make_settings(None, scheme=scheme, range="percentile"), Facts()) is None) == changes


def test_rows_are_fed_by_gptq_alone():
    """SqueezeLLM, which rounds each row alone, would make of kronecker what guided is."""
    with pytest.raises(UsageError, match="--hessian kronecker feeds the errors of rows to other rows") as caught:
        make_settings(None, scheme="KMEANS4", method="squeezellm", hessian="kronecker")
    assert caught.value.hint == "take --hessian guided, or --method gptq"
    mixed = make_settings(None, scheme="KMEANS4", method="gptq", hessian="kronecker",
                          method_overrides={"x": "squeezellm"})  # fmt: skip
    assert mixed.feeds_rows


@pytest.mark.parametrize(
    ("settings", "options", "unread"),
    [
        ({}, {"device": "cuda"}, "--device cuda"),
        ({}, {"resume": True}, "--resume"),
        ({}, {"max_memory": "8GiB"}, "--max-memory 8589934592"),
        ({"scheme": "FP8"}, {"max_memory": "8GiB"}, "--max-memory 8589934592"),
        ({"scheme": "FP8"}, {"resume": True}, "--resume"),
        ({"scheme": "Q4_0", "imatrix": "measure"}, {"device": "cuda"}, "--device cuda"),
        ({"scheme": "FP8"}, {"device": "cuda"}, None),
        ({"scheme": "FP8", "calib": "self"}, {"max_memory": "8GiB"}, None),
        ({"method": "gptq"}, {"device": "cuda", "resume": True, "max_memory": 1}, None),
        ({"scheme": "Q4_0", "method_overrides": {"x": "gptq"}}, {"resume": True}, None),
    ],
)
def test_how_a_run_is_made_is_read_or_refused(settings, options, unread):
    chosen, run = make_settings(None, **settings), RunOptions(**options)
    if unread is None:
        refuse_unread(chosen, run)
        return
    with pytest.raises(UsageError) as caught:
        refuse_unread(chosen, run)
    assert str(caught.value).startswith(f"{unread} is read only by ")


def test_an_override_alone_can_ask_for_gptq_or_static_scales():
    refuse_unread(make_settings(None, method_overrides={"x": "gptq"}, damping=0.1, samples=4))
    refuse_unread(make_settings(None, overrides={"x": "FP8"}, activation_range="mse", calib="c4", seed=1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"damping": 0.1}, "--damping 0.1 is read only by GPTQ"),
        ({"ignore": ("nothing",)}, "--ignore 'nothing' matches no linear"),
        ({"overrides": {"nothing": "W8A16"}}, "--override 'nothing' matches no linear"),
        ({"method": "gptq", "method_overrides": {"nothing": "rtn"}}, "--method-override 'nothing' matches no linear"),
    ],
)
@pytest.mark.parametrize("call", [lowbit.quantize, lowbit.dry_run, lowbit.estimate], ids=lambda call: call.__name__)
def test_every_call_refuses_it(tiny_llama, tmp_path, call, settings, named):
    output = {"output": tmp_path / "out"}
    with pytest.raises(UsageError, match=named):
        call(tiny_llama, **output, **settings)
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_no_excuse(tiny_llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pure: true\n")
    with pytest.raises(UsageError, match="--pure is read only by GGUF files"):
        lowbit.dry_run(tiny_llama, recipe=recipe)


def test_gguf_output_refuses_a_method_override_that_matches_nothing(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="--method-override 'nothing' matches no linear"):
        lowbit.dry_run(tiny_llama, output=tmp_path / "x.gguf", scheme="Q4_0", method="gptq",
                       method_overrides={"nothing": "rtn"})  # fmt: skip


def test_a_gguf_file_keeps_its_own_key_values(tiny_llama, tmp_path):
    source = lowbit.quantize(tiny_llama, tmp_path / "a.gguf", scheme="Q8_0").path
    for call in (lowbit.quantize, lowbit.dry_run, lowbit.estimate):
        with pytest.raises(UsageError, match="--pre-tokenizer llama-bpe is read only by"):
            call(source, output=tmp_path / "b.gguf", scheme="Q4_0", pre_tokenizer="llama-bpe")


def test_a_conversion_refuses_what_it_would_not_read(tiny_llama, tmp_path):
    folder = lowbit.quantize(tiny_llama, tmp_path / "ct", scheme="W4A16", group_size=32).path
    for settings in ({"group_size": 32}, {"range": "mse"}, {"method": "gptq"}, {"samples": 4}, {"ignore": ("x",)}):
        with pytest.raises(UsageError, match="is read only by"):
            lowbit.convert(folder, tmp_path / "out", format="gptq", **settings)
    lowbit.convert(folder, tmp_path / "anew", format="gptq", scheme="W4A16", group_size=64, range="mse")


def test_patterns_that_match_are_taken():
    check_patterns("--ignore", ["b$", "a"], ["a.b", "c"])
    with pytest.raises(UsageError, match="--ignore 'z' matches no linear"):
        check_patterns("--ignore", ["b$", "z"], ["a.b", "c"])


def test_a_setting_with_a_typing_mistake_gets_a_suggestion():
    with pytest.raises(UsageError, match="there is no setting sheme") as caught:
        make_settings(None, sheme="W4A16")
    assert (caught.value.hint or "").startswith("did you mean scheme?")


# ── reports and what is suggested from them ───────────────────────────────────────────────────────────────────────────


def test_a_report_tells_every_setting_that_was_given(tiny_llama, tmp_path):
    """The mutant that drops `pure` dies here, and with it any other that is dropped on the way to the file."""
    asked = {"scheme": "Q4_0", "pure": True, "output_type": "Q8_0", "token_embedding_type": "Q5_0",
             "shard_size": 500_000_000, "overrides": {"attn_v": "Q8_0"}}  # fmt: skip
    path = lowbit.quantize(tiny_llama, tmp_path / "x.gguf", **asked).path
    report = schema.load(tmp_path / "x.lowbit-report.json")
    assert report.settings.given == make_settings(None, **asked).given
    assert typed(report.command or "") == asked | {"shard_size": "500000000"}
    nested = lowbit.quantize(tiny_llama, tmp_path / "nf4", scheme="NF4", double_quant=True, range="mse").report
    assert nested.settings.given == {"scheme": "NF4", "double_quant": True, "range": "mse"}
    assert path.is_file()


@pytest.mark.parametrize("version", [4, 5])
def test_settings_of_earlier_reports_become_what_was_given(tmp_path, version):
    from report.sample import make_report

    document = make_report(blocks=1).model_dump(mode="json", by_alias=True)
    document["schema"] = version
    document["output"]["format"] = "gptq"
    document["settings"] = {
        "scheme": "W4A16", "method": "awq+gptq", "range": "percentile", "percentile": 99.5, "group_size": 64,
        "ignore": ["a", "b"], "overrides": ["x=y$=W8A16"], "shard_size": 5_000_000_000, "seed": 7,
        "method_overrides": ["z=rtn"], "options": {"damping": 0.1, "all_experts": True}, "kv_cache": "fp8",
        "imatrix": None, "pure": False,
        "calibration": {"name": "c4", "samples": 32, "sequence_length": 512, "tokens": 16384},
    }  # fmt: skip
    (tmp_path / "lowbit-report.json").write_text(json.dumps(document))
    settings = schema.load(tmp_path).settings
    assert (settings.scheme, settings.method, settings.range) == ("W4A16", "awq+gptq", "percentile")
    assert make_settings(None, **settings.given) == make_settings(
        None, scheme="W4A16", method="awq+gptq", format="gptq", range="percentile", percentile=99.5, group_size=64,
        ignore=("a", "b"), overrides={"x=y$": "W8A16"}, seed=7, method_overrides={"z": "rtn"}, damping=0.1,
        all_experts=True, kv_cache="fp8", calib="c4", samples=32,
    )  # fmt: skip


# ── help ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def help_text() -> str:
    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    return runner.invoke(app, ["quantize", "--help"], catch_exceptions=False).stdout


def test_help_has_panels_in_order_and_fits_80_columns(help_text):
    assert max(map(len, help_text.splitlines())) <= 80
    places = [help_text.index(f"\n{panel}:\n") for panel in PANELS]
    assert places == sorted(places)


def test_the_ten_options_that_most_people_need_are_on_the_first_screen(help_text):
    needed = ("--output", "--scheme", "--method", "--format", "--group-size", "--override", "--ignore", "--recipe",
              "--overwrite", "--dry-run")  # fmt: skip
    screen = help_text.splitlines()[:30]
    for flag in needed:
        assert any(line.lstrip().startswith((flag, f"-o, {flag}")) for line in screen), flag


def test_help_says_the_defaults_that_the_code_has():
    options = GPTQOptions()
    for name in ("damping", "refine"):
        assert ROWS[name].knob.absent == str(getattr(options, name))
    assert ROWS["stream_correction"].knob.absent == str(STREAM_CORRECTION) == str(options.stream)
    assert ROWS["correction"].knob.absent == f"{CORRECTION}; {CORRECTION_WITH_ROWS} with --hessian kronecker"


def test_help_imports_nothing_heavy():
    script = "import sys; from lowbit.cli.main import run; sys.argv = ['lowbit', 'quantize', '--help']\n"
    script += (
        "try: run()\nfinally: print(*(m for m in 'torch transformers numpy rich yaml'.split() if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_example_of_the_module_is_a_recipe():
    import lowbit.settings

    text = (lowbit.settings.__doc__ or "").split("YAML:\n")[1].split("The fields")[0]
    assert make_settings(None, **yaml.safe_load(text)).group_size == 64
    assert Path(lowbit.settings.__file__).exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"percentile": 40}, "percentile is 40: input should be greater than 50"),
        ({"samples": 0}, "samples is 0: input should be greater than or equal to 1"),
        ({"range": "mean"}, "range is 'mean': input should be 'auto'"),
        ({"calib": ["x" * 999]}, r"calib is \['x{57}…: input should be a valid string"),
    ],
)
def test_a_value_that_is_refused_is_named(given, says):
    with pytest.raises(UsageError, match=f"^{says}"):
        make_settings(None, **given)
    with pytest.raises(UsageError, match=r"^resume is 'maybe': input should be a valid boolean"):
        RunOptions(resume="maybe")


def test_a_refinement_reads_what_its_readers_say():
    """One place says what reads a setting: the table."""
    assert set(READ_BY_REFINE) == {
        "calib", "samples", "seqlen", "seed", "compute", "all_experts", "hessian", "damping", "shrinkage", "correction",
        "stream_correction", "correction_samples", "expert_tokens", "sweeps", "codes_only", "distill_samples",
        "distill_steps", "distill_rate",
    }  # fmt: skip
    behind = {"distill_samples", "distill_steps", "distill_rate"}  # of --distill
    assert set(READ_BY_REFINE) - behind == {name for name in READ if "refine" in READ[name][2]} & set(READ_BY_REFINE)
