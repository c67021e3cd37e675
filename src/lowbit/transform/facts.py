"""`ModelFacts`: where the weights of a model can be rewritten without changing its output.

At a *scaling point* every channel of an input can be divided by a number, and the columns of all its readers multiplied
by the same:

    norm → its readers         q, k, v; gate, up; the router and all experts; attention and MLP that run in parallel
    up_proj → down_proj        the input of down_proj is act(gate) · up, linear in up
    v_proj → o_proj            the input of o_proj is a mean of values, linear in v; query heads that share a
                               key/value head share the numbers, since v_proj has one row for all of them

Discovery finds by perturbation which norm or linear feeds which reader (`fed_by`), and which of its rows (`fed_rows`).
Left out, each with its reason: inputs that no single norm or linear feeds (an activation lies between), norms that also
feed experts stored in one tensor, and shapes that do not fit the number of heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lowbit.architecture.feeding import fed_rows
from lowbit.architecture.structure import Architecture, Linear
from lowbit.errors import ArchitectureError


@dataclass(frozen=True)
class ScalingPoint:
    """One place where scales can be moved; K = columns of the readers, C = channels with independent scales.

    feeder    module whose output is divided
    kind      of the feeder
    sources   names of the inputs (`Linear.reads`): one, except for norms of mixtures of experts
    readers   all linears that read them, including routers and linears that stay in 16 bits
    plus_one  the norm multiplies with 1 + weight
    rows      int64 [C]: rows of the feeding linear; None: row c
    channel   int64 [K]: channel of each column; None: channel k (then C = K)
    """

    feeder: str
    kind: Literal["norm", "linear"]
    sources: tuple[str, ...]
    readers: tuple[Linear, ...]
    plus_one: bool = False
    rows: Tensor | None = None
    channel: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.readers[0].shape[1]

    @property
    def feeds_output_projection(self) -> bool:
        """True for v → o."""
        return self.kind == "linear" and self.readers[0].role == "o_proj"

    def share(self, values: Tensor) -> Tensor:
        """[K] → [K]: the mean over the columns of every channel, so that columns of one channel have one value."""
        return values if self.channel is None else self.of_channels(values)[self.channel]

    def of_channels(self, values: Tensor) -> Tensor:
        """[K] → [C]: the mean over the columns of every channel."""
        if self.channel is None:
            return values
        channel = self.channel.to(values.device)
        count = torch.bincount(channel).to(values.dtype)
        return torch.zeros_like(count).index_add_(0, channel, values) / count


@dataclass(frozen=True)
class Outside:
    """Stored names of the tensors before and after the blocks; `head` even if it is tied."""

    embedding: str
    norm: str
    head: str


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that transforms need (`model_facts`).

    heads  query heads of attention
    """

    architecture: Architecture
    heads: int

    def adds_one(self, norm: str) -> bool:
        """True for a norm that multiplies with 1 + weight."""
        return self.architecture.norms.get(norm) == "rms_plus_one"

    @cached_property
    def outside(self) -> Outside:
        """ArchitectureError if the model has not one embedding of tokens, one final norm and one head."""
        whole = self.architecture
        parameters = {name: role for name, role in whole.roles.items() if whole.block_of(name) is None}
        norms = [name for name, role in parameters.items() if role == "norm" and not name.endswith(".bias")]
        embeddings = [name for name, role in parameters.items() if role == "embedding"]
        heads = [linear.name for linear in whole.linears.values() if linear.block is None and linear.role == "lm_head"]
        if not (len(norms) == len(embeddings) == len(heads) == 1):
            raise ArchitectureError(
                f"{whole.class_name} has {len(embeddings)} embeddings, {len(norms)} norms and {len(heads)} heads "
                f"outside its blocks; one of each is needed"
            )
        return Outside(embeddings[0], norms[0], f"{heads[0]}.weight")

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.architecture.parameters[self.outside.embedding][1]

    @cached_property
    def _linears_of(self) -> dict[int, list[Linear]]:
        found: dict[int, list[Linear]] = {}
        for linear in self.architecture.linears.values():
            if linear.block is not None:
                found.setdefault(linear.block, []).append(linear)
        return found

    @cached_property
    def _holds_fused_experts(self) -> frozenset[int | None]:
        roles = self.architecture.roles
        return frozenset(self.architecture.block_of(name) for name, role in roles.items() if role == "experts")

    def points(self, block: int) -> tuple[list[ScalingPoint], dict[str, str]]:
        """(scaling points of a block in the order of its linears, input without one → reason)."""
        linears = self._linears_of[block]
        fed: dict[str | None, list[Linear]] = {}
        for linear in linears:
            fed.setdefault(linear.fed_by, []).append(linear)
        points: list[ScalingPoint] = []
        left_out: dict[str, str] = {}
        for feeder, readers in fed.items():
            if feeder is None:
                why = "no norm or linear feeds it alone"
            elif _shares_inputs_with_others(readers, linears):
                why = f"it is read by linears that {feeder} does not feed"
            else:
                point = self._point(block, feeder, tuple(readers))
                if isinstance(point, ScalingPoint):
                    points.append(point)
                    continue
                why = point
            left_out |= dict.fromkeys(_sources(readers), why)
        return points, left_out

    def _point(self, block: int, feeder: str, readers: tuple[Linear, ...]) -> ScalingPoint | str:
        """The point, or the reason why there is none."""
        columns = readers[0].shape[1]
        if any(reader.shape[1] != columns for reader in readers):
            return f"the linears that {feeder} feeds differ in their columns"
        source = self.architecture.linears.get(feeder)
        if source is not None:
            return self._behind_linear(source, readers)
        if any(reader.role == "router" for reader in readers) and block in self._holds_fused_experts:
            return f"{feeder} also feeds experts stored in one tensor"
        if feeder not in self.architecture.norms:
            return f"{feeder} is no norm of a known kind"
        if self.architecture.parameters.get(f"{feeder}.weight") != (columns,):
            return f"{feeder} has not one weight for each of the {columns} columns"
        return ScalingPoint(feeder, "norm", _sources(readers), readers, self.adds_one(feeder))

    def _behind_linear(self, source: Linear, readers: tuple[Linear, ...]) -> ScalingPoint | str:
        rows, columns = source.shape[0], readers[0].shape[1]
        fed = fed_rows(readers[0].fed_rows or "all", rows, columns, self.heads)
        if fed is None:
            return f"{source.name} [{rows} rows] does not fit the {columns} columns that it feeds"
        return ScalingPoint(source.name, "linear", _sources(readers), readers, False, fed.rows, fed.channel)


def model_facts(architecture: Architecture) -> ModelFacts:
    """Facts of a model; ArchitectureError if they are unknown."""
    if architecture.untraced is not None:
        raise ArchitectureError(
            f"what feeds the linears of {architecture.class_name} is not known: it does not run on text alone "
            f"({architecture.untraced})",
            "choose a method that rewrites no weights, such as gptq or rtn",
        )
    if not architecture.heads:
        raise ArchitectureError(
            f"{architecture.class_name} has no attention heads that config.json counts",
            "choose a method that rewrites no weights, such as gptq or rtn",
        )
    return ModelFacts(architecture, architecture.heads)


def _sources(readers: Iterable[Linear]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reader.reads for reader in readers if reader.reads is not None))


def _shares_inputs_with_others(readers: list[Linear], linears: list[Linear]) -> bool:
    inputs = set(_sources(readers))
    return any(linear.reads in inputs and linear.fed_by != readers[0].fed_by for linear in linears)
