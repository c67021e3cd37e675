"""Conversion: a quantized checkpoint of one format → another format.

    repack      the target holds the codes and scales as they are: nothing is rounded, every weight decodes to the same
    requantize  it does not: the decoded weights are rounded to a scheme that it holds, and the added error is measured

Which it is, is decided for each linear before anything is written. First by the scheme: `wider_specs` are tried, the
cheapest first, until the target takes one (symmetric codes fit an asymmetric format, a scale per row fits groups, …).
Then by the values: `Exporter.inexact` looks at every slab of codes and scales (a zero point that GPTQ v1 cannot store,
a scale that float16 does not hold, columns in activation order). Reasons are kept with the tensor and reported.
The format "float" takes the decoded weights of anything, cast to the model's dtype; the error of the cast is measured.
It also makes a Hugging Face folder of a GGUF file.

Activation schemes are kept where the target has them. Where it has not, weights stay exact and a note says that
activations are no longer quantized. Linears that the source leaves in 16 bits stay so. Scales of an FP8 KV cache are
kept where the target has them, and dropped with a note where it has not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import CanReadCodes, Checkpoint, OpenOptions
from lowbit.checkpoint.kv_cache import StoredKVCache
from lowbit.checkpoint.quantized import FLOATS, KINDS
from lowbit.errors import FormatError, UsageError
from lowbit.export import FORMATS, Exporter, find_exporter
from lowbit.export.kv_cache import unfit_kv_cache
from lowbit.numerics.scales import E2M1_MAX, E4M3_MAX, INT8_MAX
from lowbit.pipeline import Prepared, described, needs_input_ranges, slabs
from lowbit.plan import Plan, PlannedTensor, make_plan, model_dtype, with_kv_cache
from lowbit.rounding.widen import widened, wider_specs
from lowbit.schemes import KV_CACHE_SCHEMES, SCHEMES, ActivationSpec, Scheme, WeightSpec, scheme_of_specs
from lowbit.settings import Settings

# What a linear is rounded to where its own codes do not fit: format → (up to 4 bits, more than 4 bits).
NEAREST: dict[str, tuple[str, str]] = {
    "compressed-tensors": ("W4A16_ASYM", "W8A16"),
    "gptq": ("W4A16", "W8A16"),
    "gptq_v2": ("W4A16", "W8A16"),
    "awq": ("W4A16_ASYM", "W4A16_ASYM"),
    "bitsandbytes": ("NF4", "INT8"),
    "modelopt": ("NVFP4A16", "FP8_DYNAMIC"),
    "mxfp4": ("MXFP4A16", "MXFP4A16"),
}


@dataclass(frozen=True)
class Choice:
    """What becomes of one quantized linear: its scheme in the target, and why it is rounded anew, if it is."""

    scheme: Scheme
    reason: str | None = None
    note: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.reason is None


def prepare_conversion(
    model: str | Path,
    settings: Settings,
    options: OpenOptions | None = None,
    threads: int | None = None,
    scheme_given: bool = False,
) -> Prepared:
    """Open a quantized model and plan its conversion to `settings.format`; reads codes, writes nothing.

    scheme_given  True where `settings.scheme` is the user's wish for every quantized linear, not a default

    Raises UsageError for a source that is not quantized, and for a GGUF file but to floats: its blocks fit no other.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot do anything", "leave it out for one per core")
    if settings.format == "auto":
        raise UsageError("a conversion needs the format to write", f"give one of {', '.join(FORMATS)}")
    options = options or OpenOptions()
    checkpoint = open_checkpoint(model, options)
    architecture, checkpoint = described(checkpoint, options)
    if checkpoint.kind == "gguf" and settings.format == "float":
        plan = make_plan(checkpoint, architecture, settings, model_dtype(checkpoint), fixed={})
        tensors = tuple(replace(t, reason=f"decoded from {t.source.stored}") for t in plan.tensors)
        return Prepared(checkpoint, replace(plan, tensors=tensors), threads or os.cpu_count() or 1, options)
    if checkpoint.kind not in KINDS or not isinstance(checkpoint, CanReadCodes):
        raise UsageError(
            f"{checkpoint.source} is not a quantized folder ({checkpoint.kind}); there are no codes to convert",
            f"quantize it instead: lowbit quantize {checkpoint.source} --format {settings.format} -o OUT",
        )
    exporter, dtype = find_exporter(settings.format), model_dtype(checkpoint)
    wanted = settings.base_scheme() if scheme_given else None
    shapes = {linear.name: linear.shape for linear in architecture.linears.values()}
    choices = {
        weight.removesuffix(".weight"): choose(scheme, shapes[weight.removesuffix(".weight")], exporter, wanted)
        for weight, scheme in checkpoint.schemes.items()
        if weight.removesuffix(".weight") in shapes
    }
    fixed = {linear: choice.scheme for linear, choice in choices.items()}
    plan = make_plan(checkpoint, architecture, settings, dtype, fixed)
    plan = replace(plan, tensors=tuple(_decided(t, choices, checkpoint, exporter) for t in plan.tensors))
    plan = _with_kv_cache(replace(plan, input_absmax=_input_ranges(plan, checkpoint)), checkpoint)
    prepared = Prepared(checkpoint, plan, threads or os.cpu_count() or 1, options)
    return replace(prepared, plan=_checked_values(prepared, exporter))


