"""`lowbit.estimate`: what a quantized model costs, before anything is spent.

    open headers → plan (exact bytes) → cache and overhead of the engine → what fits → memory, disk and time of the run

No weight is read and nothing is written; of a Hugging Face id no weight is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import ArchitectureError, UsageError
from lowbit.estimation.capacity import Load, fit_of, gigabytes
from lowbit.estimation.engines import Engine, find_engine
from lowbit.estimation.kv_cache import cache_of
from lowbit.estimation.program import assumed_program, has_models, measured_program
from lowbit.estimation.rates import assumed_rates, measure_rates
from lowbit.estimation.result import Cache, Estimate, Files, Fit, Serving
from lowbit.estimation.run_cost import run_of
from lowbit.estimation.run_memory import kind_of, run_memory
from lowbit.estimation.shapes import ModelShape, shape_of, shape_of_gguf
from lowbit.estimation.weights import Opened, opened, plan_of, stores_cache_scales
from lowbit.gguf_pipeline import PreparedGGUF
from lowbit.measure import resident_memory
from lowbit.pipeline import Prepared
from lowbit.settings import Settings, make_settings
from lowbit.verification.engines import NO_LOADER

_CONTEXT = 8192  # tokens, where nothing is said and the model has as many


def estimate(
    model: str | Path | dict[str, Any],
    *,
    output: str | Path | None = None,
    context: int | None = None,
    batch: int = 1,
    engine: str | None = None,
    kv_cache: str | None = None,
    hardware: str | None = None,
    memory: int | None = None,
    measure: bool = False,
    max_memory: int | None = None,
    recipe: Path | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Estimate:
    """Sizes, memory, largest context and batch, and the cost of the run, from config and headers alone.

    model      a folder, a .gguf file, a Hugging Face id, demo:smollm2, a folder with config.json alone, or the parsed
               config.json itself
    output     is not written; a name that ends in .gguf asks for a GGUF file, and rates are measured on its disk
    context    tokens of a sequence; None: 8192, or what the model has
    engine     None: the one that the format is for
    kv_cache   type of the cache: auto (16 bits), fp8, q8_0 …; fp8 and fp8_per_head store scales where the format can
    hardware   a device of `lowbit.hardware`; memory  bytes, in its place
    measure    measure the rates that times follow from, for a second or two, and once the program's own memory
    settings   the fields of `lowbit.settings.Settings`: scheme, method, group_size, samples …

    Raises LowbitError for what a run would refuse, an unknown engine, device or cache type, and what the engine cannot
    load at all.
    """
    if batch < 1 or (context is not None and context < 1):
        raise UsageError(f"context {context} and batch {batch} must be 1 or more")
    resident, had_models = resident_memory(), has_models()
    options = options or OpenOptions()
    made = _settings(output, recipe, kv_cache, settings)
    threads = threads or os.cpu_count() or 1
    with opened(model, options) as found:
        prepared, notes = plan_of(found, made, options, threads)
        chosen = _engine(engine, prepared)
        shape, why = _shape(found)
        notes = (*found.notes, *notes, *prepared.plan.warnings, *why, *_loader_notes(chosen, prepared.plan.format))
        asked = prepared.plan.settings
        program = _program(asked, measure, resident, had_models)
        running = run_memory(prepared, asked, shape, threads, program, max_memory)
        where = Path(output).absolute().parent if output is not None else None
        rates = measure_rates(prepared, asked.compute, where) if measure else assumed_rates(prepared, asked.compute)
        device, size = _device(hardware, memory)
        files = _files(found, prepared)
        cache = serving = fit = None
        if shape is not None:
            context, said = _context(context, shape)
            notes += said
            kept = cache_of(shape, chosen.name, kv_cache or "auto", size)
            load = Load(files.bytes, shape, kept, chosen, size)
            serving = load.serving(context, batch)
            name = (kv_cache or "auto").lower()
            cache = Cache(
                "16 bits" if name == "auto" else name, kept.bits, kept.bytes_per_token(), kept.growth(context),
                kept.sequence_bytes(context), len(kept.layers), kept.bounded,
            )  # fmt: skip
            if device is not None and size is not None:
                fit = fit_of(load, device, size, context, batch, files.weights)
        elif device is not None:
            notes += ("whether it fits is not known: config.json says too little",)
        prepared.checkpoint.close()
        return Estimate(
            found.name, _model_type(shape, prepared), files, cache, serving, fit,
            run_of(prepared, asked, shape, running, rates, threads),
            _assumptions(chosen, serving, fit, measure), notes,
        )  # fmt: skip


def _settings(output: str | Path | None, recipe: Path | None, kv_cache: str | None, given: dict[str, Any]) -> Settings:
    """As `lowbit quantize` makes them; an output's name may ask for GGUF."""
    made = make_settings(recipe, **given)
    if output is not None and made.format == "auto" and made.writes_gguf(Path(output)):
        made = made.model_copy(update={"format": "gguf"})
    name = None if kv_cache is None else kv_cache.lower()
    if not made.writes_gguf() and stores_cache_scales(name, made.format):
        made = make_settings(recipe, **given, kv_cache=name)
    return made


