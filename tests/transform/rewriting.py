"""Blocks of tiny models in memory, and the models with their blocks rewritten, for the tests of transforms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowbit.architecture.describing import describe_checkpoint
from lowbit.architecture.loading import load_model
from lowbit.calibrate.blocks import BlockInput, BlockRunner
from lowbit.checkpoint import open_checkpoint
from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors
from lowbit.transform.facts import ModelFacts, model_facts

IDS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))


class Rewritten:
    """A checkpoint, of which some tensors are others."""

    def __init__(self, stored, tensors: dict[str, Tensor], dtype: torch.dtype):
        self._stored, self._values, self._dtype = stored, tensors, dtype
        self.tensors = {name: replace(info, dtype=dtype) for name, info in stored.tensors.items()}

    def __getattr__(self, name):
        return getattr(self._stored, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._values:
            return self._values[name][start:stop].to(self._dtype)
        return self._stored.read(name, start, stop).to(self._dtype)


class Model:
    """A tiny model: its facts, its blocks as tensors, and what it computes with rewritten ones."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64):
        self.folder, self.dtype = folder, dtype
        plain = open_checkpoint(folder)
        self.architecture, self.checkpoint = describe_checkpoint(plain, split_experts=True)
        self.facts: ModelFacts = model_facts(self.architecture)
        self._turned = {f"{name}.weight" for name, each in self.architecture.linears.items() if each.transposed}

    def block(self, index: int) -> BlockTensors:
        linears = tuple(linear for linear in self.architecture.linears.values() if linear.block == index)
        names = [name for name in self.architecture.parameters if self.architecture.block_of(name) == index]
        return BlockTensors(linears, {name: self.read(name) for name in names})

    def blocks(self) -> list[BlockTensors]:
        return [self.block(index) for index in range(len(self.architecture.blocks))]

    def read(self, name: str) -> Tensor:
        values = self.checkpoint.read(name).to(self.dtype)
        return values.t() if name in self._turned else values

    def rewritten(self, tensors: dict[str, Tensor]) -> Rewritten:
        stored = {name: values.t() if name in self._turned else values for name, values in tensors.items()}
        return Rewritten(self.checkpoint, stored, self.dtype)

    def logits(self, tensors: dict[str, Tensor]) -> Tensor:
        model = load_model(self.rewritten(tensors), self.dtype)  # type: ignore[arg-type]
        model.config.get_text_config()._experts_implementation = "eager"  # the grouped product knows no float64
        with torch.inference_mode():
            return model(input_ids=IDS, use_cache=False).logits

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, LayerStats]:
        meter = Meter()
        BlockRunner(self.rewritten(tensors), self.dtype).run(IDS, meter)  # type: ignore[arg-type]
        return {name: stats_of(torch.cat(seen)) for name, seen in meter.seen.items()}


class Meter:
    """Every input of every block, whole."""

    def __init__(self):
        self.seen: dict[str, list[Tensor]] = {}

    def look(self, source: BlockInput, x: Tensor) -> None:
        self.seen.setdefault(source.name, []).append(x.clone())

    def finish(self, block: int) -> None:
        pass


def stats_of(x: Tensor) -> LayerStats:
    """Statistics of inputs [tokens, K]."""
    return LayerStats(len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), x.T @ x)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding: transformers computes norms and routers in float32 whatever the model's dtype."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def assert_same_stats(found: LayerStats, expected: LayerStats, exact: bool = True) -> None:
    """Equal but for rounding; without `exact` the magnitudes may be bounds from above."""
    assert found.tokens == expected.tokens
    for part in ("mean_sq", "hessian"):
        assert_near(getattr(found, part), getattr(expected, part))
    for part in ("absmax", "mean_abs"):
        values, bound = getattr(expected, part), getattr(found, part)
        if exact:
            assert_near(bound, values)
        else:
            assert bool((bound >= values * (1 - 1e-4) - 1e-7).all()), part


def all_tensors(blocks: list[BlockTensors]) -> dict[str, Tensor]:
    return {name: values for block in blocks for name, values in block.tensors.items()}
