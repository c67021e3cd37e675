"""The model with rotations folded in and its inputs rounded, as a `Student` that learns the rotations.

    x₀ = e R1 → rotated blocks → y = x R1ᵀ → final norm and head as they were

R1 turns the residual stream, R2 the values of each block's attention. The final norm and the head are not rounded, so
that turning the stream back before them computes what rotating them would. A block's weights are folded by the same
code that writes them (`transform.rotate.turn_block`), and autograd carries the gradients of weights to R1 and R2.

Inputs of linears are rounded by hooks, weights where the run rounds them to nearest; both straight through.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.task import RotationJob
from lowbit.calibrate.tensors import StoredTensors
from lowbit.distillation.inputs import round_inputs
from lowbit.distillation.student import Changes, Kept, Student
from lowbit.errors import UsageError
from lowbit.numerics.hadamard import Rotation
from lowbit.numerics.straight_through import straight_through
from lowbit.transform.block import BlockTensors
from lowbit.transform.rotate import StreamRotations, reads_residual, turn_block, value_point, writes_residual

RESIDUAL, VALUES, MATRIX = "residual", "values", "matrix"


class RotatedStudent(Student):
    """
    job     what the rotations are for
    runner  of the unquantized model, for this student alone: its linears get hooks

    Its changes are the matrices themselves: {"residual": {"matrix": [H, H]}, "values": {"3": [d, d], …}}, float64.
    """

    def __init__(self, job: RotationJob, runner: BlockRunner, resident: bool, graphs: bool = False):
        self.job = job
        # Error feedback adapts to rotated weights: rotations are then learned for what remains, the activations.
        self._rounds = job.nearest if job.activations else frozenset(job.targets)
        blocks = range(len(runner.blocks))
        self._linears = {index: _linears_of(runner, index) for index in blocks}
        self._stored = {
            index: StoredTensors(job.checkpoint, runner, index, {each.name: each for each in self._linears[index]})
            for index in blocks
        }
        self._turns = {index: frozenset(self._turned_names(index)) for index in blocks}
        super().__init__(runner, job.ids, [*[{} for _ in blocks], {}], resident, graphs)
        fused = round_inputs(runner, job.activations, job.online)
        if fused:
            raise UsageError(
                f"{fused[0]} runs inside a fused operation, whose inputs cannot be rounded while rotations are learned",
                "take hadamard, which learns nothing, or a scheme that rounds weights only",
            )

    @torch.no_grad()
    def forward(self, windows: Tensor, changes: Changes) -> Tensor:
        return _rotation(changes[RESIDUAL][MATRIX]).back(super().forward(windows, changes))

    def forward_kept(self, windows: Tensor, changes: Changes) -> tuple[list[Kept], Tensor]:
        kept, x = super().forward_kept(windows, changes)
        embedded = super().embedded(windows, changes)
        return [[(embedded, None)], *kept, [(x, None)]], _rotation(changes[RESIDUAL][MATRIX]).back(x)

    def backward(self, kept: list[Kept], gradient: Tensor, changes: Changes, found: Changes) -> Tensor:
        of_residual = found[RESIDUAL][MATRIX]
        [(last, _)] = kept.pop()
        of_residual += _products(gradient, last)  # y = x R1ᵀ
        turned = _rotation(changes[RESIDUAL][MATRIX]).columns(gradient)
        gradient = super().backward(kept, turned, changes, found)
        [(embedded, _)] = kept.pop()
        of_residual += _products(embedded, gradient)  # x₀ = e R1
        return gradient

    def embedded(self, windows: Tensor, changes: Changes) -> Tensor:
        return _rotation(changes[RESIDUAL][MATRIX]).columns(super().embedded(windows, changes))

    def collect(self, index: int, changes: Changes, found: Changes) -> None:
        if index == len(self.runner.blocks):
            return
        gradients = self.runner.take_gradients(self._turns[index])
        places = [(RESIDUAL, MATRIX)] + [(VALUES, str(index))] * (str(index) in changes[VALUES])
        leaves = {place: changes[place[0]][place[1]].detach().requires_grad_() for place in places}
        with torch.enable_grad():
            turned = self._turned(index, {RESIDUAL: {MATRIX: leaves[RESIDUAL, MATRIX]},
                                          VALUES: {str(index): leaves[place] for place in places[1:]}})  # fmt: skip
            tensors = [turned[name] for name in gradients]
            of_leaves = torch.autograd.grad(
                tensors, list(leaves.values()),
                [gradients[name].to(values) for name, values in zip(gradients, tensors, strict=True)],
            )  # fmt: skip
        for (kind, name), gradient in zip(leaves, of_leaves, strict=True):
            found[kind][name] += gradient

    def _load(self, index: int) -> None:
        if index not in self._loaded:
            super()._load(index)
            self.runner.watch(self._turns[index])

    @torch.no_grad()
    def _put(self, index: int, changes: Changes) -> None:
        if index < len(self.runner.blocks):
            self.runner.put(self._turned(index, changes))

    def _turned(self, index: int, changes: Changes) -> dict[str, Tensor]:
        """Stored name → what the rotations make of it, in the file's orientation; with gradients to the changes."""
        stored, linears = self._stored[index], self._linears[index]
        block = BlockTensors(linears, {name: stored.read(name).to(self.runner.device) for name in stored.names})
        before = dict(block.tensors)
        turn_block(block, self.job.facts, rotations_of(changes))
        for linear in linears:
            if linear.name in self._rounds:
                block.tensors[f"{linear.name}.weight"] = self._rounded(linear, block.weight(linear))
        return {name: stored.turned(name, values) for name, values in block.tensors.items()
                if values is not before[name]}  # fmt: skip

    def _rounded(self, linear: Linear, weight: Tensor) -> Tensor:
        target, online = self.job.targets[linear.name], self.job.online.get(linear.name)
        with torch.no_grad():
            turned = weight if online is None else online.columns(weight)
            decoded = target.with_range([turned]).nearest(turned).decoded
            decoded = decoded if online is None else online.back(decoded)
        return straight_through(weight, decoded.to(weight))

    def _turned_names(self, index: int) -> Iterable[str]:
        """Stored names of the linears' tensors that depend on a rotation."""
        facts, names = self.job.facts, set(self._stored[index].names)
        point = value_point(facts, index)
        both = [each.name for each in self._linears[index] if writes_residual(each, facts)]
        both += [] if point is None else [point.feeder]
        weights = [each.name for each in self._linears[index] if reads_residual(each, facts)]
        weights += [] if point is None else [reader.name for reader in point.readers]
        return names & ({f"{name}.weight" for name in (*both, *weights)} | {f"{name}.bias" for name in both})


def rotations_of(changes: Changes, detail: str = "") -> StreamRotations:
    """The rotations that matrices [n, n] stand for."""
    values = {int(block): _rotation(matrix) for block, matrix in changes[VALUES].items()}
    return StreamRotations("spinquant", _rotation(changes[RESIDUAL][MATRIX]), values, detail)


def _rotation(matrix: Tensor) -> Rotation:
    return Rotation(torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device), matrix, False)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over tokens of left ⊗ right, float64 [H, H], of hidden states [windows, tokens, H]."""
    return (left.flatten(0, 1).float().t() @ right.flatten(0, 1).float()).double().cpu()


def _linears_of(runner: BlockRunner, index: int) -> tuple[Linear, ...]:
    return tuple(each for each in runner.architecture.linears.values() if each.block == index)
