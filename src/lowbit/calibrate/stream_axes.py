"""Where the hidden states of a model have their windows and tokens.

Nearly all have [windows, tokens, H]. XLNet has [tokens, windows, H], Gemma 3n four streams [4, windows, tokens, H],
ProphetNet three of them along the axis of tokens, [windows, 3 · tokens, H]. No table says which. A text of one window,
one of two and one that is shorter by a token are embedded: the axis of windows is the one that changes with their
number, that of tokens the one that changes with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import ArchitectureError
from lowbit.methods import RUNS_NO_TEXT

# Tokens of the texts that are compared, at most.
PROBE_TOKENS = 32


@dataclass(frozen=True)
class StreamAxes:
    """
    windows, tokens  axes of the hidden states
    streams          positions of the axis of tokens for each token, stream after stream
    inner            sizes of the other axes, of one token
    """

    windows: int
    tokens: int
    streams: int
    inner: tuple[int, ...]

    @property
    def usual(self) -> bool:
        """True for [windows, tokens, …]."""
        return (self.windows, self.tokens, self.streams) == (0, 1, 1)

    def flat(self, hidden: Tensor) -> Tensor:
        """[windows, tokens, width] of the model's hidden states, width being everything of one token."""
        hidden = hidden.movedim((self.windows, self.tokens), (0, 1))
        if self.streams > 1:
            hidden = hidden.unflatten(1, (self.streams, -1)).transpose(1, 2)
        return hidden.flatten(2)

    def unflat(self, values: Tensor) -> Tensor:
        """The model's hidden states of [windows, tokens, width]."""
        if self.streams > 1:
            values = values.unflatten(2, (self.streams, -1)).transpose(1, 2).flatten(1, 2)
        return values.unflatten(2, self.inner).movedim((0, 1), (self.windows, self.tokens))


def find_axes(model: str, shape_of: Callable[[Tensor], torch.Size], ids: Tensor) -> StreamAxes:
    """The axes of the hidden states that `shape_of` embeds token ids [windows, tokens] to.

    model  its name, for errors
    ids    any text of the model, int64 [windows, tokens]

    ArchitectureError, naming the axis, where no axis alone counts windows, or tokens.
    """
    tokens = min(ids.shape[1], PROBE_TOKENS)
    one = ids[:1, :tokens]
    other = one[:, :-1] if tokens > 1 else torch.cat([one, one], dim=1)
    shape, of_two, of_other = shape_of(one), shape_of(one.repeat(2, 1)), shape_of(other)
    windows, size = _counting(model, "windows", (1, shape), (2, of_two))
    if size != 1:
        raise _refused(
            model, f"axis {windows} counts windows and tokens in one: {_seen((1, shape), (2, of_two))} windows"
        )
    axis, streams = _counting(model, "tokens", (tokens, shape), (other.shape[1], of_other))
    inner = tuple(length for place, length in enumerate(shape) if place not in (windows, axis))
    return StreamAxes(windows, axis, streams, inner)


def _counting(model: str, what: str, one: tuple[int, torch.Size], other: tuple[int, torch.Size]) -> tuple[int, int]:
    """(the axis that counts something, positions for each); `one` and `other` are numbers of it with the shapes."""
    (number, shape), (another, others) = one, other
    seen = f"{_seen(one, other)} {what}"
    changed = [axis for axis, sizes in enumerate(zip(shape, others, strict=False)) if sizes[0] != sizes[1]]
    if len(shape) != len(others) or len(changed) > 1:
        raise _refused(model, f"more than one axis changes with the number of {what}: {seen}")
    if not changed:
        raise _refused(model, f"no axis changes with the number of {what}: {seen}")
    (axis,) = changed
    each = shape[axis] // number
    if (shape[axis], others[axis]) != (each * number, each * another):
        raise _refused(model, f"axis {axis} is no multiple of the {what}: {seen}")
    return axis, each


def _seen(*captured: tuple[int, torch.Size]) -> str:
    return " and ".join(f"{list(shape)} for {number}" for number, shape in captured)


def _refused(model: str, why: str) -> ArchitectureError:
    return ArchitectureError(f"the hidden states of {model} cannot be cut into windows of tokens: {why}", RUNS_NO_TEXT)


def axis_of_windows(one: torch.Size, two: torch.Size) -> int | None:
    """The axis in which shapes for one window and for two differ; None for what has no windows."""
    return next((axis for axis, sizes in enumerate(zip(one, two, strict=False)) if sizes[0] != sizes[1]), None)


def of_some_windows(value: Tensor, axis: int | None, windows: int, part: slice) -> Tensor:
    """The part of a value for `windows` windows that belongs to some of them."""
    if axis is None:
        return value
    each = value.shape[axis] // windows
    return value.narrow(axis, part.start * each, (part.stop - part.start) * each)


def shape_of_windows(shape: Sequence[int], axis: int, windows: int) -> list[int]:
    """The shape for some windows, of that for one."""
    return [size * windows if place == axis else size for place, size in enumerate(shape)]
