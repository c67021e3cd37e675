"""The linear of codebook folders in transformers: codes in memory, decoded in torch for every product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.formats.codebook.read import parts_of, unpacked
from lowbit.schemes import WeightSpec


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
