"""What `lowbit verify` would refuse, found before anything is written: such a scheme is not advised.

The files of a plan are made without their weights: config.json, the format's own JSON files, and a safetensors file
that is all header. The engine's rules about its kernels and loaders (`Rule.limit`) need no more, so the same functions
judge the plan and, later, the files: model dtype, bits, group sizes, shapes, formats without a loader, models whose
class refuses a format; and for several cards, whether every layer splits at whole groups.
"""

from __future__ import annotations

import json

from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.remote import folder_for_copies, safetensors_without_weights
from lowbit.checkpoint.safetensors import TORCH_DTYPE
from lowbit.engines import Engine
from lowbit.engines.servers import split_problem
from lowbit.errors import LowbitError
from lowbit.plan.folder import FolderPlan
from lowbit.plan.plan import Prepared
from lowbit.verification import rules
from lowbit.verification.result import PLAIN, shortened
from lowbit.verification.subject import Subject

_NAMES = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def why_refused(prepared: Prepared, engine: Engine, options: OpenOptions, ranks: int = 1) -> str | None:
    """Why an engine would not load the files of a plan; None where no rule speaks against them, and for GGUF files.

    ranks  cards that divide every matrix among them
    """
    plan = prepared.plan
    if not isinstance(plan, FolderPlan):
        return None
    with folder_for_copies("planned") as folder:
        for name, content in plan.json_files(prepared.checkpoint).items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        tensors = {tensor.name: (_NAMES[tensor.dtype], tensor.shape) for tensor in plan.stored}
        safetensors_without_weights(folder / "model.safetensors", tensors)
        subject = Subject(folder=folder, engine=engine.name, options=options)
        try:
            return _first_problem(subject, engine, ranks)
        finally:
            subject.close()


def _first_problem(subject: Subject, engine: Engine, ranks: int) -> str | None:
    if subject.format == PLAIN:
        return None
    for rule in rules(engine.name, subject.format):
        if rule.limit:
            try:
                problems = rule.check(subject).problems
            except LowbitError as error:
                problems = [str(error)]
            if problems:
                return f"{engine.label} would refuse it ({rule.name}): {shortened(problems[:1])}"
    problem = None if ranks == 1 else split_problem(subject, ranks)
    return None if problem is None else f"it does not split among {ranks} cards: {problem}"
