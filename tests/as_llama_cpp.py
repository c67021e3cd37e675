"""transformers made to compute what llama.cpp does, where the two differ: what is left shows whether that was all.

one_epsilon       Kimi Linear: rms_norm_eps for the norms of latents, and in L2 norms x / √(Σx² + ε) of q and k, where
                  transformers has 1e-6
sample_deviation  Gemma 3n: sparse activations are cut at mean + 1.645 deviations; squares are divided by n - 1, not n
table_of_gelu     ggml's table of float16: GELU of the argument rounded to float16, 0 below -10, the argument above 10
steps_of_gelu     the same with another table in llama.cpp too, a few steps wide. Where one argument of GELU differs in
                  its last bits between the two programs, ggml's table may give neighbouring numbers of float16; a
                  table of few steps gives the same one
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from llama_cpp import ggml


@contextmanager
def one_epsilon(epsilon: float) -> Iterator[None]:
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    normed, init = kimi.l2norm, kimi.KimiLinearRMSNorm.__init__

    def made(self: nn.Module, width: int, eps: float = 0.0) -> None:
        init(self, width, epsilon)

    with (
        patch.object(kimi, "l2norm", lambda x, dim, eps: normed(x, dim, epsilon)),
        patch.object(kimi.KimiLinearRMSNorm, "__init__", made),
    ):
        yield


@contextmanager
def sample_deviation() -> Iterator[None]:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    def cut(mlp: nn.Module, x: Tensor) -> Tensor:
        share = torch.tensor(mlp.activation_sparsity)
        at = x.mean(-1, keepdim=True) + x.std(-1, keepdim=True) * torch.distributions.Normal(0.0, 1.0).icdf(share)
        return torch.relu(x - at)

    with patch.object(Gemma3nTextMLP, "_gaussian_topk", cut):
        yield


@contextmanager
def table_of_gelu() -> Iterator[None]:
    from transformers.models.gemma3n import modeling_gemma3n as gemma3n

    table = torch.frombuffer(bytearray(bytes(_table())), dtype=torch.float16).float()

    class TableGELU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = table[x.half().view(torch.int16).to(torch.int64) & 0xFFFF]
            return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))

    name = "gelu_pytorch_tanh"
    own = gemma3n.ACT2FN.get(name)  # the class, which [name] would call
    gemma3n.ACT2FN[name] = TableGELU
    try:
        yield
    finally:
        gemma3n.ACT2FN[name] = own


@contextmanager
def steps_of_gelu(width: float = 1.0) -> Iterator[None]:
    table = _table()
    known = bytes(table)
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    steps = nn.functional.gelu((x / width).round() * width, approximate="tanh").half()
    try:
        ctypes.memmove(table, steps.numpy().tobytes(), len(known))
        with table_of_gelu():
            yield
    finally:
        ctypes.memmove(table, known, len(known))


def _table() -> ctypes.Array[ctypes.c_uint16]:
    """llama.cpp's own, by the bits of the argument in float16."""
    library = ggml()
    library.ggml_cpu_init()  # fills it, the first time
    return (ctypes.c_uint16 * 65536).in_dll(library, "ggml_table_gelu_f16")
