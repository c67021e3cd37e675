"""Makes transformers load lowbit's codebook folders: `import lowbit.transformers`, then `from_pretrained` as always.

    import lowbit.transformers
    model = AutoModelForCausalLM.from_pretrained("out")

Every linear that config.json names becomes a `CodebookLinear`. Refused, with a ValueError that names the linear: one
that the model does not have, or that is no nn.Linear, as experts that transformers merges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.formats.codebook.read import parts_of, stated_specs, unpacked
from lowbit.schemes import WeightSpec

QUANT_METHOD = "lowbit-codebook"


class CodebookLinear(nn.Module):
    """y = x Wᵀ + bias, W decoded of the buffers, which have the names of the files. Smaller than 16 bits, not quicker.

    dtype of the bias; a product has the dtype of its input
    """

    def __init__(self, spec: WeightSpec, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.spec, self.in_features, self.out_features = spec, in_features, out_features
        for leaf, (dtypes, shape) in parts_of(spec, (out_features, in_features)).items():
            self.register_buffer(leaf, torch.zeros(shape, dtype=dtypes[0]))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    def decoded(self) -> Tensor:
        """float32 [N, K]."""
        parts = {leaf: self.get_buffer(leaf) for leaf in parts_of(self.spec, (self.out_features, self.in_features))}
        return unpacked(self.spec, self.in_features, parts).decode()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.decoded().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.spec.number}{self.spec.bits}"


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
