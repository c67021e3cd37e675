"""Task files of lm-eval that run Python, grow, wait or never end, and what becomes of them."""

from __future__ import annotations

import os

import pytest

from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.patterns import PatternError
from lowbit.tasks import task_files
from lowbit.tasks.task_files import bounded_tasks, check_task_file
from lowbit.text import template_limits

PLAIN = "task: t\ndataset_path: json\ndoc_to_text: '{{question}}'\n"
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 9)
)


@pytest.fixture
def write(tmp_path):
    def write(text, name="task.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_python_runs_only_where_it_is_trusted(write):
    path = write(PLAIN + "process_docs: !function utils.f\n")
    with pytest.raises(UsageError, match=r"runs Python of its own \(!function utils\.f\)") as caught:
        check_task_file(path, False)
    assert "--trust-remote-code" in caught.value.hint
    check_task_file(path, True)


@pytest.mark.parametrize("trusted", [False, True])
def test_python_that_yaml_itself_would_run_is_never_trusted(write, trusted):
    path = write(PLAIN + "x: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UsageError, match=r"runs Python of its own .*os\.system"):
        check_task_file(path, trusted)


def test_files_that_are_included_are_looked_at_too(write):
    write(PLAIN + "doc_to_target: !function os.system\n", "inner.yaml")
    write("include: inner.yaml\n", "middle.yaml")
    with pytest.raises(UsageError, match=r"inner\.yaml: it runs Python"):
        check_task_file(write("include: [middle.yaml]\n"), False)
    with pytest.raises(UsageError, match=r"nope\.yaml: cannot be read"):
        check_task_file(write("include: [nope.yaml]\n"), False)
    check_task_file(write(PLAIN + "include: task.yaml\n"), False)  # a cycle, which lm-eval itself refuses


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ALIASES, "more than 100,000 values"),
        ("a: &a [*a]\n", "in themselves"),
        ("a: " + "[" * 5000 + "]" * 5000, "inside of one another|cannot load"),
        (PLAIN + "repeats: 1000000000", "repeats is 1000000000; at most 1,000 are run"),
        (PLAIN + "generation_kwargs: {max_gen_toks: 999999999999999999999}", "max_gen_toks is 9+; at most 131,072"),
        ("", "holds no mapping"),
        ("- a", "holds no mapping"),
        ("a: [", "cannot load this task"),
        ("a: \0", "cannot load this task"),
    ],
    ids=["aliases", "itself", "deep", "repeats", "tokens", "empty", "list", "open", "nul"],
)
def test_a_file_that_is_no_task_or_grows_is_refused(write, text, says):
    with pytest.raises(UsageError, match=says):
        check_task_file(write(text), False)


@pytest.mark.parametrize("text", ["include: pipe", "dataset_kwargs: {data_files: {test: PLACE/pipe}}"])
def test_pipes_are_not_waited_for(write, tmp_path, text):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LowbitError, match=r"is a pipe|no regular file"):
        check_task_file(write(text.replace("PLACE", str(tmp_path))), False)


def test_templates_of_a_file_run_in_a_sandbox_and_end(monkeypatch):
    utils = pytest.importorskip("lm_eval.utils", reason="pip install 'lowbit[eval]'")
    monkeypatch.setattr(template_limits, "STEPS", 1000)
    before = utils.apply_template
    with bounded_tasks(("task.yaml",)):
        assert utils.apply_template("{{ question|regex_replace('a+', 'b') }}\n", {"question": "caat"}) == "cbt\n"
        with pytest.raises(Exception, match="unsafe"):
            utils.apply_template("{{ cycler.__init__.__globals__.os }}", {})
        with pytest.raises(CheckpointError, match=r"task\.yaml: a template takes more than 1,000 steps for one item"):
            utils.apply_template("{% for a in range(9999) %}{{ a }}{% endfor %}", {})
        with pytest.raises(PatternError, match="takes too long to match"):
            utils.apply_template("{{ ('a' * 60 ~ '!')|regex_replace('(a|aa)+$', '') }}", {})
    assert utils.apply_template is before


def test_patterns_of_answers_end(monkeypatch):
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="pip install 'lowbit[eval]'")
    monkeypatch.setattr(task_files, "SECONDS", 0.2)
    with bounded_tasks(("task.yaml",)):
        found = extraction.RegexFilter(r"#### (\d+)", fallback="none")
        assert found.apply([["so #### 12"], ["no number"]], [{}, {}]) == [["12"], ["none"]]
        slow = extraction.RegexFilter(r"(a|aa)+$")
        with pytest.raises(PatternError, match="takes too long to match what the model wrote"):
            slow.apply([["a" * 60 + "!"]], [{}])
