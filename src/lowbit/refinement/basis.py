"""The reference, in the basis of the file.

AWQ, SmoothQuant and their like divide the output of a norm or linear by a scale s per channel and multiply the columns
of its readers: W of the file is near W·s, not near W. Where the file's norms differ from the reference's, or its
weights are far from them, s is inferred and folded into the reference, whose function stays the same
(`transform.fold`):

    norm     s_k = norm of the reference / norm of the file
    linear   s_k = Σ ŵ_nk · w_nk / Σ w_nk²         least squares over the columns of the readers, by channel

A wrong s costs nothing but precision, since the reference keeps its function whatever it is. What is then still far
from the file is another model, or rotated: refused, with the name of the linear.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowbit.architecture import Architecture, Linear
from lowbit.calibrate.tensors import OverlaidCheckpoint, Replacement
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import ArchitectureError, UsageError
from lowbit.refinement.pair import TwoModels
from lowbit.transform.block import BlockTensors
from lowbit.transform.facts import ModelFacts, ScalingPoint, model_facts
from lowbit.transform.fold import fold

FARTHEST = 0.6  # ‖Ŵ − W‖² / ‖W‖²; 2-bit GPTQ reaches 0.4, an unrelated matrix 2
NEAR = 0.02  # up to here no scale is looked for where norms agree
_SAME_NORM = 2.0**-7  # two roundings to bfloat16
_SAMPLED_ROWS = 64
_LEAST_SCALE = 0.02  # mean |log s| below which a linear's scales are noise


def in_basis(pair: TwoModels, linears: Iterable[str]) -> tuple[Checkpoint, tuple[str, ...]]:
    """(the reference with what the file's scales make of it, notes on that); the same reference where there are none.

    UsageError for a linear, a norm or an embedding of the file that is not the reference's.
    """
    chosen = [pair.architecture.linears[name] for name in linears]
    folded = _Folded(pair, {})
    by_block: dict[int, list[Linear]] = {}
    for linear in chosen:
        by_block.setdefault(linear.block or 0, []).append(linear)
    facts: ModelFacts | None = None
    for block, members in by_block.items():
        norms = _changed_norms(pair, block)
        if not norms and all(distance(pair, pair.reference, linear) <= NEAR for linear in members):
            continue
        facts = facts or _facts(pair, norms)
        if facts is not None:
            folded.scales[block] = _scales(pair, facts, block, norms)
    _refuse_far_embedding(pair)
    replaced = {name: Replacement(partial(folded.read, name), torch.float32) for name in folded.names()}
    reference = OverlaidCheckpoint(pair.reference, replaced) if replaced else pair.reference
    for linear in chosen:
        apart = distance(pair, reference, linear)
        if not apart <= FARTHEST:
            raise UsageError(
                f"{linear.name} of {pair.file.source} is not near the one of {pair.reference.source}: the squared "
                f"difference is {apart:.2g} of the weight's own square",
                "--reference is the 16-bit model that the file was made of; a file with rotated weights cannot be "
                "refined",
            )
    points = sum(len(each) for each in folded.scales.values())
    note = (f"{points} points of the file carry scales (of AWQ or SmoothQuant, or left by coarse rounding); "
            f"the reference was brought to them")  # fmt: skip
    return reference, (note,) if points else ()


def distance(pair: TwoModels, reference: Checkpoint, linear: Linear) -> float:
    """‖Ŵ − W‖² / ‖W‖² over some rows of a linear."""
    rows = _sampled_rows(linear.shape[0])
    held, own = _sample(pair.file, linear, rows), _sample(reference, linear, rows)
    size = own.square().sum().item()
    return (held - own).square().sum().item() / size if size else 0.0


def _sampled_rows(rows: int) -> list[slice]:
    """At most `_SAMPLED_ROWS` of N rows, from four evenly spaced places."""
    if rows <= _SAMPLED_ROWS:
        return [slice(0, rows)]
    each = _SAMPLED_ROWS // 4
    return [slice(start, start + each) for start in (part * (rows - each) // 3 for part in range(4))]


def _sample(checkpoint: Checkpoint, linear: Linear, rows: list[slice]) -> Tensor:
    """Some rows of [N, K], float32."""
    name = f"{linear.name}.weight"
    if linear.transposed and name not in checkpoint.schemes:
        whole = _whole(checkpoint, linear)
        return torch.cat([whole[part] for part in rows])
    values = torch.cat([checkpoint.read(name, part.start, part.stop).float() for part in rows])
    checkpoint.release(name)
    return values


def _whole(checkpoint: Checkpoint, linear: Linear) -> Tensor:
    name = f"{linear.name}.weight"
    values = checkpoint.read(name).float()
    checkpoint.release(name)
    return values.t() if linear.transposed and name not in checkpoint.schemes else values


def _changed_norms(pair: TwoModels, block: int) -> list[str]:
    """Norm weights of a block that are not the reference's."""
    architecture = pair.architecture
    return [
        name for name, role in architecture.roles.items()
        if role == "norm" and architecture.block_of(name) == block and _differs(pair, name)
    ]  # fmt: skip


def _differs(pair: TwoModels, name: str) -> bool:
    if name not in pair.file.tensors or name not in pair.reference.tensors:
        return False
    held, own = pair.file.read(name).float(), pair.reference.read(name).float()
    return bool(((held - own).abs() > _SAME_NORM * own.abs() + 1e-6).any())


def _facts(pair: TwoModels, norms: list[str]) -> ModelFacts | None:
    """Facts of the model; without any, norms that differ cannot be explained."""
    try:
        return model_facts(pair.architecture)
    except ArchitectureError as error:
        if norms:
            raise _another_norm(pair, norms[0], f" ({error})") from error
        return None


def _another_norm(pair: TwoModels, name: str, why: str = "") -> UsageError:
    return UsageError(
        f"{name} of {pair.file.source} differs from the one of {pair.reference.source}, and no scale explains it{why}",
        "--reference is the very model that the file was made of, not one before or after fine-tuning",
    )


def _scales(pair: TwoModels, facts: ModelFacts, block: int, norms: list[str]) -> list[tuple[ScalingPoint, Tensor]]:
    """The scales of a block's points that the file seems to have."""
    found, explained = [], set()
    for point in facts.points(block)[0]:
        name = f"{point.feeder}.weight"
        if point.kind == "norm":
            if name not in norms:
                continue
            one = float(point.plus_one)
            scales = (pair.reference.read(name).float() + one) / (pair.file.read(name).float() + one)
            explained.add(name)
            if not bool((torch.isfinite(scales) & (scales > 0)).all()):
                raise _another_norm(pair, name)
            found.append((point, scales))
        elif all(f"{reader.name}.weight" in pair.file.tensors for reader in point.readers):
            scales = point.share(_by_least_squares(pair, point.readers))
            if bool((torch.isfinite(scales) & (scales > 0)).all()) and scales.log().abs().mean() > _LEAST_SCALE:
                found.append((point, scales))
    unexplained = [name for name in norms if name not in explained]
    if unexplained:
        raise _another_norm(pair, unexplained[0])
    return found


def _by_least_squares(pair: TwoModels, readers: tuple[Linear, ...]) -> Tensor:
    above = below = torch.zeros(readers[0].shape[1])
    for reader in readers:
        held, own = _whole(pair.file, reader), _whole(pair.reference, reader)
        above, below = above + (held * own).sum(dim=0), below + own.square().sum(dim=0)
    return torch.where(below > 0, above / below, 1.0)


def _refuse_far_embedding(pair: TwoModels) -> None:
    for name, role in pair.architecture.roles.items():
        if role != "embedding" or name not in pair.file.tensors or name not in pair.reference.tensors:
            continue
        rows = min(pair.reference.tensors[name].shape[0], 4096)
        held, own = pair.file.read(name, 0, rows).float(), pair.reference.read(name, 0, rows).float()
        apart, size = (held - own).square().sum().item(), own.square().sum().item()
        if apart > FARTHEST * size:
            raise UsageError(
                f"the embedding of {pair.file.source} is not the one of {pair.reference.source}",
                "--reference is the 16-bit model that the file was made of, with the same order of tokens",
            )


@dataclass
class _Folded:
    """Blocks of the reference with scales folded in; one block is kept."""

    pair: TwoModels
    scales: dict[int, list[tuple[ScalingPoint, Tensor]]]
    _block: int | None = None
    _held: dict[str, Tensor] | None = None

    def names(self) -> list[str]:
        """Stored names of what the scales change."""
        names = []
        for points in self.scales.values():
            for point, _ in points:
                readers = [f"{reader.name}.weight" for reader in point.readers]
                names += [f"{point.feeder}.weight", f"{point.feeder}.bias", *readers]
        return list(dict.fromkeys(name for name in names if name in self.pair.reference.tensors))

    def read(self, name: str) -> Tensor:
        """A tensor, float32, in the file's orientation."""
        architecture, reference = self.pair.architecture, self.pair.reference
        block = architecture.block_of(name)
        assert block is not None
        if self._block != block or self._held is None:
            self._block, self._held = block, self._folded(block)
        linear = architecture.linears.get(name.removesuffix(".weight"))
        turned = linear is not None and linear.transposed and name not in reference.schemes
        return self._held[name].t() if turned else self._held[name]

    def _folded(self, block: int) -> dict[str, Tensor]:
        architecture: Architecture = self.pair.architecture
        reference, file = self.pair.reference, self.pair.file
        linears = tuple(each for each in architecture.linears.values() if each.block == block)
        names = [name for name in architecture.parameters
                 if architecture.block_of(name) == block and name in reference.tensors]  # fmt: skip
        weights = {f"{linear.name}.weight": linear for linear in linears}
        tensors = {name: _whole(reference, weights[name]) if name in weights else reference.read(name).float()
                   for name in names}  # fmt: skip
        dtypes = {name: file.tensors[name].dtype for name in names if name in file.tensors and name not in weights}
        whole = BlockTensors(linears, tensors, {}, dtypes)
        for point, scales in self.scales[block]:
            fold(whole, point, scales)
        return whole.tensors
