"""The report file: what is written is what is read, and nothing else is read."""

import json
import threading
import time

import pytest
from pydantic import ValidationError
from sample import make_evaluation, make_report

from lowbit import reporting
from lowbit.errors import CheckpointError, OutputError
from lowbit.evaluation.result import Evaluation
from lowbit.report.schema import (
    REPORT_NAME,
    SCHEMA,
    TensorEntry,
    dump,
    load,
    write_text,
)
from lowbit.tasks.result import TaskResult, TaskRow
from lowbit.verification.result import Check, Verification


@pytest.fixture
def document(tmp_path):
    """A valid report as parsed JSON."""
    dump(make_report(blocks=2), tmp_path / "valid.json")
    return json.loads((tmp_path / "valid.json").read_text())


def write(path, document):
    path.write_text(json.dumps(document))
    return path


def test_a_report_survives_the_disk(tmp_path):
    report = make_report()
    dump(report, tmp_path / REPORT_NAME)
    assert load(tmp_path / REPORT_NAME) == report


def test_a_folder_stands_for_the_report_in_it(tmp_path):
    report = make_report(blocks=1)
    dump(report, tmp_path / REPORT_NAME)
    assert load(tmp_path) == report


def test_writing_twice_gives_the_same_bytes(tmp_path):
    dump(make_report(), tmp_path / "first.json")
    dump(load(tmp_path / "first.json"), tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_the_file_is_indented_and_starts_with_the_schema(tmp_path):
    dump(make_report(blocks=1), tmp_path / REPORT_NAME)
    lines = (tmp_path / REPORT_NAME).read_text().splitlines()
    assert lines[:3] == ["{", f'  "schema": {SCHEMA},', '  "lowbit": "0.1.0",']


def test_names_outside_ascii_are_written_as_they_are(tmp_path):
    report = make_report(blocks=1)
    report = report.model_copy(update={"source": report.source.model_copy(update={"model": "模型-ñ"})})
    dump(report, tmp_path / REPORT_NAME)
    assert "模型-ñ" in (tmp_path / REPORT_NAME).read_text(encoding="utf-8")
    assert load(tmp_path).source.model == "模型-ñ"


def test_a_failed_write_leaves_the_old_report_and_no_litter(tmp_path, monkeypatch):
    dump(make_report(blocks=1), tmp_path / REPORT_NAME)
    before = (tmp_path / REPORT_NAME).read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        dump(make_report(blocks=2), tmp_path / REPORT_NAME)
    assert (tmp_path / REPORT_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [REPORT_NAME]


def test_a_missing_output_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match="absent"):
        dump(make_report(blocks=1), tmp_path / "absent" / REPORT_NAME)


LATER = {"command", "neighbours", "diagnosis"}
LATER_OF_TENSORS, LATER_OF_EVALUATIONS = {"histogram", "reads"}, {"samples", "reference_sha256"}


def test_a_report_of_schema_4_is_read_without_what_came_later(tmp_path, document):
    document["schema"] = 4
    for part, names in ((document, LATER), *((tensor, LATER_OF_TENSORS) for tensor in document["tensors"]),
                        *((run, LATER_OF_EVALUATIONS) for run in document["evaluation"])):  # fmt: skip
        for name in names:
            del part[name]
    report = load(write(tmp_path / REPORT_NAME, document))
    assert report.schema_version == SCHEMA
    assert (report.command, report.neighbours) == (None, ())
    assert report.tensors[3].histogram is None
    assert report.evaluation[0].samples == ()
    dump(report, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["schema"] == SCHEMA


def test_a_report_of_schema_4_is_as_strict(tmp_path, document):
    with pytest.raises(CheckpointError, match=r"settings\.sede"):
        load(write(tmp_path / REPORT_NAME, document | {"schema": 4, "settings": document["settings"] | {"sede": 0}}))


@pytest.mark.parametrize("counts", ["", "A" * 167, "A" * 169, "\u00e9" * 168, "A" * 167 + "="])
def test_counts_of_another_length_or_alphabet_are_refused(tmp_path, document, counts):
    document["tensors"][3]["histogram"]["source"] = counts
    with pytest.raises(CheckpointError, match="histogram"):
        load(write(tmp_path / REPORT_NAME, document))


def test_a_sample_parts_for_both_or_for_none(tmp_path, document):
    document["evaluation"][0]["samples"][0]["reference"] = None
    with pytest.raises(CheckpointError, match="both models go on"):
        load(write(tmp_path / REPORT_NAME, document))


def test_an_absent_report_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / REPORT_NAME)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"schema": 1', b"\xff\xfe", b'{"schema": 1}' * 2, b"[" * 100_000, b'{"schema": "\\ud800"}'],
    ids=["empty", "open", "truncated", "not UTF-8", "two documents", "deep", "lone surrogate"],
)
def test_what_is_not_json_is_refused(tmp_path, text):
    path = tmp_path / REPORT_NAME
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match="not JSON"):
        load(path)


@pytest.mark.parametrize("content", [[], "text", 1, None, {}, {"lowbit": "0.1.0"}])
def test_json_that_is_no_report_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="no schema version"):
        load(write(tmp_path / REPORT_NAME, content))


