"""`Engine`: everything that lowbit knows about one engine.

    support   schemes, the devices they run on, and the compute dtype      `lowbit advise`
    memory    memory beside the weights, and layout of the KV cache        `lowbit estimate`, `lowbit advise`
    loading   its loader, as rules                                         `lowbit verify`
    serve     the command that loads a checkpoint                          advice and reports

Versions: vLLM 0.32, SGLang 0.5.23, TensorRT-LLM of autumn 2026, transformers 5.23, llama.cpp of autumn 2026.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from lowbit.architecture.shape import ModelShape
from lowbit.errors import UsageError
from lowbit.hardware import Device
from lowbit.registry import ENGINES, load
from lowbit.verification.result import Loading

Compute = Literal["16", "fp8", "int8", "fp4"]
Capability = tuple[int, int]
Suits = Literal["servers", "desktops", "training"]

MIB, GIB = 1 << 20, 1 << 30
SIXTEEN = "16 bits"  # the unquantized model, which every engine runs
DOUBLE_QUANT = ("NF4", "FP4")  # advised with quantized scales, as in QLoRA
ANY: Capability = (0, 0)
TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)
BELOW_ADA, BELOW_BLACKWELL, LATEST = (8, 8), (9, 9), (99, 0)
_TYPICAL_DEVICE = 80 * GIB


@dataclass(frozen=True)
class Support:
    """Schemes that an engine runs on some devices.

    schemes       names of schemes, or of GGUF file types
    compute       dtype of the matrix multiplication: "fp8", "int8", "fp4" natively, or "16" where weights are decoded
                  to 16 bits first (weight-only: fewer bytes, no faster arithmetic)
    format        `--format` of the checkpoint; None: lowbit writes no checkpoint that the engine loads this way
    source        documentation or source file that states it
    kinds         kinds of devices; least and most are compute capabilities of CUDA devices, both inclusive
    small_batch   weight-only kernels: number of sequences up to which memory bandwidth bounds a step. Beyond,
                  decoding the weights takes over, down to the speed of 16 bits
    fallback      True where the card has no arithmetic for the format and the engine decodes it instead (vLLM logs
                  this): FP8 on Ampere, FP4 before Blackwell
    method        `--method` that gives the scheme its expected quality
    finetune      True if adapters can be trained on it
    instead       where `format` is None: command of the engine's own tools
    """

    schemes: tuple[str, ...]
    compute: Compute
    format: str | None
    source: str
    kinds: tuple[str, ...] = ("cuda",)
    least: Capability = ANY
    most: Capability = LATEST
    small_batch: int | None = None
    fallback: bool = False
    method: str = "rtn"
    finetune: bool = False
    note: str = ""
    instead: str = ""


@dataclass(frozen=True)
class MemoryModel:
    """Memory of an engine beside the weights. All numbers are assumptions, stated in `assumptions`.

    prefill        (least bytes of the device, tokens in one pass of a prompt), largest first; empty: the whole prompt
                   in one pass
    logit_rows     rows of logits computed at once; None: one per sequence
    logit_bytes    bytes per logit, including the sampler's copies
    framework      bytes of the device's context, libraries and captured graphs
    share          default share of the device's memory; share_name: the engine's name for it
    cache_types    values of `--kv-cache`
    token_block    tokens per block of the cache
    bounds_windows True: the cache of a sliding layer holds its window and `slack_passes` passes of a prefill in
                   flight; False: it holds every token
    windows_of     model types whose windows it knows; None: all
    """

    prefill: tuple[tuple[int, int], ...]
    logit_rows: int | None
    logit_bytes: int
    framework: int
    share: float
    share_name: str
    cache_types: tuple[str, ...]
    assumptions: tuple[str, ...]
    token_block: int = 1
    bounds_windows: bool = True
    slack_passes: int = 0
    windows_of: tuple[str, ...] | None = None

    def pass_tokens(self, memory: int | None = None) -> int | None:
        """Largest number of tokens in one pass of a prompt, for a device with `memory` bytes; None: unbounded."""
        if not self.prefill:
            return None
        size = _TYPICAL_DEVICE if memory is None else memory
        return next(tokens for least, tokens in self.prefill if size >= least)

    def activations(self, shape: ModelShape, context: int, batch: int, memory: int | None = None) -> int:
        """Bytes of the activations of a forward pass.

            tokens · (2 hidden + 3 MLP columns) · 2 bytes   residual, input; gate, up and their product
            rows · vocabulary · logit_bytes                 logits

        tokens is the size of a pass, which engines reserve at start-up whatever the prompts are.

        context, batch  tokens of a sequence, and number of sequences
        memory          bytes of the device, by which engines choose the size of a pass
        """
        tokens = self.pass_tokens(memory)
        tokens = context * batch if tokens is None else tokens
        rows = batch if self.logit_rows is None else self.logit_rows
        return tokens * (2 * shape.hidden + 3 * shape.widest_mlp) * 2 + rows * shape.vocab * self.logit_bytes

    def cached_tokens(self, shape: ModelShape, window: int, memory: int | None = None) -> int | None:
        """Largest number of cached tokens of a layer with a window; None: all."""
        if not self.bounds_windows or (self.windows_of is not None and shape.model_type not in self.windows_of):
            return None
        return window + self.slack_passes * (self.pass_tokens(memory) or 0)

    def usable(self, memory: int, device: Device | None = None) -> int:
        """Bytes of a device's memory that the engine uses, less what the system keeps."""
        return int(memory * min(self.share, 1.0 if device is None else device.usable_share))


