"""What each tensor of an output may be stored in, and how a choice is written down: for GGUF files and for folders.

    GGUF    the ggml types of matrices of the blocks, the embedding and the head; rules for `--tensor-type-file`
    folder  the schemes of linears of the blocks, one for each fused set and for all experts of a block, since engines
            load these as one matrix; a recipe with overrides

Bytes come from plans of the same model, and the bytes of a mix from its own plan.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from torch import Tensor

from lowbit.formats.gguf.mix_table import EMBEDDING, FALLBACKS, OUTPUT
from lowbit.numerics.ggml import TYPES
from lowbit.plan.plan import PlannedTensor, Prepared
from lowbit.rounding.target import GgmlTarget, Target
from lowbit.settings import Settings

MARK = "# lowbit allocate"  # how a file of rules or a recipe begins
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Offer:
    """A tensor of the output, or several that must have one type.

    sources  names of the weights it is made of
    weights  number of weights
    sizes    type → bytes
    own      its type in the plan of the file type or scheme that the budget is taken from
    """

    name: str
    sources: tuple[str, ...]
    weights: int
    sizes: Mapping[str, int]
    own: str


@dataclass(frozen=True)
class Offers(ABC):
    """prepared: of `settings`, from which types that are not chosen come"""

    prepared: Prepared
    settings: Settings
    candidates: Sequence[str]

    @cached_property
    @abstractmethod
    def by_name(self) -> dict[str, Offer]: ...

    @abstractmethod
    def settings_with(self, mix: Mapping[str, str], work: Path) -> Settings:
        """Settings that make the mix. work: a folder for files that they name"""

    @abstractmethod
    def text(self, mix: Mapping[str, str], about: str) -> str:
        """The file that is written."""

    @abstractmethod
    def how_to_use(self, path: Path) -> str:
        """Options of `lowbit quantize` that read it."""

    @abstractmethod
    def target(self, kind: str, source: str) -> Target:
        """What a weight is rounded to."""

    def round_to(self, kind: str, source: str, weight: Tensor, importance: Tensor | None) -> Tensor:
        """A weight [N, K] as an engine decodes it; importance float32 [K]."""
        target = self.target(kind, source).with_range([weight])
        return target.nearest(weight, importance if target.is_ggml else None).decoded

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the files without the tensors whose types are chosen."""
        return self.prepared.plan.file_bytes - sum(offer.sizes[offer.own] for offer in self.by_name.values())

    def bytes_of(self, mix: Mapping[str, str], work: Path) -> int:
        """Bytes of the files of a mix, planned: tensors are aligned, and headers differ."""
        return self.prepared.plan_again(self.settings_with(mix, work)).file_bytes


@dataclass(frozen=True)
class GGUFOffers(Offers):
    """The ggml types of a GGUF file."""

    @cached_property
    def by_name(self) -> dict[str, Offer]:
        plan = self.prepared.plan
        assert plan.architecture is not None
        linears = {f"{linear.name}.weight" for linear in plan.architecture.linears.values() if linear.block is not None}
        chosen = [
            tensor for tensor in plan.tensors
            if tensor.is_quantized and tensor.source.names
            and (tensor.name in (EMBEDDING, OUTPUT) or linears.issuperset(tensor.source.names))
        ]  # fmt: skip
        return {
            tensor.name: Offer(tensor.name, tuple(dict.fromkeys(tensor.source.names)), tensor.weights,
                               self._sizes(tensor), tensor.stored_as)
            for tensor in chosen
        }  # fmt: skip

    def _sizes(self, tensor: PlannedTensor) -> dict[str, int]:
        """Of the candidates, or of what stands for them in rows that they do not divide, and of its own type."""
        columns = tensor.shape[-1]
        fitting = (name if columns % TYPES[name].weights == 0 else FALLBACKS.get(name) for name in self.candidates)
        names = (name for name in dict.fromkeys((*fitting, tensor.stored_as)) if name is not None)
        return {
            name: tensor.weights // columns * TYPES[name].row_bytes(columns)
            for name in names if columns % TYPES[name].weights == 0
        }  # fmt: skip

    def target(self, kind: str, source: str) -> Target:
        return GgmlTarget(kind)

    def settings_with(self, mix: Mapping[str, str], work: Path) -> Settings:
        rules = work / "planned.types"
        rules.write_text(self.text(mix, MARK), encoding="utf-8")
        return self.settings.model_copy(update={"tensor_type_file": str(rules)})

    def bytes_of(self, mix: Mapping[str, str], work: Path) -> int:
        planned = super().bytes_of(mix, work)
        (work / "planned.types").unlink()
        return planned

    def text(self, mix: Mapping[str, str], about: str) -> str:
        return rules_of(mix, about)

    def how_to_use(self, path: Path) -> str:
        return f"-o OUT.gguf --scheme {self.settings.scheme} --tensor-type-file {path}"


