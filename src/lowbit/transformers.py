"""Makes transformers load lowbit's codebook folders: `import lowbit.transformers`, then `from_pretrained` as always.

    import lowbit.transformers
    model = AutoModelForCausalLM.from_pretrained("out")

Every linear that config.json names becomes a `CodebookLinear`. Refused, with a ValueError that names the linear: one
that the model does not have, or that is no nn.Linear, as experts that transformers merges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.formats.codebook.linear import CodebookLinear
from lowbit.formats.codebook.read import stated_specs

QUANT_METHOD = "lowbit-codebook"


@register_quantization_config(QUANT_METHOD)
class CodebookConfig(QuantizationConfigMixin):
    """`quantization_config` of a codebook folder; ValueError where it is not one."""

    def __init__(self, version: int = 1, groups: list[dict[str, Any]] | None = None, **others: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.version, self.groups = version, groups
        stated_specs({"version": version, "groups": groups})


@register_quantizer(QUANT_METHOD)
class CodebookQuantizer(HfQuantizer):
    """Puts the linears in place before the files are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        modules = dict(model.named_modules())
        for name, spec in stated_specs(self.quantization_config.to_dict()).items():
            linear = modules.get(name)
            if type(linear) is not nn.Linear:
                found = "no such module" if linear is None else type(linear).__name__
                raise ValueError(f"{name} is quantized in the files, but the model has {found} in its place; "
                                 f"lowbit.load reads such a folder")  # fmt: skip
            with torch.device("meta"):
                replaced = CodebookLinear(spec, linear.in_features, linear.out_features, linear.bias is not None,
                                          linear.weight.dtype)  # fmt: skip
            model.set_submodule(name, replaced)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
