"""Statistics of the inputs of one stage of a block, for GPTQ, AWQ, SmoothQuant and the other methods.

    H = Σ x xᵀ                      hessian [K, K]
    D = C (H₁ + λ)⁻¹                drift [K, K], C = Σ (x₀ − x) xᵀ, x₀ the input of the unquantized model for the
                                    same token, λ a hundredth of the mean of diag H₁; off-diagonals of H₁ are shrunk
                                    by ρ first, as for error feedback (`rounding.hessian`)
    R = C_r (H₁ + λ)⁻¹              lost [N, K], C_r = Σ (r₀ − r) xᵀ, r the residual stream that the output of the
                                    reader is added to, r₀ that of the unquantized model
    absmax, mean |x|, mean x, and mean x² = diag(H) / tokens

C, C_r and H₁ sum over the windows that both models ran on. All sums are float32, over batches of at most
`blocks.BATCH_TOKENS` tokens. H is symmetric, so only its upper tiles are computed. Products round their factors to
bfloat16 if the forward pass is bfloat16 (`precision.py`).

Refused: NaN and inf in an input. An input that no token reached has no statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lowbit.calibrate.block_modules import BlockInput
from lowbit.errors import NonFiniteError
from lowbit.numerics.precision import fast_products
from lowbit.tensors import LayerStats

_CROSS_DAMPING = 0.01
_TILE = 512  # side of the tiles of the symmetric product


class InputKeeper:
    """A `BlockVisitor` that keeps one batch of every input, for comparison with the other stream.

    inputs  name → what its readers were given, of every call in order
    """

    def __init__(self):
        self.inputs: dict[str, list[Tensor]] = {}

    def look(self, source: BlockInput, x: Tensor) -> None:
        if source.expert is None:  # the streams route differently, so the tokens of experts do not match
            self.inputs.setdefault(source.name, []).append(x)

    def next(self, source: BlockInput) -> Tensor | None:
        """The first call that was not asked for yet; None where there is none."""
        calls = self.inputs.get(source.name)
        return calls.pop(0) if calls else None

    def finish(self, block: int) -> None:
        self.inputs.clear()


class InputStatistics:
    """A `BlockVisitor` that sums.

    channels     also absmax, mean |x| and mean x of every channel (AWQ, SmoothQuant); else they are 0
    unquantized  the same batch in the unquantized model; C sums over the inputs found there
    shrinkage    ρ of the Hessian that D is solved with
    keep         if set, called with every input [tokens, K]
    weights      if set, (input) → readers with weights of the batch's tokens, float32 [tokens, G]
    lost         if set, () → r₀ − r of the batch, [tokens, N]; called where the inputs of both models are compared
    """

    def __init__(self, dtype: torch.dtype, channels: bool = True, unquantized: InputKeeper | None = None,
                 shrinkage: float = 0.0):  # fmt: skip
        self._dtype, self._channels, self._unquantized, self._shrinkage = dtype, channels, unquantized, shrinkage
        self._sums: dict[str, _Sums] = {}
        self.keep: Callable[[Tensor], None] | None = None
        self.weights: Callable[[BlockInput], dict[str, Tensor]] | None = None
        self.lost: Callable[[], Tensor] | None = None

    def look(self, source: BlockInput, x: Tensor) -> None:
        if self.keep is not None:
            self.keep(x)
        if not len(x):
            return
        weights = {} if self.weights is None else self.weights(source)
        sums = self._sums.get(source.name)
        if sums is None:
            crossed = self._unquantized is not None and source.expert is None
            groups = {name: each.shape[1] for name, each in weights.items()}
            plain = not weights or any(linear.name not in weights for linear in source.linears)
            sums = self._sums[source.name] = _Sums(x.shape[1], self._channels, crossed, plain, groups, x.device)
        original = None if self._unquantized is None else self._unquantized.next(source)
        lost = None if original is None or self.lost is None else self.lost().to(x.device)
        with fast_products(self._dtype):
            sums.add(x.float(), None if original is None else original - x, lost, weights)

    def finish(self, block: int) -> None:
        pass

    def end_of_unquantized(self) -> None:
        """Solve for D: the remaining windows run in the quantized stream alone."""
        self._unquantized = None
        for sums in self._sums.values():
            if sums.plain is not None:
                sums.plain.solve_drift(self._shrinkage)

    def take(self) -> dict[str, LayerStats]:
        """Name of an input → its statistics; this object keeps none of them."""
        sums, self._sums = self._sums, {}
        return {name: each.statistics(name) for name, each in sums.items()}


class _Products:
    """H and C of one input, of tokens that count alike or have weights."""

    def __init__(self, columns: int, cross: bool, device: torch.device):
        zeros = partial(torch.zeros, columns, columns, dtype=torch.float32, device=device)
        self.hessian = zeros()
        self.cross = zeros() if cross else None
        self.cross_stream: Tensor | None = None
        self.drift: Tensor | None = None
        self.lost: Tensor | None = None

    def add(self, x: Tensor, difference: Tensor | None, lost: Tensor | None = None) -> None:
        _add_gram(self.hessian, x)
        if self.cross is not None and difference is not None:
            self.cross.addmm_(difference.float().t(), x)
        if lost is not None:
            if self.cross_stream is None:
                self.cross_stream = torch.zeros(lost.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            self.cross_stream.addmm_(lost.float().t(), x)

    def solve_drift(self, shrinkage: float = 0.0) -> None:
        """D and R from the sums so far; None if H has no Cholesky factor."""
        if self.cross is None:
            return
        damped = self.hessian.triu() + self.hessian.triu(1).t()
        if shrinkage:
            diagonal = damped.diagonal().clone()
            damped.mul_(1 - shrinkage).diagonal().copy_(diagonal)
        mean = damped.diagonal().mean()
        damped.diagonal().add_(_CROSS_DAMPING * mean + (mean == 0))
        root, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            for sums in (self.cross, self.cross_stream):
                for rows in () if sums is None else sums.split(_TILE):  # in place: the largest matrices of a run
                    rows.copy_(torch.cholesky_solve(rows.t(), root).t())
            self.drift, self.lost = self.cross, self.cross_stream
        self.cross = self.cross_stream = None

    def mirror(self) -> None:
        """Complete the lower tiles of H."""
        for first in range(0, len(self.hessian), _TILE):
            last = min(first + _TILE, len(self.hessian))
            self.hessian[last:, first:last] = self.hessian[first:last, last:].t()
            tile = self.hessian[first:last, first:last]
            tile.copy_((tile + tile.t()) / 2)


class _Sums:
    """The sums of one input. D is that of tokens that all count alike: it is estimated, column by column, from the same
    tokens, and weights leave it too few.

    plain   H and C of tokens that all count alike; None if every reader has weights and there is no C
    groups  reader with weights → its groups of output rows, which have an H each
    """

    def __init__(self, columns: int, channels: bool, cross: bool, plain: bool, groups: dict[str, int],
                 device: torch.device):  # fmt: skip
        self.tokens, self.channels = 0, channels
        self.absmax, self.absolute, self.values = torch.zeros(3, columns, device=device)
        self.squares = torch.zeros(columns, device=device)
        self.plain = _Products(columns, cross, device) if plain or cross else None
        self.weighted = {
            name: [_Products(columns, False, device) for _ in range(count)] for name, count in groups.items()
        }

    def add(self, x: Tensor, difference: Tensor | None, lost: Tensor | None, weights: dict[str, Tensor]) -> None:
        self.tokens += len(x)
        if self.plain is not None:
            self.plain.add(x, difference, lost)
        else:
            self.squares += x.square().sum(dim=0)
        for name, products in self.weighted.items():
            for one, root in zip(products, weights[name].to(x.device).sqrt().unbind(dim=1), strict=True):
                one.add(x * root[:, None], None)
        if self.channels:
            magnitude = x.abs()
            torch.maximum(self.absmax, magnitude.amax(dim=0), out=self.absmax)
            self.absolute += magnitude.sum(dim=0)
            self.values += x.sum(dim=0)

    def statistics(self, name: str) -> LayerStats:
        plain = self.plain
        for products in (
            *([] if plain is None else [plain]),
            *(one for each in self.weighted.values() for one in each),
        ):
            products.mirror()
        squares = self.squares if plain is None else plain.hessian.diagonal().clone()
        wrong = ~torch.isfinite(squares)
        if wrong.any():
            raise NonFiniteError(
                f"{name} is not finite in {int(wrong.sum())} of {len(wrong)} channels for some token of the "
                f"calibration text (the first is channel {int(wrong.nonzero()[0])})",
                "compute in float32 (quantize: --compute float32; other commands: --dtype float32), or look for damage "
                "with `lowbit evaluate`",
            )
        count = max(1, self.tokens)
        stats = LayerStats(
            self.tokens, self.absmax, squares / count, self.absolute / count, None if plain is None else plain.hessian,
            None if plain is None else plain.drift, None if plain is None else plain.lost, self.values / count,
        )  # fmt: skip
        weighted = {
            reader: tuple(replace(stats, hessian=one.hessian) for one in products)
            for reader, products in self.weighted.items()
        }
        return replace(stats, weighted=weighted) if weighted else stats


def _add_gram(hessian: Tensor, x: Tensor) -> None:
    """H += xᵀ x for the tiles on and above the diagonal."""
    columns = x.shape[1]
    if columns <= _TILE:
        hessian.addmm_(x.t(), x)
        return
    for first in range(0, columns, _TILE):
        last = min(first + _TILE, columns)
        hessian[first:last, first:].addmm_(x[:, first:last].t(), x[:, first:])
