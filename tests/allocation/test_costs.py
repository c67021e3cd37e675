"""What each type costs each tensor, against the definition by autograd over the whole model, and against KL itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close

from lowbit.allocation.costs import Tensors, Weighed, measure_costs
from lowbit.architecture.loading import load_model, module_names
from lowbit.calibrate.blocks import BlockRunner
from lowbit.checkpoint import open_checkpoint
from models import make_model

IDS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
         "num_hidden_layers": 3}  # fmt: skip
TYPES = ("fine", "coarse")


def round_to(kind, name, weight, importance):
    """Errors whose size alone depends on the type."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight)))
    return weight + noise * {"fine": 1e-4, "coarse": 1e-3}[kind]


def weighed(name: str, *sources: str) -> Weighed:
    return Weighed(name, sources or (name,), TYPES)


def costs_of(model, ids=IDS, **outside):
    checkpoint = open_checkpoint(model)
    runner = BlockRunner(checkpoint)
    linears = [name for name, linear in runner.architecture.linears.items() if linear.block is not None]
    tensors = Tensors([weighed(f"{name}.weight") for name in linears], **outside)
    return measure_costs(runner, checkpoint, ids, tensors, round_to, 7, 1 << 30), checkpoint


def by_autograd(checkpoint, ids=IDS):
    """Linear → (inputs, gradients) of the whole model at once: the definition, without blocks."""
    whole, seen = load_model(checkpoint), {}
    for name, path in module_names(whole, BlockRunner(checkpoint).architecture).items():

        def keep(_module, arguments, out, name=name):
            out.retain_grad()
            seen[name] = arguments[0], out

        whole.get_submodule(path).register_forward_hook(keep)
    logits = whole(inputs_embeds=whole.get_input_embeddings()(ids).requires_grad_()).logits.flatten(0, 1)
    drawn = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(7))
    labels = torch.searchsorted(logits.detach().softmax(-1).cumsum(-1), drawn)[:, 0]
    cross_entropy(logits, labels, reduction="sum").backward()
    return {name: (x.detach().flatten(0, 1), out.grad.flatten(0, 1)) for name, (x, out) in seen.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("costs") / "model", **SMALL)


def test_a_linear_costs_what_the_definition_says(model):
    costs, checkpoint = costs_of(model)
    seen = by_autograd(checkpoint)
    for name, its in costs.items():
        x, gradient = seen[name.removesuffix(".weight")]
        weight = checkpoint.read(name).float()
        for kind, found in its.items():
            moved = (x @ (round_to(kind, name, weight, None) - weight).T * gradient).sum(-1)
            assert_close(torch.tensor(found), (moved.square() / 2).mean(), rtol=1e-3, atol=0.0)


def test_a_token_counts_for_one_nat_at_most(model):
    """Errors so large that the second order means nothing."""
    checkpoint = open_checkpoint(model)
    runner = BlockRunner(checkpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    costs = measure_costs(runner, checkpoint, IDS, Tensors([Weighed(name, (name,), ("huge",))]),
                          lambda kind, name, weight, importance: weight + 1e6, 7, 1 << 30)  # fmt: skip
    assert costs[name]["huge"] == pytest.approx(1.0)


def test_the_sum_is_near_the_divergence(model):
    """All linears and the embedding rounded at once: KL of the whole model, to second order."""
    ids = torch.randint(3, 250, (40, 64), generator=torch.Generator().manual_seed(1))
    embedding = weighed("model.embed_tokens.weight")
    costs, checkpoint = costs_of(model, ids, embedding=embedding)
    whole = load_model(checkpoint)
    with torch.no_grad():
        expected = whole(ids).logits.log_softmax(-1).flatten(0, 1)
        for name in costs:
            parameter = whole.get_parameter(name)
            parameter.copy_(round_to("coarse", name, parameter, None))
        found = whole(ids).logits.log_softmax(-1).flatten(0, 1)
    divergence = kl_div(found, expected, log_target=True, reduction="batchmean").item()
    assert sum(its["coarse"] for its in costs.values()) == pytest.approx(divergence, rel=0.35)


def test_the_head_costs_its_divergence(model):
    head = weighed("lm_head.weight")
    costs, checkpoint = costs_of(model, head=head)
    whole = load_model(checkpoint)
    with torch.no_grad():
        hidden = whole.model(IDS).last_hidden_state
        weight = whole.lm_head.weight
        expected = (hidden @ weight.T).log_softmax(-1)
        found = (hidden @ round_to("coarse", "lm_head.weight", weight, None).T).log_softmax(-1)
        every = kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    some = torch.cat([part.flatten()[::4] for part in every.split(85)])  # one batch holds all windows
    assert costs["lm_head.weight"]["coarse"] == pytest.approx(some.mean().item(), rel=1e-2)


def test_ten_times_the_error_costs_a_hundred_times_as_much(model):
    costs, _ = costs_of(model, embedding=weighed("model.embed_tokens.weight"))
    for its in costs.values():
        assert its["coarse"] == pytest.approx(100 * its["fine"], rel=0.05)


def test_experts_in_one_operation_are_weighed_at_the_output_of_the_block(tmp_path):
    """One tensor of the output holds all experts of a block."""
    folder = make_model(tmp_path / "model", "qwen3_moe")
    checkpoint = open_checkpoint(folder)
    runner = BlockRunner(checkpoint)
    experts = [name for name, linear in runner.architecture.linears.items()
               if linear.expert is not None and linear.block == 0 and "down" in name]  # fmt: skip
    assert len(experts) > 1
    stacked = Weighed("experts", tuple(f"{name}.weight" for name in experts), TYPES)
    costs = measure_costs(runner, checkpoint, IDS, Tensors([stacked]), round_to, 7, 1 << 30)["experts"]
    assert 0 < costs["fine"] < costs["coarse"]
    assert costs["coarse"] == pytest.approx(100 * costs["fine"], rel=0.1)


def test_both_ways_agree_on_a_linear(model, monkeypatch):
    """At its own output, and at that of the block, for linears behind which tokens do not read each other."""
    direct, _ = costs_of(model)
    monkeypatch.setattr(BlockRunner, "linear_module", lambda self, name: None)
    at_block, _ = costs_of(model)
    for name, its in direct.items():
        if ".mlp." in name or "o_proj" in name:
            assert at_block[name]["fine"] == pytest.approx(its["fine"], rel=0.02), name
