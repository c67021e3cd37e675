"""A block stage by stage: the order in which inputs are reached, and statistics behind what was rounded before."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibrate.block_modules import Block, BlockInput, observed
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.passes import BlockPasses, Streams, run_through
from lowbit.calibrate.stages import added_to_stream, by_child, count_stages, find_idle, find_stages
from lowbit.checkpoint import open_checkpoint
from models import ARCHITECTURES, make_model

IDS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))


class Inputs:
    """Every input of a block, [tokens, K], by name."""

    def __init__(self):
        self.seen: dict[str, torch.Tensor] = {}

    def look(self, source: BlockInput, x: torch.Tensor) -> None:
        before = self.seen.get(source.name)
        self.seen[source.name] = x.double() if before is None else torch.cat([before, x.double()])

    def finish(self, block: int) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def stages_of(runner: BlockRunner, index: int = 1):
    states = runner.embed(IDS)
    runner.load(index)
    with torch.no_grad():
        return find_stages(runner.blocks[index], lambda: runner.forward(index, states.values[:1]))


def test_a_llama_block_has_four_stages(tiny_llama):
    stages = stages_of(BlockRunner(open_checkpoint(tiny_llama)))
    assert [[linear.name.split(".")[-1] for linear in stage.inputs[0].linears] for stage in stages] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip
    assert [stage.last for stage in stages] == [False, True, False, True]
    assert [stage.end for stage in stages] == [None, "self_attn.o_proj", None, "mlp.down_proj"]
    assert [len(stage.inputs) for stage in by_child(stages)] == [2, 2]


IDLE = {
    "llama": [("input_layernorm",), ("input_layernorm", "post_attention_layernorm")],
    # What attention put out is normed before it is added.
    "gemma2": [("input_layernorm",), ("input_layernorm", "pre_feedforward_layernorm")],
    # Both norms look at the block's input; the MLP wants its own.
    "gpt_neox": [("input_layernorm",), ("input_layernorm", "post_attention_layernorm")],
}


@pytest.mark.parametrize("architecture", IDLE)
def test_norms_whose_output_nobody_wants(folder, architecture):
    runner = BlockRunner(open_checkpoint(make_model(folder / f"idle-{architecture}", architecture)))
    states, stages = runner.embed(IDS), stages_of(runner)
    with torch.no_grad():
        found = find_idle(runner.blocks[1], stages, lambda: runner.forward(1, states.values[:1]))
    first, *rest = found.values()
    assert first == ()
    norms = [tuple(name for name in names if "norm" in name) for names in rest]
    assert norms == IDLE[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stages_hold_every_input_once(folder, architecture):
    runner = BlockRunner(open_checkpoint(make_model(folder / architecture, architecture)))
    stages, block = stages_of(runner), runner.blocks[1]
    names = [source.name for stage in stages for source in stage.inputs]
    assert sorted(names) == sorted(source.name for source in block.all_inputs)
    assert len(stages) == count_stages(block)
    children = [stage.child for stage in stages]
    assert children == sorted(children, key=children.index)  # a child's stages follow each other
    assert all(stage.last == (stage.child not in children[number + 1 :]) for number, stage in enumerate(stages))


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gemma2", "deepseek_v2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("room", [1 << 30, 0], ids=["inputs kept", "no room for inputs"])
def test_statistics_are_behind_what_was_rounded_before(folder, architecture, room, monkeypatch):
    """ "Rounding" a linear here is to shrink it; then the whole block is run at once and everything compared."""
    path = folder / architecture
    runner = BlockRunner(open_checkpoint(path if path.is_dir() else make_model(path, architecture)))
    if not room:
        monkeypatch.setattr(BlockRunner, "has_room", lambda self, shape: False)
    streams, before = Streams(runner, IDS, len(IDS)), runner.embed(IDS)
    runner.load(0)
    original = Inputs()
    with torch.no_grad(), observed(runner.blocks[0], runner.blocks[0].module, original):
        runner.forward(0, before.values)
    passes, found = BlockPasses(runner, 0, streams), {}
    for stage in passes.stages:
        found |= passes.measure(stage, lambda windows: None)
        runner.put({
            f"{linear.name}.weight": 0.7 * open_checkpoint(path).read(f"{linear.name}.weight").float()
            for source in stage.inputs for linear in source.linears
            if f"{linear.name}.weight" in open_checkpoint(path).tensors
        })  # fmt: skip
    passes.advance(lambda windows: None, open_checkpoint(path).read)
    behind = Inputs()
    with torch.no_grad(), observed(runner.blocks[0], runner.blocks[0].module, behind):
        quantized = runner.forward(0, before.values)
    torch.testing.assert_close(streams.quantized.values, quantized)
    for stage in passes.stages:
        for source in stage.inputs[:1]:  # others of a stage are not behind this one
            x = behind.seen[source.name]
            hessian, drift = found[source.name].hessian, found[source.name].drift
            torch.testing.assert_close(hessian.double(), x.T @ x, rtol=1e-4, atol=1e-5 * float(x.square().sum()))
            if source.expert is None:
                wanted = (original.seen[source.name] - x).T @ x
                damped = x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(x.shape[1])
                expected = torch.linalg.solve(damped, wanted.T).T
                torch.testing.assert_close(drift.double(), expected, rtol=1e-2, atol=1e-3)
    runner.drop(0)
    runner.load(0)
    run_through(runner, 0, before, IDS)
    torch.testing.assert_close(streams.unquantized.values, before.values)


ADDED = {
    "llama": ("self_attn", "mlp"),
    "opt": ("self_attn", "fc2"),
    "gpt_neox": ("attention", "mlp"),
    "qwen3_moe": ("self_attn", "mlp"),
    "gemma2": (),  # norms behind attention and MLP
    "granite": (),  # outputs are multiplied before they are added
}


@pytest.mark.parametrize("architecture", ADDED)
def test_children_whose_output_is_added_to_the_stream(folder, architecture):
    runner = BlockRunner(open_checkpoint(make_model(folder / f"added-{architecture}", architecture)))
    states, stages = runner.embed(IDS), stages_of(runner)
    h = states.values[:1]
    with torch.no_grad():
        found = added_to_stream(runner.blocks[1], stages, h, lambda: runner.forward(1, h))
    assert found == ADDED[architecture]


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gemma2"])
def test_what_the_stream_lost_is_the_regression_of_it_on_the_input(folder, architecture):
    """The stream before a child adds to it: the block's input, and the outputs of the children before."""
    path = make_model(folder / f"lost-{architecture}", architecture)
    runner = BlockRunner(open_checkpoint(path))
    streams, noise = Streams(runner, IDS, len(IDS)), torch.Generator().manual_seed(1)
    streams.quantized.values += 0.1 * torch.randn(streams.quantized.values.shape, generator=noise)
    runner.load(0)
    block, outputs = runner.blocks[0], dict.fromkeys(ADDED[architecture])

    def run(h: torch.Tensor) -> dict[str, torch.Tensor]:
        hooks = [block.module.get_submodule(child).register_forward_hook(
            lambda _module, _arguments, out, child=child: outputs.update(
                {child: (out[0] if isinstance(out, tuple) else out).double().reshape(-1, h.shape[-1])}))
            for child in outputs]  # fmt: skip
        with torch.no_grad():
            runner.forward(0, h)
        for hook in hooks:
            hook.remove()
        return dict(outputs)

    inputs = [each.values.clone() for each in (streams.unquantized, streams.quantized)]
    unquantized, quantized = run(inputs[0]), run(inputs[1])
    passes, seen = BlockPasses(runner, 0, streams), Inputs()
    with torch.no_grad(), observed(block, block.module, seen):
        runner.forward(0, inputs[1])
    lost = (inputs[0].double() - inputs[1].double()).flatten(0, 1)
    for stage in passes.stages:
        found = passes.measure(stage, lambda windows: None)[stage.inputs[0].name].lost
        if stage.end is None or stage.child not in outputs:
            assert found is None
            continue
        x = seen.seen[stage.inputs[0].name]
        damped = x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(x.shape[1])
        torch.testing.assert_close(found.double(), torch.linalg.solve(damped, x.T @ lost).T, rtol=1e-2, atol=1e-3)
        lost = lost + unquantized[stage.child] - quantized[stage.child]


def test_two_kinds_of_experts_in_one_child_are_one_stage():
    mlp = torch.nn.ModuleDict({"text": torch.nn.Identity(), "vision": torch.nn.Identity()})
    mlp.forward = lambda x: mlp["text"](x)
    module = torch.nn.ModuleDict({"mlp": mlp})
    experts = {f"mlp.{kind}": {(0, "input"): BlockInput(f"{kind}.0.input", ())} for kind in mlp}
    (stage,) = find_stages(Block("block", module, experts=experts), lambda: mlp(torch.ones(1, 2, 4)))
    assert [source.name for source in stage.inputs] == ["text.0.input", "vision.0.input"]
