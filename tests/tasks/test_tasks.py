"""Tasks with real models of a few thousand weights, and everything that can be wrong with what was asked."""

from __future__ import annotations

import contextlib
import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint.base import HTML_NAME, OpenOptions, report_path
from lowbit.cli.main import app
from lowbit.errors import DependencyError, EngineFailure, NonFiniteError, UsageError
from lowbit.evaluation.memory import Way
from lowbit.evaluation.opening import Opener
from lowbit.report import schema
from lowbit.tasks import harness
from lowbit.tasks.answering import ENDS, answers, choice_tokens, likelihoods
from lowbit.tasks.items import Item
from lowbit.tasks.models import BlockwiseModel, WholeModel
from lowbit.tasks.run import evaluate_tasks


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return lowbit.quantize(tiny_llama, tmp_path_factory.mktemp("tasks") / "out", scheme="W4A16").path


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return lowbit.load(tiny_llama)


def test_likelihoods_are_sums_over_the_choice_alone_whatever_stands_beside_it_in_the_batch(loaded):
    """Each row alone, by a plain loop over its tokens."""
    model, tokenizer = loaded
    texts = [("one two", " three"), ("a much longer beginning of a line", " x"), ("b", " something else")]
    rows = []
    for prompt, choice in texts:
        start = len(tokenizer(prompt)["input_ids"])
        rows.append((tokenizer(prompt + choice)["input_ids"], start))
    found = [each.total for each in WholeModel(model, tokenizer).scored(rows)]
    for (ids, start), total in zip(rows, found, strict=True):
        with torch.inference_mode():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        alone = sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert total == pytest.approx(alone, abs=1e-4)
    items = [Item("facts", prompt, (choice, " no", " not", " never")) for prompt, choice in texts]
    by_item = likelihoods(WholeModel(model, tokenizer), items)
    assert [scores[0] * len(choice.encode()) for scores, (_, choice) in zip(by_item, texts, strict=True)] == (
        pytest.approx(found, abs=1e-3)
    )


def test_ties_and_nan_are_no_right_answers(loaded):
    model, tokenizer = loaded
    same = Item("facts", "one", (" two", " two", " two", " two"))
    assert answers(WholeModel(model, tokenizer), [same]) == [False]
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError):
            answers(WholeModel(model, tokenizer), [same])
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_written_code_ends_where_the_function_does(loaded, monkeypatch):
    model, tokenizer = loaded
    text = "    return x\n\n\ndef other():\n"
    monkeypatch.setattr(type(model), "generate", lambda self, ids, **how: torch.cat(
        [ids, torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])], 1))  # fmt: skip
    prompt = list(tokenizer("def f(x):\n")["input_ids"])
    assert WholeModel(model, tokenizer).written([prompt], ENDS, 40)[0].rstrip() == "    return x"
    right = Item("code", "def f(x):\n", (), (("f(3)", "3"),))
    wrong = Item("code", "def f(x):\n", (), (("f(3)", "4"),))
    assert answers(WholeModel(model, tokenizer), [wrong, right]) == [False, True]


def test_a_model_against_itself_flips_nothing(tiny_llama):
    found = evaluate_tasks(tiny_llama, tiny_llama, ["facts", "arithmetic"], limit=6)
    assert [row.category for row in found.rows] == ["arithmetic", "facts", "all"]
    assert [(row.items, row.lost, row.gained) for row in found.rows] == [(6, 0, 0), (6, 0, 0), (12, 0, 0)]
    assert found.rows[-1].p == 1.0


def test_a_model_that_does_not_fit_answers_block_by_block_as_a_whole_one_does(tiny_llama, loaded, monkeypatch):
    """Choices of unlike lengths to 1e-4, text token by token, and so the rows; rounded inputs too."""
    whole = WholeModel(*loaded)
    words = ["one", "one two three four five six", "x " * 40]
    rows = [choice_tokens(loaded[1], word, f" {end}") for word in words for end in ("cat", "dog", "two words more")]
    prompts = [list(loaded[1](word)["input_ids"]) for word in words]
    with contextlib.ExitStack() as stack:
        opened = Opener(stack, torch.float32, "cpu", OpenOptions()).open(tiny_llama)
        blockwise = BlockwiseModel(opened, contextlib.nullcontext, OpenOptions(), 1 << 30)
        found, expected = blockwise.scored(rows), whole.scored(rows)
        assert [each.total for each in found] == pytest.approx([each.total for each in expected], abs=1e-4)
        assert [each.greedy for each in found] == [each.greedy for each in expected]
        texts = whole.written(prompts, (), 5)
        assert blockwise.written(prompts, (), 5) == texts
        stop = texts[0][2:4]
        assert blockwise.written(prompts[:1], (stop,), 5) == [texts[0].partition(stop)[0]]
    monkeypatch.setattr("lowbit.tasks.run.choose_way", lambda loaders, runs, most: Way(True, 1 << 30, ("by blocks",)))
    parted = evaluate_tasks(tiny_llama, tiny_llama, ["facts", "languages", "code"], limit=4)
    monkeypatch.undo()
    assert parted.notes[-2:] == ("reference: by blocks", "by blocks")
    assert parted.rows == evaluate_tasks(tiny_llama, tiny_llama, ["facts", "languages", "code"], limit=4).rows