def _engine(name: str | None, prepared: Prepared | PreparedGGUF) -> Engine:
    """The engine asked for; UsageError where llama.cpp is asked to load anything but GGUF."""
    chosen = find_engine(name or prepared.plan.engine)
    if chosen.name == "llama.cpp" and prepared.plan.format != "gguf":
        raise UsageError(
            f"llama.cpp loads GGUF files, and {prepared.plan.scheme_name} is written as {prepared.plan.format}",
            "give one of its types: --scheme Q4_K_M, Q8_0, IQ4_XS …",
        )
    return chosen


def _loader_notes(engine: Engine, format: str) -> tuple[str, ...]:
    if format == "gguf" and engine.name != "llama.cpp":
        return (f"GGUF is llama.cpp's format; {engine.name} may not load it, or decode it to 16 bits",)
    why = NO_LOADER.get(engine.name, {}).get(format)
    return () if why is None else (f"{engine.name} cannot load this: {why}",)


def _shape(found: Opened) -> tuple[ModelShape | None, tuple[str, ...]]:
    try:
        return (shape_of(found.config) if found.config else shape_of_gguf(found.metadata)), ()
    except ArchitectureError as error:
        return None, (f"cache and overhead are not known: {error}",)


def _context(context: int | None, shape: ModelShape) -> tuple[int, tuple[str, ...]]:
    bound = shape.max_positions
    if context is None:
        return min(_CONTEXT, bound or _CONTEXT), ()
    if bound is not None and context > bound:
        return context, (f"a context of {context} is more than the {bound} tokens that the model was made for",)
    return context, ()


def _device(hardware: str | None, memory: int | None) -> tuple[str | None, int | None]:
    """(name, bytes); --memory stands in for, or corrects, that of a device."""
    if hardware is None:
        return (None, None) if memory is None else (f"{gigabytes(memory)} of memory", memory)
    from lowbit.hardware import find_device

    device = find_device(hardware)
    return device.label, device.memory_bytes if memory is None else memory


def _files(found: Opened, prepared: Prepared | PreparedGGUF) -> Files:
    plan = prepared.plan
    guessed = found.guessed_bytes(prepared)
    return Files(
        plan.format, plan.scheme_name, plan.settings.method, plan.file_bytes + guessed,
        plan.bits_per_weight(decoder_only=True), plan.bits_per_weight(decoder_only=False),
        sum(tensor.weights for tensor in plan.tensors), sum(tensor.source_bytes for tensor in plan.tensors),
        not (guessed or found.made),
    )  # fmt: skip


def _model_type(shape: ModelShape | None, prepared: Prepared | PreparedGGUF) -> str:
    return prepared.plan.model_class if shape is None else shape.model_type


def _program(settings: Settings, measure: bool, resident: int, had_models: bool) -> int:
    kind = kind_of(settings)
    return measured_program(kind) if measure else assumed_program(kind, resident, had_models)


def _assumptions(engine: Engine, serving: Serving | None, fit: Fit | None, measured: bool) -> tuple[str, ...]:
    lines: tuple[str, ...] = ()
    if serving is not None:
        lines += ("weights: all on one device, as they lie in the files", *engine.assumptions)
    if fit is not None:
        lines += (f"{engine.name} takes {engine.share:g} of the device ({engine.share_name}): {gigabytes(fit.usable)}",)
    if measured:
        return (
            *lines,
            "memory of the run: the program's own was measured by quantizing a model of 100 kB; the rest follows from "
            "slabs, threads and shapes",
            "time of the run: work counted and divided by rates measured now; the machine otherwise idle",
        )
    return (
        *lines,
        "memory of the run: the program's own is what this process holds and what a run imports later; the rest "
        "follows from slabs, threads and shapes",
        "time of the run: work counted and divided by the rates of docs/benchmarks.md per core; --measure takes this "
        "machine's; the machine otherwise idle",
    )
