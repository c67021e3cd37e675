"""`ImportanceMatrix`: how much the error of each input channel of each tensor counts. llama.cpp calls it imatrix.

    importance[e, k] = Σ x[k]² / count[e]      over the tokens that expert e multiplied; E = 1 for ordinary linears

That is the diagonal of the Hessian Σ x xᵀ divided by the number of tokens: the squared error of a weight times it is
the squared error of the output. Tensors have their GGUF names, as in the files.

An expert that no token reached, or whose inputs were all zero, gets the mean importance of the other experts of its
tensor, with a note; where there are none, every channel counts 1. A channel of importance zero among others stays zero:
its weights multiply nothing, so their error costs nothing.

Refused (CheckpointError): NaN, inf, negative values or counts; sums without tokens; a matrix without any tokens; a
matrix of another model (names or widths that do not match).

`statistics` shows which channels carry the energy of each input, over all experts that tokens reached:

    total    Σ_k mean x[k]²           the energy of the input
    top 1 %  share of `total` in the 1 % of channels with most of it: 0.01 where all are alike, 1 where outliers rule
    entropy  −Σ p log₂ p / log₂ n      p = mean x² / total, of n channels: 1 where all are alike, 0 where one rules
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

# The matrix of the output head; GGUF files of models that tie it keep the embeddings only, under their own name.
HEAD_NAMES = ("output.weight", "token_embd.weight")

_BLOCK = re.compile(r"blk\.(\d+)\.")
_MEASURE_AGAIN = "measure it again: lowbit imatrix MODEL -o FILE"


@dataclass(frozen=True)
class ImportanceEntry:
    """The measurement of one tensor.

    sums    float32 [E, K]  Σ x², as in the files; zeros for an expert that no token reached
    counts  int64 [E]       tokens in the sum

    Files that do not state the number of experts give [1, E·K] and one count.
    """

    sums: Tensor
    counts: Tensor

    @property
    def values(self) -> Tensor:
        """Mean x², float32 [E, K]."""
        return (self.sums.double() / self.counts.clamp(min=1)[:, None]).float()

    @property
    def unseen(self) -> tuple[int, ...]:
        """The experts that no token reached."""
        return tuple(torch.nonzero(self.counts == 0).flatten().tolist())

    @classmethod
    def of_sums(cls, sums: Tensor, counts: Tensor) -> ImportanceEntry:
        """From Σ x² [E, K] in any float dtype and the tokens of each expert [E] in any integer dtype."""
        return cls(sums.float(), counts.to(torch.int64))

    @classmethod
    def of_means(cls, values: Tensor, counts: Tensor) -> ImportanceEntry:
        """From mean x² [E, K] and the tokens of each expert [E]."""
        return cls.of_sums(values.double() * counts[:, None], counts)


@dataclass(frozen=True)
class ImportanceMatrix:
    """entries       GGUF name of a tensor ("blk.3.ffn_up_exps.weight") → measurement, sorted by name
    datasets      names of the texts
    chunks        number of windows of text
    chunk_tokens  tokens in a window; 0 if unknown
    """

    entries: dict[str, ImportanceEntry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_tokens: int = 0

    def importance(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """float32 [E, K]: finite, none negative, no row all zero. None without an entry.

        shape  of the tensor in torch's order: [N, K] or [E, N, K]; CheckpointError for an entry of another width
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        entry = fitted(entry, name, shape, "the imatrix")
        values = entry.values
        usable = values.any(dim=1) & (entry.counts > 0)
        if usable.all():
            return values
        filling = values[usable].mean(dim=0) if usable.any() else torch.ones(values.shape[1])
        return torch.where(usable[:, None], values, filling)

    @property
    def unseen_experts(self) -> dict[str, tuple[int, ...]]:
        """Tensor → the experts of it that no token reached, where there are any."""
        return {name: entry.unseen for name, entry in self.entries.items() if entry.unseen}


def fitted(entry: ImportanceEntry, name: str, shape: tuple[int, ...], where: str) -> ImportanceEntry:
    """The entry as [E, K] of a tensor of this shape; CheckpointError where it is of another."""
    experts, columns = math.prod(shape[:-2]), shape[-1] if shape else 1
    sums, counts = entry.sums, entry.counts
    if sums.numel() != experts * columns or len(counts) not in (1, experts):
        raise CheckpointError(
            f"{where}: {name} has importance for {_sizes(*sums.shape)}, the tensor {list(shape)} has "
            f"{_sizes(experts, columns)}",
            "it is the imatrix of another model; " + _MEASURE_AGAIN,
        )
    return ImportanceEntry(sums.reshape(experts, columns), counts.expand(experts) if len(counts) == 1 else counts)


