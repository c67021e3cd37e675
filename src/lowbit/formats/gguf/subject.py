"""`GGUFSubject`: a GGUF file under verification, and one pass over all its weights.

The pass decodes every tensor in slabs, looks for NaN and inf, and, given the source, sums ‖W − Ŵ‖² and ‖W‖². A GGUF
source is compared under GGUF names; any other source under Hugging Face names, through the reader, so that wrongly
ordered rows show as a large error.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from lowbit.architecture import Architecture, describe_checkpoint
from lowbit.checkpoint.base import Checkpoint, row_slabs
from lowbit.errors import LowbitError
from lowbit.formats.gguf.mmproj.read import TowerFile
from lowbit.formats.gguf.mmproj.row import CLIP
from lowbit.formats.gguf.model import describe_gguf
from lowbit.formats.gguf.raw import RawCheckpoint, RawGGUF, open_raw_gguf, rows_and_columns
from lowbit.formats.gguf.read import GGUFCheckpoint, open_gguf
from lowbit.formats.gguf.row import GGUFArchitecture, RowTarget
from lowbit.formats.gguf.table import row_of_model
from lowbit.numerics import ggml
from lowbit.numerics.ggml.types import largest_value, smallest_step
from lowbit.numerics.precision import squared_error_in_double
from lowbit.verification.result import GGUF, MMPROJ
from lowbit.verification.subject import Verified
from lowbit.workers import run_all

SLAB_WEIGHTS = 1 << 20


@dataclass
class GGUFSurvey:
    """Results of the pass. relative_errors: name → ‖W − Ŵ‖ / ‖W‖"""

    not_finite: list[str] = field(default_factory=list)
    relative_errors: dict[str, float] = field(default_factory=dict)
    without_source: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class GGUFSubject(Verified):
    """A GGUF file under verification; its source is a checkpoint, or a GGUF file as it is."""

    @cached_property
    def known_format(self) -> str:
        """ "mmproj" for the file of a vision tower; "gguf" for all others, damaged ones too."""
        try:
            return MMPROJ if self.arch == CLIP else GGUF
        except LowbitError:
            return GGUF

    @cached_property
    def raw(self) -> RawGGUF:
        return open_raw_gguf(self.folder)

    @property
    def arch(self) -> str:
        return str(self.raw.metadata.get("general.architecture", ""))

    @property
    def block_count(self) -> int:
        value = self.raw.metadata.get(f"{self.arch}.block_count")
        return value if isinstance(value, int) else 0

    @cached_property
    def survey(self) -> GGUFSurvey:
        return _Pass(self).run()

    @cached_property
    def described(self) -> tuple[Architecture, Checkpoint]:
        """The source, a Hugging Face model: its architecture, and itself under that one's names, experts one by one."""
        assert self.source is not None
        return describe_checkpoint(self.source, split_experts=True)

    @property
    def source_is_mapped(self) -> bool:
        """True if the source is a model whose names and config.json a GGUF file follows from; False for a GGUF file."""
        return self.source is not None and self.source.kind != "gguf"

    def type_of(self, name: str) -> str:
        return self._types.get(name, "F32")

    def smallest_step(self, name: str) -> float:
        """As of its type; of an NVFP4 weight, or expert, times the scale of the whole matrix; of w that is stored as
        w + 1 or -exp(w), that of float32 where these are near 1."""
        step = smallest_step(self.type_of(name)) * self._scales.get(name, 1.0)
        is_changed = "as_checkpoint" in self.__dict__ and self.as_checkpoint.is_changed(name)
        return max(step, 2.0**-22) if is_changed else step

    @cached_property
    def _scales(self) -> dict[str, float]:
        raw = self.raw
        scales = {t.name: raw.scales(t) for t in raw.tensors if t.name in raw.weight_scales}
        found = {name: values.abs().max().item() for name, values in scales.items() if values is not None}
        of_pieces = self.as_checkpoint.scales if "as_checkpoint" in self.__dict__ else {}
        return found | {name: max(map(abs, scales)) for name, scales in of_pieces.items()}

    @cached_property
    def _types(self) -> dict[str, str]:
        types = {tensor.name: tensor.type_name for tensor in self.raw.tensors}
        if self.tower is not None:
            return types | {name: info.stored for name, info in self.tower.tensors.items()}
        if self.source is not None and self.source.hub_names:
            types |= {name: info.stored for name, info in self.as_checkpoint.tensors.items()}
        return types

    @cached_property
    def as_checkpoint(self) -> GGUFCheckpoint:
        """The file under Hugging Face names."""
        return open_gguf(self.folder)

    @cached_property
    def tower(self) -> TowerFile | None:
        """The file of a vision tower under Hugging Face names, if its source has them; else None."""
        if self.known_format != MMPROJ or self.source is None or not self.source.hub_names:
            return None
        return TowerFile(self.raw, self.source)

    def close(self) -> None:
        for name in ("raw", "as_checkpoint"):
            if name in self.__dict__:
                self.__dict__[name].close()


