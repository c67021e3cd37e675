"""lm-eval itself, where it is installed (the eval extra), on a task of local files."""

from __future__ import annotations

import json
from typing import Any

import pytest

import lowbit
from lowbit.errors import EngineFailure, UsageError
from lowbit.tasks import harness
from lowbit.tasks.answering import likelihoods
from lowbit.tasks.items import Item
from lowbit.tasks.run import evaluate_tasks

lm_eval: Any = None  # until a test runs, so that collecting need not wait for it
TaskManager: Any = None


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    global lm_eval, TaskManager
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lowbit[eval]'")
    TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager


QUESTIONS = [("2 + 2", ["3", "4", "5", "6"], 1), ("the capital of Spain", ["Madrid", "Rome", "Paris", "Oslo"], 0),
             ("not hot", ["warm", "red", "cold", "dry"], 2), ("7 - 4", ["1", "2", "4", "3"], 3)]  # fmt: skip
TASK = r"""
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\nAnswer:"
doc_to_choice: {choice}
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(autouse=True)
def real_index():
    """Other tests put stand-ins in its place."""
    harness._manager.cache_clear()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def write_task(tmp_path, offline):
    """Makes the task's two files; choice: of the letters, or of the texts behind them."""

    def write(choice='["A", "B", "C", "D"]'):
        data = tmp_path / "items.jsonl"
        fields = ("question", "choices", "answer")
        data.write_text("\n".join(json.dumps(dict(zip(fields, each, strict=True))) for each in QUESTIONS))
        path = tmp_path / "letters.yaml"
        path.write_text(TASK.format(data=data, choice=choice))
        return str(path)

    return write


@pytest.mark.parametrize("choice", ['["A", "B", "C", "D"]', "choices"])
def test_likelihoods_and_accuracy_are_those_of_lm_evals_own_model(tiny_llama, write_task, choice):
    """Of every choice of every item, to 1e-4: letters, which are one token, and texts, which are several; and the
    packaged tasks score the same choices alike."""
    task = write_task(choice)
    how = {"tasks": [task], "log_samples": True, "bootstrap_iters": 0}
    theirs = lm_eval.simple_evaluate(model="hf", device="cpu", batch_size=1, **how,
                                     model_args=f"pretrained={tiny_llama},dtype=float32",
                                     task_manager=TaskManager(include_defaults=False))  # fmt: skip
    model, tokenizer = lowbit.load(tiny_llama)
    ours = harness.samples(model, tokenizer, (task,), None, 8)
    assert len(ours["letters"]) == len(QUESTIONS)
    for mine, its in zip(ours["letters"], theirs["samples"]["letters"], strict=True):
        assert mine["doc"] == its["doc"]
        assert _likelihoods(mine) == pytest.approx(_likelihoods(its), abs=1e-4)
        assert (mine["acc"], mine["acc_norm"]) == (its["acc"], its["acc_norm"])
        words = its["doc"]["choices"] if choice == "choices" else "ABCD"
        item = Item("facts", f"Question: {its['doc']['question']}\nAnswer:", tuple(f" {word}" for word in words))
        packaged = likelihoods(model, tokenizer, [item])[0]
        sums = [score * len(each.encode()) for score, each in zip(packaged, item.choices, strict=True)]
        assert sums == pytest.approx(_likelihoods(its), abs=1e-3)


def _likelihoods(sample):
    return [float(answer[0]) for answer in sample["filtered_resps"]]


def test_a_task_of_a_file_is_paired_by_item(tiny_llama, write_task):
    found = evaluate_tasks(tiny_llama, tiny_llama, [write_task()], limit=3)
    assert found.suite.startswith("lm-eval")
    assert [(row.category, row.items, row.lost, row.gained) for row in found.rows] == [
        ("letters", 3, 0, 0), ("all", 3, 0, 0)]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "no such task file"),
        (lambda path: path.write_text("task: [unclosed"), "cannot load"),
        (lambda path: path.write_text("words: only\n"), "cannot load"),
        (lambda path: path.with_name("items.jsonl").unlink(), "data_files"),
    ],
)
def test_a_task_file_that_is_not_sound_is_refused(tiny_llama, write_task, tmp_path, spoil, says):
    task = write_task()
    spoil(tmp_path / "letters.yaml")
    with pytest.raises(UsageError) as caught:
        evaluate_tasks(tiny_llama, tiny_llama, [task])
    assert says in f"{caught.value} {caught.value.hint}"


def test_a_template_that_does_not_fit_the_items_is_named(tiny_llama, write_task, tmp_path):
    task = write_task("answers_that_are_not_there")
    with pytest.raises((UsageError, EngineFailure), match="letters"):
        evaluate_tasks(tiny_llama, tiny_llama, [task])


@pytest.mark.slow
def test_names_of_the_hubs_tasks_without_a_network(tiny_llama, offline):
    """In one test, since lm-eval reads its index for ten seconds."""
    with pytest.raises(UsageError, match="no task 'mmlo'") as caught:
        evaluate_tasks(tiny_llama, tiny_llama, ["mmlo"])
    assert "mmlu" in caught.value.hint
    with pytest.raises(UsageError, match="piqa: the data cannot be had"):
        evaluate_tasks(tiny_llama, tiny_llama, ["piqa"])
