"""A transformers model without its weights: parameters on the meta device, buffers computed.

The class is the one that config.json names: a causal language model, one that also sees or hears, a bare decoder
(embedding models), or one with a classification head (reward models).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowbit.checkpoint.base import as_transformers_has_it, transformers_config
from lowbit.checkpoint.stated import without_quantization
from lowbit.errors import ArchitectureError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def build_without_weights(
    config: dict[str, Any], folder: str, trust_remote_code: bool = False, dtype: torch.dtype | None = None,
    eager: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """The transformers model of a parsed config.json in evaluation mode; `folder` holds it (for remote code only).

    eager  attention written out in torch, which runs everywhere and shows what the class does

    Raises ArchitectureError where transformers cannot build it.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = as_transformers_has_it(config)
    plain = without_quantization(config)
    if not isinstance(config.get("model_type"), str):
        raise ArchitectureError(
            f"{folder}: config.json states no model_type, which says what the tensors are for",
            "copy config.json of the original model; it must be that of a language model",
        )
    own_code = trust_remote_code and bool(config.get("auto_map"))
    if config["model_type"] not in CONFIG_MAPPING and not own_code:
        raise ArchitectureError(
            f"{folder}: model type {config['model_type']!r} is not known to transformers {transformers.__version__}",
            "upgrade transformers if the model is newer than it",
        )
    try:
        if own_code:
            parsed = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            if hasattr(parsed, "quantization_config"):
                delattr(parsed, "quantization_config")
        else:
            parsed = transformers_config(plain)
        if eager:
            parsed._attn_implementation = "eager"
        with parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            factory = auto_class(parsed, config.get("architectures"))
            keywords = {} if dtype is None else {"dtype": dtype}
            return factory.from_config(parsed, trust_remote_code=trust_remote_code, **keywords).eval()
    except Exception as error:  # validators of transformers, and code of others, can raise anything
        raise ArchitectureError(
            f"{folder}: transformers cannot build a model of type {config.get('model_type')!r} from config.json: "
            f"{' '.join(str(error).split())[:300]}",
            "check config.json, or upgrade transformers if the model is newer than it",
        ) from error


def auto_class(config: Any, named: Any = None) -> Any:
    """transformers' factory for a config: what `architectures` of config.json names, if there is such a class."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    name = str(named[0]) if isinstance(named, list) and named else ""
    for end, factory in (("ForSequenceClassification", AutoModelForSequenceClassification),
                         ("ForTokenClassification", AutoModelForTokenClassification),
                         ("Model", AutoModel)):  # fmt: skip
        if name.endswith(end) and not name.endswith("LMHeadModel") and type(config) in factory._model_mapping:
            return factory
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    judges = name.endswith("ForImageClassification") and type(config) in AutoModelForImageClassification._model_mapping
    if sees and judges:  # images, by what its text model answers (ShieldGemma 2)
        return AutoModelForImageClassification
    if sees and getattr(AutoModelForImageTextToText._model_mapping[type(config)], "__name__", "") == name:
        return AutoModelForImageTextToText
    text = type(config) in AutoModelForCausalLM._model_mapping
    if not (sees or text) and type(config) in AutoModelForMultimodalLM._model_mapping:  # it hears
        return AutoModelForMultimodalLM
    return AutoModelForImageTextToText if sees and not text else AutoModelForCausalLM


# Elements above which a new tensor goes to the meta device at once: no buffer is so large, and the experts of a block
# may be larger than memory.
_LARGE = 1 << 26
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class _LargeOnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None:
            sizes = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules constructed inside get parameters without storage; buffers are computed as usual.

    `torch.device("meta")` would take the buffers along, and what a class computes for them in __init__ would be lost.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # a tied one is there already: keep its identity
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        if parameter is not None:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws no numbers for it
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
