"""From a plan to decisions for every block: the text, the targets, the folder that keeps them, the loop.

`decide` is the same for folders and for GGUF files; what differs is where the codes of a linear may lie (`targets`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from lowbit import __version__, kernels
from lowbit.architecture import Architecture
from lowbit.architecture.loading import load_tokenizer
from lowbit.blockwise.memory import states_memory
from lowbit.blockwise.overlay import OverlaidCheckpoint, Replacement
from lowbit.blockwise.run import Job, outside_rotated, quantize_blocks
from lowbit.blockwise.store import BlockStore, work_folder
from lowbit.calibrate.blocks import Progress
from lowbit.calibrate.precision import compute_dtype
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import UsageError
from lowbit.evaluation.memory import available_memory
from lowbit.measure import resident_memory
from lowbit.methods import parse_method
from lowbit.rounding.target import Target
from lowbit.settings import RunOptions, Settings
from lowbit.text import CalibrationWindows, calibration_windows, context_length
from lowbit.transform.facts import model_facts

# Where the user names no bound: of the memory that is free now.
_SHARE_OF_FREE = 0.8
_IF_UNKNOWN = 4 << 30


@dataclass(frozen=True)
class Decided:
    """What calibration decided.

    checkpoint  the source with rewritten tensors in place
    store       codes of the rounded linears
    windows     of the text it was decided on
    seconds     by kind of work
    """

    checkpoint: Checkpoint
    store: BlockStore
    windows: CalibrationWindows
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """Of the text, and of single blocks."""
        return (*self.windows.notes, *(note for record in self.store.records.values() for note in record.notes))

    def decoded(self, targets: dict[str, Target], architecture: Architecture, dtype: torch.dtype) -> Checkpoint:
        """The model as an engine will run it, for measuring what goes into its rounded linears."""
        replaced = {}
        for name, target in targets.items():
            linear = architecture.linears[name]
            rows = _decoded_rows(self.store, name, target, linear.shape[1], linear.transposed)
            replaced[f"{name}.weight"] = Replacement(rows, dtype)
        return OverlaidCheckpoint(self.checkpoint, replaced)


def read_windows(
    checkpoint: Checkpoint, settings: Settings, options: OpenOptions, run: RunOptions, progress: Progress | None = None
) -> CalibrationWindows:
    """The calibration text, cut; written by the model itself for "self"."""
    if settings.calib == "self":
        from lowbit.calibrate.self_text import generate_windows

        return generate_windows(
            checkpoint, settings.samples, settings.seqlen, seed=settings.seed, options=options, device=run.device,
            max_memory=run.max_memory, progress=progress,
        )  # fmt: skip
    return calibration_windows(
        settings.calib, load_tokenizer(checkpoint, options), settings.samples, settings.seqlen, seed=settings.seed,
        longest=context_length(checkpoint.config()),
    )  # fmt: skip


def decide(
    checkpoint: Checkpoint,
    architecture: Architecture,
    targets: dict[str, Target],
    dtypes: dict[str, torch.dtype],
    settings: Settings,
    options: OpenOptions,
    run: RunOptions,
    output: Path,
    progress: Progress | None = None,
) -> Decided:
    """Run the calibration text through the model and decide the codes of every target.

    dtypes  stored name → dtype of tensors that are written as floats
    output  the name to be; the decisions are kept in a hidden folder beside it until `BlockStore.remove`

    Raises LowbitError where the method cannot work on this model, or not within the memory allowed.
    """
    method = parse_method(settings.method)
    dtype = compute_dtype(settings.compute, run.device)
    if not targets:
        raise UsageError("no linear of a decoder block is quantized, so there is nothing to calibrate",
                         "loosen --ignore, or take --method rtn")  # fmt: skip
    windows = read_windows(checkpoint, settings, options, run, progress)
    replaced: dict[str, Replacement] = {}
    if "hadamard" in method.transforms:
        facts = model_facts(architecture, checkpoint.config())
        rotated = outside_rotated(checkpoint, facts)
        replaced = {name: _whole(values.to(dtypes[name])) for name, values in rotated.items()}
    source = OverlaidCheckpoint(checkpoint, replaced)
    limit = run.max_memory or resident_memory() + int(_SHARE_OF_FREE * (available_memory() or _IF_UNKNOWN))
    job = Job(source, targets, dtypes, windows.ids, settings, options, dtype, run.device)
    memory = states_memory(architecture, dtype, job.compared_windows > 0, bool(method.transforms), limit)
    job = replace(job, states_memory=memory)
    store = BlockStore(work_folder(output), _depends_on(job), run.resume)
    cost = quantize_blocks(job, store, progress)
    replaced = replaced | {name: Replacement(_stored_rows(store, name), dtypes[name]) for name in store.rewritten()}
    return Decided(OverlaidCheckpoint(checkpoint, replaced), store, windows, cost.seconds)


def _whole(values: Tensor) -> Replacement:
    return Replacement(lambda first, last: values[first:last], values.dtype)


def _stored_rows(store: BlockStore, name: str) -> Callable[[int, int], Tensor]:
    return lambda first, last: store.tensor(name)[first:last]


def _decoded_rows(
    store: BlockStore, linear: str, target: Target, columns: int, transposed: bool
) -> Callable[[int, int], Tensor]:
    def rows(first: int, last: int) -> Tensor:
        whole = store.decoded(linear, target, columns)
        return (whole.t() if transposed else whole)[first:last]

    return rows


def _depends_on(job: Job) -> dict[str, object]:
    """Whatever changes a byte of the result."""
    headers = hashlib.sha256()
    for name, info in sorted(job.checkpoint.tensors.items()):
        headers.update(f"{name} {info.shape} {info.stored} {info.nbytes}\n".encode())
    ids = hashlib.sha256(job.ids.contiguous().numpy().tobytes()).hexdigest()
    return {
        "settings": job.settings.model_dump(mode="json"),
        "source": job.checkpoint.source,
        "headers": headers.hexdigest(),
        "tokens": ids,
        "targets": {name: repr(target) for name, target in sorted(job.targets.items())},
        "dtype": str(job.dtype),
        "device": job.device,
        "threads": torch.get_num_threads(),
        "kernels": kernels.isa(),
        "lowbit": __version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }
