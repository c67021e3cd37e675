"""One block in memory at a time against the whole model at once: the same inputs of the same linears, every family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowbit.architecture.loading import load_model, module_names
from lowbit.calibrate import blocks, gradients
from lowbit.calibrate.blocks import BlockInput, BlockRunner
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import OutputError
from models import ARCHITECTURES, make_model

IDS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))


class Sums:
    """Σ x² and tokens of every linear, by name; and the order of blocks."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.finished: list[int] = []

    def look(self, source: BlockInput, x: torch.Tensor) -> None:
        for linear in source.linears:
            self.add(linear.name, x)

    def add(self, name: str, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        self.sums[name] = self.sums.get(name, 0) + x.double().square().sum(0)
        self.tokens[name] = self.tokens.get(name, 0) + len(x)

    def finish(self, block: int) -> None:
        self.finished.append(block)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def reference(folder, runner: BlockRunner) -> tuple[Sums, torch.Tensor]:
    """The whole model, window by window, hooks on every linear; experts by transformers' own eager loop."""
    model = load_model(open_checkpoint(folder))
    expected = Sums()
    for linear, module in module_names(model, runner.architecture).items():
        if runner.architecture.linears[linear].block is not None:
            model.get_submodule(module).register_forward_pre_hook(
                lambda _, arguments, linear=linear: expected.add(linear, arguments[0])
            )
    for name, module in model.named_modules():
        if hasattr(module, "down_proj") and hasattr(module, "has_gate"):
            place = name.replace("mlp.experts", "block_sparse_moe.experts") if "mixtral" in str(folder) else name
            module.register_forward_pre_hook(
                lambda module, arguments, place=place: add_experts(expected, place, module, *arguments)
            )
    last = []
    with torch.inference_mode():
        for window in IDS:
            out = model.base_model(input_ids=window[None], use_cache=False)
            last.append(out.last_hidden_state[0])
    return expected, torch.stack(last)


def add_experts(expected: Sums, place: str, module, hidden, index, weights) -> None:
    """Inputs of each expert, from the parameters themselves."""
    gate, up, down = ("w1", "w3", "w2") if "sparse" in place else ("gate_proj", "up_proj", "down_proj")
    for expert in range(module.down_proj.shape[0]):
        x = hidden[(index == expert).any(-1)]
        if not len(x):
            continue
        first = module.gate_up_proj[expert]
        both = x @ (first if module.is_transposed else first.t())
        both = both + module.gate_up_proj_bias[expert] if module.has_bias else both
        for leaf, values in ((gate, x), (up, x), (down, module._apply_gate(both))):
            expected.add(f"{place}.{expert}.{leaf}", values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_are_those_of_the_whole_model(folder, architecture, monkeypatch):
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 48)  # two windows at a time: the last batch is smaller
    model = make_model(folder / architecture, architecture, dtype=torch.float32)
    runner = BlockRunner(open_checkpoint(model))
    seen = Sums()
    states = runner.run(IDS, seen)
    expected, last = reference(model, runner)
    assert seen.finished == list(range(len(runner.architecture.blocks)))
    assert set(seen.sums) == set(expected.sums)
    assert {name for name, linear in runner.architecture.linears.items() if linear.block is not None} >= set(seen.sums)
    for name, sums in expected.sums.items():
        assert seen.tokens[name] == expected.tokens[name], name
        torch.testing.assert_close(seen.sums[name], sums, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    head = torch.cat(list(runner.head_inputs(IDS, states)))
    torch.testing.assert_close(head, last.reshape(head.shape), rtol=1e-4, atol=1e-4)


def test_sliding_and_full_attention_have_masks_of_their_own(folder):
    sizes = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    model = make_model(folder / "sliding", "gemma2", dtype=torch.float32, **sizes)
    runner = BlockRunner(open_checkpoint(model))
    seen = Sums()
    runner.run(IDS, seen)
    expected, _ = reference(model, runner)
    for name, sums in expected.sums.items():
        torch.testing.assert_close(seen.sums[name], sums, rtol=1e-4, atol=1e-6)


def test_only_one_block_has_weights_at_a_time(tiny_llama):
    runner = BlockRunner(open_checkpoint(tiny_llama))

    class Watch(Sums):
        def finish(self, block: int) -> None:
            real = {name for name, value in runner.model.named_parameters() if value.device.type != "meta"}
            assert real
            assert all(name.startswith(f"model.layers.{block}.") for name in real)
            super().finish(block)

    watch = Watch()
    runner.run(IDS, watch)
    assert watch.finished == [0, 1]
    assert all(value.device.type == "meta" for value in runner.model.parameters())


def test_hidden_states_above_the_bound_go_to_a_file_and_change_nothing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    in_memory, in_file = Sums(), Sums()
    here = BlockRunner(open_checkpoint(tiny_llama)).run(IDS, in_memory)
    there = BlockRunner(open_checkpoint(tiny_llama), max_memory=1000).run(IDS, in_file)
    assert (here.spilled, there.spilled) == (False, True)
    assert torch.equal(here.values, there.values)
    assert all(torch.equal(in_file.sums[name], sums) for name, sums in in_memory.sums.items())
    assert list(tmp_path.iterdir()) == []


def test_only_gradients_say_that_other_hessians_need_less_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    with pytest.raises(OutputError, match=r"8\.19 kB of hidden states cannot be put into") as error:
        blocks.HiddenStates((4, 16, 32), torch.float32, 1000)
    assert "--hessian" not in error.value.hint
    runner = SimpleNamespace(blocks=[None] * 3, dtype=torch.float32)
    states = SimpleNamespace(values=torch.zeros(4, 16, 32))
    with pytest.raises(OutputError, match=r"24\.6 kB of hidden states") as error:
        gradients.inputs_of_blocks(runner, IDS, states, 1000, lambda windows: None)  # type: ignore[arg-type]
    assert "TMPDIR" in error.value.hint
    assert "--hessian inputs" in error.value.hint


def test_q_k_and_v_are_one_input(tiny_llama):
    runner = BlockRunner(open_checkpoint(tiny_llama))
    leaves = [[linear.name.rsplit(".", 1)[-1] for linear in source.linears] for source in runner.inputs[:4]]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_weights_may_be_bfloat16(tiny_llama):
    wide, narrow = Sums(), Sums()
    BlockRunner(open_checkpoint(tiny_llama)).run(IDS, wide)
    BlockRunner(open_checkpoint(tiny_llama), torch.bfloat16).run(IDS, narrow)
    for name, sums in wide.sums.items():
        assert 0 < (narrow.sums[name] - sums).norm() / sums.norm() < 0.02
