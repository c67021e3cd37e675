"""What every byte of a calibrated run, or of a training, depends on, so that --resume never joins two different runs.

    settings    every setting of the table, by name
    source      the revision, and what the user typed, which is told but not compared
    files       SHA-256 of every weight file, all of it; of a model in memory, of its tensors
    beside      the same of an adapter, of code that comes with the model, of the model that refinement starts from, and
                of the float model of a distillation
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
from lowbit.errors import brief
from lowbit.files.hashes import file_digests
from lowbit.version import __version__, version_of

if TYPE_CHECKING:
    from lowbit.calibrate.one_block import Job
    from lowbit.checkpoint.base import Checkpoint, OpenOptions
    from lowbit.settings import Settings

_SLAB_WEIGHTS = 8_000_000
_ABSENT = object()
_KINDS = {"store", "training"}  # numbers of the layout of what is kept, by the kind of run


def depends_on(job: Job, options: OpenOptions, learning: Tensor) -> dict[str, Any]:
    """Everything that can change a byte of the result, as JSON values; reads all weight files once.

    learning  ids that a distillation learns from
    """
    text = {"the calibration text": job.ids}
    if job.settings.further_windows:
        text["the text of the distillation"] = learning
    return identity(
        job.checkpoint, options,
        store={"store": 3},
        settings=settings_of(job.settings),
        beside={} if job.start is None else told_as("{}, which is refined,", file_hashes(set(job.start.files))),
        text=text,
        targets={name: repr(target) for name, target in sorted(job.targets.items())},
        arithmetic={"dtype": str(job.dtype), "device": job.device},
    )  # fmt: skip


def identity(
    source: Checkpoint, options: OpenOptions, *, store: dict[str, int], settings: dict[str, Any],
    beside: dict[str, str], text: dict[str, Tensor], targets: dict[str, str], arithmetic: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The topics of the module docstring; what all runs share is found here.

    store   number of the layout of what is kept; a change of it is another version of lowbit
    beside  of other models that are read: what a file is called → its SHA-256
    text    what it is called → its tensor
    """
    code = set(source.folder.glob("*.py")) if options.trust_remote_code else set()
    return {
        "lowbit": {"version": __version__, **store},
        "settings": settings,
        "model": source.source,
        "source": {"revision": options.revision},
        "files": weight_hashes(source),
        "beside": told_as("{} of the adapter", file_hashes(set(adapter_files(options))))
        | told_as("{}, code of the model,", file_hashes(code))
        | beside,
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


def told_as(form: str, hashes: dict[str, str]) -> dict[str, str]:
    """The same by what messages call each file."""
    return {form.format(name): digest for name, digest in hashes.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words: "group_size was 32, is 64"."""
    found: list[str] = []
    for topic in now:
        if topic == "model" or (topic == "targets" and found):
            continue
        was, is_now = before.get(topic), now[topic]
        if was == is_now:
            continue
        if topic == "lowbit" and isinstance(was, dict) and len(_KINDS & (was.keys() | is_now.keys())) == len(_KINDS):
            return ["it is a training" if "training" in was else "it is no training"]
        if not isinstance(was, dict) or topic == "lowbit":
            return ["it was begun by another version of lowbit"]
        names = [name for name in {**was, **is_now} if was.get(name, _ABSENT) != is_now.get(name, _ABSENT)]
        if topic == "settings" and not was.keys() <= is_now.keys() <= was.keys():
            return [f"it was begun by a lowbit with other settings: {', '.join(sorted(was.keys() ^ is_now.keys()))}"]
        if topic == "files":
            found += [f"{name} of {now.get('model')} is not what it was" for name in names]
        elif topic in ("beside", "text"):
            found += [f"{name} {_became(name in was, name in is_now)}" for name in names]
        elif topic == "targets":
            found.append(f"{len(names)} linears are rounded to another grid, the first {names[0]}")
        else:
            where = "config.json: " if topic == "config" else ""
            found += [where + change for name in names for change in _changes(name, was, is_now)]
    return found


def _became(there_before: bool, there_now: bool) -> str:
    if there_before and there_now:
        return "is not what it was"
    return "was read, and is not now" if there_before else "is read, and was not"


def _changes(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What became of a value, or of those inside of it, in words."""
    was, is_now = before.get(name, _ABSENT), now.get(name, _ABSENT)
    if isinstance(was, dict) and isinstance(is_now, dict):
        inner = [key for key in {**was, **is_now} if was.get(key, _ABSENT) != is_now.get(key, _ABSENT)]
        return [f"{name}.{change}" for key in inner for change in _changes(key, was, is_now)]
    told = ["absent" if value is _ABSENT else brief(str(value)) for value in (was, is_now)]
    return [f"{name} is not what it was" if told[0] == told[1] else f"{name} was {told[0]}, is {told[1]}"]
