"""lm-eval itself, where the `eval` extra is installed: what our adapter makes of each item is what lm-eval's own model
makes of it."""

from __future__ import annotations

import json

import pytest

import lowbit
from lowbit.errors import UsageError
from lowbit.tasks import harness
from lowbit.tasks.answering import likelihoods
from lowbit.tasks.items import packaged_items

pytest.importorskip("lm_eval")


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The packaged facts as a multiple-choice task of lm-eval, from a file: no network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"prompt": item.prompt, "choices": list(item.choices), "gold": 0} for item in packaged_items(0, ("facts",))]
    (tmp_path / "facts.json").write_text("\n".join(json.dumps(row) for row in rows[:24]))
    return {
        "task": "our_facts", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "facts.json")}}, "num_fewshot": 0,
        "doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip


def test_the_adapter_is_lm_evals_own_model_item_by_item(tiny_llama, task):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = lowbit.load(tiny_llama)
    ours = harness.outcomes(model, tokenizer, (task,), None, 8)
    own = HFLM(pretrained=str(tiny_llama), dtype="float32", device="cpu", batch_size=8)
    found = lm_eval.simple_evaluate(model=own, tasks=[task], log_samples=True, bootstrap_iters=0)
    theirs = {("our_facts", "none", str(row["doc_id"])): row["acc"] >= 0.5 for row in found["samples"]["our_facts"]}
    assert ours == theirs
    assert len(ours) == 24
    # And the packaged way to score the same choices: lm-eval's log-likelihoods.
    scores = likelihoods(model, tokenizer, packaged_items(0, ("facts",))[:24])
    for row in found["samples"]["our_facts"]:
        sums = [float(answer[0][0]) for answer in row["resps"]]
        sizes = [len(choice.encode()) for choice in row["doc"]["choices"]]
        expected = [total / size for total, size in zip(sums, sizes, strict=True)]
        assert scores[row["doc_id"]] == pytest.approx(expected, abs=1e-3)


def test_unknown_tasks_are_named_and_known_ones_are_not_refused():
    assert harness.check_tasks(("arc_easy",)).startswith("lm-eval 0.4")
    with pytest.raises(UsageError) as caught:
        harness.check_tasks(("arc_eazy",))
    assert "arc_easy" in caught.value.hint


def test_a_task_whose_data_cannot_be_had_is_refused_by_name(tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, tokenizer = lowbit.load(tiny_llama)
    with pytest.raises(UsageError, match="arc_easy: the data cannot be had") as caught:
        harness.outcomes(model, tokenizer, ("arc_easy",), 2, 2)
    assert "--tasks all" in caught.value.hint
