"""verify, inspect, evaluate, generate and demo, end to end on tiny models."""

from __future__ import annotations

import json
import shutil

import pytest

from checkpoint.checkpoint_files import write_tiny_gguf
from commands import start
from models import make_model

MEASURED = ["--windows", "2", "--window-tokens", "64"]


def test_verify_says_good_of_a_good_folder(lowbit, quantized, tiny_llama):
    outcome = lowbit("verify", quantized, "--reference", tiny_llama)
    assert outcome.code == 0
    assert "FAIL" not in outcome.stdout
    assert lowbit("verify", quantized, "--engine", "transformers").code == 0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_verify_exits_with_1_for_a_broken_folder(lowbit, quantized, tmp_path, flags):
    broken = shutil.copytree(quantized, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (broken / "config.json").write_text(json.dumps(config))
    outcome = lowbit("verify", broken, *flags)
    assert outcome.code == 1
    assert "Traceback" not in outcome.stderr
    if flags:
        assert json.loads(outcome.stdout)["ok"] is False
    else:
        assert "FAIL" in outcome.stdout
        assert "lm_head" in outcome.stdout


def test_inspect_tells_stored_types(lowbit, tiny_llama, quantized, tmp_path):
    original = json.loads(lowbit("inspect", tiny_llama, "--json").stdout)
    ours = json.loads(lowbit("inspect", quantized, "--json").stdout)
    gguf = json.loads(lowbit("inspect", write_tiny_gguf(tmp_path / "tiny.gguf"), "--json").stdout)
    assert [document["kind"] for document in (original, ours, gguf)] == ["safetensors", "compressed-tensors", "gguf"]
    assert {row["stored"] for row in original["tensors"]} == {"BF16"}
    assert gguf["metadata"]["general.architecture"] == "llama"
    assert "tokenizer" in lowbit("inspect", write_tiny_gguf(tmp_path / "tiny.gguf"), "--json").stdout


def test_gguf_can_be_the_source(lowbit, tmp_path):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert lowbit("quantize", gguf, "-o", tmp_path / "out", "--scheme", "W8A16").code == 0
    assert lowbit("verify", tmp_path / "out", "--reference", gguf).code == 0


def test_generate_answers_the_same_with_the_same_seed(lowbit, quantized):
    ask = ["generate", quantized, "-p", "hello", "--max-tokens", "8", "--temperature", "1", "--seed", "3"]
    first = lowbit(*ask)
    assert first.code == 0
    assert first.stderr == ""
    assert lowbit(*ask).stdout == first.stdout
    assert lowbit(*ask, "--json").stdout.count('"text"') == 1


def test_evaluate_compares_with_the_source_that_the_report_names(lowbit, quantized, tiny_llama, text_file):
    rows = json.loads(lowbit("evaluate", quantized, "--text", text_file, *MEASURED, "--json").stdout)
    assert [row["activations"] for row in rows] == ["none", "simulated"]
    assert {row["reference"] for row in rows} == {str(tiny_llama)}
    assert all(0 < row["kld_mean"] < 1 for row in rows)


@pytest.fixture
def talkative(tmp_path):
    """A tiny model that can see a window of 512 tokens."""
    return make_model(tmp_path / "talkative", max_position_embeddings=1024)


def test_demo_twice_with_any_model(lowbit, talkative, tmp_path):
    arguments = ["demo", "--model", talkative, "--windows", "2", "-o", tmp_path / "demo"]
    for _ in range(2):
        outcome = lowbit(*arguments)
        assert outcome.code == 0, outcome.stderr
    for scheme in ("W4A16", "FP8_DYNAMIC"):
        assert scheme in outcome.stdout
        folder = tmp_path / "demo" / scheme
        rows = json.loads((folder / "lowbit-report.json").read_text())["evaluation"]
        page = (folder / "report.html").read_text()
        assert "KL divergence, mean" in page
        assert f"{100 * rows[0]['same_top1']:.1f}" in page
        assert f"{rows[0]['kld_mean']:.5f}" in outcome.stdout
        assert lowbit("verify", folder).code == 0
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["FP8_DYNAMIC", "W4A16"]


def test_demo_json(lowbit, talkative, tmp_path):
    outcome = lowbit("demo", "--model", talkative, "--windows", "1", "-o", tmp_path / "demo", "--json")
    assert outcome.stderr == ""
    assert [row["scheme"] for row in json.loads(outcome.stdout)] == ["W4A16", "FP8_DYNAMIC"]


@pytest.mark.demo_model
def test_demo_model_can_be_planned(lowbit):
    plan = json.loads(lowbit("quantize", "demo:smollm2", "--dry-run", "--json").stdout)
    assert 4.1 < plan["decoder_bits_per_weight"] < 4.6
    assert len(plan["tensors"]) == 272


def test_version_through_python_dash_m():
    process = start("--version")
    assert process.communicate()[0].startswith("lowbit ")
    assert process.returncode == 0


def test_convert_to_gguf_names_the_report_beside_the_file(lowbit, quantized, tmp_path):
    outcome = lowbit("convert", quantized, "--format", "gguf", "--scheme", "Q8_0", "-o", tmp_path / "x.gguf")
    assert outcome.code == 0
    assert "x.report.html" in outcome.stdout
    assert (tmp_path / "x.report.html").is_file()
