"""States of a training on disk, so that one that was killed goes on, to the same bytes.

    .NAME.lowbit-work/            beside the output, the work folder of every run (`calibrate.store`)
        run.json                  what the weights depend on: settings, course, model, text, arithmetic, versions
        learning.safetensors      the trained parameters, AdamW's moments, states of random numbers; steps done

One state is kept, the last. It is written beside the one before, flushed, and takes its name in one step; its SHA-256
is in blocks.json. A training whose settings, data, model or versions differ is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowbit.calibrate.identity import identity, settings_of, told_as, weight_hashes
from lowbit.calibrate.store import BlockStore
from lowbit.train.loop import Lesson
from lowbit.train.options import Course

if TYPE_CHECKING:
    from lowbit.checkpoint.base import Checkpoint, OpenOptions
    from lowbit.settings import Settings


STATE = "learning.safetensors"  # its name in the work folder


class TrainingStates:
    """The last state of a training.

    every  steps from one state to the next; 0: none is kept
    """

    def __init__(self, folder: Path, depends_on: dict[str, Any], resume: bool, every: int):
        self.every = every
        self._store = BlockStore(folder, depends_on, resume)

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self._store.save_learning(tensors, facts)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self._store.load_learning()

    def remove(self) -> None:
        """Delete it, once the output is complete."""
        if self._store.folder.exists():
            self._store.remove()


def training_depends_on(
    checkpoint: Checkpoint, reference: Checkpoint | None, settings: Settings, course: Course, lesson: Lesson,
    options: OpenOptions, device: str, more: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything that can change a byte of the trained weights, as JSON values; reads all weight files once.

    more  of adapters
    """
    counted = {} if lesson.counted is None else {"what counts of it": lesson.counted}
    return identity(
        checkpoint, options,
        store={"training": 2},
        settings=settings_of(settings) | asdict(course) | more,
        beside={} if reference is None else told_as("{} of the reference", _hashes(reference)),
        text={"the training text": lesson.ids, **counted},
        targets={},
        arithmetic={"device": device},
    )  # fmt: skip


def _hashes(reference: Checkpoint) -> dict[str, str]:
    """SHA-256 of all that its answers depend on."""
    config = json.dumps(reference.config(), sort_keys=True, default=str)
    return weight_hashes(reference) | {"config.json": hashlib.sha256(config.encode()).hexdigest()}
