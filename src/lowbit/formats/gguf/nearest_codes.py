"""The rule `gguf-nearest-codes`: with the scales that a file rounded to nearest stores, no other code is nearer.

Every block is unpacked and the source's weight is rounded with the scale and offset of the file; where that decodes
nearer to the weight than the stored code, beyond what float32 resolves, the code is wrong. It holds with an importance
matrix too, which moves scales only. It is about the types whose code is one number of one weight. The i-quants have
codes of four or eight weights with common signs; their search minimises a weighted error, so that a nearer point of
the grid exists now and then, and they are counted, not judged.

The source is read in the order of rows of the file: a GGUF under its own names, any other as it would be written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.checkpoint.base import row_slabs
from lowbit.formats.gguf.header import GGUFTensor
from lowbit.formats.gguf.model import describe_gguf
from lowbit.formats.gguf.raw import rows_and_columns
from lowbit.numerics.ggml.types import TYPES, GgmlType, family, per_column, weights_of
from lowbit.verification.result import Finding
from lowbit.workers import run_all

if TYPE_CHECKING:
    from lowbit.formats.gguf.subject import GGUFSubject

SLAB_WEIGHTS = 1 << 20
# w / scale in float32 against an encoder that multiplied by the reciprocal, relative to the weight and the scale
_SLACK = 2.0**-15

_Rows = Callable[[int, int], Tensor]


def check_nearest(subject: GGUFSubject) -> Finding:
    """Every code of a scalar type is the nearest one to the source's weight."""
    originals = _originals(subject)
    quantized = [t for t in subject.raw.tensors if t.type_name in TYPES and TYPES[t.type_name].family != "plain"]
    judged = [t for t in quantized if TYPES[t.type_name].family != "i" and t.name in originals]
    jobs = [_Job(subject, tensor, originals[tensor.name]) for tensor in judged]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run_all(
            ((job.look_at, first, last) for job in jobs
             for first, last in row_slabs(rows_and_columns(job.tensor.shape), SLAB_WEIGHTS)),
            os.cpu_count() or 1,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    problems = [min(job.problems)[1] for job in jobs if job.problems]
    left = (
        f"; {len(quantized) - len(judged)} of i-quants or without a source are not judged"
        if judged != quantized
        else ""
    )
    return Finding(problems, f"every code of {len(judged)} matrices is the nearest one{left}")


def _originals(subject: GGUFSubject) -> dict[str, _Rows]:
    """Name in the file → its rows in the source, of tensors that have the same shape there."""
    shapes = {tensor.name: tensor.shape for tensor in subject.raw.tensors}
    source = subject.source
    if source is None:
        return {}
    if not source.hub_names:
        same = [name for name, info in source.tensors.items() if tuple(info.shape) == shapes.get(name)]
        return {name: partial(source.read, name) for name in same}
    architecture, checkpoint = subject.described
    written = {tensor.name: tensor for tensor in describe_gguf(checkpoint, architecture).tensors}
    return {
        name: partial(tensor.read, checkpoint) for name, tensor in written.items() if tensor.shape == shapes.get(name)
    }


@dataclass
class _Job:
    """One matrix. problems: (row, what is wrong there), one of each slab at most."""

    subject: GGUFSubject
    tensor: GGUFTensor
    original: _Rows

    def __post_init__(self) -> None:
        self.problems: list[tuple[int, str]] = []

    @property
    def kind(self) -> GgmlType:
        return TYPES[self.tensor.type_name]

    def look_at(self, first: int, last: int) -> None:
        """Judge rows first..last."""
        kind, raw = self.kind, self.subject.raw
        weight = self.original(first, last).float().reshape(last - first, -1)
        scales = raw.scales(self.tensor)
        if scales is not None:  # of NVFP4: the scale of the whole matrix, or of each expert
            experts = torch.arange(first, last) // (rows_and_columns(self.tensor.shape)[0] // len(scales))
            weight = weight / scales[experts][:, None]
        blocks = family(kind).unpack(kind, raw.blocks(self.tensor, first, last))
        stored = weights_of(kind, blocks.codes, blocks)
        nearest = weights_of(kind, family(kind).round(kind, weight, blocks), blocks)
        slack = (weight.abs() + per_column(blocks.scale.abs(), weight.shape[1])) * _SLACK
        wrong = (stored - weight).abs() > (nearest - weight).abs() + slack
        if bool(wrong.any()):
            row, column = (int(index) for index in wrong.nonzero()[0])
            self.problems.append((first + row, f"{self.tensor.name}[{first + row}, {column}] decodes to "
                                  f"{stored[row, column].item():.6g}; another code is nearer to the source's "
                                  f"{weight[row, column].item():.6g}"))  # fmt: skip
