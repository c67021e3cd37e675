"""Conversion: a quantized checkpoint of one format → another format.

    repack      the target holds the same codes and scales: every weight decodes to the same value
    requantize  it does not: the decoded weights are rounded to a scheme that it holds, and the added error is measured

The plan settles this for each linear. First by scheme: the target takes the first of `wider_specs`, cheapest first,
that it can hold (symmetric codes fit an asymmetric format, a scale per row fits groups, …). Then by value:
`Exporter.inexact` checks every slab of codes and scales (a zero point that GPTQ v1 cannot store, a scale that float16
does not hold, columns in activation order). The report gives the reason of each requantized linear.
The format "float" stores decoded weights, cast to the model's dtype, and measures the error of the cast. It also turns
a GGUF file into a Hugging Face folder.

Where the target has no such activation scheme, weights stay exact and a note says that activations are no longer
quantized. Scales of an FP8 KV cache that the target cannot store are dropped with a note. Linears that the source has
in 16 bits stay in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.architecture import model_dtype, open_described
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import FLOATS, KINDS
from lowbit.errors import FormatError, UsageError
from lowbit.export import Exporter, find_exporter
from lowbit.export.kv_cache import unfit_kv_cache
from lowbit.knobs import Facts
from lowbit.numerics.scales import E2M1_MAX, E4M3_MAX, INT8_MAX
from lowbit.plan.folder import FolderPlan, make_plan, with_kv_cache
from lowbit.plan.linears import stored_as
from lowbit.plan.plan import SLAB_WEIGHTS, Making, PlannedTensor, Prepared, Request
from lowbit.registry import FORMATS, written_formats
from lowbit.rounding.widen import widened, wider_specs
from lowbit.schemes import KV_CACHE_SCHEMES, SCHEMES, ActivationSpec, Scheme, WeightSpec, scheme_of_specs
from lowbit.settings import Settings, refuse_unread
from lowbit.tensors import InputRange


@dataclass(frozen=True)
class Choice:
    """The scheme of one quantized linear in the target. reason: why it is requantized; None where it is repacked"""

    scheme: Scheme
    reason: str | None = None
    note: str | None = None


def prepare_conversion(request: Request, scheme_given: bool = False) -> Prepared:
    """Open a quantized model and plan its conversion to `settings.format`; reads codes, writes nothing.

    scheme_given  True if the user chose `settings.scheme` for every quantized linear; False if it is a default

    Raises UsageError for a source that is not quantized. A GGUF file converts to "float" only: no other format holds
    its blocks.
    """
    threads, settings = request.worker_threads, request.settings
    if settings.format == "auto":
        raise UsageError("a conversion needs the format to write", f"give one of {', '.join(written_formats())}")
    # what no conversion reads, before a default scheme is blamed for it; the plan tells the rest
    refuse_unread(settings, None, Facts(converts=True, takes_scheme=scheme_given, static=True))
    checkpoint, architecture = open_described(request.model, request.options)
    exporter, dtype = find_exporter(settings.format), model_dtype(checkpoint)

    def prepared(plan: FolderPlan) -> Prepared:
        facts = Facts(
            converts=True, decodes=checkpoint.kind == "gguf", takes_scheme=scheme_given,
            rounds=any(tensor.making is not Making.repacked for tensor in plan.quantized),
            static=bool(plan.static_inputs),
        )  # fmt: skip
        refuse_unread(settings, None, facts)
        return Prepared(
            checkpoint, plan, threads, lambda others: make_plan(checkpoint, architecture, others, dtype),
            request.options, request.name or checkpoint.source,
        )  # fmt: skip

    if checkpoint.kind == "gguf" and settings.format == "float":
        plan = make_plan(checkpoint, architecture, settings, dtype, fixed={})
        tensors = (replace(t, reason=f"decoded from {checkpoint.tensors[t.name].stored}") for t in plan.tensors)
        return prepared(replace(plan, tensors=tuple(tensors)))
    if checkpoint.kind not in KINDS:
        raise UsageError(
            f"{checkpoint.source} is not a quantized folder ({checkpoint.kind}); there are no codes to convert",
            _instead(checkpoint.source, exporter),
        )
    asked = settings.base_scheme() if scheme_given else None
    shapes = {linear.name: linear.shape for linear in architecture.linears.values()}
    choices = {
        weight.removesuffix(".weight"): choose(scheme, shapes[weight.removesuffix(".weight")], exporter, asked)
        for weight, scheme in checkpoint.schemes.items()
        if weight.removesuffix(".weight") in shapes
    }
    transforms = checkpoint.rotations
    rotated = [name for name in choices if f"{name}.weight" in transforms]
    if settings.format == "float":  # read decoded and without the rotation, like a tensor that is copied
        choices = {name: choice for name, choice in choices.items() if name not in rotated}
    for name in rotated:
        if name in choices and choices[name].reason is None:
            choices[name] = replace(choices[name], reason=transforms[f"{name}.weight"].reason)
    fixed = {linear: choice.scheme for linear, choice in choices.items()}
    plan = make_plan(checkpoint, architecture, settings, dtype, fixed)
    plan = replace(plan, tensors=tuple(_planned(t, choices, checkpoint, exporter, settings) for t in plan.tensors))
    if settings.format == "float" and rotated:
        said = {name: f"decoded for an input as it comes: {transforms[f'{name}.weight'].reason}" for name in rotated}
        plan = replace(plan, tensors=tuple(
            replace(t, reason=said[t.linear.name]) if t.linear and t.linear.name in said else t for t in plan.tensors
        ))  # fmt: skip
    plan = _with_kv_cache(replace(plan, input_ranges=_input_ranges(plan, checkpoint)), checkpoint)
    return prepared(_checked_values(plan, checkpoint, exporter))


def _input_ranges(plan: FolderPlan, checkpoint: Checkpoint) -> dict[str, InputRange]:
    """Input ranges recovered from the source's static activation scales; linears without one are calibrated later."""
    stored, zero_points, ranges = checkpoint.input_scales, checkpoint.input_zero_points, {}
    for linear in plan.static_inputs:
        scale = stored.get(f"{linear}.weight")
        if scale is not None:
            spec = plan.schemes[linear].activation
            assert spec is not None, "it needs calibration"
            zero_point = zero_points.get(f"{linear}.weight")
            if not spec.symmetric and zero_point is not None:
                least, largest = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
                ranges[linear] = InputRange(scale * (least - zero_point), scale * (largest - zero_point))
            elif spec.symmetric:
                largest_code = INT8_MAX if spec.number == "int" else E4M3_MAX
                two_level = E2M1_MAX if spec.scale_format == "e4m3" else 1.0
                ranges[linear] = InputRange.within(scale * largest_code * two_level)
    return ranges


