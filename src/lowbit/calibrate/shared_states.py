"""What a decoder block hands to later blocks beside the hidden states, in a mapping that all of them are given.

Gemma 3n and Gemma 4 compute keys and values in some blocks and read them again in the last ones. The model's own loop
makes one mapping for a forward pass. Here a block runs all windows before the next one does, so the entries are kept
for every window, and apart for the two streams of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lowbit.calibrate.stream_axes import of_some_windows
from lowbit.errors import ArchitectureError
from lowbit.measure import human_bytes


@dataclass(frozen=True)
class SharedMapping:
    """In place of a mapping among a block's arguments: which of the model's it is, and how to make an empty one."""

    number: int
    empty: Callable[[], MutableMapping[Any, Any]]


@dataclass(frozen=True)
class _KeptEntry:
    windows: slice
    value: Any


class SharedStates:
    """The entries of all mappings for every window.

    model  its name, for errors
    limit  bytes; ArchitectureError where the entries of all windows take more
    """

    def __init__(self, model: str, limit: int):
        self._model, self._limit = model, limit
        self._entries: dict[tuple[bool, int, Any], list[_KeptEntry]] = {}

    @contextmanager
    def given(self, arguments: Any, part: slice, other: bool) -> Iterator[Any]:
        """The arguments of a block for some windows, with mappings in their places; what the block puts into these is
        kept, even if an observer ends its run.

        other  of the stream that a copy of the block runs
        """
        mappings: dict[int, MutableMapping[Any, Any]] = {}

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, SharedMapping):
                return leaf
            if leaf.number not in mappings:
                mappings[leaf.number] = leaf.empty()
                mappings[leaf.number].update(self._known(leaf.number, part, other))
            return mappings[leaf.number]

        arguments = tree_map(made, arguments)
        before = {number: dict(mapping) for number, mapping in mappings.items()}
        try:
            yield arguments
        finally:
            for number, mapping in mappings.items():
                for key, value in mapping.items():
                    if value is not before[number].get(key):
                        self._keep((other, number, key), _KeptEntry(part, tree_map(_detached, value)))

    def _known(self, number: int, part: slice, other: bool) -> dict[Any, Any]:
        """Entries of some windows; the other stream reads those of this one where it has none of its own."""
        found: dict[Any, Any] = {}
        for (of_other, of, key), entries in sorted(self._entries.items(), key=lambda item: item[0][0]):
            if of == number and (other or not of_other):
                entry = next((each for each in entries if _covers(each.windows, part)), None)
                if entry is not None:
                    found[key] = _cut(entry, part)
        return found

    def _keep(self, place: tuple[bool, int, Any], entry: _KeptEntry) -> None:
        size = entry.windows.stop - entry.windows.start
        for leaf in tree_leaves(entry.value):
            if isinstance(leaf, Tensor) and (not leaf.dim() or len(leaf) != size):
                raise ArchitectureError(
                    f"a block of {self._model} hands later ones {place[2]} of shape {list(leaf.shape)}, whose axis 0 "
                    f"does not count its {size} windows",
                    "choose --method rtn",
                )
        others = [each for each in self._entries.get(place, ()) if not _covers(entry.windows, each.windows)]
        self._entries[place] = [entry, *others]
        needed = sum(leaf.nbytes for entries in self._entries.values() for each in entries
                     for leaf in tree_leaves(each.value) if isinstance(leaf, Tensor))  # fmt: skip
        if needed > self._limit:
            raise ArchitectureError(
                f"the blocks of {self._model} hand {human_bytes(needed)} to later ones for this text; "
                f"{human_bytes(self._limit)} are allowed",
                "give fewer --samples, a shorter --seqlen, or more --max-memory",
            )


def without_mappings(calls: Any) -> Any:
    """Arguments of blocks with a `SharedMapping` in place of every mapping."""
    numbers: dict[int, int] = {}

    def named(leaf: Any) -> Any:
        if not isinstance(leaf, MutableMapping):
            return leaf
        return SharedMapping(numbers.setdefault(id(leaf), len(numbers)), type(leaf))

    return tree_map(named, calls)


def _covers(windows: slice, part: slice) -> bool:
    return windows.start <= part.start and part.stop <= windows.stop


def _cut(entry: _KeptEntry, part: slice) -> Any:
    windows = entry.windows.stop - entry.windows.start
    within = slice(part.start - entry.windows.start, part.stop - entry.windows.start)
    return tree_map(lambda leaf: of_some_windows(leaf, 0, windows, within) if isinstance(leaf, Tensor) else leaf,
                    entry.value)  # fmt: skip


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
