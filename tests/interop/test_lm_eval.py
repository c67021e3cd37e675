"""lm-eval itself, where it is installed (the eval extra), on a task of local files."""

from __future__ import annotations

import contextlib
import json
import shutil
from typing import Any

import pytest
import torch

import lowbit
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import EngineFailure, LowbitError, UsageError
from lowbit.evaluation.opening import Opener
from lowbit.tasks import harness
from lowbit.tasks.answering import likelihoods
from lowbit.tasks.items import Item
from lowbit.tasks.lm import language_model
from lowbit.tasks.models import BlockwiseModel, WholeModel
from lowbit.tasks.run import evaluate_tasks
from lowbit.tasks.server import ServedModel
from task_servers import serving

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
def real_index(monkeypatch):
    """Other tests put stand-ins in its place. Without lm-eval's account of the machine, for which it calls pip."""
    harness._manager.cache_clear()
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


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
    ours = harness.samples(harness.whole_model(model, tokenizer, 8), (task,), None)
    assert len(ours["letters"]) == len(QUESTIONS)
    for mine, its in zip(ours["letters"], theirs["samples"]["letters"], strict=True):
        assert mine["doc"] == its["doc"]
        assert _likelihoods(mine) == pytest.approx(_likelihoods(its), abs=1e-4)
        assert (mine["acc"], mine["acc_norm"]) == (its["acc"], its["acc_norm"])
        words = its["doc"]["choices"] if choice == "choices" else "ABCD"
        item = Item("facts", f"Question: {its['doc']['question']}\nAnswer:", tuple(f" {word}" for word in words))
        packaged = likelihoods(WholeModel(model, tokenizer), [item])[0]
        sums = [score * len(each.encode()) for score, each in zip(packaged, item.choices, strict=True)]
        assert sums == pytest.approx(_likelihoods(its), abs=1e-3)


@pytest.mark.parametrize("way", ["blocks", "server", "llama.cpp"])
@pytest.mark.parametrize("choice", ['["A", "B", "C", "D"]', "choices"])
def test_block_by_block_and_over_a_server_they_are_the_same(tiny_llama, write_task, way, choice):
    """One adapter, held to lm-eval's own `hf` model: every log-likelihood, and which are the most probable."""
    task = write_task(choice)
    model, tokenizer = lowbit.load(tiny_llama)
    theirs = harness.samples(harness.whole_model(model, tokenizer, 1), (task,), None)["letters"]
    with contextlib.ExitStack() as stack:
        opened = Opener(stack, torch.float32, "cpu", OpenOptions()).open(tiny_llama)
        if way == "blocks":
            answerer = BlockwiseModel(opened, contextlib.nullcontext, OpenOptions(), 1 << 30)
        else:
            url, _ = stack.enter_context(serving(model, tokenizer, echo=way == "server"))
            answerer = ServedModel(url, tokenizer)
        judged = language_model(answerer, opened.model, lambda done: None)
        ours = harness.samples(judged, (task,), None)["letters"]
    assert not judged.unknown_greedy
    for mine, its in zip(ours, theirs, strict=True):
        assert _likelihoods(mine) == pytest.approx(_likelihoods(its), abs=1e-4)
        assert [answer[1] for answer in mine["filtered_resps"]] == [answer[1] for answer in its["filtered_resps"]]
        assert (mine["acc"], mine["acc_norm"]) == (its["acc"], its["acc_norm"])


WRITING = """
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: %s}
metric_list: [{metric: exact_match}]
"""


def test_text_is_written_as_lm_evals_own_model_writes_it(tiny_llama, write_task, tmp_path):
    """Token by token through the blocks; a task that samples is refused there."""
    task = write_task()
    path = tmp_path / "letters.yaml"
    head = path.read_text().partition("output_type")[0] + 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    path.write_text(head + WRITING % "false")
    model, tokenizer = lowbit.load(tiny_llama)
    theirs = harness.samples(harness.whole_model(model, tokenizer, 1), (task,), None)["letters"]
    with contextlib.ExitStack() as stack:
        opened = Opener(stack, torch.float32, "cpu", OpenOptions()).open(tiny_llama)
        blockwise = BlockwiseModel(opened, contextlib.nullcontext, OpenOptions(), 1 << 30)
        judged = language_model(blockwise, opened.model, lambda done: None)
        ours = harness.samples(judged, (task,), None)["letters"]
        assert [each["resps"] for each in ours] == [each["resps"] for each in theirs]
        path.write_text(head + WRITING % "true")
        with pytest.raises(UsageError, match="samples its answers"):
            harness.samples(judged, (task,), None)


def test_a_server_that_does_not_say_what_is_most_probable_cannot_judge_that(tiny_llama, write_task, tmp_path):
    task = write_task()
    path = tmp_path / "letters.yaml"
    head = path.read_text().partition("output_type")[0] + 'doc_to_text: "{{question}}"\ndoc_to_target: " {{answer}}"\n'
    path.write_text(head + "output_type: loglikelihood\nmetric_list: [{metric: acc}]\n")
    model, tokenizer = lowbit.load(tiny_llama)
    counts = pytest.raises(EngineFailure, match="letters counts the continuations that are the most probable")
    with serving(model, tokenizer, tops=False) as (url, _), counts:
        evaluate_tasks(tiny_llama, tasks=[task], url=url)
    with serving(model, tokenizer) as (url, _):
        assert evaluate_tasks(tiny_llama, tiny_llama, tasks=[task], url=url).rows[-1].lost == 0


def test_lm_evals_tasks_go_on_where_a_dying_server_stopped_them(tiny_llama, write_task, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    model, tokenizer = lowbit.load(tiny_llama)
    task = write_task()
    with serving(model, tokenizer, dies_after=6) as (url, _):
        port = int(url.rpartition(":")[2])
        with pytest.raises(EngineFailure, match="answers 500"):
            evaluate_tasks(tiny_llama, tiny_llama, [task], url=url)
    with serving(model, tokenizer, port=port) as (url, asked):
        found = evaluate_tasks(tiny_llama, tiny_llama, [task, "facts"], url=url, limit=4)
    assert "6 answers are from a run that was stopped" in found.notes
    assert len(asked) == 4 * 4 + 4 * 4 - 6
    assert [(row.category, row.items, row.lost) for row in found.rows] == [
        ("facts", 4, 0), ("letters", 4, 0), ("all", 8, 0)]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "says"),
    [("{% for m in messages %}<{{ m.content }}>{% endfor %}", ""), (None, "has no chat template"),
     ("{{ raise_exception('no') }}", "its chat template fails"), ("{% for i in range(10**9) %}x{% endfor %}", "")],
)  # fmt: skip
def test_the_chat_template_is_applied_or_named(tiny_llama, write_task, tmp_path, template, says):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    task = write_task()
    if says or "range" in str(template):
        with pytest.raises(LowbitError, match=says):
            evaluate_tasks(folder, tasks=[task], chat_template=True)
        return
    model, tokenizer = lowbit.load(folder)
    judged = harness.whole_model(model, tokenizer, 8)
    asked = [harness.samples(judged, (task,), None, chat)["letters"][0]["arguments"] for chat in (False, True)]
    assert "<Question: 2 + 2" not in str(asked[0])
    assert "<Question: 2 + 2" in str(asked[1])


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