def _with_kv_cache(plan: FolderPlan, checkpoint: Checkpoint) -> FolderPlan:
    """The plan with the scales of the source's KV cache, or with a note on why the target cannot store them.

    Settings that ask for KV-cache scales take precedence: calibration then measures keys and values.
    """
    stored = checkpoint.kv_cache
    if stored is None or plan.kv_cache is not None:
        return plan
    scheme, notes = stored.scheme, plan.notes
    if scheme.per == "head" and scheme.name not in plan.format.kv_cache and "fp8" in plan.format.kv_cache:
        scheme = KV_CACHE_SCHEMES["fp8"]
        notes = (*notes, "scales of the KV cache: one per layer, the largest of the source's, which has one per head")
    reason = unfit_kv_cache(plan.format, scheme)
    absent = sorted(set(range(len(plan.described.blocks))) - stored.absmax.keys())
    if reason is None and absent:
        reason = f"the source has none for layer {absent[0]}"
    if reason is not None:
        return replace(plan, notes=(*notes, f"scales of the KV cache are dropped: {reason}"))
    plan = with_kv_cache(plan, scheme, checkpoint.config())
    return replace(plan, kv_absmax=stored.absmax, notes=notes)


def choose(source: Scheme, shape: tuple[int, int], exporter: Exporter, asked: Scheme | None = None) -> Choice:
    """The scheme of a linear in the target format, judged by schemes alone.

    asked  the user's scheme; exact only if it holds the source's codes
    """
    for activation in dict.fromkeys((source.activation, None)):
        for weight in wider_specs(source.weight, shape[1]):
            same = weight == source.weight and activation == source.activation
            if not same and not _multiplied(weight, activation):
                continue
            scheme = source if same else scheme_of_specs(weight, activation)
            if asked is not None and scheme.weight != asked.weight:
                continue
            if _holds(exporter, scheme, shape):
                lost = source.activation is not None and activation is None
                return Choice(scheme, note="activations are no longer quantized" if lost else None)
    if asked is not None:
        return Choice(asked, reason=f"{_told(asked, source)} was asked for, and does not hold codes of "
                                    f"{_told(source, asked)}")  # fmt: skip
    nearest = FORMATS[exporter.FORMAT].nearest
    if nearest is None:
        raise FormatError(
            f"{exporter.FORMAT} does not hold {source.name}, and rounding to what it holds would ruin a model that was "
            "not trained so",
            "choose another format, or train with lowbit finetune",
        )
    scheme = SCHEMES[nearest[source.weight.bits > 4]]
    if scheme.weight.group_size_is_free:  # the source's group size, or one that divides the row
        sizes = (source.weight.group_size, 128, 64, 32)
        scheme = scheme.with_group_size(next((size for size in sizes if size and shape[1] % size == 0), -1))
    return Choice(scheme, f"{exporter.FORMAT} has no {source.name}")


