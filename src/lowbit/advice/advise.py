"""`lowbit.advise`: every scheme that the engine runs on the device, with memory, speed and expected loss, ranked.

    lowbit.engines      which schemes run here, and what they compute in
    lowbit.estimation   bytes of the weights, of the KV cache, and of what the engine needs beside them
    roofline.py         tokens per second from those
    quality.py          what a scheme is expected to lose, with the source
    score.py            one number from all of it, by goal and workload

No rule ties a scheme to a device: the order follows from the tables. Beside each scheme stands the command line that
writes the checkpoint; `Engine.serve_line` gives the one that serves it.

A scheme whose files `lowbit verify` would refuse is not advised (judge.py). Where groups are too wide for the cards
that divide every matrix, smaller ones are tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from lowbit.advice.judge import why_refused, why_shape_refused
from lowbit.advice.measured import MeasuredSpeed, measured_here
from lowbit.advice.quality import Expectation, expected, fp8_cache_loss
from lowbit.advice.result import Advice, Memory, Option, reason_for
from lowbit.advice.roofline import ASSUMPTIONS, Load, Speed, speed
from lowbit.advice.score import Goal, Ratios, Workload, find_goal, find_workload, score
from lowbit.architecture.shape import ModelShape, shape_of
from lowbit.checkpoint.base import OpenOptions
from lowbit.engines import Engine, engine_for, find_engine
from lowbit.engines.engine import DOUBLE_QUANT, SIXTEEN, Support
from lowbit.errors import ArchitectureError, FormatError, LowbitError, UsageError
from lowbit.estimation.footprint import Footprint, active_weights, footprint
from lowbit.estimation.serving import ADAPTER_RANK, Deployment, deploy, refuse_absurd_load, training_bytes
from lowbit.estimation.weights import ModelHeaders, open_headers, plan_of
from lowbit.hardware import Device, find_device
from lowbit.hardware.table import PRICE_SOURCE, PRICES
from lowbit.knobs import Facts, command_line
from lowbit.registry import FORMATS
from lowbit.schemes import is_gguf_name
from lowbit.settings import MEASURE, Settings, facts_of, make_settings

DEFAULT_CONTEXT = 2048
_SMALL_MODEL = 4.0  # billions of weights, below which figures of 8B models are too kind
_SMALLER_GROUPS = (64, 32)  # that kernels of 4 and 8 bits take
# Without MODEL: the shape of Llama 3.1 8B.
GENERIC = ModelShape("llama", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
                     vocab=128256, max_positions=131072)  # fmt: skip
GENERIC_NAME = "a model of Llama 3.1 8B's shape (no MODEL was given)"


@dataclass(frozen=True)
class _Model:
    """
    name     as typed by the user, or a description
    path     argument of `lowbit quantize`; None without a model
    headers  for planning its files; None if only the shape is known
    notes    on how the headers were read
    """

    name: str
    shape: ModelShape
    path: str | None = None
    headers: ModelHeaders | None = None
    options: OpenOptions = field(default_factory=OpenOptions)
    notes: tuple[str, ...] = ()

    @property
    def billions(self) -> float:
        """Billions of weights, embeddings included."""
        return footprint(self.shape, SIXTEEN).total / 2e9

    def weights(self, scheme: str, settings: dict[str, Any] | None, judge: tuple[Engine, int] | None) -> Footprint:
        """The bytes in a scheme: of the files that `lowbit quantize` would write with these settings if the headers are
        known, else from the shape. Raises the errors of planning: FormatError, ShapeError, ArchitectureError,
        UsageError; and FormatError for files that `lowbit verify` would refuse.

        judge  the engine, and the cards that divide every matrix; None: it has taken this scheme before
        """
        by_shape = footprint(self.shape, scheme, (settings or {}).get("group_size"))
        if settings is None:
            return by_shape
        if self.headers is None:
            refusal = None if judge is None or is_gguf_name(scheme) else why_shape_refused(self.shape, settings, *judge)
            if refusal is not None:
                raise FormatError(refusal)
            return by_shape
        prepared, _ = plan_of(self.headers, make_settings(None, **settings), self.options)
        try:
            refusal = None if judge is None else why_refused(prepared, judge[0], self.options, judge[1])
            if refusal is not None:
                raise FormatError(refusal)
            return by_shape.scaled(prepared.plan.file_bytes + self.headers.guessed_bytes(prepared))
        finally:
            prepared.checkpoint.close()


@dataclass(frozen=True)
class _Question:
    """The resolved arguments of `advise`. sixteen: the model in 16 bits, the basis of all comparisons."""

    model: _Model
    device: Device
    engine: Engine
    goal: Goal
    workload: Workload
    load: Load
    kv_cache: str
    price: float | None

    @property
    def finetune(self) -> bool:
        return self.workload.name == "finetune"

    @property
    def ranks(self) -> int:
        """Cards that divide every matrix among them."""
        return self.device.count if self.engine.sharing == "tensor" else 1

    @property
    def sixteen(self) -> Footprint:
        return footprint(self.model.shape, SIXTEEN)

    def memory(self, weights: Footprint, fp8_cache: bool) -> Memory:
        """Memory as in `lowbit estimate`; for fine-tuning, with adapters and optimizer."""
        shape, load, device = self.model.shape, self.load, self.device
        total, usable = round(weights.total), self.engine.memory.usable(device.memory_bytes * device.count, device)
        if self.finetune:
            return Memory(total, 0, training_bytes(shape, load.context, load.batch), usable)
        serving = self.deployed(total, fp8_cache).serving(load.context, load.batch)
        return Memory(total, serving.kv_cache, serving.activations + serving.framework, usable)

    def speed(self, weights: Footprint, how: Support | None, fp8_cache: bool) -> Speed:
        """Speed with half-full caches, the average."""
        shape, device = self.model.shape, self.device
        half = Load(self.load.batch, max(1, self.load.context // 2), self.load.prompt)
        deployed = self.deployed(0, fp8_cache)
        pass_tokens = self.engine.memory.pass_tokens(device.memory_bytes)
        return speed(shape, weights, self.sixteen, deployed.sequence_bytes(half.context), how, device, half,
                     deployed.ranks, pass_tokens)  # fmt: skip

    def deployed(self, weights: int, fp8_cache: bool) -> Deployment:
        kv_cache, device = "fp8" if fp8_cache else "auto", self.device
        return deploy(self.engine, self.model.shape, weights, kv_cache, device.memory_bytes, device.count)


def advise(
    model: str | Path | ModelShape | dict[str, Any] | None = None,
    *,
    hardware: str | Device = "this",
    engine: str | None = None,
    goal: str | None = None,
    workload: str | None = None,
    context: int = DEFAULT_CONTEXT,
    batch: int | None = None,
    kv_cache: str = "auto",
    memory: int | None = None,
    price: float | None = None,
    options: OpenOptions | None = None,
) -> Advice:
    """Rank the schemes to quantize to, with reasons.

    model      as `lowbit quantize` takes it (of a Hugging Face id only headers are fetched), a parsed config.json, or
               None for the shape of Llama 3.1 8B
    hardware   a row of `lowbit.hardware.DEVICES` in any spelling, several of them ("2xA100"), "this", or a Device
    engine     vllm, sglang, tensorrt-llm, llama.cpp, transformers; None: the usual one for the device
    goal       balanced (None), quality, speed, memory: `lowbit.advice.score.GOALS`
    workload   chat, serve, decode, prefill, finetune; None: serve with an engine that serves many, else chat
    context    tokens of a sequence at its end; caches are half full on average, and prompts are half as long
    batch      sequences at once; None: typical of the engine, 8 or 1
    kv_cache   "auto": 16 bits or FP8, whichever scores better; "fp8" or "bf16": only that
    memory     bytes of one card, instead of the table's
    price      dollars per hour of one card; None: what `lowbit.hardware.table.PRICES` has for it, if anything

    UsageError for unknown or incompatible arguments, and the errors of opening the model.
    """
    _check(context, batch, kv_cache, price)
    if memory is not None and memory < 1:
        raise UsageError(f"a memory of {memory} bytes holds no model", "give that of one card, such as 16GiB")
    device = find_device(hardware) if isinstance(hardware, str) else hardware
    device = device if memory is None else replace(device, memory_bytes=memory)
    finetune = workload == "finetune"
    chosen = engine_for(device, finetune) if engine is None else find_engine(engine)
    if finetune and not chosen.trains:
        raise UsageError(f"{chosen.name} does not train adapters", "leave --engine out: transformers does, with peft")
    load = Load(batch or chosen.batch, context, max(1, context // 2))
    price = PRICES.get(device.name) if price is None else price
    with _open(model, options or OpenOptions()) as about:
        chosen.refuse_ranks(about.shape, device)
        asked = _Question(about, device, chosen, find_goal(goal),
                          find_workload(workload or ("serve" if chosen.batch > 1 else "chat")), load, kv_cache,
                          price)  # fmt: skip
        why = chosen.memory.keeps_fp8_cache(about.shape, device) if kv_cache == "fp8" else None
        if kv_cache == "fp8" and (why or finetune):
            raise UsageError(f"--kv-cache fp8: {why or 'adapters are trained without one'}", "leave --kv-cache out")
        options_found, without = _options(asked)
        return Advice(
            about.name, about.billions, active_weights(about.shape) / 1e9, device, chosen.name, asked.goal,
            asked.workload, load, tuple(sorted(options_found, key=_rank)), without, _assumptions(asked, options_found),
            (*about.notes, *_notes(asked)), price, _measured(asked),
        )  # fmt: skip


@contextmanager
def _open(model: str | Path | ModelShape | dict[str, Any] | None, options: OpenOptions) -> Iterator[_Model]:
    """A folder, a .gguf file, a Hugging Face id (headers only), demo:…, a parsed config.json, a shape, or None."""
    if model is None or isinstance(model, ModelShape):
        name = GENERIC_NAME if model is None else f"a model of {model.hidden} × {model.layers}"
        yield _Model(name, model or GENERIC)
        return
    with ExitStack() as stack:
        try:
            headers = stack.enter_context(open_headers(model, options))
        except ArchitectureError:
            if not isinstance(model, dict):
                raise
            headers = None  # transformers does not know the model type; config.json may still give the shape
        if isinstance(model, dict):
            yield _Model(str(model.get("model_type", "a config.json")), shape_of(model), None, headers, options)
        elif headers is None or not headers.config:
            raise UsageError(
                f"{model}: the model's shape is unknown", "give the Hugging Face model that it was made from"
            )
        else:
            yield _Model(headers.name, shape_of(headers.config), str(model), headers, options, headers.notes)


def _check(context: int, batch: int | None, kv_cache: str, price: float | None) -> None:
    refuse_absurd_load(context, batch, least=2)
    if kv_cache not in ("auto", "fp8", "bf16"):
        raise UsageError(f"there is no KV cache {kv_cache!r}", "choose auto, fp8 or bf16")
    if price is not None and not 0 < price < math.inf:
        raise UsageError(f"a price of {price} dollars per hour is not one", "leave --price out")


def _options(asked: _Question) -> tuple[list[Option], dict[str, str]]:
    """(every option, scheme left out → reason)."""
    options: list[Option] = []
    without = dict.fromkeys(asked.engine.left_out(asked.device), f"{asked.engine.name} has no kernel for it here")
    basis = asked.speed(asked.sixteen, None, False)
    candidates: dict[str, Support | None] = {SIXTEEN: None, **asked.engine.supported(asked.device)}
    for scheme, how in candidates.items():
        expectation = expected(scheme, asked.finetune)
        if asked.finetune and not (how is None or how.finetune):
            without[scheme] = "adapters are not trained on it"
        elif expectation is None:
            without[scheme] = "no figure of its quality is known"
        else:
            for tried in (how, *_with_smaller_groups(asked, scheme, how)):
                try:
                    options += [_option(asked, scheme, tried, expectation, basis, fp8, first=place == 0)
                                for place, fp8 in enumerate(_caches(asked, tried))]  # fmt: skip
                    without.pop(scheme, None)
                    break
                except LowbitError as error:
                    without.setdefault(scheme, str(error))
    return options, without


def _with_smaller_groups(asked: _Question, scheme: str, how: Support | None) -> list[Support]:
    """The same support in smaller groups, which more cards can split; none for a single card."""
    if asked.ranks == 1 or how is None or how.format is None or how.group_size is not None or is_gguf_name(scheme):
        return []
    stated = make_settings(None, scheme=scheme).base_scheme().weight
    size = stated.group_size if stated.group_size_is_free else None
    return [replace(how, group_size=smaller) for smaller in _SMALLER_GROUPS if size is not None and smaller < size]


def _caches(asked: _Question, how: Support | None) -> list[bool]:
    """The choices of an FP8 KV cache to try."""
    possible = asked.engine.memory.keeps_fp8_cache(asked.model.shape, asked.device) is None and not asked.finetune
    if asked.kv_cache == "bf16" or not possible or how is None or not FORMATS[how.format or "float"].kv_cache:
        return [False]
    return [True] if asked.kv_cache == "fp8" else [False, True]


def _option(
    asked: _Question, scheme: str, how: Support | None, expectation: Expectation, basis: Speed, fp8_cache: bool,
    first: bool,
) -> Option:  # fmt: skip
    about, load, engine = asked.model, asked.load, asked.engine
    settings = None
    if how is not None and how.format is not None:
        settings = quantize_settings(scheme, how, fp8_cache, about.shape.max_positions)
    weights = about.weights(scheme, settings, (engine, asked.ranks) if first else None)
    reached = asked.speed(weights, how, fp8_cache)
    memory, whole = asked.memory(weights, fp8_cache), asked.memory(asked.sixteen, False)
    ratios = Ratios(reached.decode / basis.decode, reached.prefill / basis.prefill, whole.chosen / memory.chosen)
    cache_loss = fp8_cache_loss().percent if fp8_cache else 0.0
    loss = expectation.loss + cache_loss
    output = quantize = serve = None
    if settings is not None:
        output = output_name(about.path, scheme, fp8_cache)
        quantize = quantize_line(about.path, output, settings)
        if asked.finetune:
            serve = engine.train.format(output=output)
        else:
            serve = engine.serve_line(output, load.context, load.batch, fp8_cache, asked.device.count)
    price = asked.price
    per_million = None if price is None else price * asked.device.count / 3600 * 1e6  # dollars · tokens/s
    return Option(
        scheme, how, fp8_cache, memory, reached, expectation, ratios, loss,
        score(ratios, expectation.loss, asked.goal, asked.workload, expectation.scaled_from is not None, cache_loss,
              fp8_cache),
        reason_for(asked.device, how, memory, ratios, reached, loss, fp8_cache),
        output, settings, quantize, serve, how.instead if how is not None and how.format is None else None,
        None if per_million is None else per_million / reached.decode_all,
        None if per_million is None else per_million / reached.prefill,
    )  # fmt: skip


def _rank(option: Option) -> tuple[bool, float]:
    """Sort key: options that fit, by score; then the others, smallest first."""
    fits = option.memory.fits
    return (not fits, -option.score if fits else float(option.memory.total))


def _measured(asked: _Question) -> tuple[MeasuredSpeed, ...]:
    if asked.device.name != "this" or asked.model.path is None:
        return ()
    return tuple(measured_here(asked.model.path, asked.engine.name, asked.load.prompt, asked.load.batch))


def _assumptions(asked: _Question, options: list[Option]) -> tuple[str, ...]:
    lines = [*ASSUMPTIONS, f"caches are half full on average and prompts {asked.load.prompt} tokens long"]
    if any(option.fp8_cache for option in options):
        lines.append(f"an FP8 cache with stored scales costs what was {fp8_cache_loss().says}")
    if asked.price is not None:
        stated = PRICES.get(asked.device.name) == asked.price
        lines.append(f"{asked.price:g} dollars an hour and card" + (f": {PRICE_SOURCE}" if stated else ""))
    if asked.device.count > 1 and asked.ranks > 1:
        link = f"{asked.device.link / 1e9:.3g} GB/s one way"
        kind = "direct links" if asked.device.direct else "PCI Express 4.0"
        lines.append(f"{asked.ranks} cards divide every matrix (tensor parallelism) and add up their parts over {kind} "
                     f"of {link}, twice a layer")  # fmt: skip
    elif asked.device.count > 1:
        lines.append(f"{asked.device.count} cards hold whole layers and work one after the other: memory adds up, the "
                     f"speed of one sequence is that of one card")  # fmt: skip
    if asked.finetune:
        lines.append(f"adapters of rank {ADAPTER_RANK} on every linear, with gradient checkpoints")
    return (*lines, *(asked.engine.memory.assumptions if not asked.finetune else ()))


def _notes(asked: _Question) -> tuple[str, ...]:
    notes = []
    if asked.model.billions < _SMALL_MODEL:
        notes.append(f"expected losses are of models of 8 billion weights; one of {asked.model.billions:.2g} billion "
                     f"loses more, at 4 bits several times as much: evaluate what you make")  # fmt: skip
    longest = asked.model.shape.max_positions
    if longest is not None and asked.load.context > longest:
        notes.append(f"the model was made for {longest} tokens; {asked.load.context} were asked about")
    if asked.device.note:
        notes.append(f"{asked.device.label}: {asked.device.note}")
    return tuple(notes)


PLACEHOLDER = "MODEL"
# Types whose expected quality (`lowbit.advice.quality`) was measured without an importance matrix.
_WITHOUT_IMATRIX = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_0")


def quantize_settings(scheme: str, how: Support, fp8_cache: bool, longest: int | None = None) -> dict[str, Any]:
    """The keyword arguments of `lowbit.quantize` for an option, without defaults.

    longest  context of the model in tokens, the limit of calibration windows
    """
    settings = _what(scheme, how, fp8_cache)
    facts = facts_of(make_settings(None, **settings), Facts(gguf=is_gguf_name(scheme)))
    reads_text = facts.reads_text or facts.measures
    if reads_text and longest is not None and longest < Settings().seqlen:
        settings["seqlen"] = longest
    return settings


def _what(scheme: str, how: Support, fp8_cache: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"scheme": scheme}
    if is_gguf_name(scheme):
        if scheme not in _WITHOUT_IMATRIX:
            settings["imatrix"] = MEASURE
        return settings
    if how.method != "rtn":
        settings["method"] = how.method
    if how.group_size is not None:
        settings["group_size"] = how.group_size
    if how.format not in ("compressed-tensors", "bitsandbytes"):
        settings["format"] = how.format
    if scheme in DOUBLE_QUANT:
        settings["double_quant"] = True
    if fp8_cache:
        settings["kv_cache"] = "fp8"
    return settings


def output_name(model: str | None, scheme: str, fp8_cache: bool = False) -> str:
    """Name of the output in the current folder: "Llama-3.1-8B-W4A16", "….gguf"."""
    stem = PLACEHOLDER.lower() if model is None else PurePath(model.removeprefix("demo:")).name.removesuffix(".gguf")
    return f"{stem}-{scheme}{'-fp8-cache' if fp8_cache else ''}{'.gguf' if is_gguf_name(scheme) else ''}"


def quantize_line(model: str | None, output: str, settings: dict[str, Any]) -> str:
    """ "lowbit quantize MODEL -o OUT --scheme …" of those settings."""
    return command_line("quantize", model or PLACEHOLDER, output, settings)
