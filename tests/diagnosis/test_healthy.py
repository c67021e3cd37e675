"""A model without a fault raises no alarm, whatever it was quantized with."""

import shutil

import pytest
from faults import diagnosed

import lowbit
from lowbit.train import Course
from models import make_model


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("W4A16", {"group_size": 32}),
        ("W2A16", {"group_size": 32}),
        ("W8A8", {}),
        ("NVFP4A16", {}),
        ("NF4", {}),
        ("W2A16", {"group_size": 32, "method": "gptq"}),
        ("W4A16", {"group_size": 32, "method": "awq"}),
        ("W8A8", {"method": "smoothquant"}),
        ("W4A16", {"group_size": 32, "method": "hadamard+gptq"}),
        ("FP8", {}),
        ("TERNARY", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("method", "rtn"),
)
def test_no_false_alarm(quantized, llama, text, scheme, settings):
    found = diagnosed(quantized(scheme, **settings), llama, text, budget=10)
    assert [each.title for each in found.findings if each.severity == "fault"] == []
    assert found.healthy
    assert found.verdict.startswith("nothing is broken")
    assert ("unless the reference is another model" in found.verdict) is ("hadamard" in settings.get("method", ""))


def test_a_training_is_no_damage_and_is_not_undone(llama, text, tmp_path):
    course = Course(steps=1, windows=4, window_tokens=32)
    trained = lowbit.finetune(llama, tmp_path / "out", scheme="TERNARY", data=str(text), course=course).path
    found = diagnosed(trained, llama, text, budget=10)
    assert found.healthy
    (suggested,) = found.suggestions
    how = f"--scheme TERNARY --distill --reference {llama}"
    assert suggested.command == f"lowbit finetune {trained} -o {trained}-further {how}"


@pytest.mark.parametrize("scheme", ["Q4_0", "Q2_K"])
def test_no_false_alarm_in_gguf_files(tmp_path, text, scheme):
    source = make_model(tmp_path / "llama", hidden_size=256, intermediate_size=512)
    lowbit.quantize(source, tmp_path / "q.gguf", scheme=scheme)
    found = diagnosed(tmp_path / "q.gguf", source, text)
    assert found.healthy
    names = {each.name for each in found.contributions}
    assert {"model.embed_tokens.weight", "model.layers.0", "model.layers.1"} <= names
    assert any("'^blk\\." in each.command or "'^token_embd" in each.command for each in found.suggestions)


def test_a_mixture_of_experts(tmp_path, text):
    source = make_model(tmp_path / "mixtral", "mixtral")
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16", group_size=32)
    found = diagnosed(tmp_path / "q", source, text)
    assert found.healthy
    assert {"expert 0", "expert 3"} <= {each.role for each in found.contributions}


def test_the_model_itself_has_nothing_to_diagnose(llama, text):
    found = diagnosed(llama, llama, text)
    assert found.kld == pytest.approx(0, abs=1e-9)
    assert found.verdict == "the two models are the same on this text"
    assert found.contributions == found.suggestions == found.flips == ()


def test_scales_that_were_moved_are_seen_without_a_report(quantized, llama, text, tmp_path):
    shutil.copytree(quantized("W4A16", group_size=32, method="awq"), tmp_path / "q")
    with_report = diagnosed(tmp_path / "q", llama, text, budget=10)
    (tmp_path / "q" / "lowbit-report.json").unlink()
    without = diagnosed(tmp_path / "q", llama, text, budget=10)
    assert without.healthy
    names = [{each.name for each in found.contributions if each.level == "set"} for found in (with_report, without)]
    assert names[0] == names[1]
    assert any("qkv_proj" in name and "o_proj" in name for name in names[0])
