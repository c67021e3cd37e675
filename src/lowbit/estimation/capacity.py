"""What fits a device: the memory of serving, the largest context and the largest batch.

    total(context, batch) = weights + batch · cache(context) + activations(context, batch) + framework
    fits                    total ≤ share · memory of the device

Both largest values are found by halving, since everything grows with context and with batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowbit.estimation.engines import Engine
from lowbit.estimation.kv_cache import KVCache
from lowbit.estimation.result import Fit, Serving
from lowbit.estimation.shapes import ModelShape

LONGEST = 1 << 24  # tokens and sequences that are tried at most where a model has no bound


@dataclass(frozen=True)
class Load:
    """A model in an engine. weights  bytes; memory  of the device, where it is known."""

    weights: int
    shape: ModelShape
    cache: KVCache
    engine: Engine
    memory: int | None = None

    def serving(self, context: int, batch: int) -> Serving:
        """Memory for `batch` sequences of `context` tokens."""
        return Serving(
            self.engine.name, context, batch, self.weights, batch * self.cache.sequence_bytes(context),
            self.engine.activations(self.shape, context, batch, self.memory), self.engine.framework,
        )  # fmt: skip

    def largest_context(self, usable: int, batch: int) -> int:
        """Tokens; the model's own bound where that is less."""
        bound = self.shape.max_positions or LONGEST
        return _largest(lambda context: self.serving(context, batch).total <= usable, bound)

    def largest_batch(self, usable: int, context: int) -> int:
        return _largest(lambda batch: self.serving(context, batch).total <= usable, LONGEST)


def fit_of(load: Load, device: str, memory: int, context: int, batch: int, weight_count: int) -> Fit:
    """Whether `batch` sequences of `context` tokens fit a device of so many bytes, in numbers and in a sentence.

    weight_count  of the whole model, to say what bits per weight would fit
    """
    usable = int(memory * load.engine.share)
    serving = load.serving(context, batch)
    longest, most = load.largest_context(usable, batch), load.largest_batch(usable, context)
    if serving.total <= usable:
        whole = longest == load.shape.max_positions
        verdict = (
            f"fits: {_tokens(longest)} of context{', all that the model has,' if whole else ''} at batch {batch}; at "
            f"most {most} sequence{'s' * (most != 1)} of {context} tokens"
        )
        return Fit(device, memory, usable, True, longest, most, verdict)
    short = serving.total - usable
    verdict = (
        f"does not fit: {gigabytes(serving.total)} are needed and {gigabytes(usable)} usable, "
        f"{gigabytes(short)} too much"
    )
    return Fit(
        device, memory, usable, False, longest, most, verdict, _hint(load, serving, usable, longest, weight_count)
    )


def _hint(load: Load, serving: Serving, usable: int, longest: int, weight_count: int) -> str:
    """What would fit."""
    ways = []
    if longest:
        ways.append(f"a context of {longest} tokens at batch {serving.batch}")
    single = load.serving(serving.context, 1)
    if serving.batch > 1 and single.total <= usable:
        ways.append(f"{load.largest_batch(usable, serving.context)} sequences of {serving.context} tokens")
    left = usable - (serving.total - serving.weights)
    bits = 8 * left / weight_count if weight_count else 0.0
    if bits >= 1.5:
        ways.append(f"files of at most {bits:.1f} bits per weight")
    if not ways:
        least = load.serving(1, 1)
        needed = gigabytes(least.total / load.engine.share)
        return f"nothing of this model in this scheme: one token needs a device of {needed}"
    return "would fit: " + "; or ".join(ways)


def gigabytes(count: float) -> str:
    """15200000000 → "15.20 GB"."""
    return f"{count / 1e9:.2f} GB"


def _tokens(count: int) -> str:
    """131072 → "128k tokens"."""
    return f"{count // 1024}k tokens" if count >= 1024 and count % 1024 == 0 else f"{count} tokens"


def _largest(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number up to `bound` that fits; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
