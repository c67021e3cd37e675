"""Rotations folded into whole models: the same logits, and statistics as measured on the rotated model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rewriting import Model, all_tensors, assert_near, assert_same_stats, stats_of

from lowbit.errors import UsageError
from lowbit.numerics.hadamard import make_rotation
from lowbit.tensors import LayerStats
from lowbit.transform.rotate import (
    RotateOptions,
    apply_stream,
    apply_values,
    hadamard_rotations,
    residual_refusal,
    residual_rotation,
    rotate_block,
    rotate_outside,
    rotate_values,
    rotated_stats,
)
from models import make_model

UNTIED = {"tie_word_embeddings": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def with_stats(model: Model, stats: dict[str, LayerStats]):
    blocks = model.blocks()
    for block in blocks:
        block.stats = {linear.reads: stats[linear.reads] for linear in block.linears if linear.reads in stats}
    return blocks


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt_neox", "gpt2", "deepseek_v3", "gpt_oss"])
def test_rotated_values_change_no_logit(folder, architecture):
    model = Model(make_model(folder / f"values-{architecture}", architecture, dtype=torch.float32))
    plain = all_tensors(model.blocks())
    blocks = with_stats(model, model.measure(plain))
    for index, block in enumerate(blocks):
        (point,) = [point for point in model.facts.points(index)[0] if point.feeds_output_projection]
        rotate_values(block, point, make_rotation(point.columns // model.facts.heads))
        assert not torch.equal(block.weight(point.readers[0]), plain[f"{point.readers[0].name}.weight"])
    turned = all_tensors(blocks)
    assert_near(model.logits(turned), model.logits(plain))
    again = model.measure(turned)
    for block in blocks:
        for source, kept in block.stats.items():
            assert_same_stats(kept, again[source], exact=not source.endswith("attention_output"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "phi3", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_a_rotated_residual_stream_changes_no_logit(folder, architecture):
    model = Model(make_model(folder / f"stream-{architecture}", architecture, dtype=torch.float32, **UNTIED))
    outside = model.facts.outside
    plain = all_tensors(model.blocks()) | {
        name: model.read(name) for name in (outside.embedding, outside.norm, outside.head)
    }
    rotation = residual_rotation(model.facts, seed=3)
    blocks = with_stats(model, model.measure(plain))
    for block in blocks:
        rotate_block(block, rotation, model.facts)
    turned = all_tensors(blocks) | rotate_outside(plain, rotation, model.facts)
    assert not torch.equal(turned[outside.embedding], plain[outside.embedding])
    assert_near(model.logits(turned), model.logits(plain))
    again = model.measure(turned)
    for block in blocks:
        for source, kept in block.stats.items():
            assert_same_stats(kept, again[source], exact=False)


REFUSED = {
    "gpt2": "LayerNorm", "cohere2": "LayerNorm", "gemma2": "post_attention_layernorm", "glm4": "follows",
    "olmo2": "follows", "deepseek_v3": "multi-token", "qwen2_5_vl": "visual|norms", "gemma3": "vision|norms",
}  # fmt: skip


@pytest.mark.parametrize("architecture", REFUSED)
def test_streams_that_cannot_be_rotated_are_refused_with_the_reason(folder, architecture):
    model = Model(make_model(folder / f"refused-{architecture}", architecture))
    with pytest.raises(UsageError, match=REFUSED[architecture]):
        residual_rotation(model.facts)
    assert residual_refusal(model.facts)


def test_a_tied_head_needs_to_be_untied_unless_the_final_norm_is_even(folder):
    model = Model(make_model(folder / "tied", "llama", dtype=torch.float32, tie_word_embeddings=True))
    outside = model.facts.outside
    tensors = {name: model.read(name) for name in (outside.embedding, outside.norm)}
    rotation = residual_rotation(model.facts)
    with pytest.raises(UsageError, match="tied") as error:
        rotate_outside(tensors, rotation, model.facts)
    assert "49,152 more weights" in error.value.hint
    even = {**tensors, outside.norm: torch.full_like(tensors[outside.norm], 0.75)}
    blocks = model.blocks()
    plain = all_tensors(blocks) | even
    for block in blocks:
        rotate_block(block, rotation, model.facts)
    turned = all_tensors(blocks) | rotate_outside(even, rotation, model.facts)
    assert outside.head not in turned
    assert_near(model.logits(turned), model.logits(plain))


def test_magnitudes_become_bounds_and_moments_stay_exact():
    x = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = make_rotation(12)
    turned = rotated_stats(stats_of(x), rotation)
    assert turned is not None
    assert_same_stats(turned, stats_of(rotation.columns(x)), exact=False)


def test_statistics_that_no_longer_hold_are_taken_away(folder):
    stats = stats_of(torch.randn(10, 4))
    assert rotated_stats(replace(stats, hessian=None), make_rotation(4)) is None
    model = Model(make_model(folder / "zero", "llama", dtype=torch.float32))
    block = with_stats(model, model.measure(all_tensors(model.blocks())))[0]
    block.tensors["model.layers.0.input_layernorm.weight"][3] = 0.0
    rotate_block(block, residual_rotation(model.facts), model.facts)
    assert "model.layers.0.attention_input" not in block.stats
    assert "model.layers.0.mlp_input" in block.stats


def coarse(linear, weight, importance=None):
    step = weight.abs().amax(1, keepdim=True) / 7
    return (weight / step).round() * step


def test_values_are_left_alone_where_rounding_gains_nothing(folder):
    """Weights with one magnitude are exact before, and not after."""
    model = Model(make_model(folder / "even", "llama", dtype=torch.float32))
    block = with_stats(model, model.measure(all_tensors(model.blocks())))[0]
    for leaf in ("v_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{leaf}.weight"
        block.tensors[name] = block.tensors[name].sign()
    before, stats = dict(block.tensors), dict(block.stats)
    (note,) = apply_values(block, model.facts, coarse)
    assert not note.applied
    assert note.error_before == note.error_after == 0.0
    assert block.tensors == before
    assert block.stats == stats
    (note,) = apply_values(block, model.facts, coarse, RotateOptions(always=True))
    assert note.applied
    assert note.error_after > 0


def test_the_transform_of_the_stream_says_what_it_did(folder):
    model = Model(make_model(folder / "note", "llama", dtype=torch.float32))
    block = model.block(1)
    (note,) = apply_stream(block, model.facts, coarse, hadamard_rotations(model.facts, 5))
    assert note.applied
    assert note.error_before is None
    assert note.point == "model.layers.1"
    assert note.detail == "Hadamard rotation of 128 channels, seed 5"


def test_drift_of_rotated_inputs_is_the_rotated_drift():
    generator = torch.Generator().manual_seed(3)
    drift, x, lost = (torch.randn(rows, 12, generator=generator) for rows in (12, 1, 5))
    rotation = make_rotation(12)
    moved = rotated_stats(LayerStats(1, x[0].abs(), x[0] ** 2, x[0].abs(), x.T @ x, drift, lost), rotation)
    assert moved is not None
    assert moved.lost is not None
    torch.testing.assert_close(rotation.columns(x) @ moved.lost.T, x @ lost.T)
    assert moved.drift is not None
    torch.testing.assert_close(rotation.columns(x) @ moved.drift.T, rotation.columns(x @ drift.T))
