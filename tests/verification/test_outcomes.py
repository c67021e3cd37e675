"""The last line of verify: what comes of a failure, in three classes; and how a mixed model is called."""

from __future__ import annotations

import pytest

import lowbit
from lowbit.errors import UsageError
from lowbit.report.compared import Compared
from lowbit.settings import RunOptions, make_settings
from lowbit.verification import Check, Verification, rules
from lowbit.verification.result import verdict


def failed(**outcomes):
    checks = [Check(rule=name, passed=False, detail=f"{name}!", outcome=outcome) for name, outcome in outcomes.items()]
    return Verification(ok=False, engine="vllm", checks=tuple(checks))


def test_the_verdict_names_what_comes_of_each_failure():
    assert verdict(failed(a="refuses", b="refuses")) == "vllm refuses to load it: a, b"
    assert verdict(failed(a="misreads", b="costs"), details=True) == (
        "vllm loads it and computes something else: a!; and is slower with it, or it is larger, than was meant: b!"
    )
    limit = Check(rule="kernels", passed=False, limit=True)
    sound = Verification(ok=False, engine="sglang", checks=(limit,))
    assert verdict(sound) == "the files are sound, but sglang refuses to load it: kernels"
    assert verdict(Verification(ok=True, engine="vllm", checks=())) == "0 rules of vllm hold"


@pytest.mark.parametrize(("rule", "outcome"), [
    ("tensors", "refuses"), ("scales", "misreads"), ("nearest-codes", "misreads"), ("fused-schemes", "misreads"),
    ("checksums", "misreads"), ("sizes", "costs"), ("gguf-weights", "misreads"), ("engine-limits", "refuses"),
])  # fmt: skip
def test_every_rule_has_an_outcome(rule, outcome):
    assert {each.outcome for each in rules() if each.name == rule} == {outcome}


def test_a_mixed_model_is_not_shown_as_one_scheme(tiny_llama, tmp_path):
    mixed = lowbit.quantize(tiny_llama, tmp_path / "x", scheme="W4A16", overrides={"down_proj$": "W8A16"}).report
    gguf = lowbit.quantize(tiny_llama, tmp_path / "x.gguf", scheme="Q4_0", overrides={"ffn_down": "Q8_0"}).report
    assert Compared("x", "x", (), "report", mixed).scheme == "W4A16 + W8A16"
    assert Compared("x", "x", (), "report", gguf).scheme == "Q4_0, with overrides"


def test_what_python_misspells_gets_a_hint():
    with pytest.raises(UsageError) as caught:
        make_settings(gropu_size=64)
    assert caught.value.hint.startswith("did you mean group_size?")
    with pytest.raises(UsageError) as caught:
        make_settings(resume=True)
    assert caught.value.hint.startswith("give it as run=RunOptions(resume=…)")
    with pytest.raises(UsageError, match="there is no option devize") as caught:
        RunOptions(devize="cuda")
    assert caught.value.hint.startswith("did you mean device?")
    with pytest.raises(UsageError, match="resume is 'perhaps': "):
        RunOptions(resume="perhaps")