@pytest.mark.parametrize("version", [0, 1, 2, 3, 99, "5", 5.0, True, None, [2]])
def test_another_schema_version_is_named(tmp_path, document, version):
    with pytest.raises(CheckpointError, match="report schema") as caught:
        load(write(tmp_path / REPORT_NAME, document | {"schema": version}))
    assert json.dumps(version) in str(caught.value)
    assert f"this lowbit reads {SCHEMA}" in str(caught.value)


def remove(document, *path):
    *outer, last = path
    for step in outer:
        document = document[step]
    del document[last]


def put(document, value, *path):
    *outer, last = path
    for step in outer:
        document = document[step]
    document[last] = value


def test_a_missing_field_is_named_by_its_path(tmp_path, document):
    remove(document, "tensors", 3, "bytes")
    with pytest.raises(CheckpointError, match=r"tensors\.3\.bytes"):
        load(write(tmp_path / REPORT_NAME, document))


def test_an_unknown_field_is_refused(tmp_path, document):
    document["settings"]["sede"] = 0
    with pytest.raises(CheckpointError, match=r"settings\.sede"):
        load(write(tmp_path / REPORT_NAME, document))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tensors", 0, "bytes"), -1),
        (("tensors", 0, "bytes"), 2**63),
        (("tensors", 0, "bytes"), "12"),
        (("tensors", 0, "bytes"), 1.5),
        (("tensors", 0, "shape"), "576"),
        (("tensors", 0, "name"), None),
        (("tensors", 0, "name"), ["a"]),
        (("totals", "seconds"), float("nan")),
        (("totals", "seconds"), float("inf")),
        (("evaluation", 0, "kld_mean"), float("nan")),
        (("evaluation", 0, "same_top1"), 88.7),
        (("source", "kind"), 3),
        (("created"), "yesterday"),
        (("created"), "2026-03-14T09:26:53"),
        (("versions"), {"torch": 2.13}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(tmp_path, document, path, value):
    put(document, value, *([path] if isinstance(path, str) else path))
    with pytest.raises(CheckpointError, match="not a lowbit report"):
        load(write(tmp_path / REPORT_NAME, document))


def test_an_oversized_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.report.schema.LARGEST_FILE", 1000)
    dump(make_report(blocks=2), tmp_path / REPORT_NAME)
    with pytest.raises(CheckpointError, match="larger than 1000 bytes"):
        load(tmp_path)


def test_of_a_verification_the_report_holds_engine_and_checks(document):
    """What else the verifier says (the folder, what was left unchecked) is not part of the file."""
    assert set(document["verification"]) == {"ok", "engine", "checks"}
    assert {frozenset(check) for check in document["verification"]["checks"]} == {
        frozenset({"rule", "passed", "detail"})
    }


def test_an_evaluation_enters_the_report_as_plain_values():
    measured = make_evaluation()
    assert Evaluation.model_validate(measured.model_dump(mode="json")) == measured


def test_a_tensor_left_alone_needs_a_reason():
    facts = {"name": "w", "role": "norm", "shape": (4,), "bits_per_weight": 16, "bytes": 8}
    assert TensorEntry(**facts, reason="norms stay in 16 bits").scheme is None
    with pytest.raises(ValidationError, match="a scheme or a reason"):
        TensorEntry(**facts)
    with pytest.raises(ValidationError, match="a scheme or a reason"):
        TensorEntry(**facts, scheme="W4A16", reason="both")


def test_ok_cannot_contradict_the_checks():
    failed = Check(rule="every linear is quantized", passed=False)
    assert not Verification(ok=False, engine="vllm", checks=(failed,)).ok
    with pytest.raises(ValidationError, match="contradicts"):
        Verification(ok=True, engine="vllm", checks=(failed,))


def test_what_appears_under_the_name_of_a_page_is_kept_and_so_is_the_page(tmp_path):
    page = tmp_path / "page.html"
    write_text("first", page, replaces=False)
    with pytest.raises(OutputError, match="appeared while it was made, and was kept; what was made is") as caught:
        write_text("second", page, replaces=False)
    assert page.read_text() == "first"
    (made,) = set(tmp_path.iterdir()) - {page}
    assert made.read_text() == "second"
    assert str(made) in str(caught.value)
    write_text("third", page)
    assert page.read_text() == "third"


def test_runs_that_measure_at_once_lose_nothing_of_one_another(tmp_path, monkeypatch):
    """Each reads the report, adds its own, and writes it: without a lock the last one takes the others' place."""
    dump(make_report(blocks=1), tmp_path / REPORT_NAME)
    written = reporting.write_report

    def slowly(report, output):
        time.sleep(0.05)
        written(report, output)

    monkeypatch.setattr(reporting, "write_report", slowly)
    rows = (TaskRow(category="all", items=2, right=1),)
    results = [TaskResult(suite=f"suite {number}", model="m", reference=None, rows=rows, seed=0,
                          dtype="float32", activations="none", seconds=1.0) for number in range(4)]  # fmt: skip
    threads = [threading.Thread(target=reporting.add_tasks, args=(tmp_path, result)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.suite for each in load(tmp_path).tasks} >= {result.suite for result in results}
