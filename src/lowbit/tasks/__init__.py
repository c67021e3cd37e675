"""Tasks: what a model can still do, reference and quantized on the same items.

items.py     the packaged items: arithmetic, facts, format, code, languages; made from a seed
humaneval.py the items of HumanEval, from its authors' package
sandbox.py   runs code that a model wrote
answering.py answers to items, by the likelihood of choices or by writing; `Answerer`: who answers
models.py    a model that answers here, whole or block by block
server.py    a running server that answers
harness.py   other tasks, by lm-eval; lm.py, its model over an `Answerer`
result.py    `TaskRow`, `TaskResult`: paired figures, McNemar's exact test
run.py       `evaluate_tasks`
"""
