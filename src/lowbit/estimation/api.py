"""`lowbit.estimate`: the cost of a quantized model before the run.

    open headers → plan (exact bytes) → cache and overhead of the engine → what fits → memory, disk and time of the run

No weight is read or downloaded, and nothing is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.architecture.shape import shape_of, shape_of_gguf
from lowbit.checkpoint.base import OpenOptions
from lowbit.engines import Engine, find_engine
from lowbit.errors import ArchitectureError, UsageError
from lowbit.estimation.result import Cache, DeviceFit, Estimate, Files, Serving
from lowbit.estimation.run_memory import Process, measured_program, peak_memory
from lowbit.estimation.run_time import assumed_rates, measure_rates, run_of
from lowbit.estimation.serving import deploy, fit_of, gigabytes, refuse_absurd_load
from lowbit.estimation.weights import ModelHeaders, open_headers, plan_of
from lowbit.hardware import Device, find_device
from lowbit.kv.losses import cache_loss
from lowbit.kv.types import OF_OUTPUT
from lowbit.plan.plan import Prepared
from lowbit.registry import FORMATS
from lowbit.schemes import KV_CACHE_SCHEMES
from lowbit.settings import Settings, make_settings

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
    recipe: str | Path | None = None,
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
    hardware   a device of `lowbit.hardware`, or several: 2xA100; memory  bytes of one, in its place
    measure    measure the rates that times follow from, for a second or two, and once the program's own memory
    settings   the fields of `lowbit.settings.Settings`: scheme, method, group_size, samples …

    Raises LowbitError for what a run would refuse, an unknown engine, device or cache type, and what the engine cannot
    load at all.
    """
    refuse_absurd_load(context, batch)
    process = Process.now()
    options = options or OpenOptions()
    with open_headers(model, options) as headers:
        prepared, notes = plan_of(headers, _settings(output, recipe, kv_cache, settings), options, threads, max_memory)
        plan = prepared.plan
        chosen = _engine(engine, prepared)
        notes = (*headers.notes, *notes, *plan.notes)
        try:
            shape = shape_of(headers.config) if headers.config else shape_of_gguf(headers.metadata)
        except ArchitectureError as error:
            shape = None
            notes += (f"cache and overhead are not known: {error}",)
        if plan.format.name == "gguf" and not chosen.loading.reads_gguf:
            notes += (f"GGUF is llama.cpp's format; {chosen.name} may not load it, or decode it to 16 bits",)
        elif plan.format.name in chosen.loading.no_loader:
            notes += (f"{chosen.name} cannot load this: {chosen.loading.no_loader[plan.format.name]}",)
        program = measured_program(prepared) if measure else process.program(prepared)
        holding = peak_memory(prepared, program, max_memory)
        where = Path(output).absolute().parent if output is not None else None
        compute = plan.settings.compute
        rates = measure_rates(prepared, compute, where) if measure else assumed_rates(prepared, compute)
        device = None if hardware is None else find_device(hardware)
        size = memory if memory is not None or device is None else device.memory_bytes
        files = _files(headers, prepared)
        cache = serving = fit = None
        if shape is not None:
            longest = shape.max_positions
            if context is None:
                context = min(_CONTEXT, longest or _CONTEXT)
            elif longest is not None and context > longest:
                notes += (f"a context of {context} is more than the {longest} tokens that the model was made for",)
            name = (kv_cache or "auto").lower()
            cards = 1 if device is None else device.count
            if device is not None:
                chosen.refuse_ranks(shape, device)
            load = deploy(chosen, shape, files.bytes, name, size, cards)
            serving, kept = load.serving(context, batch), load.cache
            cache = Cache(
                "16 bits" if name == "auto" else name, kept.bits, kept.bytes_per_token(), kept.growth(context),
                load.sequence_bytes(context), len(kept.layers), kept.bounded,
            )  # fmt: skip
            if size is not None:
                label = f"{gigabytes(size)} of memory" if device is None else device.label
                usable = chosen.memory.usable(size * cards, device)
                fit = fit_of(load, label, size * cards, usable, context, batch, files.weights)
        elif size is not None:
            notes += ("whether it fits is not known: config.json says too little",)
        prepared.checkpoint.close()
        return Estimate(
            headers.name, plan.model_class if shape is None else shape.model_type, files, cache, serving, fit,
            run_of(prepared, holding, rates),
            (*_assumptions(chosen, serving, fit, device, measure),
             *(_cache_loss(kv_cache, chosen, device) if cache is not None else ())), notes,
        )  # fmt: skip


