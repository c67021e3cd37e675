"""The runs that `benchmarks/kills.py` kills: each makes an output, small, and goes on where an earlier one was killed.

A run takes (root, output, resume, event) and calls `event` at every step of progress. `prepare` makes what they read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Event = Callable[..., None]


def prepare(root: Path, blocks: int) -> None:
    """A model, a quantized one, texts and prompts in `root`."""
    import lowbit
    from calibrate.calibrated import write_text
    from models import make_model

    model = make_model(root / "model", num_hidden_layers=blocks)
    text = write_text(root)
    (root / "held-out.txt").write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    (root / "text-of-runs.txt").write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    (root / "prompts.txt").write_text("".join(f"prompt number {number}\n" for number in range(8)))
    lowbit.quantize(model, root / "quantized", scheme="W3A16", group_size=32)


def gptq(root: Path, output: Path, resume: bool, event: Event) -> None:
    import lowbit
    from lowbit.calibrate import loop
    from lowbit.settings import RunOptions

    loop.KEEP_STATES_EVERY = 0.0  # states after every block, so that kills meet their writing too
    how = {"scheme": "Q4_0"} if output.suffix == ".gguf" else {"scheme": "W4A16", "group_size": 32}
    lowbit.quantize(root / "model", output, method="gptq", calib=str(root / "text-of-runs.txt"), samples=12, seqlen=48,
                    expert_tokens=8, threads=1, run=RunOptions(resume=resume), progress=event, **how)  # fmt: skip


def refine(root: Path, output: Path, resume: bool, event: Event) -> None:
    import lowbit
    from lowbit.calibrate import loop
    from lowbit.settings import RunOptions

    loop.KEEP_STATES_EVERY = 0.0
    lowbit.refine(root / "quantized", output, reference=root / "model", calib=str(root / "text-of-runs.txt"),
                  samples=12, seqlen=48, expert_tokens=8, sweeps=1, text=root / "held-out.txt", windows=3,
                  window_tokens=32, run=RunOptions(resume=resume), progress=event)  # fmt: skip


def finetune(root: Path, output: Path, resume: bool, event: Event) -> None:
    _train(root, output, resume, event, scheme="W4A16", group_size=32)


def adapters(root: Path, output: Path, resume: bool, event: Event) -> None:
    from lowbit.train import LoRA

    _train(root, output, resume, event, scheme="W4A16", group_size=32, lora=LoRA(4, init="loftq"))


def _train(root: Path, output: Path, resume: bool, event: Event, **how: object) -> None:
    import lowbit
    from lowbit.train import Course

    course = Course(steps=6, batch=2, windows=10, window_tokens=24, learning_rate=1e-3)
    lowbit.finetune(root / "model", output, data=str(root / "text-of-runs.txt"), course=course, save_every=2,
                    resume=resume, progress=event, **how)  # type: ignore[arg-type]  # fmt: skip


def blind(root: Path, output: Path, resume: bool, event: Event) -> None:
    """Without --resume: answers that were kept are taken whenever the question is the same."""
    from lowbit.blind.run import compare_blind

    found = compare_blind(str(root / "model"), str(root / "quantized"), root / "prompts.txt", max_tokens=4, seed=1,
                          progress=event).to_dict()  # fmt: skip
    output.mkdir()
    (output / "answers.json").write_text(json.dumps({key: found[key] for key in found if key != "notes"}))


def tasks(root: Path, output: Path, resume: bool, event: Event) -> None:
    from lowbit.tasks.run import evaluate_tasks

    found = evaluate_tasks(root / "quantized", root / "model", ["arithmetic"], limit=1, progress=event)
    output.mkdir()
    kept = {"seconds", "notes", "created"}
    (output / "figures.json").write_text(found.model_dump_json(exclude=kept & set(type(found).model_fields)))


# what → (name of its output, the run)
RUNS: dict[str, tuple[str, Callable[[Path, Path, bool, Event], None]]] = {
    "gptq": ("out", gptq), "gptq-gguf": ("out.gguf", gptq), "refine": ("out", refine), "finetune": ("out", finetune),
    "adapters": ("out", adapters), "blind": ("out", blind), "tasks": ("out", tasks),
}  # fmt: skip
