"""Experts of a class that does not describe its computation: their inputs are seen by the products."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import lowbit
from lowbit.calibrate.watched_experts import WatchedExperts
from lowbit.errors import ArchitectureError
from tiny_types import make_tiny

E, T, H, WIDTH = 3, 5, 8, 4


class OneByOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * WIDTH, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, WIDTH))

    def forward(self, x, chosen):
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            gate, up = functional.linear(x[chosen == expert], self.gate_up_proj[expert]).chunk(2, -1)
            out[chosen == expert] = functional.linear(gate * up, self.down_proj[expert])
        return out


class AllAtOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(E, WIDTH, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, WIDTH))

    def forward(self, x):
        hidden = torch.bmm(x.expand(E, -1, -1), self.up_proj.transpose(1, 2)).relu()
        return (hidden @ self.down_proj.transpose(1, 2)).sum(0)


class Summed(AllAtOnce):
    def forward(self, x):
        return torch.einsum("th,ewh->tw", x, self.up_proj) @ self.down_proj.sum(0).t()


def watch(experts, *arguments):
    seen = {}
    watched = WatchedExperts(experts, lambda expert, which, x: seen.__setitem__((expert, which), x.clone()))
    with torch.no_grad():
        out = watched(*arguments)
    return watched, out, seen


def test_an_expert_that_runs_alone_is_seen_with_the_tokens_routed_to_it():
    experts, x, chosen = OneByOne(), torch.randn(T, H), torch.tensor([0, 2, 0, 2, 2])
    watched, out, seen = watch(experts, x, chosen)
    watched.check()
    assert torch.equal(out, experts(x, chosen))
    assert seen.keys() == {(0, "input"), (0, "hidden"), (2, "input"), (2, "hidden")}
    assert torch.equal(seen[2, "input"], x[chosen == 2])
    gate, up = functional.linear(x[chosen == 2], experts.gate_up_proj[2]).chunk(2, -1)
    assert torch.equal(seen[2, "hidden"], gate * up)


def test_experts_that_run_together_are_seen_one_by_one():
    experts, x = AllAtOnce(), torch.randn(1, T, H)
    _, out, seen = watch(experts, x)
    assert torch.equal(out, experts(x))
    assert seen.keys() == {(expert, which) for expert in range(E) for which in ("input", "hidden")}
    assert torch.equal(seen[1, "input"], x[0])
    assert torch.allclose(seen[1, "hidden"], functional.linear(x[0], experts.up_proj[1]).relu(), atol=1e-6)


def test_a_class_whose_products_cannot_be_seen_is_refused():
    watched, _, seen = watch(Summed(), torch.randn(T, H))
    assert not seen
    with pytest.raises(ArchitectureError, match=r"Summed is a fused operation .* its inputs cannot be measured"):
        watched.check()


def test_showing_every_token_to_every_expert_is_refused():
    with pytest.raises(ArchitectureError, match="not every expert can see every token"):
        WatchedExperts(OneByOne(), lambda *_: None)(torch.randn(T, H), all_tokens=True)


# Experts of a class without description, with such shared experts beside, and blocks whose parts return lists.
@pytest.mark.parametrize("model_type", ["longcat_flash", "inkling_text", "openai-gpt"])
def test_gptq_chooses_the_codes_of_models_with_such_classes(tmp_path, model_type):
    source = make_tiny(tmp_path / "source", model_type)
    made = lowbit.quantize(source, tmp_path / "out", scheme="W4A16", group_size=32, method="gptq", samples=16,
                           seqlen=64, expert_tokens=8)  # fmt: skip
    methods = {entry.name: entry.method for entry in made.report.tensors if entry.scheme is not None}
    assert "gptq" in methods.values()
    assert all(method == "gptq" for name, method in methods.items() if "experts" not in name)
    assert not [name for name, method in methods.items() if "shared_experts" in name and method != "gptq"]
