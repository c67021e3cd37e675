"""What a class of transformers does while it loads a quantized checkpoint, which no file tells.

_init_weights   runs over every module. Some classes read `module.weight` of each linear there, which a linear of
                packed codes does not have; loading then ends in an AttributeError.
decoding        waits for the first call of the model itself. A class that only its parts compute (Qwen-Omni thinks in
                one model and talks in another) is never called, so its packed layers are never decoded.
fused experts   are parameters, not linears. transformers puts a list of linears in the place of some of them when a
                checkpoint is quantized (Llama 4), so that their codes have a place.
one to many   a rule that cuts one stored weight into several is copied with the names of packed tensors beside the
                stored one, unless the parts are quantized; a rule of several names on both sides is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel


def has_no_forward(model: nn.Module) -> bool:
    """True for a model of models, which is never called itself."""
    return type(model).forward is nn.Module.forward


def initialization_reads(model: PreTrainedModel, quantized: Iterable[str]) -> str | None:
    """The class of a module whose initialization fails where `quantized`, names of linears, have no weight; None where
    all pass. Parameters of `model` are on the meta device, and stay as they are."""
    linears = [model.get_submodule(name) for name in dict.fromkeys(quantized)]
    held = [(linear, dict(linear._parameters)) for linear in linears]
    for linear in linears:
        linear._parameters.pop("weight", None)
    seen: set[str] = set()
    try:
        for name, module in model.named_modules():
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            if kind not in seen:
                seen.add(kind)
                if _needs_weight(model, module):
                    return type(module).__name__
    finally:
        for linear, parameters in held:  # in their order, which is that of the model's parameters
            linear._parameters.clear()
            linear._parameters.update(parameters)
    return None


def _needs_weight(model: PreTrainedModel, module: nn.Module) -> bool:
    try:
        model._init_weights(module)
    except AttributeError as error:
        return "has no attribute 'weight'" in str(error)
    except Exception:  # what a class computes while it initializes may need numbers, which meta tensors do not have
        return False
    return False


def replaced_experts(experts: Iterable[nn.Module]) -> tuple[str, ...]:
    """The quantization methods for which transformers puts linears in the place of all these modules of experts."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    kinds = {type(module).__name__ for module in experts}
    methods = [
        {str(getattr(method, "value", method)) for method in row["quantization_methods"]}
        if (row := MODULES_TO_PATCH_FOR_QUANTIZATION.get(kind)) else set()
        for kind in kinds
    ]  # fmt: skip
    return tuple(sorted(set.intersection(*methods))) if methods else ()


def cut_weights(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns of the first of the weights that transformers makes of one stored weight, by each of its rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = [rule for rule in get_model_conversion_mapping(model, add_legacy=False)
             if isinstance(rule, WeightConverter)]  # fmt: skip
    return tuple(
        rule._original_target_patterns[0]
        for rule in rules
        if len(rule._original_target_patterns) > 1
        and not getattr(rule.operations[0], "supports_many_to_many", False)
        and all(source.endswith(".weight") for source in rule._original_source_patterns)
    )
