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

from lowbit.formats.gguf.mix import TypeChoice, importance_needed
from lowbit.formats.gguf.mix_table import EMBEDDING, FILE_TYPES, OUTPUT
from lowbit.numerics.ggml import TYPES
from lowbit.plan.plan import PlannedTensor, Prepared, Request, prepare
from lowbit.rounding.target import Target
from lowbit.settings import MEASURE, Settings, make_settings

MARK = "# lowbit allocate"  # how a file of rules or a recipe begins
_OF_THE_CHOICE = ("scheme", "overrides", "method", "format", "calib", "samples", "seqlen", "seed")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Offer:
    """A tensor of the output, or several that must have one type.

    sources  names of the weights it is made of
    weights  number of weights
    sizes    type → bytes
    own      its type in the plan of the file type or scheme of the settings; own_bytes: what that takes
    """

    name: str
    sources: tuple[str, ...]
    weights: int
    sizes: Mapping[str, int]
    own: str
    own_bytes: int


@dataclass(frozen=True)
class Offers(ABC):
    """
    prepared    of `settings`, from which types that are not chosen come
    candidates  types to choose from
    made_by     `method` or `quality` of the run that will make the output, if one was named
    """

    prepared: Prepared
    settings: Settings
    candidates: Sequence[str]
    made_by: Mapping[str, str]

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
    def how_to_use(self, mix: Mapping[str, str], path: Path) -> tuple[str, dict[str, object]]:
        """(output, options of `lowbit quantize` that read the file by name)."""

    @abstractmethod
    def target(self, kind: str, source: str) -> Target:
        """What a weight is rounded to."""

    def round_to(self, kind: str, source: str, weight: Tensor, importance: Tensor | None) -> Tensor:
        """A weight [N, K] as an engine decodes it; importance float32 [K]."""
        target = self.target(kind, source).with_range([weight])
        return target.nearest(weight, importance if target.is_ggml else None).decoded

    @property
    def beside(self) -> dict[str, object]:
        """Settings that the output needs beside the choice: all that were given but the text and what is chosen."""
        return {name: value for name, value in self.settings.given.items() if name not in _OF_THE_CHOICE}

    @cached_property
    def is_calibrated(self) -> bool:
        """True if a text decides how linears of blocks will be rounded."""
        return make_settings(None, **self.made_by).is_blockwise

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the files without the tensors whose types are chosen."""
        return self.prepared.plan.file_bytes - sum(offer.own_bytes for offer in self.by_name.values())

    def bytes_of(self, mix: Mapping[str, str], work: Path) -> int:
        """Bytes of the files of a mix, planned: tensors are aligned, and headers differ."""
        return self.prepared.plan_again(self.settings_with(mix, work)).file_bytes


@dataclass(frozen=True)
class GGUFOffers(Offers):
    """The ggml types of a GGUF file.

    model     as it was given
    with_own  what the rules of the file type give a tensor is offered beside the candidates
    """

    model: str = ""
    with_own: bool = True

    @cached_property
    def _plans(self) -> dict[str, dict[str, PlannedTensor]]:
        """Candidate → tensor → its plan where all get that type, or what stands for it in rows that it does not divide,
        and where llama.cpp applies no scale of the whole matrix (NVFP4)."""
        file_types = {each.base: each.name for each in reversed(FILE_TYPES.values()) if each.like is None}
        plans = {}
        for kind in dict.fromkeys(self.candidates):
            pure = self.settings.model_copy(update={"scheme": file_types[kind], "pure": True})
            plans[kind] = {tensor.name: tensor for tensor in self.prepared.plan_again(pure).tensors}
        return plans

    @cached_property
    def by_name(self) -> dict[str, Offer]:
        plan = self.prepared.plan
        assert plan.architecture is not None
        shapes = {
            f"{linear.name}.weight": linear.shape
            for linear in plan.architecture.linears.values() if linear.block is not None
        }  # fmt: skip
        offers = {}
        for tensor in plan.tensors:
            sources = tuple(dict.fromkeys(tensor.source.names))
            outside = tensor.name in (EMBEDDING, OUTPUT)
            if tensor.is_quantized and sources and (outside or shapes.keys() >= set(sources)):
                columns = {tensor.shape[-1], *(shapes[source][1] for source in sources if not outside)}
                sizes = self._sizes(tensor, columns)
                if sizes:
                    offers[tensor.name] = Offer(
                        tensor.name, sources, tensor.weights, sizes, tensor.stored_as, tensor.stored_bytes
                    )
        return offers

    def _sizes(self, tensor: PlannedTensor, columns: Iterable[int]) -> dict[str, int]:
        """Type → bytes, of those whose block divides the stored rows, and those of the weights it is made of (which
        differ where a layout turns them), so that they can be weighed."""
        planned = [plan[tensor.name] for plan in self._plans.values()]
        own = tensor.stored_as
        if self.with_own or all(each.stored_as == own for each in planned):
            planned.append(tensor)
        return {
            each.stored_as: each.stored_bytes for each in planned
            if not any(count % TYPES[each.stored_as].weights for count in columns)
        }  # fmt: skip

    @cached_property
    def _targets(self) -> dict[tuple[str, str], Target]:
        """(type, source) → target."""
        planned = (tensor for plan in (*self._plans.values(), self._own) for tensor in plan.values())
        return {
            (tensor.stored_as, source): tensor.target
            for tensor in planned if tensor.target is not None for source in tensor.source.names
        }  # fmt: skip

    @property
    def _own(self) -> dict[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.prepared.plan.tensors}

    def target(self, kind: str, source: str) -> Target:
        return self._targets[kind, source]

    def settings_with(self, mix: Mapping[str, str], work: Path) -> Settings:
        rules = work / "planned.types"
        rules.write_text(self.text(mix, MARK), encoding="utf-8")
        # a file says of the importance matrix it was made with, which takes bytes
        return self.settings.model_copy(update={"tensor_type_file": str(rules), "imatrix": self._importance(mix)})

    def bytes_of(self, mix: Mapping[str, str], work: Path) -> int:
        settings = self.settings_with(mix, work)
        if settings.imatrix is None:
            planned = self.prepared.plan_again(settings).file_bytes
        else:  # a plan that is made again keeps the header's key-values
            settings = settings.model_copy(update={"method": "rtn"})
            again = prepare(Request(self.model, settings, self.prepared.options, preview=True))
            planned = again.plan.file_bytes
            again.checkpoint.close()
        (work / "planned.types").unlink()
        return planned

    def text(self, mix: Mapping[str, str], about: str) -> str:
        return rules_of(mix, about)

    def how_to_use(self, mix: Mapping[str, str], path: Path) -> tuple[str, dict[str, object]]:
        options = {"scheme": self.settings.scheme, **self.made_by, "tensor_type_file": path,
                   "imatrix": self._importance(mix)}  # fmt: skip
        if options["imatrix"] is not None or self.is_calibrated:
            options["calib"] = self.settings.given.get("calib")
        return "OUT.gguf", {**options, **self.beside}

    def _importance(self, mix: Mapping[str, str]) -> str | None:
        """What `--imatrix` must be: MEASURE if a type of the file is of no use without one, and nothing calibrates."""
        if self.is_calibrated:
            return None
        kept = {name: tensor.stored_as for name, tensor in self._own.items()}
        types = {name: TypeChoice(kind) for name, kind in {**kept, **mix}.items()}
        return MEASURE if importance_needed(self.settings.scheme, types) else None


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
                self.settings.scheme, sum(plans[self.settings.scheme][weight].stored_bytes for weight in its),
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
        recipe = {"scheme": scheme, **self.made_by, **self.beside, **({"overrides": overrides} if overrides else {})}
        return f"{about}\n{yaml.safe_dump(recipe, sort_keys=False, width=10_000)}"

    def how_to_use(self, mix: Mapping[str, str], path: Path) -> tuple[str, dict[str, object]]:
        return "OUT", {"recipe": path, "calib": self.settings.given.get("calib") if self.is_calibrated else None}

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
