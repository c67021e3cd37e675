"""Gemma 3n in llama.cpp: what is left of the difference when transformers computes two things as llama.cpp does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gguf_models import describe_folder, make_case, prompt_and_logprobs, write_plain
from llama_cpp import top_logprobs

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")


class TableGELU(nn.Module):
    """ggml's: a table of float16 for arguments and values, 0 below -10 and the argument above 10."""

    def forward(self, x: Tensor) -> Tensor:
        looked_up = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, looked_up))


def cut_by_the_deviation_of_a_sample(mlp: nn.Module, x: Tensor) -> Tensor:
    share = torch.tensor(mlp.activation_sparsity)
    cut = x.mean(-1, keepdim=True) + x.std(-1, keepdim=True) * torch.distributions.Normal(0.0, 1.0).icdf(share)
    return torch.relu(x - cut)


# The second has 22 random blocks, through which what is left of the table grows.
@pytest.mark.parametrize(("case", "most"), [("gemma3n_text", 5e-4), ("gemma3n_shared", 1e-2)])
def test_llama_cpp_computes_gemma_3n_but_for_gelu_and_the_deviation(tmp_path, monkeypatch, case, most):
    from transformers.models.gemma3n import modeling_gemma3n as gemma3n

    monkeypatch.setattr(gemma3n.Gemma3nTextMLP, "_gaussian_topk", cut_by_the_deviation_of_a_sample)
    monkeypatch.setitem(gemma3n.ACT2FN, "gelu_pytorch_tanh", TableGELU)
    folder = make_case(tmp_path / "hf", case)
    model, checkpoint = describe_folder(folder)
    path = write_plain(model, checkpoint, tmp_path / "model.gguf")
    ids, expected = prompt_and_logprobs(folder)
    found = top_logprobs(path, ids)
    assert max(abs(value - expected[token].item()) for token, value in found.items()) < most
