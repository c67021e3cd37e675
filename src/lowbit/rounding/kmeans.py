"""k-means codebooks weighted by sensitivity (SqueezeLLM: Kim et al. 2023, arXiv 2306.07629, the dense part).

    min over tables and codes of  Σ_j h_j · (w_j − table[code_j])²          for every row by itself

h is the sensitivity of a weight: diag(H) = mean x² of its input here; the paper takes the diagonal of the Fisher
matrix, which `importance` may hold. Lloyd's algorithm in one dimension: on sorted weights a cluster is a range, so that
with running sums of h and h·w every iteration costs one binary search per boundary, for all rows at once.

    boundaries ← (c_i + c_(i+1)) / 2        c_i ← Σ h·w / Σ h between them; an empty cluster stays where it is

Lloyd finds a local minimum, so it begins twice, at weighted quantiles and at even steps from the smallest weight to the
largest (the asymmetric integer grid), and each row keeps the better. There is no chance in it. Values are rounded to
float16 in the end. The paper's sparse outliers are not part of this.

Rows whose sensitivities are all 0 count their weights alike. Tables of rows with fewer distinct weights than values
repeat some. No engine reads these codes; they are written decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.numerics.learned_codebook import LearnedCodebookGrid
from lowbit.rounding.target import Rounded
from lowbit.tensors import Granularity, GroupParams, LayerStats, QuantizedTensor

_LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class KmeansOptions:
    """iterations  at most; it ends when no value of any row moves"""

    iterations: int = 100


def kmeans(
    weight: Tensor,
    bits: int,
    stats: LayerStats | None = None,
    importance: Tensor | None = None,
    options: KmeansOptions | None = None,
) -> Rounded:
    """Codes uint8 [N, K] and a table [N, 2^bits] for a weight [N, K] (float32, bfloat16, float16).

    importance  float32 [K] or [N, K], ≥ 0; else mean x² of `stats`; else every weight counts alike, with a note
    """
    if not 1 <= bits <= 8:
        raise UsageError(f"codebooks of {bits} bits cannot be learned", "ask for 1 to 8 bits")
    notes: tuple[str, ...] = ()
    if importance is None and stats is not None:
        importance = stats.mean_sq
    if importance is None:
        notes = ("codebooks learned without sensitivities: nothing was calibrated",)
    table = learn_tables(weight.float(), bits, importance, (options or KmeansOptions()).iterations)
    grid = LearnedCodebookGrid(table)
    rows, columns = weight.shape
    scale = torch.ones(rows, 1, device=weight.device)
    codes = grid.round(weight, GroupParams(scale), columns)
    stored = QuantizedTensor(codes, scale, grid, Granularity.CHANNEL, columns)
    notes += (f"{grid.bits_per_weight(columns):.3f} bits per weight with a codebook for each row",)
    return Rounded(stored, stored.decode(), notes)


def learn_tables(weight: Tensor, bits: int, importance: Tensor | None, iterations: int) -> Tensor:
    """Float32 tables [N, 2^bits] of float16 values, ascending, for float32 weight [N, K]."""
    rows = _Rows(weight, importance)
    first = rows.lloyd(rows.quantiles(1 << bits), iterations)
    second = rows.lloyd(rows.even_steps(1 << bits), iterations)
    better = rows.error(first) <= rows.error(second)
    return torch.where(better[:, None], first, second).float()


class _Rows:
    """Sorted weights of every row with running sums, float64 [N, K + 1]: Σ h, Σ h·w and Σ h·w² of the first k."""

    def __init__(self, weight: Tensor, importance: Tensor | None):
        self.sorted, order = weight.sort(dim=1)
        if importance is None:
            h = torch.ones_like(weight)
        else:
            h = importance.to(weight.device, torch.float32).expand_as(weight).gather(1, order)
        h = h.double()
        h = torch.where(h.sum(1, keepdim=True) > 0, h, torch.ones_like(h))
        values = self.sorted.double()
        self.h, self.hw, self.hww = (_running(each) for each in (h, h * values, h * values.square()))

    def quantiles(self, count: int) -> Tensor:
        """Initial values [N, count]: the weights at (i + 1/2) / count of Σ h."""
        at = (torch.arange(count, device=self.h.device, dtype=torch.float64) + 0.5) / count
        place = torch.searchsorted(self.h, self.h[:, -1:] * at) - 1
        return self.sorted.gather(1, place.clamp(0, self.sorted.shape[1] - 1)).double()

    def even_steps(self, count: int) -> Tensor:
        """Initial values [N, count] from the smallest weight to the largest."""
        step = torch.linspace(0.0, 1.0, count, device=self.h.device, dtype=torch.float64)
        low, high = self.sorted[:, :1].double(), self.sorted[:, -1:].double()
        return low + (high - low) * step

    def lloyd(self, values: Tensor, iterations: int) -> Tensor:
        """Values [N, count] at a local minimum, rounded to float16 (float64, ascending)."""
        for _ in range(iterations):
            edges = self._edges(values)
            mass, moment = (_between(sums, edges) for sums in (self.h, self.hw))
            moved = torch.where(mass > 0, moment / mass, values)
            if torch.equal(moved, values):
                break
            values = moved
        return values.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).half().double().sort(dim=1).values

    def error(self, values: Tensor) -> Tensor:
        """Σ h · (w − nearest value)² of every row."""
        edges = self._edges(values)
        mass, moment, square = (_between(sums, edges) for sums in (self.h, self.hw, self.hww))
        return (square - 2 * values * moment + values.square() * mass).sum(1)

    def _edges(self, values: Tensor) -> Tensor:
        """[N, count + 1]: cluster i is the sorted weights edges[i] .. edges[i + 1] − 1."""
        halfway = ((values[:, 1:] + values[:, :-1]) / 2).float().contiguous()
        inner = torch.searchsorted(self.sorted, halfway, right=True)
        first = torch.zeros_like(inner[:, :1])
        return torch.cat([first, inner, torch.full_like(first, self.sorted.shape[1])], dim=1)


def _running(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _between(sums: Tensor, edges: Tensor) -> Tensor:
    return sums.gather(1, edges).diff(dim=1)