def check_values(matrix: ImportanceMatrix, where: str) -> None:
    """CheckpointError for values that cannot weigh errors."""
    if not matrix.entries:
        raise CheckpointError(f"{where}: it holds no tensor's importance", _MEASURE_AGAIN)
    for name, entry in matrix.entries.items():
        _check_entry(name, entry, where)
    if all(not entry.counts.any() for entry in matrix.entries.values()):
        raise CheckpointError(f"{where}: all counts are zero: nothing was measured", _MEASURE_AGAIN)


def _check_entry(name: str, entry: ImportanceEntry, where: str) -> None:
    if len(entry.counts) and int(entry.counts.min()) < 0:
        raise CheckpointError(f"{where}: {name} was measured on {int(entry.counts.min())} tokens", _MEASURE_AGAIN)
    values = entry.values
    wrong = ~(torch.isfinite(values) & (values >= 0))
    if wrong.any():
        expert, channel = torch.nonzero(wrong)[0].tolist()
        of_expert = f" of expert {expert}" if len(entry.counts) > 1 else ""
        raise CheckpointError(
            f"{where}: the importance of {name}, channel {channel}{of_expert}, is {values[expert, channel]:g}; "
            f"finite numbers from 0 on are needed ({int(wrong.sum())} are not)",
            "the run that made it overflowed or was damaged; " + _MEASURE_AGAIN,
        )
    if entry.counts.any() and not values.any():
        raise CheckpointError(
            f"{where}: the importance of {name} is zero in every channel, which says nothing about its weights",
            "the model or the run that made it is damaged; " + _MEASURE_AGAIN,
        )


def check_fits(matrix: ImportanceMatrix, tensors: Mapping[str, tuple[int, ...]], where: str) -> list[str]:
    """Check that a matrix belongs to a model and has usable values (CheckpointError); notes for the user.

    tensors  GGUF name → shape in torch's order, [N, K] or [E, N, K], of the tensors that need importance
    where    the file, for messages
    """
    check_values(matrix, where)
    known = [name for name in matrix.entries if name in tensors]
    if not known:
        raise CheckpointError(
            f"{where}: none of its {len(matrix.entries)} names is a tensor of this model; the first is "
            f"{next(iter(matrix.entries))!r}",
            "it is the imatrix of another model; " + _MEASURE_AGAIN,
        )
    blocks, known_blocks = _last_block(matrix.entries), _last_block(tensors)
    if blocks > known_blocks:
        raise CheckpointError(
            f"{where}: it goes up to block {blocks}, this model to block {known_blocks}",
            "it is the imatrix of another model; " + _MEASURE_AGAIN,
        )
    for name in known:
        fitted(matrix.entries[name], name, tensors[name], where)
    missing = [name for name in tensors if name not in matrix.entries]
    notes = [f"{where} has nothing on {len(missing)} tensors: {_some(missing)}"] if missing else []
    return notes + unseen_notes(matrix, where)


def unseen_notes(matrix: ImportanceMatrix, where: str) -> list[str]:
    """A note on each tensor with experts that no token reached."""
    return [
        f"{where}: no token reached {_experts(experts, len(matrix.entries[name].counts))} of {name}, which is "
        + ("taken to weigh its channels alike" if len(experts) == len(matrix.entries[name].counts)
           else "taken to weigh its channels as the mean of the others does")
        for name, experts in matrix.unseen_experts.items()
    ]  # fmt: skip


