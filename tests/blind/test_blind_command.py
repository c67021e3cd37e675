"""`lowbit compare --blind`: what it writes and prints, and the options that it refuses."""

from __future__ import annotations

import json

import pytest
from chat_servers import chatting, prompt_of
from typer.testing import CliRunner

from lowbit.cli.main import app
from lowbit.errors import LowbitError, OutputError, UsageError


def lowbit(*words):
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def servers():
    with chatting(prompt_of) as (a, _), chatting(lambda body: prompt_of(body) + "!") as (b, _):
        yield a, b


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_page_is_written_and_the_order_is_not_printed(servers, prompts, tmp_path):
    done = lowbit(*servers, "--blind", "--prompts", prompts, "-o", "page.html", "--seed", 4)
    assert "3 to vote on, 0 with the same answer" in done.stdout
    assert "page: page.html" in done.stderr
    assert "left" not in done.stdout
    assert "data-sealed" in (tmp_path / "page.html").read_text()


def test_without_a_name_the_page_is_blind_html(servers, prompts, tmp_path):
    lowbit(*servers, "--blind", "--prompts", prompts)
    assert (tmp_path / "blind.html").is_file()


def test_a_page_that_is_there_is_not_replaced_and_nothing_is_asked(prompts, tmp_path):
    (tmp_path / "blind.html").write_text("mine")
    with chatting(prompt_of) as (a, asked), pytest.raises(OutputError, match="exists"):
        lowbit(a, a, "--blind", "--prompts", prompts)
    assert not asked
    assert (tmp_path / "blind.html").read_text() == "mine"


def test_with_overwrite_a_page_of_lowbit_is_and_nothing_else(servers, prompts, tmp_path):
    page = tmp_path / "blind.html"
    page.write_text("mine")
    with pytest.raises(OutputError, match=r"blind.html exists, and is no such document of lowbit"):
        lowbit(*servers, "--blind", "--prompts", prompts, "--overwrite")
    assert page.read_text() == "mine"
    page.write_text('<head><meta name="generator" content="lowbit"></head>')
    lowbit(*servers, "--blind", "--prompts", prompts, "--overwrite")
    assert "data-sealed" in page.read_text()
    lowbit(*servers, "--blind", "--prompts", prompts, "--overwrite")  # its own page


def test_a_judge_needs_no_page_and_is_summed_up(servers, prompts, tmp_path):
    def opinion(body):
        first, second = prompt_of(body).split("[Answer of assistant B]")
        return "[[A]]" if "!" in first else "[[B]]" if "!" in second else "hm"

    with chatting(opinion, ("critic",)) as (url, _):
        done = lowbit(*servers, "--blind", "--prompts", prompts, "--judge", url)
        values = json.loads(lowbit(*servers, "--blind", "--prompts", prompts, "--judge", url, "--json").stdout)
    assert "judge    critic" in done.stdout
    assert "wins: 0 for A, 3 for B; ties: 0; sign test p = 0.25: neither is preferred; 0% of" in done.stdout
    assert not list(tmp_path.glob("*.html"))
    assert values["judge"]["wins_b"] == 3
    assert [pair["verdict"] for pair in values["pairs"]] == ["b"] * 3
    assert {pair["left"] for pair in values["pairs"]} <= {"a", "b"}


def test_verdicts_that_cannot_be_read_are_counted_in_words(servers, prompts):
    with chatting(lambda body: "Both!", ("critic",)) as (url, _):
        done = lowbit(*servers, "--blind", "--prompts", prompts, "--judge", url)
    assert "3 pairs are not counted: the judge did not answer in the form it was asked for" in done.stdout


@pytest.mark.parametrize(
    "unread",
    [
        ("--reference", "x"), ("--text", "x"), ("--windows", 3), ("--window-tokens", 16), ("--protocol", "second-half"),
        ("--bos",), ("--max-memory", "1GiB"), ("--samples", 2), ("--fresh",), ("--no-report",),
    ],
)  # fmt: skip
def test_an_option_of_the_measured_comparison_is_refused(unread):
    with pytest.raises(UsageError, match=f"{unread[0]} is not read with --blind"):
        lowbit("a", "b", "--blind", *unread)


@pytest.mark.parametrize(
    "alone",
    [
        ("--prompts", "x"), ("--max-tokens", 3), ("--temperature", 1), ("--seed", 0), ("--judge", "http://x"),
        ("--judge-model", "x"),
    ],
)  # fmt: skip
def test_an_option_of_the_blind_comparison_is_refused_without_it(alone):
    with pytest.raises(UsageError, match=f"{alone[0]} is of a blind comparison"):
        lowbit("a", "b", *alone)


@pytest.mark.parametrize("models", [("a",), ("a", "b", "c")])
def test_two_models_are_compared_and_no_other_number(models):
    with pytest.raises(UsageError, match="--blind compares two models"):
        lowbit(*models, "--blind")


def test_a_model_that_does_not_exist_is_an_error_in_words(prompts, tmp_path):
    with pytest.raises(LowbitError):
        lowbit(tmp_path / "absent", tmp_path / "absent", "--blind", "--prompts", prompts)


@pytest.mark.parametrize(
    ("second", "page", "says"), [("absent", "page.html", "absent"), ("", "absent/page.html", "absent is no folder")]
)
def test_a_model_or_a_folder_that_is_not_there_is_refused_before_anything_is_asked(prompts, second, page, says):
    with chatting(prompt_of) as (a, asked), pytest.raises(LowbitError, match=says):
        lowbit(a, second or a, "--blind", "--prompts", prompts, "-o", page)
    assert not asked
