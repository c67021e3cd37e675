"""Scales folded at every scaling point of every architecture: the same logits, and the statistics measured anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rewriting import Model, all_tensors, assert_near, assert_same_stats, stats_of

from lowbit.architecture.feeding import fed_rows
from lowbit.architecture.structure import Linear
from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors
from lowbit.transform.facts import ScalingPoint
from lowbit.transform.fold import fold, scaled_stats
from models import ARCHITECTURES, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def random_scales(point: ScalingPoint) -> torch.Tensor:
    scales = torch.rand(point.columns, generator=torch.Generator().manual_seed(point.columns)).double() * 2 + 0.4
    return point.share(scales)


# Number of scaling points of the second block, by what they are: norms, v → o, up → down.
POINTS = {
    "opt": (2, 1, 1), "gpt2": (2, 1, 0), "bloom": (2, 1, 0), "gpt_neox": (2, 1, 0),
    "olmo2": (0, 1, 1), "cohere2": (1, 1, 1), "stablelm_parallel": (1, 1, 1),
    "qwen2_moe": (2, 1, 5), "qwen3_moe": (2, 1, 4), "mixtral": (2, 1, 4), "gpt_oss": (2, 1, 0),
    "deepseek_v2": (4, 1, 5), "deepseek_v2_lite": (3, 1, 5), "deepseek_v3": (4, 1, 5),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_everywhere_changes_no_logit_and_moves_the_statistics(folder, architecture):
    model = Model(make_model(folder / architecture, architecture, dtype=torch.float32))
    blocks = model.blocks()
    plain = all_tensors(blocks)
    logits, stats = model.logits(plain), model.measure(plain)
    for index, block in enumerate(blocks):
        block.stats = {linear.reads: stats[linear.reads] for linear in block.linears if linear.reads in stats}
        points, left_out = model.facts.points(index)
        assert {each for point in points for each in point.sources} | set(left_out) == {
            linear.reads for linear in block.linears
        }
        for point in points:
            fold(block, point, random_scales(point))
    kinds = [(point.kind, point.feeds_output_projection) for point in points]
    counts = tuple(kinds.count(kind) for kind in (("norm", False), ("linear", True), ("linear", False)))
    assert counts == POINTS.get(architecture, (2, 1, 1))
    folded = all_tensors(blocks)
    assert any(not torch.equal(folded[name], plain[name]) for name in plain)
    assert_near(model.logits(folded), logits)
    again = model.measure(folded)
    for block in blocks:
        for source, kept in block.stats.items():
            assert_same_stats(kept, again[source])


def norm_and_reader(weight: torch.Tensor, plus_one: bool = False, bias: torch.Tensor | None = None):
    columns = len(weight)
    reader = Linear("reader", "up_proj", (6, columns), 0, "x", fed_by="norm")
    tensors = {"norm.weight": weight, "reader.weight": torch.randn(6, columns)}
    if bias is not None:
        tensors["norm.bias"] = bias
    block = BlockTensors((reader,), tensors, {"x": stats_of(torch.randn(20, columns))})
    return block, ScalingPoint("norm", "norm", ("x",), (reader,), plus_one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plus_one", [False, True])
def test_readers_take_what_the_written_norm_lost(dtype, plus_one):
    torch.manual_seed(0)
    weight = (torch.rand(64) + 0.5 - float(plus_one)).to(dtype).float()
    block, point = norm_and_reader(weight, plus_one)
    block.dtypes["norm.weight"] = dtype
    before = (weight + plus_one) * block.tensors["reader.weight"]
    scales = torch.rand(64) * 4 + 0.3
    ratio = fold(block, point, scales)
    written = block.tensors["norm.weight"]
    assert torch.equal(written, written.to(dtype).float())
    torch.testing.assert_close((written + plus_one) * block.tensors["reader.weight"], before, rtol=5e-7, atol=1e-9)
    assert not torch.equal(ratio, scales)
    torch.testing.assert_close(ratio, scales, rtol=0.05 if plus_one else 2**-8, atol=0)


def test_channels_whose_norm_weight_vanishes_stay_as_they_are():
    block, point = norm_and_reader(torch.tensor([0.0, 1.0, 1e-30, 1.0]), bias=torch.ones(4))
    block.dtypes["norm.weight"] = torch.float16
    before = dict(block.tensors)
    ratio = fold(block, point, torch.tensor([2.0, 2.0, 4.0, 1e6]))
    assert ratio.tolist()[:3] == [1.0, 2.0, 1.0]
    assert torch.isfinite(ratio).all()
    for name in ("norm.weight", "norm.bias"):
        assert torch.equal(block.tensors[name][[0, 2]], before[name][[0, 2]])
    assert block.tensors["norm.bias"][1] == 0.5


def test_folding_back_gives_the_same_block():
    block, point = norm_and_reader(torch.rand(8) + 0.5, bias=torch.randn(8))
    before, stats = dict(block.tensors), block.stats["x"]
    scales = torch.rand(8) + 0.5
    fold(block, point, scales)
    fold(block, point, 1 / scales)
    for name, values in before.items():
        torch.testing.assert_close(block.tensors[name], values)
    assert_same_stats(block.stats["x"], stats)


def test_shared_heads_have_shared_scales():
    """4 query heads of 2, 2 key/value heads: columns 0, 1 and 2, 3 are both key/value head 0."""
    fed = fed_rows("values", 4, 8, 4)
    assert fed.channel.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    reader = Linear("o", "o_proj", (3, 8), 0, "x", fed_by="v")
    point = ScalingPoint("v", "linear", ("x",), (reader,), channel=fed.channel)
    values = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    assert point.of_channels(values).tolist() == [2, 3, 6, 7]
    assert point.share(values).tolist() == [2, 3, 2, 3, 6, 7, 6, 7]
    block = BlockTensors((reader,), {"v.weight": torch.ones(4, 5), "o.weight": torch.ones(3, 8)})
    with pytest.raises(AssertionError, match="one channel"):
        fold(block, point, values)
    fold(block, point, point.share(values))
    assert block.tensors["v.weight"][:, 0].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6, 1 / 7])
    assert block.tensors["o.weight"][0].tolist() == [2, 3, 2, 3, 6, 7, 6, 7]


def test_non_finite_and_zero_scales_are_our_own_mistake():
    block, point = norm_and_reader(torch.ones(4))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="finite and positive"):
            fold(block, point, torch.tensor([1.0, bad, 1.0, 1.0]))


def test_a_norm_that_also_feeds_fused_experts_is_no_scaling_point(folder):
    from lowbit.architecture.describing import describe_checkpoint
    from lowbit.checkpoint import open_checkpoint
    from lowbit.transform.facts import model_facts

    checkpoint = open_checkpoint(make_model(folder / "fused", "gpt_oss"))
    architecture, _ = describe_checkpoint(checkpoint)
    points, left_out = model_facts(architecture).points(0)
    assert "model.layers.0.post_attention_layernorm" not in [point.feeder for point in points]
    assert "one tensor" in left_out["model.layers.0.mlp_input"]


def test_an_input_read_by_a_linear_that_is_not_fed_is_no_scaling_point(folder):
    model = Model(make_model(folder / "shared", "llama"))
    linears = dict(model.architecture.linears)
    name = "model.layers.0.mlp.gate_proj"
    linears[name] = replace(linears[name], fed_by=None)
    facts = replace(model.facts, architecture=replace(model.architecture, linears=linears))
    points, left_out = facts.points(0)
    assert "model.layers.0.post_attention_layernorm" not in [point.feeder for point in points]
    assert "model.layers.0.mlp_input" in left_out


def test_drift_of_scaled_inputs_is_the_scaled_drift():
    generator = torch.Generator().manual_seed(3)
    drift, lost, x, scales = (torch.randn(shape, generator=generator) for shape in ((6, 6), (4, 6), (6,), (6,)))
    scales = scales.exp()
    moved = scaled_stats(LayerStats(1, x.abs(), x.square(), x.abs(), torch.outer(x, x), drift, lost), scales)
    assert moved.lost is not None
    torch.testing.assert_close(moved.lost @ (x / scales), lost @ x)
    assert moved.drift is not None
    torch.testing.assert_close(moved.drift @ (x / scales), (drift @ x) / scales)