def rules_of(types: Mapping[str, str], about: str) -> str:
    """Rules for `--tensor-type-file`, one for the tensors of one type and name in all their blocks."""
    blocks: dict[tuple[str, str], list[int]] = defaultdict(list)
    lines = [about]
    for name, kind in types.items():
        found = _BLOCK.fullmatch(name)
        if found is None:
            lines.append(f"^{re.escape(name)}$ = {kind}")
        else:
            blocks[found[2], kind].append(int(found[1]))
    for (name, kind), its in sorted(blocks.items()):
        lines.append(rf"^blk\.({'|'.join(map(str, sorted(its)))})\.{re.escape(name)}$ = {kind}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class FolderOffers(Offers):
    """The schemes of a folder."""

    @cached_property
    def _plans(self) -> dict[str, dict[str, PlannedTensor]]:
        """Scheme → quantized linear of a block, by name of its weight → its plan."""
        plans = {}
        for scheme in dict.fromkeys((*self.candidates, self.settings.scheme)):
            plan = self.prepared.plan_again(self.settings.model_copy(update={"scheme": scheme}))
            plans[scheme] = {tensor.name: tensor for tensor in plan.tensors
                             if tensor.is_quantized and tensor.linear is not None and tensor.in_decoder}  # fmt: skip
        return plans

    @cached_property
    def by_name(self) -> dict[str, Offer]:
        architecture, plans = self.prepared.plan.architecture, self._plans
        assert architecture is not None
        common = set.intersection(*(set(plan) for plan in plans.values()))
        sets = {**architecture.fused_sets, **architecture.expert_sets}
        set_of = {f"{linear}.weight": name for name, members in sets.items() for linear in members}
        members: dict[str, list[str]] = defaultdict(list)
        for name in plans[self.settings.scheme]:
            if name in common:
                members[set_of.get(name, name.removesuffix(".weight"))].append(name)
        return {
            name: Offer(
                name, tuple(its), sum(plans[self.settings.scheme][weight].weights for weight in its),
                {scheme: sum(plans[scheme][weight].stored_bytes for weight in its) for scheme in plans},
                self.settings.scheme,
            )
            for name, its in members.items()
        }  # fmt: skip

    def target(self, kind: str, source: str) -> Target:
        target = self._plans[kind][source].target
        assert target is not None, "a quantized linear has a target"
        return target

    def settings_with(self, mix: Mapping[str, str], work: Path) -> Settings:
        scheme, overrides = self._recipe(mix)
        return self.settings.model_copy(update={"scheme": scheme, "overrides": overrides})

    def text(self, mix: Mapping[str, str], about: str) -> str:
        scheme, overrides = self._recipe(mix)
        recipe = {"scheme": scheme, "overrides": overrides} if overrides else {"scheme": scheme}
        return f"{about}\n{yaml.safe_dump(recipe, sort_keys=False, width=10_000)}"

    def how_to_use(self, path: Path) -> str:
        return f"-o OUT --recipe {path}"

    def _recipe(self, mix: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """(the scheme of most weights, regex → scheme of all others)."""
        weights: dict[str, int] = defaultdict(int)
        for name, scheme in mix.items():
            weights[scheme] += self.by_name[name].weights
        most = max(weights, key=lambda scheme: weights[scheme], default=self.settings.scheme)
        others = ((source, mix[name]) for name, offer in self.by_name.items() for source in offer.sources
                  if mix[name] != most)  # fmt: skip
        return most, self._patterns(others)

    def _patterns(self, linears: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Regex → scheme, one for linears of one name and scheme in all their blocks, and of all experts of these."""
        blocks: dict[tuple[str, str, str], set[int]] = defaultdict(set)
        for source, scheme in linears:
            linear = self._plans[scheme][source].linear
            assert linear is not None
            assert linear.block is not None
            before, number, after = linear.name.partition(f".{linear.block}.")
            assert number, "the name of a linear holds the number of its block"
            behind = re.escape(after)
            if linear.expert is not None:
                behind = behind.replace(rf"\.{linear.expert}\.", r"\.\d+\.", 1)
            blocks[re.escape(before), behind, scheme].add(linear.block)
        return {
            rf"^{before}\.({'|'.join(map(str, sorted(its)))})\.{after}$": scheme
            for (before, after, scheme), its in sorted(blocks.items())
        }
