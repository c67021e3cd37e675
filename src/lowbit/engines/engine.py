"""`Engine`: everything that lowbit knows about one engine.

    support   schemes, the devices they run on, and the compute dtype      `lowbit advise`
    memory    memory beside the weights, and layout of the KV cache        `lowbit estimate`, `lowbit advise`
    loading   its loader, as rules                                         `lowbit verify`
    serve     the command that loads a checkpoint                          advice and reports

Versions: vLLM 0.32, SGLang 0.5.23, TensorRT-LLM of autumn 2026, LMDeploy 0.16, TGI 3.3,
transformers 5.23, llama.cpp of autumn 2026.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
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
# How an engine uses several cards: "tensor": each multiplies a part of every matrix; "layers": each holds some layers,
# and a token passes through one card after the other.
Sharing = Literal["tensor", "layers"]

MIB, GIB = 1 << 20, 1 << 30
SIXTEEN = "16 bits"  # the unquantized model, which every engine runs
DOUBLE_QUANT = ("NF4", "FP4")  # advised with quantized scales, as in QLoRA
ANY: Capability = (0, 0)
TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)
BELOW_ADA, BELOW_BLACKWELL, LATEST = (8, 8), (9, 9), (99, 0)
_TYPICAL_DEVICE = 80 * GIB
_WITH_SINKS = ("gpt_oss",)  # models whose attention has sinks


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
    converts      True where the kernel converts weights to the dtype of its arithmetic as it multiplies (FP8
                  activations over 4-bit integers), which costs some of that arithmetic
    method        `--method` that gives the scheme its expected quality
    group_size    `--group-size` that the loader asks for; None: the scheme's
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
    converts: bool = False
    method: str = "rtn"
    group_size: int | None = None
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
    fp8_below_ada  head_dims for which a backend reads an FP8 cache on cards without FP8 (below compute capability 8.9),
                   where neither latent attention nor attention sinks do; None: every model
    fp8_below_ada_source  where that is stated
    fp8_on_cpu     what speaks against an FP8 cache on a CPU, where the engine has one
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
    fp8_below_ada: tuple[int, ...] | None = None
    fp8_below_ada_source: str = ""
    fp8_on_cpu: str = ""

    def pass_tokens(self, memory: int | None = None) -> int | None:
        """Largest number of tokens in one pass of a prompt, for a device with `memory` bytes; None: unbounded."""
        if not self.prefill:
            return None
        size = _TYPICAL_DEVICE if memory is None else memory
        return next(tokens for least, tokens in self.prefill if size >= least)

    def keeps_fp8_cache(self, shape: ModelShape, device: Device) -> str | None:
        """Why an FP8 cache is not possible for a model on a device; None where it is."""
        if "fp8" not in self.cache_types or device.kind not in ("cuda", "rocm"):
            return (device.kind == "cpu" and self.fp8_on_cpu) or f"no FP8 cache on {device.kind} devices"
        capability = device.compute_capability
        if capability is None or capability >= ADA or self.fp8_below_ada is None:
            return None
        sinks = shape.model_type in _WITH_SINKS
        if capability < AMPERE or shape.is_latent or sinks or shape.head_dim not in self.fp8_below_ada:
            what = ("latent attention" if shape.is_latent else "attention sinks" if sinks
                    else f"heads of {shape.head_dim}")  # fmt: skip
            return f"no backend keeps an FP8 cache for {what} on {device.label} ({self.fp8_below_ada_source})"
        return None

    def activations(
        self, shape: ModelShape, context: int, batch: int, memory: int | None = None, ranks: int = 1
    ) -> int:
        """Bytes of the activations of a forward pass on one card.

            tokens · (2 hidden + 3 MLP columns / ranks) · 2 bytes   residual, input; gate, up and their product
            rows · vocabulary · logit_bytes                         logits

        tokens is the size of a pass, which engines reserve at start-up whatever the prompts are.

        context, batch  tokens of a sequence, and number of sequences
        memory          bytes of the device, by which engines choose the size of a pass
        ranks           cards that divide every matrix among them
        """
        tokens = self.pass_tokens(memory)
        tokens = context * batch if tokens is None else tokens
        rows = batch if self.logit_rows is None else self.logit_rows
        columns = -(-shape.widest_mlp // ranks)
        return tokens * (2 * shape.hidden + 3 * columns) * 2 + rows * shape.vocab * self.logit_bytes

    def cached_tokens(self, shape: ModelShape, window: int, memory: int | None = None) -> int | None:
        """Largest number of cached tokens of a layer with a window; None: all."""
        if not self.bounds_windows or (self.windows_of is not None and shape.model_type not in self.windows_of):
            return None
        return window + self.slack_passes * (self.pass_tokens(memory) or 0)

    def usable(self, memory: int, device: Device | None = None) -> int:
        """Bytes of a device's memory that the engine uses, less what the system keeps; of several, of all together."""
        return int(memory * min(self.share, 1.0 if device is None else device.usable_share))


