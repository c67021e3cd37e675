"""The packaged texts: sizes, encoding, no overlap, and a README table that accounts for every byte."""

from importlib import resources

import pytest

from lowbit.text.mixture import PASSAGES

DATA = resources.files("lowbit") / "data"
SIZES = {"evaluation.txt": (110_000, 140_000), "calibration.txt": (400_000, 480_000)}
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


def domain_of(row):
    """The domain of calibration that a passage counts to; code and other languages first, whatever they are about."""
    kinds = set(row["domain"].split(", "))
    if kinds & {"code", "data"}:
        return "code"
    if row["language"] != "English":
        return "languages"
    if kinds & {"science", "mathematics", "technical documentation"}:
        return "technical"
    return "dialogue" if kinds & {"conversation", "dialogue"} else "prose"


def test_the_domains_of_calibration_are_those_of_the_table():
    rows = passages("calibration.txt")
    assert [(domain_of(row), int(row["bytes"])) for row in rows] == list(PASSAGES)


def test_evaluation_is_mainly_english_prose_and_several_domains():
    rows = passages("evaluation.txt")
    total = sum(int(row["bytes"]) for row in rows)
    assert sum(int(row["bytes"]) for row in rows if row["language"] == "English") >= 0.8 * total
    assert {row["language"] for row in rows} >= {"English", "French", "German", "Spanish", "Chinese"}
    assert {row["domain"] for row in rows} >= {"science", "law", "history", "code", "technical documentation"}


def test_calibration_is_mainly_english_with_many_languages_and_domains():
    rows = passages("calibration.txt")
    total = sum(int(row["bytes"]) for row in rows)
    assert sum(int(row["bytes"]) for row in rows if row["language"] == "English") >= 0.6 * total
    code = {"SQL", "shell", "C", "C++", "Go", "Python", "JavaScript", "TypeScript", "Rust", "Java", "JSON", "HTML"}
    languages = {language for row in rows for language in row["language"].split(", ")}
    assert code <= languages
    assert len(languages - code - {"YAML", "CSV"}) >= 20
    domains = {domain for row in rows for domain in row["domain"].split(", ")}
    assert domains >= {"conversation", "mathematics", "science", "news", "recipe", "law", "code", "data", "letters",
                       "technical documentation", "drama", "poetry"}  # fmt: skip


@pytest.mark.parametrize("file", SIZES)
def test_no_passage_says_the_same_twice(file):
    paragraphs = [paragraph for paragraph in read(file).split("\n\n") if len(paragraph) > 100]
    assert len(set(paragraphs)) == len(paragraphs)


@pytest.mark.demo_model
def test_calibration_is_enough_for_128_windows_of_512_tokens():
    from lowbit.architecture.loading import load_tokenizer
    from lowbit.checkpoint import open_checkpoint
    from lowbit.text import mixed_windows

    checkpoint = open_checkpoint("demo:smollm2")
    found = mixed_windows(None, load_tokenizer(checkpoint), 128, 512)
    checkpoint.close()
    assert found.ids.shape == (128, 512)
    assert found.notes == ()
    assert found.text_tokens > 110_000


def test_every_licence_that_asks_for_its_notice_has_it():
    notices = (DATA / "LICENSES.md").read_text(encoding="utf-8")
    for row in passages("evaluation.txt") + passages("calibration.txt"):
        if row["licence"].startswith("public domain"):
            continue
        if row["source"] == "written for this package":
            assert row["licence"] == "Apache-2.0", row["passage"]
            continue
        assert row["licence"] in {"BSD-3-Clause", "MIT", "Apache-2.0"}, row["passage"]
        project = row["source"].split("`")[1].split("-")[0]
        known = {"golang": "The Go Authors", "python": "Scikit-Learn Developers", "nanobind": "Wenzel Jakob"}
        assert known.get(project, project.capitalize()) in notices, row["passage"]