# (name, rows, K, read our rows, read the source's rows or None, bytes, release both)
_Job = tuple[str, int, int, Callable[[int, int], Tensor], Callable[[int, int], Tensor] | None, int, Callable[[], None]]


class _Pass:
    """Decodes and compares, spread over threads."""

    def __init__(self, subject: GGUFSubject):
        self.subject, self.found = subject, GGUFSurvey()
        self.sums: dict[str, list[float]] = {}
        self.lock = threading.Lock()
        self.done = 0

    def run(self) -> GGUFSurvey:
        tower = self.subject.tower
        if tower is not None:
            jobs = self._of_tower(tower)
        else:
            jobs = self._under_hub_names() if self._has_hub_source() else self._under_own_names()
        total = sum(job[5] for job in jobs)
        threads = torch.get_num_threads()
        slabs = (
            (self._slab, job, first, last, total) for job in jobs for first, last in row_slabs(job[1:3], SLAB_WEIGHTS)
        )
        try:
            torch.set_num_threads(1)
            run_all(slabs, os.cpu_count() or 1)
        finally:
            torch.set_num_threads(threads)
        for name, (error, weight, count) in self.sums.items():
            # What lies below half of the type's smallest step may become zero: that is no error of the encoder.
            error = max(0.0, error - count * self.subject.smallest_step(name) ** 2 / 4)
            self.found.relative_errors[name] = math.sqrt(error / weight) if weight else math.sqrt(error)
        self.found.not_finite = sorted(set(self.found.not_finite))
        return self.found

    def _has_hub_source(self) -> bool:
        source = self.subject.source
        if source is None or not source.hub_names:
            return False
        try:
            return bool(self.subject.as_checkpoint.tensors)
        except LowbitError:  # an architecture that only llama.cpp reads: look at the values alone
            return False

    def _under_own_names(self) -> list[_Job]:
        ours, source = RawCheckpoint(self.subject.raw, ""), self.subject.source
        theirs = None if source is None or source.hub_names else source
        applied = {scale.name for scale in self.subject.raw.weight_scales.values()}  # are compared with their weights
        jobs: list[_Job] = []
        for name, info in ours.tensors.items():
            known = theirs is not None and name in theirs.tensors and name not in applied
            if theirs is not None and not known and name not in applied:
                self.found.without_source.append(name)

            def release(name: str = name, other: Checkpoint | None = theirs if known else None) -> None:
                ours.release(name)
                if other is not None:
                    other.release(name)

            mine, original = partial(ours.read, name), partial(theirs.read, name) if theirs and known else None
            jobs.append((name, *rows_and_columns(info.shape), mine, original, info.nbytes, release))
        return jobs

    def _of_tower(self, tower: TowerFile) -> list[_Job]:
        self.found.without_source += tower.unknown
        jobs: list[_Job] = []
        for name, info in tower.tensors.items():
            skipped = tower.first_row(name)

            def theirs(first: int, last: int, name: str = name, skipped: int = skipped) -> Tensor:
                return tower.source.read(name, skipped + first, skipped + last)

            rows, columns = (info.shape[0], math.prod(info.shape[1:])) if info.shape else (1, 1)
            release = partial(tower.release, name)
            jobs.append((name, rows, columns, partial(tower.read, name), theirs, info.nbytes, release))
        return jobs

    def _under_hub_names(self) -> list[_Job]:
        ours, (_, source) = self.subject.as_checkpoint, self.subject.described
        our_row = row_of_model(ours.config(), str(self.subject.folder))
        their_row = row_of_model(source.config(), source.source)
        origins = self._origins(source, our_row, their_row)
        jobs: list[_Job] = []
        stored: dict[str, None] = {}  # what has other rows in the model that the file is read as, or more of them
        for name, info in ours.tensors.items():
            origin = origins(name)
            known = origin in source.tensors and source.tensors[origin].shape == info.shape
            if not known or not _are_alike(our_row.find(name), their_row.find(origin)):
                stored |= dict.fromkeys(ours.stored_names(name))
                continue
            rows = info.shape[0] if info.shape else 1
            columns = max(1, math.prod(info.shape[1:]))

            def release(name: str = name, origin: str = origin) -> None:
                ours.release(name)
                source.release(origin)

            def theirs(first: int, last: int, origin: str = origin) -> Tensor:
                return source.read(origin, first, last)

            def mine(first: int, last: int, name: str = name) -> Tensor:
                return ours.read(name, first, last)

            jobs.append((name, rows, columns, mine, theirs, info.nbytes, release))
        return jobs + self._as_written(stored)

    def _as_written(self, names: Iterable[str]) -> list[_Job]:
        """Tensors of the file against what the source would be written as."""
        names = list(names)
        if not names:
            return []
        architecture, source = self.subject.described
        written = {tensor.name: tensor for tensor in describe_gguf(source, architecture).tensors}
        ours = RawCheckpoint(self.subject.raw, "")
        jobs: list[_Job] = []
        for name in names:
            tensor, info = written.get(name), ours.tensors[name]
            known = tensor is not None and tensor.shape == info.shape
            if not known:
                self.found.without_source.append(name)
            theirs = partial(tensor.read, source) if known and tensor is not None else None
            release = partial(ours.release, name)
            jobs.append((name, *rows_and_columns(info.shape), partial(ours.read, name), theirs, info.nbytes, release))
        return jobs

    def _origins(self, source: Checkpoint, ours: GGUFArchitecture, theirs: GGUFArchitecture) -> Callable[[str], str]:
        """Our name → the source's: both have a name of the file in common (a model that sees has other names than its
        language model); a tied output matrix that has a copy of its own comes from the embedding."""
        by_place = {(target.name, target.expert): name for name in source.tensors for target in theirs.find(name)}

        def origin(name: str) -> str:
            if name in source.tensors or not ours.find(name):
                return name
            place = ours.find(name)[0]
            embedding = by_place.get(("token_embd.weight", None), name) if place.name == "output.weight" else name
            return by_place.get((place.name, place.expert), embedding)

        return origin

    def _slab(self, job: _Job, first: int, last: int, total: int) -> None:
        name, rows, _, ours, theirs, nbytes, release = job
        decoded = ours(first, last).float().reshape(last - first, -1).contiguous()
        original = decoded
        if theirs is not None:
            original = theirs(first, last).reshape(decoded.shape)
            if not (original.is_floating_point() and original.dtype.itemsize in (2, 4)):
                original = original.float()
        sums = ggml.squared_error("F32", original, decoded.view(torch.uint8)) if decoded.numel() else (0.0, 0.0, 0.0)
        finite = math.isfinite(sums[0] + sums[1]) or bool(torch.isfinite(decoded).all())
        largest = largest_value(self.subject.type_of(name))
        fits = math.isfinite(sums[0] + sums[1]) and sums[1] <= largest**2
        if finite and not fits and bool(torch.isfinite(original).all()):
            # Compared with the nearest values that the type can hold; those that were clipped are said when written.
            sums = squared_error_in_double(original.float().clamp(-largest, largest), decoded)
        if last == rows:
            release()
        with self.lock:
            if not finite:
                self.found.not_finite.append(f"{name}: holds NaN or inf")
            if theirs is not None:
                known = self.sums.setdefault(name, [0.0, 0.0, 0.0])
                known[0] += sums[0]
                known[1] += sums[1]
                known[2] += decoded.numel()
            self.done += nbytes * (last - first) // max(1, rows)
            if self.subject.progress is not None:
                self.subject.progress(f"verify {name}", self.done, total)


def _are_alike(ours: tuple[RowTarget, ...], theirs: tuple[RowTarget, ...]) -> bool:
    """True if the row that the file is read by arranges a tensor as the source's does, without multipliers of a config.

    A file of Helium is read as Llama, whose rotary pairs lie otherwise; one of Granite 4 as Granite, whose gate and up
    are apart; one of Falcon-H1 holds products.
    """
    layouts = [[target.place.layout for target in each] for each in (ours, theirs)]
    multiplied = any(layout.factors is not None for layout in layouts[1])
    return not ours or not theirs or (layouts[0] == layouts[1] and not multiplied)