@dataclass(frozen=True)
class Engine:
    """
    name      value of `--engine`; label: the project's own spelling
    kinds     kinds of devices that it runs on
    support   the first row for a scheme and a device counts
    serve     command that loads the checkpoint {output}; serve_load is appended for {batch} sequences of {context}
              tokens, {tokens} in all; serve_fp8_cache for an FP8 cache, serve_cache for one of {keys} and {values},
              serve_skip for {layers} whose cache stays in 16 bits, serve_ranks for {ranks} cards
    sharing   how it uses several cards
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
    serve_cache: str = ""
    serve_skip: str = ""
    serve_ranks: str = ""
    sharing: Sharing = "layers"
    train: str = ""
    serves: bool = True
    batch: int = 1
    suits: Suits | None = None

    def supported(self, device: Device) -> dict[str, Support]:
        """Scheme → support on `device`; UsageError where the engine does not run on such a device."""
        if device.kind not in self.kinds:
            others = [name for name, place in ENGINES.items() if device.kind in load(place).kinds]
            raise UsageError(f"{self.name} does not run on {device.label} ({device.kind})",
                             f"try {' or '.join(others)}" if others else
                             "lowbit knows no engine's kernels there; lowbit estimate counts the memory")  # fmt: skip
        schemes: dict[str, Support] = {}
        for row in self.support:
            capability = device.compute_capability
            if device.kind == "rocm" and device.name != "this" and row.compute != "16" and not device.has(row.compute):
                continue  # MI250 has no FP8; a measured card says too little of itself
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

    def serve_with_cache(self, output: str, keys: str, values: str, skip: Sequence[int] = ()) -> str | None:
        """The command that loads a checkpoint with a cache of these types, in the engine's spelling, but for layers
        whose cache stays in 16 bits; None where the engine has no such options."""
        if not self.serve_cache or (skip and not self.serve_skip):
            return None
        line = self.serve_line(output) + self.serve_cache.format(keys=keys, values=values)
        return line + self.serve_skip.format(layers=" ".join(map(str, skip))) if skip else line

    def refuse_ranks(self, shape: ModelShape, device: Device) -> None:
        """UsageError where the heads of a model cannot be divided among the cards."""
        count = device.count
        if self.sharing == "tensor" and shape.heads % count:
            fitting = [str(size) for size in range(1, 17) if shape.heads % size == 0]
            raise UsageError(f"{self.name} divides the {shape.heads} heads of every layer among the cards, and {count} "
                             f"does not divide them", f"cards that do: {', '.join(fitting)}")  # fmt: skip
        if self.sharing == "layers" and count > shape.layers:
            raise UsageError(f"{self.name} gives whole layers to the cards; {shape.layers} are fewer than {count}")

    def serve_line(
        self, output: str, context: int | None = None, batch: int = 1, fp8_cache: bool = False, ranks: int = 1
    ) -> str:  # fmt: skip
        """The command that loads a checkpoint, for sequences of `context` tokens if given, on `ranks` cards."""
        line = self.serve.format(output=shlex.quote(output))
        if context is not None:
            line += self.serve_load.format(context=context, batch=batch, tokens=context * batch)
        line += self.serve_fp8_cache if fp8_cache else ""
        return line + self.serve_ranks.format(ranks=ranks) if ranks > 1 else line