def merge(matrices: Sequence[ImportanceMatrix], names: Sequence[str] = ()) -> ImportanceMatrix:
    """One matrix of all tokens: sums and counts are added. `names` are the files, for messages.

    Raises CheckpointError for matrices of different models; only the output head may be absent from some.
    """
    names = names or [f"imatrix {index + 1}" for index in range(len(matrices))]
    first = matrices[0]
    for name, matrix in zip(names[1:], matrices[1:], strict=True):
        apart = sorted(set(first.entries) ^ set(matrix.entries))
        apart = [tensor for tensor in apart if tensor not in HEAD_NAMES]
        if apart:
            raise CheckpointError(
                f"{name} and {names[0]} are of different models: only one of the two has {_some(apart)}",
                "merge files of one model",
            )
    every = sorted({tensor for matrix in matrices for tensor in matrix.entries})
    entries = {
        tensor: _merged(tensor, [matrix.entries[tensor] for matrix in matrices if tensor in matrix.entries])
        for tensor in every
    }
    datasets = tuple(dict.fromkeys(dataset for matrix in matrices for dataset in matrix.datasets))
    chunk_tokens = next((matrix.chunk_tokens for matrix in matrices if matrix.chunk_tokens), 0)
    tokens = sum(matrix.chunks * (matrix.chunk_tokens or chunk_tokens) for matrix in matrices)
    chunks = tokens // chunk_tokens if chunk_tokens else sum(matrix.chunks for matrix in matrices)
    return ImportanceMatrix(entries, datasets, chunks, chunk_tokens)


def _merged(name: str, entries: list[ImportanceEntry]) -> ImportanceEntry:
    widest = max(entries, key=lambda entry: len(entry.counts))
    experts, columns = widest.sums.shape
    alike = [fitted(entry, name, (experts, 1, columns), "another of the files") for entry in entries]
    sums = reduce(torch.add, (entry.sums.double() for entry in alike))
    return ImportanceEntry.of_sums(sums, reduce(torch.add, (entry.counts for entry in alike)))


def _last_block(names: Mapping[str, object]) -> int:
    return max((int(match[1]) for name in names if (match := _BLOCK.match(name))), default=-1)


def _sizes(experts: int, columns: int) -> str:
    return f"{columns} channels" if experts == 1 else f"{experts} experts of {columns} channels"


def _experts(experts: tuple[int, ...], of: int) -> str:
    if of == 1:
        return "any channel"
    return f"expert{'s' * (len(experts) > 1)} {_some([str(expert) for expert in experts], 8)}"


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class _PromisedMatrix(ImportanceMatrix):
    """Stands for the matrix that a run would measure: every tensor has an entry, without values."""

    def importance(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        entry = self.entries.get(name)
        return None if entry is None else entry.sums


def promised_matrix(
    shapes: Mapping[str, Sequence[int]], dataset: str, windows: int, window_tokens: int
) -> ImportanceMatrix:
    """A matrix with the names and widths of one that is to be measured; it takes no memory."""
    entries = {
        name: ImportanceEntry(torch.ones(1, 1).expand(math.prod(shape[:-2]), shape[-1]),
                              torch.ones(math.prod(shape[:-2]), dtype=torch.int64))
        for name, shape in sorted(shapes.items())
    }  # fmt: skip
    return _PromisedMatrix(entries, (dataset,), windows, window_tokens)


@dataclass(frozen=True)
class Statistics:
    """Of one tensor. experts: their number; unseen: the numbers of those that no token reached"""

    name: str
    channels: int
    tokens: int
    total: float
    mean: float
    smallest: float
    largest: float
    top_share: float
    entropy: float
    experts: int
    unseen: tuple[int, ...]


def statistics(matrix: ImportanceMatrix) -> list[Statistics]:
    """One row per tensor, in the order of blocks."""
    return [_of(name, matrix.entries[name]) for name in sorted(matrix.entries, key=_in_order)]


def _in_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    in_block = len(parts) > 1 and parts[0] == "blk" and parts[1].isdigit()
    return (int(parts[1]) if in_block else 1 << 30, name)


def _of(name: str, entry: ImportanceEntry) -> Statistics:
    values = (entry.sums.double() / entry.counts.clamp(min=1)[:, None])[entry.counts > 0].flatten()
    total = values.sum().item()
    shares = values / total if total > 0 else values
    top = max(1, len(values) // 100)
    bits = -torch.special.xlogy(shares, shares).sum().item() / math.log(2)
    return Statistics(
        name=name,
        channels=entry.sums.shape[1],
        tokens=int(entry.counts.max()),
        total=total,
        mean=values.mean().item() if len(values) else 0.0,
        smallest=values.min().item() if len(values) else 0.0,
        largest=values.max().item() if len(values) else 0.0,
        top_share=shares.topk(min(top, len(shares))).values.sum().item(),
        entropy=bits / math.log2(len(values)) if len(values) > 1 else 1.0,
        experts=len(entry.counts),
        unseen=entry.unseen,
    )