def _input_ranges(plan: Plan, checkpoint: CanReadCodes) -> dict[str, float]:
    """The ranges that the source's static activation scales were made of; a linear without one is calibrated later."""
    stored, ranges = checkpoint.input_scales, {}
    for linear in needs_input_ranges(plan):
        scale = stored.get(f"{linear}.weight")
        if scale is not None:
            spec = plan.schemes[linear].activation
            assert spec is not None, "it needs calibration"
            largest_code = INT8_MAX if spec.number == "int" else E4M3_MAX
            ranges[linear] = scale * largest_code * (E2M1_MAX if spec.scale_format == "e4m3" else 1.0)
    return ranges


def _with_kv_cache(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The plan with the scales of the source's KV cache, where the target can store them; else a note says why not.

    What the settings ask for goes first: then keys and values are measured anew.
    """
    stored: StoredKVCache | None = getattr(checkpoint, "kv_cache", None)
    if stored is None or plan.kv_cache is not None:
        return plan
    scheme, notes = stored.scheme, plan.notes
    if plan.format == "modelopt" and scheme.per == "head":
        scheme = KV_CACHE_SCHEMES["fp8"]
        notes = (*notes, "scales of the KV cache: one per layer, the largest of the source's, which has one per head")
    reason = unfit_kv_cache(plan.format, scheme)
    absent = sorted(set(range(len(plan.architecture.blocks))) - stored.absmax.keys())
    if reason is None and absent:
        reason = f"the source has none for layer {absent[0]}"
    if reason is not None:
        return replace(plan, notes=(*notes, f"scales of the KV cache are dropped: {reason}"))
    plan = with_kv_cache(plan, scheme, checkpoint.config())
    return replace(plan, kv_absmax=stored.absmax, notes=notes)


def choose(source: Scheme, shape: tuple[int, int], exporter: Exporter, wanted: Scheme | None = None) -> Choice:
    """The scheme of a linear in the target format, by its scheme alone.

    wanted  what the user asked for; exact only if it holds the source's codes
    """
    for weight in wider_specs(source.weight, shape[1]):
        for activation in dict.fromkeys((source.activation, None)):
            scheme = _named(weight, activation, source)
            if wanted is not None and scheme.weight != wanted.weight:
                continue
            if _holds(exporter, scheme, shape):
                lost = source.activation is not None and activation is None
                return Choice(scheme, note="activations are no longer quantized" if lost else None)
    if wanted is not None:
        return Choice(wanted, reason=f"{wanted.name} was asked for, and does not hold codes of {source.name}")
    name = NEAREST[exporter.FORMAT][source.weight.bits > 4]
    return Choice(_fitting(SCHEMES[name], source.weight, shape), f"{exporter.FORMAT} has no {source.name}")


def _holds(exporter: Exporter, scheme: Scheme, shape: tuple[int, int]) -> bool:
    try:
        exporter.storage_format(scheme)
    except FormatError:
        return False
    return exporter.unfit(shape, scheme) is None


def _named(weight: WeightSpec, activation: ActivationSpec | None, source: Scheme) -> Scheme:
    same = weight == source.weight and activation == source.activation
    return source if same else scheme_of_specs(weight, activation)


def _fitting(scheme: Scheme, source: WeightSpec, shape: tuple[int, int]) -> Scheme:
    """A scheme with the source's group size where that is free, or one that divides the row."""
    if not scheme.weight.group_size_is_free:
        return scheme
    sizes = [source.group_size, 128, 64, 32]
    return scheme.with_group_size(next((size for size in sizes if size and shape[1] % size == 0), -1))


def _decided(
    tensor: PlannedTensor, choices: dict[str, Choice], checkpoint: CanReadCodes, exporter: Exporter
) -> PlannedTensor:
    """A planned tensor that is repacked or rounded anew, with the dtype of the source's scales and the reason."""
    if tensor.linear is None or tensor.scheme is None:
        return tensor
    choice = choices[tensor.linear.name]
    notes = (*tensor.notes, *([choice.note] if choice.note else []))
    if not choice.is_exact:
        return replace(tensor, notes=(*notes, f"requantized: {choice.reason}"))
    dtype = checkpoint.scale_dtype(tensor.name)
    dtype = dtype if dtype in FLOATS and _takes_any_scale_dtype(exporter, tensor.scheme) else tensor.dtype
    if dtype != tensor.dtype:
        stored = tuple(exporter.stored_tensors(tensor.linear.name, tensor.linear.shape, tensor.scheme, dtype))
        tensor = replace(tensor, dtype=dtype, stored=stored)
    return replace(tensor, repack=True, notes=notes)


def _takes_any_scale_dtype(exporter: Exporter, scheme: Scheme) -> bool:
    return all(exporter.scale_format(scheme, dtype) == str(dtype).removeprefix("torch.") for dtype in FLOATS)


def _checked_values(prepared: Prepared, exporter: Exporter) -> Plan:
    """The plan, with linears rounded anew whose values the target cannot store, though it has their scheme."""
    plan, checkpoint = prepared.plan, prepared.checkpoint
    if exporter.FORMAT == "float":
        return plan
    assert isinstance(checkpoint, CanReadCodes)
    tensors = []
    for tensor in plan.tensors:
        if tensor.repack and tensor.scheme is not None:
            reason = None
            for first, last in slabs(tensor, plan, checkpoint):
                quantized = widened(checkpoint.read_quantized(tensor.name, first, last), tensor.scheme.weight)
                reason = exporter.inexact(quantized, tensor.scheme, tensor.dtype)
                if reason is not None:
                    break
            prepared.checkpoint.release(tensor.name)
            if reason is not None:
                tensor = _rounded_anew(tensor, reason, plan, exporter)
        tensors.append(tensor)
    return replace(plan, tensors=tuple(tensors))


def _rounded_anew(tensor: PlannedTensor, reason: str, plan: Plan, exporter: Exporter) -> PlannedTensor:
    assert tensor.linear is not None
    assert tensor.scheme is not None
    stored = tuple(exporter.stored_tensors(tensor.linear.name, tensor.linear.shape, tensor.scheme, plan.dtype))
    notes = (*tensor.notes, f"requantized: {reason}")
    return replace(tensor, repack=False, dtype=plan.dtype, stored=stored, notes=notes)