def _cache_loss(kv_cache: str | None, engine: Engine, device: Device | None) -> tuple[str, ...]:
    """What a cache of this type costs, where it was measured; nothing of one in 16 bits."""
    name = (kv_cache or "auto").lower()
    found = cache_loss(OF_OUTPUT.get(name, name)) or cache_loss(name)
    on_cpu = device is not None and device.kind == "cpu" and name.startswith("fp8") and engine.memory.fp8_on_cpu
    more = (f"on this device more: {on_cpu}",) if on_cpu else ()
    return () if found is None else (f"loss by the cache in {name}, {found.says}", *more)


def _settings(
    output: str | Path | None, recipe: str | Path | None, kv_cache: str | None, given: dict[str, Any]
) -> Settings:
    """The settings of `lowbit quantize` for this output; cache scales are stored if the format can hold them."""
    settings = make_settings(recipe, **given)
    if output is not None and settings.format == "auto" and settings.writes_gguf(Path(output)):
        settings = settings.model_copy(update={"format": "gguf"})
    name = None if kv_cache is None else kv_cache.lower()
    holding = FORMATS["compressed-tensors" if settings.format == "auto" else settings.format].kv_cache
    stored = name in KV_CACHE_SCHEMES and name in holding
    return make_settings(recipe, **given, kv_cache=name) if stored and not settings.writes_gguf() else settings


def _engine(name: str | None, prepared: Prepared) -> Engine:
    """The requested engine, or that of the format; UsageError if it loads only GGUF files and this is none."""
    chosen = find_engine(name or prepared.plan.engine)
    if chosen.loading.reads_gguf and prepared.plan.format.name != "gguf":
        raise UsageError(
            f"{chosen.name} loads GGUF files; {prepared.plan.scheme_name} is written as {prepared.plan.format.name}",
            "give one of its types: --scheme Q4_K_M, Q8_0, IQ4_XS …",
        )
    return chosen


def _files(headers: ModelHeaders, prepared: Prepared) -> Files:
    plan = prepared.plan
    guessed = headers.guessed_bytes(prepared)
    return Files(
        plan.format.name, plan.scheme_name, plan.settings.method, plan.file_bytes + guessed,
        plan.bits_per_weight(decoder_only=True), plan.bits_per_weight(decoder_only=False),
        sum(tensor.weights for tensor in plan.tensors), sum(tensor.source_bytes for tensor in plan.tensors),
        not (guessed or headers.from_config),
    )  # fmt: skip


def _assumptions(
    engine: Engine, serving: Serving | None, fit: DeviceFit | None, device: Device | None, measured: bool
) -> tuple[str, ...]:
    lines: tuple[str, ...] = ()
    model = engine.memory
    if serving is not None:
        cards = 1 if device is None else device.count
        where = "all on one device" if cards == 1 else f"divided among {cards} cards"
        lines += (f"weights: {where}, as they lie in the files", *model.assumptions)
        if cards > 1:
            lines += (f"every one of the {cards} cards has activations and framework of its own",)
    if fit is not None and device is not None and device.usable_share < model.share:
        lines += (f"a program may use {device.usable_share:g} of the device's memory: {gigabytes(fit.usable)}",)
    elif fit is not None:
        lines += (f"{engine.name} takes {model.share:g} of the device ({model.share_name}): {gigabytes(fit.usable)}",)
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
