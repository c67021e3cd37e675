"""`prepare`: fake quantization on the linears of a model in memory, as an output's plan has them; `remove`: off again.

    the settings of `lowbit.quantize` → the plan of the output → linear → its grid or ggml type
    → a parametrization of the parameter that holds it

So overrides, `ignore`, group sizes that do not divide, fused sets and llama.cpp's mix of types are those of an output.
Parameters stay the same objects; that of a linear L is then called L.parametrizations.weight.original, and what is
learned of its scales L.parametrizations.weight.0.changes.

Refused, besides what `architecture.in_memory` refuses: a model that is prepared already, or all of whose parameters are
frozen; methods and importance matrices, whose place training takes.

Keys and values as a quantized KV cache gives them back, while a model is trained.

    k̂ = decode(encode(k))        forward; backward straight through: the gradient of k̂ is that of k

Each attention module gets the cache around its own forward pass, by hooks: so whatever runs it, a trainer, or the
recomputation of activation checkpointing in the backward pass, sees the same. `lowbit.kv.simulated` has what types do.
Ranges that an engine has stored, of FP8 and NVFP4, are those of the batch, as static activation scales are in training.

Refused: types with tables that need a calibration text (KVQuant), and what the simulation refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial, reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lowbit.architecture import Architecture
from lowbit.architecture.disk_layout import disk_layout
from lowbit.architecture.in_memory import model_in_memory, unwrapped
from lowbit.calibrate.kv_cache import attention_layers
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.distillation.inputs import rounding_hook
from lowbit.errors import UsageError
from lowbit.knobs import Facts
from lowbit.kv.simulated import quantized_layers, simulated_cache
from lowbit.kv.types import OF_OUTPUT, CacheType, find_cache_type
from lowbit.plan.plan import Plan, Request
from lowbit.plan.plan import prepare as plan_output
from lowbit.rounding.rtn import Fitted, TensorRange
from lowbit.rounding.target import Target
from lowbit.schemes import ActivationSpec
from lowbit.settings import Settings, make_settings, refuse_unread
from lowbit.train.fake_quantize import FakeQuantize, QuantizedPart

_ATTRIBUTE = "lowbit_training"
# The method whose plan has a target for every linear that codes can be given for; nothing of it is run.
_PLANNED_AS = "gptq"


@dataclass
class Training:
    """What `prepare` did to a model.

    settings  of the output
    options   trust in the model's own code
    dtype     of floats and scales in the output; None: the model's
    linears   linear → name of the parameter that holds it
    hooks     of fake-quantized activations, and of the cache
    """

    settings: Settings
    options: OpenOptions
    dtype: torch.dtype | None
    linears: dict[str, str]
    hooks: list[Any] = field(default_factory=list)

    @property
    def planned(self) -> Settings:
        """The settings as they are planned."""
        return self.settings.model_copy(update={"method": _PLANNED_AS})


def prepare(
    model: Any,
    scheme: str = "W4A16",
    *,
    learn_scales: bool = True,
    activations: bool = True,
    cache: str | None = None,
    dtype: torch.dtype | None = None,
    options: OpenOptions | None = None,
    scales: Mapping[str, Fitted] = MappingProxyType({}),
    **settings: Any,
) -> Any:
    """Put fake quantization on the linears of a transformers model, in place; returns the model.

    scheme        of folders (W4A16, NVFP4 …) or a type of GGUF files (Q4_0, Q4_K_M, TQ2_0 …)
    learn_scales  scales of grids are parameters (LSQ); False: fitted to the weights in every forward pass
    activations   fake-quantize the inputs of linears too, where the scheme quantizes them
    cache         round keys and values as this type of KV cache does (`lowbit.kv.CACHE_TYPES`: int4_per_token_head …).
                  None: as kv_cache of the settings will have an engine do it; without both they are not rounded
    dtype         of scales and of what stays unquantized in the output; None: the model's own. A model that is trained
                  in float32 may be written in bfloat16
    scales        linear → scales that learned ones begin with, of a model that was quantized before
    settings      format, group_size, ignore, overrides, range …: those of `lowbit.quantize` that shape its output
    """
    model = unwrapped(model)
    if hasattr(model, _ATTRIBUTE):
        raise UsageError("the model is prepared already", "lowbit.train.remove takes the fake quantization off")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("every parameter of the model is frozen: nothing would be trained",
                         "model.requires_grad_(True), for all or some of them")  # fmt: skip
    chosen = make_settings(None, scheme=scheme, **settings)
    for name in ("method", "method_overrides", "imatrix", "mmproj"):
        if name in chosen.given:
            raise UsageError(f"{name} is not read by a training", "training takes the place of a method; leave it out")
    refuse_unread(chosen, None, Facts(gguf=chosen.writes_gguf()))
    named = cache if cache is not None else chosen.kv_cache
    rounds = None if named is None else cache_of(named)
    training = Training(chosen, options or OpenOptions(), dtype, {})
    source = model_in_memory(model, None, options, dtype=dtype)
    try:
        plan, checkpoint = planned(source, training, preview=True)
        assert plan.architecture is not None
        targets = _with_ranges(plan.targets, plan.architecture, checkpoint)
        if not targets:
            raise UsageError("no linear of a decoder block is quantized", "loosen ignore, or choose another scheme")
        fitted = next((name for name, target in targets.items() if target.fits_tables), None)
        if fitted is not None:
            raise UsageError(f"{fitted} has values that are fitted to its weights, which a training would fit anew in "
                             f"every step", "train with W4A16, or another scheme of fixed values")  # fmt: skip
        fakes: dict[str, FakeQuantize] = {}
        for parameter, parts in _parts(model, targets, plan.architecture).items():
            values = model.get_parameter(parameter)
            fakes[parameter] = FakeQuantize(values, parts, learn_scales, scales).to(values.device)
            training.linears |= {part.linear: parameter for part in parts}
        if activations:
            _refuse_fused_activations(plan.activations, training.linears)
        if rounds is not None:
            quantized_layers(model, rounds)  # which refuses heads and models that the type does not take
    finally:
        source.remove()
    # Nothing fails from here on: a model is prepared whole, or not at all.
    for parameter, fake in fakes.items():
        owner, _, leaf = parameter.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), leaf, fake, unsafe=True)
    if activations:
        training.hooks = _quantize_activations(model, plan.activations, training.linears)
    if rounds is not None:
        training.hooks += round_cache(model, rounds)
    setattr(model, _ATTRIBUTE, training)
    return model


def remove(model: Any) -> Any:
    """Take the fake quantization off, in place: plain parameters, with the decoded weights; returns the model."""
    model = unwrapped(model)
    training = training_of(model)
    for parameter in dict.fromkeys(training.linears.values()):
        owner_name, _, leaf = parameter.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(owner_name), leaf, leave_parametrized=True)
    for hook in training.hooks:
        hook.remove()
    delattr(model, _ATTRIBUTE)
    return model


def training_of(model: Any) -> Training:
    """What `prepare` did; UsageError for a model that it was not called for."""
    training = getattr(model, _ATTRIBUTE, None)
    if training is None:
        raise UsageError("the model is not prepared", "call lowbit.train.prepare(model, scheme) before training")
    return training


def planned(source: Checkpoint, training: Training, **request: Any) -> tuple[Plan, Checkpoint]:
    """(the plan of the output, the open model under its names)."""
    prepared = plan_output(Request(source, training.planned, training.options, lacks_tokenizer=True, **request))
    return prepared.plan, prepared.checkpoint


@torch.no_grad()
def _with_ranges(targets: dict[str, Target], architecture: Architecture, checkpoint: Checkpoint) -> dict[str, Target]:
    """The targets with the range of the whole tensor, or of the fused set, where scales need one."""
    ranged = dict(targets)
    for name, target in targets.items():
        if not target.needs_range:
            continue
        fused = architecture.linears[name].fused
        shared = fused is not None and target.fused_sets_share
        members = [each for each in architecture.fused_sets[fused] if each in targets] if shared and fused else [name]
        extents = []
        for member in members:
            weight = checkpoint.read(f"{member}.weight")
            weight = weight.t() if architecture.linears[member].transposed else weight
            extents.append(target.measured(weight.float().contiguous()))
        ranged[name] = target.ranged(reduce(TensorRange.joined, extents))
    return ranged


def _parts(model: Any, targets: dict[str, Target], architecture: Architecture) -> dict[str, list[QuantizedPart]]:
    """Parameter of the model → the linears in it that are quantized."""
    found: dict[str, list[QuantizedPart]] = {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for parameter, placement in disk_layout(model, split_experts=True, own_names=architecture.own_names).items():
        for stored, part, expert in placement.pieces():
            linear = stored.removesuffix(".weight")
            if stored.endswith(".weight") and linear in targets and parameter not in tied and part.total is None:
                turned = architecture.linears[linear].transposed
                each = QuantizedPart(linear, targets[linear], part, expert, turned)
                found.setdefault(parameter, []).append(each)
    missing = targets.keys() - {part.linear for parts in found.values() for part in parts}
    if missing:
        raise UsageError(f"{min(missing)} is no parameter of {type(model).__name__} by itself",
                         "leave it out with ignore")  # fmt: skip
    return found


def _refuse_fused_activations(activations: dict[str, ActivationSpec], linears: dict[str, str]) -> None:
    for linear in activations:
        if not linears.get(linear, "").endswith(".weight"):
            raise UsageError(f"{linear} runs inside a fused operation, whose inputs cannot be rounded in training",
                             "take a scheme that rounds weights only; prepare(…, activations=False) of lowbit.train "
                             "trains the weights alone")  # fmt: skip


def _quantize_activations(
    model: nn.Module, activations: dict[str, ActivationSpec], linears: dict[str, str]
) -> list[Any]:
    """Hooks that round the inputs of linears."""
    owners = {linear: model.get_submodule(linears[linear].removesuffix(".weight")) for linear in activations}
    return [owners[linear].register_forward_pre_hook(rounding_hook(spec)) for linear, spec in activations.items()]


def cache_of(name: str) -> CacheType:
    """The type of a name; UsageError for one that a training cannot have."""
    found = find_cache_type(OF_OUTPUT.get(name, name))
    if "distribution" in found.needs:
        raise UsageError(f"cache type {found.name} needs tables of a calibration text, which change in training",
                         "choose fp8_calibrated, int8_per_token_head, int4_per_token_head, kivi4 or kivi2")  # fmt: skip
    return found


def round_cache(model: nn.Module, cache: CacheType) -> list[Any]:
    """Have the attention of a model see keys and values of this cache type; returns the hooks."""
    layers = set(quantized_layers(model, cache))
    hooks: list[Any] = []
    for module, layer in attention_layers(model).items():
        if layer in layers:
            within = ExitStack()  # empty outside of the module's forward pass
            enter = partial(_enter, within, model, cache, layer)
            hooks += [module.register_forward_pre_hook(enter),
                      module.register_forward_hook(partial(_leave, within), always_call=True)]  # fmt: skip
    return hooks


def _enter(within: ExitStack, model: nn.Module, cache: CacheType, layer: int, *_: Any) -> None:
    within.enter_context(simulated_cache(model, cache, "batch", only=(layer,)))


def _leave(within: ExitStack, *_: Any) -> None:
    within.close()