@dataclass(frozen=True)
class Engine:
    """
    name      value of `--engine`; label: the project's own spelling
    kinds     kinds of devices that it runs on
    support   the first row for a scheme and a device counts
    serve     command that loads the checkpoint {output}; serve_load is appended for {batch} sequences of {context}
              tokens, {tokens} in all; serve_fp8_cache for an FP8 cache
    train     command that loads it to train adapters
    serves    True if `serve` starts a server, which reports then show
    batch     typical number of sequences at once
    suits     use for which it is the default engine
    """

    name: str
    label: str
    kinds: tuple[str, ...]
    support: tuple[Support, ...]
    memory: MemoryModel
    loading: Loading
    serve: str
    serve_load: str = ""
    serve_fp8_cache: str = ""
    train: str = ""
    serves: bool = True
    batch: int = 1
    suits: Suits | None = None

    def supported(self, device: Device) -> dict[str, Support]:
        """Scheme → support on `device`; UsageError where the engine does not run on such a device."""
        if device.kind not in self.kinds:
            others = [name for name, place in ENGINES.items() if device.kind in load(place).kinds]
            raise UsageError(f"{self.name} does not run on {device.label} ({device.kind})",
                             f"try {' or '.join(others)}")  # fmt: skip
        schemes: dict[str, Support] = {}
        for row in self.support:
            capability = device.compute_capability
            if device.kind in row.kinds and (capability is None or row.least <= capability <= row.most):
                for scheme in row.schemes:
                    schemes.setdefault(scheme, row)
        return schemes

    def left_out(self, device: Device) -> list[str]:
        """Schemes that the engine runs on other devices only."""
        anywhere = dict.fromkeys(scheme for row in self.support for scheme in row.schemes)
        return [scheme for scheme in anywhere if scheme not in self.supported(device)]

    @property
    def trains(self) -> bool:
        """True if adapters can be trained on some scheme."""
        return any(row.finetune for row in self.support)

    def serve_line(
        self, output: str, context: int | None = None, batch: int = 1, fp8_cache: bool = False
    ) -> str:  # fmt: skip
        """The command that loads a checkpoint, for sequences of `context` tokens if given."""
        line = self.serve.format(output=shlex.quote(output))
        if context is not None:
            line += self.serve_load.format(context=context, batch=batch, tokens=context * batch)
        return line + self.serve_fp8_cache if fp8_cache else line