def test_the_command_adds_them_to_the_report_and_the_page(folder):
    words = ["evaluate", str(folder), "--tasks", "facts,format", "--task-items", "4"]
    for _ in range(2):
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, answer.output
    assert "difference" in answer.stdout
    report = schema.load(folder)
    assert [each.suite for each in report.tasks] == ["packaged"]
    assert report.tasks[0].rows[-1].items == 8
    page = report_path(folder, HTML_NAME).read_text(encoding="utf-8")
    assert "p (McNemar)" in page
    shown = json.loads(CliRunner().invoke(app, [*words, "--json", "--no-report", "--task-seed", "5"]).stdout)
    assert shown["seed"] == 5
    assert {"accuracy", "difference", "difference_se", "p"} <= shown["rows"][0].keys()
    assert schema.load(folder).tasks == report.tasks


def test_activations_are_simulated_where_the_scheme_rounds_them(tiny_llama, tmp_path):
    made = lowbit.quantize(tiny_llama, tmp_path / "out", scheme="FP8_DYNAMIC").path
    assert evaluate_tasks(made, tasks=["facts"], limit=2).activations == "simulated"
    assert evaluate_tasks(made, tasks=["facts"], limit=2, activations="none").activations == "none"


@pytest.mark.parametrize(
    ("tasks", "how", "says"),
    [
        ([], {}, "no task"),
        (["fact"], {}, "did you mean facts"),
        (["facts"], {"chat_template": True}, "without a chat template"),
        (["facts"], {"limit": 0}, "1 or more"),
        (["facts"], {"seed": -1}, "the seed -1"),
        (["facts"], {"max_memory": 1 << 20}, "memory"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, tasks, how, says):
    with pytest.raises(UsageError) as caught:
        evaluate_tasks(folder, tasks=tasks, **how)
    assert says in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "all", "--windows", "3"], "--windows"),
        (["--tasks", "all", "--text", "x"], "--text"),
        (["--task-items", "3"], "--task-items"),
        (["--task-seed", "3"], "--task-seed"),
    ],
)
def test_options_that_are_not_read_are_refused(folder, words, says):
    answer = CliRunner().invoke(app, ["evaluate", str(folder), *words])
    assert isinstance(answer.exception, UsageError)
    assert says in str(answer.exception)


def test_without_lm_eval_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    harness._manager.cache_clear()
    with pytest.raises(DependencyError, match="mmlu") as caught:
        evaluate_tasks(folder, tasks=["mmlu"])
    assert "lowbit[eval]" in caught.value.hint


def _stand_in(monkeypatch, evaluate):
    """Modules that look like lm-eval 0.4.13."""
    names = ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    modules = {name: types.ModuleType(name) for name in names}
    modules["lm_eval.tasks"].TaskManager = lambda include_defaults: types.SimpleNamespace(all_tasks=["mmlu", "gsm8k"])
    modules["lm_eval.models.huggingface"].HFLM = lambda pretrained, tokenizer, batch_size: pretrained
    modules["lm_eval"].simple_evaluate = evaluate
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    harness._manager.cache_clear()
    monkeypatch.setattr(harness.metadata, "version", lambda name: "0.4.13")


def test_lm_evals_items_are_paired_by_task_filter_and_document(folder, monkeypatch):
    calls = []

    def evaluate(model, tasks, limit, log_samples, bootstrap_iters, task_manager, apply_chat_template):
        assert log_samples
        calls.append(tasks)
        flipped = len(calls) - 1  # of the second model the first document is wrong
        samples = [{"doc_id": doc, "filter": "none", "acc": float(doc >= flipped)} for doc in range(3)]
        return {"samples": {"mmlu": samples, "gsm8k": [{"doc_id": 0, "filter": "strict", "exact_match": 1.0}]}}

    _stand_in(monkeypatch, evaluate)
    found = evaluate_tasks(folder, tasks=["mmlu", "gsm8k"], limit=3)
    assert found.suite == "lm-eval 0.4.13"
    assert [(row.category, row.items, row.lost, row.gained) for row in found.rows] == [
        ("mmlu", 3, 1, 0), ("gsm8k (strict)", 1, 0, 0), ("all", 4, 1, 0)]  # fmt: skip
    with pytest.raises(UsageError, match="no task 'mmlo'") as caught:
        evaluate_tasks(folder, tasks=["mmlo"])
    assert "mmlu" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ConnectionError("Couldn't reach 'cais/mmlu' on the Hub"), UsageError, "cannot be had"),
        (OSError("LocalEntryNotFoundError: offline mode"), UsageError, "--tasks all"),
        (KeyError("choices"), EngineFailure, "failed on mmlu"),
    ],
)
def test_tasks_that_fail_are_named(folder, monkeypatch, error, kind, says):
    def evaluate(**how):
        raise error

    _stand_in(monkeypatch, evaluate)
    with pytest.raises(kind) as caught:
        evaluate_tasks(folder, tasks=["mmlu"])
    assert "mmlu" in str(caught.value)
    assert says in f"{caught.value} {caught.value.hint}"


def test_a_task_without_right_and_wrong_is_refused(folder, monkeypatch):
    _stand_in(monkeypatch, lambda **how: {"samples": {"mmlu": [{"doc_id": 0, "bleu": 0.3}]}})
    with pytest.raises(UsageError, match="no metric of right and wrong"):
        evaluate_tasks(folder, tasks=["mmlu"])


def test_a_dtype_by_name_is_refused(tiny_llama):
    with pytest.raises(UsageError, match="'bfloat16' is no dtype of torch"):
        lowbit.load(tiny_llama, dtype="bfloat16")
