import json

import pytest
from faults import multiply_scales
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import CheckpointError, OutputError, UsageError
from lowbit.export.atomic import DIAGNOSIS_MARK, refuse_existing_document
from lowbit.report import schema
from lowbit.report.diagnosis import Diagnosis

FEW = ("--windows", 2, "--window-tokens", 32, "--budget", 4)


def run(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in ("diagnose", *arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_verdict_first_and_commands_last(w4a16, llama, text):
    multiply_scales(w4a16, ".layers.2.", 2)
    lines = run(w4a16, "--reference", llama, "--text", text, *FEW, "--no-report").stdout.strip().splitlines()
    assert lines[0].startswith("the 7 quantized linears of block 2 are 2.0 times what they should be")
    assert lines[-1].startswith("lowbit quantize ")
    assert any("What restoring a group takes off the KLD" in line for line in lines)
    assert any("Tokens that flipped" in line for line in lines)


def test_json_is_a_diagnosis_and_the_same_in_a_file_and_in_the_report(w4a16, text, tmp_path):
    """The reference is the one that the report names."""
    result = run(w4a16, "--text", text, *FEW, "--json", "-o", tmp_path / "found.json")
    document = json.loads(result.stdout)
    found = Diagnosis.model_validate_json(result.stdout, strict=True)
    assert found.model_dump(mode="json") == document == json.loads((tmp_path / "found.json").read_text())
    refuse_existing_document(tmp_path / "found.json", True, DIAGNOSIS_MARK)  # which is lowbit's own
    assert schema.load(w4a16).diagnosis == found
    assert (w4a16 / "report.html").is_file()
    assert document["versions"]["lowbit"] == lowbit.__version__


@pytest.mark.parametrize("command", ["compare", "diagnose"])
def test_a_file_that_is_there_is_replaced_only_when_told(w4a16, text, tmp_path, command):
    """Refused before anything is measured; a folder is never replaced."""
    page = tmp_path / "page"
    page.write_text("mine")
    models = [w4a16, w4a16] if command == "compare" else [w4a16]
    result = CliRunner().invoke(app, [command, *map(str, models), "--text", str(text), "-o", str(page)])
    assert isinstance(result.exception, OutputError)
    assert "--overwrite" in result.exception.hint
    assert page.read_text() == "mine"
    again = CliRunner().invoke(app, [command, *map(str, models), "--text", str(text), "-o", str(page), "--overwrite"])
    assert isinstance(again.exception, OutputError)
    assert page.read_text() == "mine"  # a model, say, whose name was given by mistake
    page.unlink()
    page.mkdir()
    result = CliRunner().invoke(app, [command, *map(str, models), "--text", str(text), "-o", str(page), "--overwrite"])
    assert isinstance(result.exception, OutputError)
    assert page.is_dir()


def test_no_report_leaves_the_report_alone(w4a16, text):
    before = (w4a16 / "lowbit-report.json").read_bytes()
    run(w4a16, "--text", text, *FEW, "--no-report")
    assert (w4a16 / "lowbit-report.json").read_bytes() == before


def test_a_reference_is_needed(w4a16, text):
    (w4a16 / "lowbit-report.json").unlink()
    with pytest.raises(UsageError, match="no reference"):
        lowbit.diagnose(w4a16, None, text)


def test_another_model_is_refused(w4a16, text, tmp_path):
    from models import make_model

    wider = make_model(tmp_path / "wider", num_hidden_layers=4, intermediate_size=128)
    with pytest.raises(UsageError, match=r"mlp.* in its reference"):
        lowbit.diagnose(w4a16, wider, text, windows=1, window_tokens=16)
    for blocks in (2, 5):  # of which more is no better: what is missing here was taken for a rotation
        other = make_model(tmp_path / str(blocks), num_hidden_layers=blocks)
        with pytest.raises(UsageError, match=f"(?m)has 4 blocks, its reference .* {blocks}$"):
            lowbit.diagnose(w4a16, other, text, windows=1, window_tokens=16)


def test_statistics_of_another_model_in_the_report_are_refused(llama, text, tmp_path):
    lowbit.quantize(llama, tmp_path / "q", method="gptq", group_size=32, calib=str(text), samples=2, seqlen=32,
                    expert_tokens=8)  # fmt: skip
    path = tmp_path / "q" / "lowbit-report.json"
    document = json.loads(path.read_text())
    document["settings"]["calibration"]["inputs"][0]["codes"] = "AQID"
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="3 channels; this model has 128"):
        lowbit.diagnose(tmp_path / "q", llama, text, windows=2, window_tokens=32, budget=1)
