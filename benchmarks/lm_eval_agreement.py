"""The packaged facts asked as MMLU asks, by lm-eval's own `hf` model and by lowbit: accuracy and log-likelihoods.

usage: lm_eval_agreement.py FOLDER…      (the eval extra)

    FOLDER  what both load: a model in 16 bits, or compressed-tensors with weights alone rounded

Each item is a question with four lettered choices; the log-likelihoods of " A" to " D" are compared. float32, and no
network.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import lowbit
from lowbit.tasks import harness
from lowbit.tasks.items import packaged_items

TASK = r"""
task: facts_as_mmlu
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def main() -> None:
    print("| | items | right, lm-eval's hf | right, lowbit | judged alike | largest difference of a log-likelihood |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        task = write_task(Path(scratch))
        for folder in sys.argv[1:]:
            print(row(folder, task), flush=True)


def write_task(folder: Path) -> str:
    order = random.Random(0)
    lines = []
    for item in packaged_items(0, ("facts",)):
        choices = order.sample(item.choices, len(item.choices))
        lines.append(json.dumps({"prompt": item.prompt, "choices": choices, "answer": choices.index(item.choices[0])}))
    (folder / "facts.jsonl").write_text("\n".join(lines))
    path = folder / "facts.yaml"
    path.write_text(TASK.format(data=folder / "facts.jsonl"))
    return str(path)


def row(folder: str, task: str) -> str:
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", device="cpu", batch_size=8, tasks=[task],
        log_samples=True, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
    )["samples"]["facts_as_mmlu"]  # fmt: skip
    model, tokenizer = lowbit.load(folder)
    harness.check_tasks((task,), False)
    ours = harness.samples(harness.whole_model(model, tokenizer, 8), (task,), None)["facts_as_mmlu"]
    pairs = list(zip(ours, theirs, strict=True))
    apart = max(abs(float(mine[0]) - float(its[0])) for our, their in pairs
                for mine, its in zip(our["filtered_resps"], their["filtered_resps"], strict=True))  # fmt: skip
    alike = sum(our["acc"] == their["acc"] for our, their in pairs)
    right = [sum(int(sample["acc"]) for sample in samples) for samples in (theirs, ours)]
    return f"| {Path(folder).name} | {len(pairs)} | {right[0]} | {right[1]} | {alike} | {apart:.1e} |"


if __name__ == "__main__":
    main()
