"""The packaged texts: sizes, encoding, no overlap, and a README table that accounts for every byte."""

from importlib import resources

import pytest

DATA = resources.files("lowbit") / "data"
SIZES = {"evaluation.txt": (110_000, 140_000), "calibration.txt": (250_000, 400_000)}
OVERLAP = 200
COLUMNS = ("file", "passage", "begins", "author", "source", "licence", "domain", "language", "bytes")


def passages(file):
    """The table's rows for `file`, in order."""
    lines = (DATA / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith(f"| {file}")]
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def read(file):
    return (DATA / file).read_bytes().decode("utf-8", errors="strict")


@pytest.mark.parametrize("file", SIZES)
def test_size_is_in_its_range(file):
    smallest, largest = SIZES[file]
    assert smallest <= len((DATA / file).read_bytes()) <= largest


@pytest.mark.parametrize("file", SIZES)
def test_text_is_clean_utf8(file):
    text = read(file)
    unwanted = {character for character in text if ord(character) < 32 and character not in "\n\t"}
    assert not unwanted | ({"\ufffd", "\ufeff", "\u00a0"} & set(text))
    assert "\n\n\n" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("file", SIZES)
def test_no_distributor_boilerplate_is_left(file):
    text = read(file).lower()
    assert "gutenberg" not in text
    assert "etext" not in text


def test_the_two_texts_share_no_long_piece():
    evaluation = " ".join(read("evaluation.txt").split())
    calibration = " ".join(read("calibration.txt").split())
    pieces = {evaluation[i : i + OVERLAP] for i in range(len(evaluation) - OVERLAP + 1)}
    assert not any(calibration[i : i + OVERLAP] in pieces for i in range(len(calibration) - OVERLAP + 1))


@pytest.mark.parametrize("file", SIZES)
def test_table_accounts_for_every_byte_in_order(file):
    data = (DATA / file).read_bytes()
    position = 0
    for row in passages(file):
        assert all(row.values()), row
        assert data[position:].decode().startswith(row["begins"]), row["passage"]
        position += int(row["bytes"])
        assert data[position - 1 : position] == b"\n", row["passage"]
        position += 1
    assert position == len(data) + 1


def test_evaluation_is_mainly_english_prose_and_several_domains():
    rows = passages("evaluation.txt")
    total = sum(int(row["bytes"]) for row in rows)
    assert sum(int(row["bytes"]) for row in rows if row["language"] == "English") >= 0.8 * total
    assert {row["language"] for row in rows} >= {"English", "French", "German", "Spanish", "Chinese"}
    assert {row["domain"] for row in rows} >= {"science", "law", "history", "code", "technical documentation"}


def test_every_licence_that_asks_for_its_notice_has_it():
    notices = (DATA / "LICENSES.md").read_text(encoding="utf-8")
    for row in passages("evaluation.txt") + passages("calibration.txt"):
        if row["licence"].startswith("public domain"):
            continue
        assert row["licence"] in {"BSD-3-Clause", "MIT", "Apache-2.0"}, row["passage"]
        project = row["source"].split("`")[1].split("-")[0]
        known = {"golang": "The Go Authors", "python": "Scikit-Learn Developers", "nanobind": "Wenzel Jakob"}
        assert known.get(project, project.capitalize()) in notices, row["passage"]