def _instead(source: str, exporter: Exporter) -> str:
    """The command that makes such a folder of a model that is not quantized."""
    if exporter.FORMAT == "float":
        return "it is in 16 bits already"
    nearest = FORMATS[exporter.FORMAT].nearest
    scheme = nearest[0] if nearest else next(name for name, each in SCHEMES.items() if _has_place(exporter, each))
    return f"quantize it instead: lowbit quantize {source} --format {exporter.FORMAT} --scheme {scheme} -o OUT"


def _told(scheme: Scheme, other: Scheme) -> str:
    """The name of a scheme; of two with one name, with what tells them apart."""
    size = scheme.weight.group_size
    return scheme.name if scheme.name != other.name or size is None else f"{scheme.name} in groups of {size}"


def _multiplied(weight: WeightSpec, activation: ActivationSpec | None) -> bool:
    """False for integers of under 8 bits with 8-bit integer activations: kernels take 8 and 8, and a code takes a byte
    either way."""
    return activation is None or activation.number != "int" or activation.bits != 8 or weight.bits == 8


def _holds(exporter: Exporter, scheme: Scheme, shape: tuple[int, int]) -> bool:
    return _has_place(exporter, scheme) and exporter.unfit(shape, scheme) is None


def _has_place(exporter: Exporter, scheme: Scheme) -> bool:
    try:
        exporter.storage_format(scheme)
    except FormatError:
        return False
    return True


def _planned(
    tensor: PlannedTensor, choices: dict[str, Choice], checkpoint: Checkpoint, exporter: Exporter, settings: Settings
) -> PlannedTensor:
    """A tensor planned as repacked, with scales in the source's dtype, or as requantized, with the reason."""
    if tensor.linear is None or tensor.scheme is None:
        return tensor
    choice = choices[tensor.linear.name]
    notes = (*tensor.notes, *([choice.note] if choice.note else []))
    if choice.reason is not None:
        return replace(tensor, notes=(*notes, f"requantized: {choice.reason}"))
    dtype = checkpoint.scale_dtype(tensor.name)
    # Scales keep the source's dtype in formats that store scales of any dtype.
    any_dtype = all(exporter.scale_format(tensor.scheme, each) == str(each).removeprefix("torch.") for each in FLOATS)
    if dtype in FLOATS and dtype != tensor.dtype and any_dtype:
        tensor = replace(tensor, **stored_as(tensor.linear, tensor.scheme, dtype, exporter, settings))
    return replace(tensor, making=Making.repacked, notes=notes)


def _checked_values(plan: FolderPlan, checkpoint: Checkpoint, exporter: Exporter) -> FolderPlan:
    """The plan, in which linears are requantized whose values the target cannot store, though it has their scheme."""
    if exporter.FORMAT == "float":
        return plan
    tensors = []
    for tensor in plan.tensors:
        if tensor.making is Making.repacked and tensor.scheme is not None and tensor.linear is not None:
            reason = None
            for first, last in tensor.slabs(SLAB_WEIGHTS):
                quantized = widened(checkpoint.read_quantized(tensor.name, first, last), tensor.scheme.weight)
                reason = exporter.inexact(quantized, tensor.scheme, tensor.dtype)
                if reason is not None:
                    break
            checkpoint.release(tensor.name)
            if reason is not None:
                anew = stored_as(tensor.linear, tensor.scheme, plan.dtype, exporter, plan.settings)
                notes = (*tensor.notes, f"requantized: {reason}")
                tensor = replace(tensor, making=Making.rounded, notes=notes, **anew)
        tensors.append(tensor)
    return replace(plan, tensors=tuple(tensors))
