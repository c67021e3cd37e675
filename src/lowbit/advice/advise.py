"""`lowbit.advise`: every scheme that the engine runs on the device, with memory, speed and expected loss, ranked.

    engines.py      which schemes run here, and what they compute in
    footprint.py    how many bytes the weights take, and how many a step reads
    estimation      bytes of the KV cache, and what the engine needs beside it
    roofline.py     tokens per second from those
    quality.py      what a scheme is expected to lose, with the source
    score.py        one number from all of it, by goal and workload

Nothing here says which scheme suits which device: the order follows from the tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.advice.commands import output_name, quantize_line, quantize_settings, serve_line
from lowbit.advice.engines import (
    ENGINES,
    FP8_CACHE_ENGINES,
    FP8_CACHE_FORMATS,
    SIXTEEN,
    SUPPORT,
    Support,
    engine_for,
    left_out,
    supported,
)
from lowbit.advice.footprint import Footprint, footprint, matrices
from lowbit.advice.quality import FP8_CACHE_LOSS, FP8_CACHE_SOURCE, expected
from lowbit.advice.reasons import reason_for
from lowbit.advice.result import Advice, Memory, Option
from lowbit.advice.roofline import ASSUMPTIONS, USABLE_MEMORY, Load, Speed, speed
from lowbit.advice.score import Goal, Ratios, Workload, find_goal, find_workload, score
from lowbit.advice.subject import Subject, subject
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import LowbitError, UsageError
from lowbit.estimation.engines import find_engine, overhead_bytes
from lowbit.estimation.kv_cache import cache_of
from lowbit.estimation.shapes import ModelShape
from lowbit.hardware import Device, find_device

DEFAULT_CONTEXT = 2048
_SERVER_BATCH = 8  # sequences at once of engines that serve; one of those on somebody's desk
_SMALL_MODEL = 4.0  # billions of weights, below which figures of 8B models are too kind
# QLoRA: adapters of this rank on every linear, each weight with a gradient and two Adam moments in float32.
_RANK, _ADAPTER_BYTES = 16, 2 + 4 + 4 + 4


@dataclass(frozen=True)
class _Question:
    """What was asked, worked out."""

    subject: Subject
    device: Device
    engine: str
    goal: Goal
    workload: Workload
    load: Load
    kv_cache: str
    price: float | None

    @property
    def finetune(self) -> bool:
        return self.workload.name == "finetune"


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
    """Which scheme to quantize to, and why.

    model      as `lowbit quantize` takes it (of a Hugging Face id only headers are fetched), a parsed config.json, or
               None for the shape of Llama 3.1 8B
    hardware   a row of `lowbit.hardware.DEVICES` in any spelling, "this", or a Device
    engine     vllm, sglang, tensorrt-llm, llama.cpp, transformers; None: what one would take for the device
    goal       balanced (None), quality, speed, memory: `lowbit.advice.score.GOALS`
    workload   chat, serve, decode, prefill, finetune; None: serve with an engine that serves, else chat
    context    tokens of a sequence at its end; caches are half full on average, and prompts are half as long
    batch      sequences at once; None: 8 with an engine that serves, else 1
    kv_cache   "auto": 16 bits or FP8, whichever scores better; "fp8" or "bf16": that alone
    memory     bytes of the device, where they are not the table's
    price      dollars per hour of the device

    Raises UsageError for what is not known or does not go together, and what opening the model raises.
    """
    _check(context, batch, kv_cache, price)
    device = find_device(hardware) if isinstance(hardware, str) else hardware
    device = device if memory is None else _with_memory(device, memory)
    engine = _engine(engine, device, workload)
    serves = engine in ("vllm", "sglang", "tensorrt-llm")
    chosen = find_workload(workload or ("serve" if serves else "chat"))
    load = Load(batch or (_SERVER_BATCH if serves else 1), context, max(1, context // 2))
    with subject(model, options) as about:
        asked = _Question(about, device, engine, find_goal(goal), chosen, load, kv_cache, price)
        found, without = _options(asked)
        return Advice(
            about.name, about.billions, about.active_billions, device, engine, asked.goal, chosen, load,
            tuple(sorted(found, key=_rank)), without, _assumptions(asked, found), (*about.notes, *_notes(asked)),
        )  # fmt: skip


def _check(context: int, batch: int | None, kv_cache: str, price: float | None) -> None:
    if context < 2:
        raise UsageError(f"a context of {context} tokens is not one", "give the tokens of a sequence, such as 8192")
    if batch is not None and batch < 1:
        raise UsageError(f"a batch of {batch} sequences is not one", "give 1 or more")
    if kv_cache not in ("auto", "fp8", "bf16"):
        raise UsageError(f"there is no KV cache {kv_cache!r}", "choose auto, fp8 or bf16")
    if price is not None and price <= 0:
        raise UsageError(f"a price of {price} dollars per hour is not one", "leave --price out")


def _engine(name: str | None, device: Device, workload: str | None) -> str:
    finetune = workload == "finetune"
    engine = engine_for(device, finetune) if name is None else find_engine(name).name
    assert engine in ENGINES
    if finetune and not any(row.finetune for row in SUPPORT if row.engine == engine):
        raise UsageError(f"{engine} does not train adapters", "leave --engine out: transformers does, with peft")
    return engine


def _options(asked: _Question) -> tuple[list[Option], dict[str, str]]:
    """(every option, scheme → why it is none)."""
    about, found = asked.subject, []
    without = dict.fromkeys(left_out(asked.engine, asked.device), f"{asked.engine} has no kernel for it here")
    sixteen = footprint(about.shape, SIXTEEN)
    basis = _speed(asked, sixteen, sixteen, None, False)
    candidates: dict[str, Support | None] = {SIXTEEN: None, **supported(asked.engine, asked.device)}
    for scheme, how in candidates.items():
        if asked.finetune and not (how is None or how.finetune):
            without[scheme] = "adapters are not trained on it"
            continue
        if expected(scheme, asked.finetune) is None:
            without[scheme] = "no figure of its quality is known"
            continue
        try:
            weights = about.weights(scheme, how)
        except LowbitError as error:
            without[scheme] = str(error)
            continue
        found += [_option(asked, scheme, how, weights, sixteen, basis, fp8) for fp8 in _caches(asked, how)]
    return found, without


def _caches(asked: _Question, how: Support | None) -> list[bool]:
    """Whether the KV cache is FP8: what is to be tried."""
    possible = asked.engine in FP8_CACHE_ENGINES and asked.device.kind != "cpu" and not asked.finetune
    possible = possible and how is not None and how.format in FP8_CACHE_FORMATS
    if asked.kv_cache == "bf16" or not possible:
        return [False]
    return [True] if asked.kv_cache == "fp8" else [False, True]


def _option(
    asked: _Question, scheme: str, how: Support | None, weights: Footprint, sixteen: Footprint, basis: Speed,
    fp8_cache: bool,
) -> Option:  # fmt: skip
    about, load = asked.subject, asked.load
    expectation = expected(scheme, asked.finetune)
    assert expectation is not None
    reached = _speed(asked, weights, sixteen, how, fp8_cache)
    memory, whole = _memory(asked, weights, fp8_cache), _memory(asked, sixteen, False)
    ratios = Ratios(reached.decode / basis.decode, reached.prefill / basis.prefill, whole.total / memory.total)
    loss = expectation.loss + FP8_CACHE_LOSS * fp8_cache
    settings = (
        None
        if how is None or how.format is None
        else quantize_settings(scheme, how, fp8_cache, about.shape.max_positions)
    )
    output = None if settings is None else output_name(about.path, scheme, fp8_cache)
    return Option(
        scheme, how, fp8_cache, memory, reached, expectation, ratios, loss,
        score(ratios, loss, asked.goal, asked.workload, expectation.scaled_from is not None),
        reason_for(asked.device, how, memory, ratios, reached, loss, fp8_cache),
        output, settings,
        None if settings is None or output is None else quantize_line(about.path, output, settings),
        None if output is None else serve_line(asked.engine, output, load, fp8_cache, asked.finetune),
        how.instead if how is not None and how.format is None else None,
        _dollars(asked.price, reached.decode_all), _dollars(asked.price, reached.prefill),
    )  # fmt: skip


def _speed(asked: _Question, weights: Footprint, sixteen: Footprint, how: Support | None, fp8_cache: bool) -> Speed:
    shape, load = asked.subject.shape, asked.load
    half = Load(load.batch, max(1, load.context // 2), load.prompt)  # caches are half full on average
    cache = cache_of(shape, asked.engine, 8.0 if fp8_cache else 16.0).sequence_bytes(half.context)
    return speed(shape, weights, sixteen, cache, how, asked.device, half)


def _memory(asked: _Question, weights: Footprint, fp8_cache: bool) -> Memory:
    shape, load, device = asked.subject.shape, asked.load, asked.device
    usable = int(device.memory_bytes * min(find_engine(asked.engine).share, USABLE_MEMORY[device.kind]))
    if asked.finetune:
        return Memory(round(weights.total), 0, _training_bytes(shape, load), usable)
    cache = cache_of(shape, asked.engine, 8.0 if fp8_cache else 16.0)
    overhead = overhead_bytes(asked.engine, shape, load.context, load.batch).total
    return Memory(round(weights.total), load.batch * cache.sequence_bytes(load.context), overhead, usable)


def _training_bytes(shape: ModelShape, load: Load) -> int:
    """Of QLoRA with gradient checkpoints: adapters, optimizer, a hidden state per layer, one layer at work, logits.

    Assumed: rank 16 on every linear, 14 bytes per trained weight; 34 · hidden bytes per token of the layer at work, and
    logits in 16 and 32 bits with a gradient.
    """
    linears = (each for each in matrices(shape) if each.part in ("dense", "experts"))
    adapters = sum(_RANK * (each.rows + each.columns) * each.copies for each in linears) * _ADAPTER_BYTES
    tokens = load.batch * load.context
    return adapters + tokens * (shape.hidden * (2 * shape.layers + 34) + shape.vocab * 10) + (1 << 30)


def _with_memory(device: Device, memory: int) -> Device:
    return replace(device, memory_bytes=memory)


def _dollars(price: float | None, tokens_per_second: float) -> float | None:
    """Dollars per million tokens."""
    return None if price is None else price / 3600 / tokens_per_second * 1e6


def _rank(option: Option) -> tuple[bool, float]:
    """What fits first, by score; then what does not, the smallest first."""
    fits = option.memory.fits
    return (not fits, -option.score if fits else float(option.memory.total))


def _assumptions(asked: _Question, found: list[Option]) -> tuple[str, ...]:
    lines = list(ASSUMPTIONS)
    lines.append(f"caches are half full on average and prompts {asked.load.prompt} tokens long")
    if any(option.fp8_cache for option in found):
        lines.append(f"an FP8 cache costs {FP8_CACHE_LOSS} % ({FP8_CACHE_SOURCE})")
    if asked.finetune:
        lines.append(f"adapters of rank {_RANK} on every linear, with gradient checkpoints")
    return (*lines, *(find_engine(asked.engine).assumptions if not asked.finetune else ()))


def _notes(asked: _Question) -> tuple[str, ...]:
    notes = []
    if asked.subject.billions < _SMALL_MODEL:
        notes.append(f"expected losses are of models of 8 billion weights; one of {asked.subject.billions:.2g} billion "
                     f"loses more, at 4 bits several times as much: evaluate what you make")  # fmt: skip
    longest = asked.subject.shape.max_positions
    if longest is not None and asked.load.context > longest:
        notes.append(f"the model was made for {longest} tokens; {asked.load.context} were asked about")
    if asked.device.note:
        notes.append(f"{asked.device.label}: {asked.device.note}")
    return tuple(notes)
