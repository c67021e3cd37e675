"""The result of an estimate: `Estimate`, of plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Files:
    """The output files.

    bytes    of the weight files, headers included
    decoder_bits_per_weight   of the linears of the decoder blocks, scales included
    file_bits_per_weight      of everything in the files
    source_bytes              of the weights that are read
    exact    False if shapes or a part of the header are estimated, with a note
    """

    format: str
    scheme: str
    method: str
    bytes: int
    decoder_bits_per_weight: float
    file_bits_per_weight: float
    weights: int
    source_bytes: int
    exact: bool


@dataclass(frozen=True)
class Cache:
    """The KV cache.

    type, bits       of a cached value, block scales included
    bytes_per_token  of a token that every layer keeps
    bytes_per_token_at_context  of one more token behind `context` tokens: full windows grow no more
    sequence_bytes   of a sequence of `context` tokens
    layers, bounded_layers   and how many of them keep a window only
    """

    type: str
    bits: float
    bytes_per_token: float
    bytes_per_token_at_context: float
    sequence_bytes: int
    layers: int
    bounded_layers: int


@dataclass(frozen=True)
class Serving:
    """Memory of the device while `batch` sequences of `context` tokens are served."""

    engine: str
    context: int
    batch: int
    weights: int
    kv_cache: int
    activations: int
    framework: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.framework


@dataclass(frozen=True)
class DeviceFit:
    """Whether that fits a device.

    memory, usable    of the device, and what the engine takes of it
    largest_context   for the batch asked for, in tokens; 0 where not even one fits
    largest_batch     for the context asked for, in sequences; 0 likewise
    verdict           the same in a sentence
    hint              what would fit, where this does not
    """

    device: str
    memory: int
    usable: int
    fits: bool
    largest_context: int
    largest_batch: int
    verdict: str
    hint: str = ""


@dataclass(frozen=True)
class Run:
    """The quantization itself on this machine.

    disk            bytes of the files, and of temporary files during the run
    peak_memory     bytes, the sum of `memory`
    memory          part → bytes
    seconds         (least, most); by kind of work in `work`, in the middle of the range
    """

    disk: int
    peak_memory: int
    memory: dict[str, int]
    seconds: tuple[float, float]
    work: dict[str, float]
    threads: int


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes, times in seconds. cache and serving are None if config.json says too little."""

    model: str
    model_type: str
    files: Files
    cache: Cache | None
    serving: Serving | None
    fit: DeviceFit | None
    run: Run
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        if self.serving is not None:
            values["serving"]["total"] = self.serving.total
        for name in ("assumptions", "notes"):
            values[name] = list(values[name])
        values["run"]["seconds"] = list(self.run.seconds)
        return values
