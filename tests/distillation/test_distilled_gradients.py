"""The gradient through all blocks, one in memory at a time, is that of the divergence."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibrate.blocks import BlockRunner
from lowbit.checkpoint import open_checkpoint
from lowbit.distillation.divergence import TokenDivergence
from lowbit.distillation.student import LearnedTensor, Student
from lowbit.numerics import grid_for
from lowbit.rounding.learnable import LearnableVector, learnable
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import RangeSearch
from models import make_model

SPEC = SCHEMES["W4A16"].with_group_size(32).weight
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


def rounded_linear(weight: torch.Tensor, turned: bool) -> LearnedTensor:
    # float32 scales, so that differences of the divergence are smooth
    target = GridTarget(SPEC, grid_for(SPEC, "float32"), RangeSearch())
    return LearnedTensor(
        learnable(target, target.nearest(weight.t().contiguous() if turned else weight).stored), turned
    )


def make_student(folder, resident: bool, graphs: bool = False) -> tuple[Student, TokenDivergence]:
    checkpoint = open_checkpoint(str(folder))
    runner = BlockRunner(checkpoint)
    architecture, ids = runner.architecture, torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    parts: list[dict] = [{} for _ in range(len(runner.blocks) + 1)]
    for name, linear in architecture.linears.items():
        if linear.block is not None:
            one = rounded_linear(checkpoint_weight(runner, name), linear.transposed)
            parts[linear.block][f"{name}.weight"] = lambda one=one: one
    for name, role in architecture.roles.items():
        block = architecture.block_of(name)
        if role in ("norm", "bias") and len(architecture.parameters[name]) == 1:
            vector = LearnedTensor(LearnableVector(checkpoint.read(name), torch.float32))
            parts[len(runner.blocks) if block is None else block][name] = lambda vector=vector: vector
    student = Student(runner, ids, parts, resident, graphs)
    return student, TokenDivergence(BlockRunner(open_checkpoint(str(folder))), student)


def checkpoint_weight(runner: BlockRunner, name: str) -> torch.Tensor:
    return runner._loader.checkpoint.read(f"{name}.weight").float()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("resident", "graphs"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral", "gpt2"])
def test_gradients_foretell_differences(tmp_path, family, resident, graphs):
    """Of every kind of block: biases, soft caps, fused experts, transposed linears."""
    sizes = {} if family == "gpt2" else SMALL
    student, divergence = make_student(
        make_model(tmp_path / "model", family, dtype=torch.float32, **sizes), resident, graphs
    )
    changes = student.start()
    generator = torch.Generator().manual_seed(1)
    for each in changes.values():
        for change in each.values():
            change.copy_(torch.randn(change.shape, generator=generator) * 0.02)
    windows = torch.arange(3)
    student.prepare(changes)
    found = {name: {key: torch.zeros_like(change) for key, change in each.items()} for name, each in changes.items()}
    loss = divergence.gradients(windows, changes, found)
    assert loss == pytest.approx(divergence.mean(windows, changes, 2), rel=1e-4)
    assert loss > 0
    # along the gradients themselves, of scales and of vectors apart
    for kind in ("scale", "values"):
        direction = {
            name: {key: gradient for key, gradient in each.items() if key == kind} for name, each in found.items()
        }
        square = sum(
            gradient.double().square().sum().item() for each in direction.values() for gradient in each.values()
        )
        step = 2e-3 / square**0.5
        ends = []
        for sign in (1, -1):
            moved = {
                name: {
                    key: change + sign * step * direction[name].get(key, torch.zeros(()))
                    for key, change in each.items()
                }
                for name, each in changes.items()
            }
            student.prepare(moved)
            ends.append(divergence.mean(windows, moved, 3))
        foretold = 2 * step * square / windows.numel() / student.ids.shape[1]
        assert ends[0] - ends[1] == pytest.approx(foretold, rel=0.03), kind
    assert any(gradient.any() for gradient in found[next(reversed(student.parts[-1]))].values())  # the last norm


def test_the_divergence_is_that_of_whole_models(tmp_path):
    """Against ten lines with transformers' own models."""
    from lowbit.architecture.loading import load_model

    folder = make_model(tmp_path / "model", dtype=torch.float32, **SMALL)
    student, divergence = make_student(folder, resident=True)
    changes = student.start()
    student.prepare(changes)
    checkpoint = open_checkpoint(str(folder))
    teacher, judged = load_model(checkpoint), load_model(checkpoint)
    with torch.no_grad():
        for part in student.parts:
            for name, read in part.items():
                judged.get_parameter(name).copy_(read().learnable.decoded({}))
        log_p = teacher(student.ids).logits.log_softmax(-1)
        log_q = judged(student.ids).logits.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert divergence.mean(torch.arange(3), changes, 1) == pytest.approx(expected, rel=1e-4)
