"""A new engine is one file and one row: verify, estimate, advise, reports and the command see it. And kernel limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.advice import advise
from lowbit.cli.main import app
from lowbit.engines import all_engines, find_engine
from lowbit.registry import ENGINES
from lowbit.verification import rules, verify
from models import make_model

# The whole of an engine that loads compressed-tensors folders of 8-bit integers, and no others.
FAKE = '''
from lowbit.engines.engine import Engine, MemoryModel, Support
from lowbit.verification.result import Finding, Loading, Rule

_FORMAT = "compressed-tensors"


def check_eight_bits(subject):
    """Every linear has 8 bits."""
    return Finding([f"{name} has not 8 bits" for name, s in subject.schemes.items() if s.weight.bits != 8], "8 bits")


ENGINE = Engine(
    "fake", "Fake", ("cuda",),
    (Support(("W8A16",), "16", _FORMAT, "made up", small_batch=2),),
    MemoryModel(prefill=((0, 64),), logit_rows=1, logit_bytes=2, framework=12345, share=0.5, share_name="half",
                cache_types=("auto",), assumptions=("half of it",)),
    Loading(
        rules=(Rule("fake-bits", "limits", (_FORMAT,), "8 bits", check_eight_bits, "made up", limit=True),),
        no_loader={"gptq": "the fake engine has no GPTQ loader"},
    ),
    serve="fake serve {output}", serve_load=" --tokens {tokens}",
)
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "engine_of_tests.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ENGINES, "fake", "engine_of_tests:ENGINE")
    yield find_engine("fake")
    sys.modules.pop("engine_of_tests", None)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    model = make_model(folder / "model", hidden_size=128, intermediate_size=256)
    made = {"model": model}
    for name, settings in {"W8A16": {}, "W4A16": {}, "gptq": {"scheme": "W4A16", "format": "gptq"}}.items():
        made[name] = lowbit.quantize(model, folder / name, **{"scheme": name, **settings}).path
    return made


def test_verification_checks_its_rules_and_those_of_every_engine(fake, outputs):
    assert verify(outputs["W8A16"], engine="fake").ok
    assert [check.rule for check in verify(outputs["W4A16"], engine="fake").failed] == ["fake-bits"]
    failed = verify(outputs["gptq"], engine="fake").failed
    assert [(check.rule, check.detail) for check in failed] == [("engine-loader", fake.loading.no_loader["gptq"])]
    by_name = {rule.name: engines for rule, engines in rules().items()}
    assert by_name["fake-bits"] == ("fake",)
    assert "fake" in by_name["tensors"]
    assert "fake" not in by_name["gguf-file"]


def test_the_command_lists_its_rules(fake):
    listed = CliRunner().invoke(app, ["verify", "--rules", "--engine", "fake"]).stdout
    assert "fake-bits: 8 bits" in listed
    assert "gptq-column-order" not in listed


def test_estimates_take_its_memory(fake, outputs):
    found = lowbit.estimate(outputs["model"], scheme="W8A16", engine="fake", memory=1 << 30)
    assert found.serving is not None
    assert found.fit is not None
    assert found.serving.framework == 12345
    assert found.fit.usable == 1 << 29
    assert any("half of it" in line for line in found.assumptions)


def test_advice_ranks_its_schemes_and_prints_its_line(fake, outputs):
    advice = advise(str(outputs["model"]), hardware="h100", engine="fake", context=64, batch=2)
    assert {option.scheme for option in advice.options} == {"W8A16", "16 bits"}
    (option,) = (option for option in advice.options if option.scheme == "W8A16")
    assert option.serve == "fake serve model-W8A16 --tokens 128"


def test_a_report_names_its_line(fake, outputs, tmp_path):
    from lowbit import reporting

    verification = verify(outputs["W8A16"], engine="fake")
    lines = reporting._serve_lines(verification, tmp_path / "out")
    assert [line.engine for line in lines] == ["fake", "lowbit"]
    assert lines[0].command == f"fake serve {tmp_path / 'out'}"


def test_no_two_engines_share_a_rule_name_for_different_checks():
    names = [rule.name for rule in rules()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("engine", all_engines(), ids=lambda engine: engine.name)
def test_lines_quote_the_output(engine):
    assert "'a b'" in engine.serve_line("a b", 4096, 2)


@pytest.mark.parametrize(("heads", "taken"), [(2, False), (4, True)])
def test_marlin_of_sglang_takes_multiples_of_64_rows(heads, taken, tmp_path):
    """q, k and v are one matrix of 3 · 16 · heads rows, of which a tile of Marlin takes 64: 96 rows have no kernel."""
    model = make_model(tmp_path / "model", hidden_size=128, intermediate_size=256, num_attention_heads=heads,
                       num_key_value_heads=heads, head_dim=16)  # fmt: skip
    folder = lowbit.quantize(model, tmp_path / "out", scheme="W4A16_ASYM", format="awq", group_size=32).path
    # o_proj fails in any case: its columns are those of the heads, fewer than 128
    detail = {check.rule: check.detail for check in verify(folder, engine="sglang").failed}["awq-kernels"]
    assert ("self_attn.q_proj" in detail) is not taken
