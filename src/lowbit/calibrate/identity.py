"""What every byte of a calibrated run, or of a training, depends on, so that --resume never joins two different runs.

    settings    every setting of the table, by name
    source      the revision, and what the user typed, which is told but not compared
    files       SHA-256 of every weight file, all of it, and of an adapter's files; of a model in memory, of its tensors
    start       the same of the model that refinement starts from, or of the float model of a distillation
    config      config.json
    text        SHA-256 of the token ids, of a training also of those that count in its loss
    targets     linear → grid or ggml type; a training has none
    arithmetic  dtype, device, threads, instruction set
    versions    of lowbit, torch and transformers

`differences` says in a few words what changed: settings first, since targets follow from them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.adapter import adapter_files
from lowbit.checkpoint.base import IN_MEMORY, row_slabs
from lowbit.files.hashes import file_digests
from lowbit.version import __version__, version_of

if TYPE_CHECKING:
    from lowbit.calibrate.one_block import Job
    from lowbit.checkpoint.base import Checkpoint, OpenOptions
    from lowbit.settings import Settings

_LONGEST_VALUE = 60  # characters of a value in a message
_SLAB_WEIGHTS = 8_000_000
_ABSENT = object()


def depends_on(job: Job, options: OpenOptions) -> dict[str, Any]:
    """Everything that can change a byte of the result, as JSON values; reads all weight files once."""
    return identity(
        job.checkpoint, options,
        store={"store": 3},
        settings=settings_of(job.settings),
        start=file_hashes(set() if job.start is None else set(job.start.files)),
        text={"the calibration text": job.ids},
        targets={name: repr(target) for name, target in sorted(job.targets.items())},
        arithmetic={"dtype": str(job.dtype), "device": job.device},
    )  # fmt: skip


def identity(
    source: Checkpoint, options: OpenOptions, *, store: dict[str, int], settings: dict[str, Any],
    start: dict[str, str], text: dict[str, Tensor], targets: dict[str, str], arithmetic: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The topics of the module docstring; what all runs share is found here.

    store  number of the layout of what is kept; a change of it is another version of lowbit
    text   what it is called → its tensor
    """
    return {
        "lowbit": {"version": __version__, **store},
        "settings": settings,
        "model": source.source,
        "source": {"revision": options.revision},
        "files": weight_hashes(source) | file_hashes(set(adapter_files(options))),
        "start": start,
        "config": source.config(),
        "text": {name: hashlib.sha256(held.contiguous().numpy().tobytes()).hexdigest() for name, held in text.items()},
        "targets": targets,
        "arithmetic": {**arithmetic, "threads": torch.get_num_threads(), "kernels": kernels.isa()},
        "versions": {"torch": torch.__version__, "transformers": version_of("transformers")},
    }


def settings_of(settings: Settings) -> dict[str, Any]:
    """Those that bytes depend on, as JSON values."""
    return settings.model_dump(mode="json", exclude={"allow_fallback"})


def weight_hashes(source: Checkpoint) -> dict[str, str]:
    """SHA-256 of each weight file, or of all tensors of a model in memory, one after the other."""
    if source.kind != IN_MEMORY:
        return file_hashes({info.file for info in source.tensors.values()})
    digest = hashlib.sha256()
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.shape} {info.dtype}\0".encode())
        for start, stop in row_slabs(info.shape, _SLAB_WEIGHTS):
            rows = source.read(name, start, stop) if info.shape else source.read(name)
            digest.update(rows.reshape(-1).view(torch.uint8).numpy().data)
    return {"a tensor": digest.hexdigest()}


def file_hashes(files: set[Path]) -> dict[str, str]:
    """File name → SHA-256 of the SHA-256s of its chunks."""
    return {path.name: hashlib.sha256(file_digests(path)).hexdigest() for path in sorted(files)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words: "group_size was 32, is 64"."""
    found: list[str] = []
    for topic in now:
        if topic == "model" or (topic == "targets" and found):
            continue
        was, is_now = before.get(topic), now[topic]
        if was == is_now:
            continue
        if not isinstance(was, dict) or topic == "lowbit":
            return ["it was begun by another version of lowbit"]
        names = [name for name in {**was, **is_now} if was.get(name, _ABSENT) != is_now.get(name, _ABSENT)]
        if topic == "start":
            found += [f"{name}, which is refined, is not what it was" for name in names]
        elif topic == "files":
            found += [f"{name} of {now.get('model')} is not what it was" for name in names]
        elif topic == "text":
            found += [f"{name} is not what it was" for name in names]
        elif topic == "targets":
            found.append(f"{len(names)} linears are rounded to another grid, the first {names[0]}")
        else:
            found += [f"{name} was {_brief(was.get(name))}, is {_brief(is_now.get(name))}" for name in names]
    return found


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
