"""Tasks: what a model can still do, reference and quantized on the same items.

items.py     the packaged items: arithmetic, facts, format, code; made from a seed
sandbox.py   runs code that a model wrote
answering.py a model's answers: by the likelihood of choices, or by writing
result.py    `TaskRow`, `TaskResult`: paired figures, McNemar's exact test
harness.py   other tasks, by lm-eval
run.py       `evaluate_tasks`
"""
