from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.architecture import canonical_view, discover
from lowbit.architecture.loading import load_model
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.errors import CheckpointError
from models import make_model

IDS = torch.arange(24)[None] * 7 % 300 + 3
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def per_expert(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


@pytest.fixture
def fused(per_expert, tmp_path):
    """The same model with the experts of block 1 as transformers 5 keeps them."""
    state = load_file(per_expert / "model.safetensors")
    prefix = "model.layers.1.mlp.experts"

    def taken(leaf):
        return [state.pop(f"{prefix}.{expert}.{leaf}.weight") for expert in range(4)]

    gate, up, down = taken("gate_proj"), taken("up_proj"), taken("down_proj")
    state[FUSED] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
    state[f"{prefix}.down_proj"] = torch.stack(down)
    return written(state, per_expert, tmp_path)


def written(state, like, folder):
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((like / "config.json").read_text())
    return folder


def view_of(folder, **options):
    checkpoint = SafetensorsCheckpoint(folder)
    return canonical_view(checkpoint, discover(checkpoint.config(), "x", **options))


def test_a_checkpoint_with_canonical_names_is_its_own_view(per_expert):
    checkpoint = SafetensorsCheckpoint(per_expert)
    assert canonical_view(checkpoint, discover(checkpoint.config(), "x")) is checkpoint


def test_fused_experts_appear_one_by_one(per_expert, fused):
    view, expected = view_of(fused), SafetensorsCheckpoint(per_expert)
    assert set(view.tensors) == set(expected.tensors)
    for name, info in expected.tensors.items():
        seen = view.tensors[name]
        assert (seen.name, seen.shape, seen.dtype, seen.nbytes) == (name, info.shape, info.dtype, info.nbytes)
        assert torch.equal(view.read(name), expected.read(name)), name
        view.release(name)


def test_rows_of_an_expert(per_expert, fused):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rows = view_of(fused).read(name, 5, 9)
    assert rows.is_contiguous()
    assert torch.equal(rows, SafetensorsCheckpoint(per_expert).read(name, 5, 9))
    with pytest.raises(IndexError):
        view_of(fused).read(name, 60, 65)
    with pytest.raises(CheckpointError, match="no tensor"):
        view_of(fused).read(FUSED)


def test_fused_experts_of_another_shape_are_refused(per_expert, fused, tmp_path):
    state = load_file(fused / "model.safetensors")
    state[FUSED] = state[FUSED].transpose(1, 2)[:, :, :64].contiguous()
    with pytest.raises(CheckpointError, match=rf"{FUSED} has shape \[4, 128, 64\].*\[4, 128, 128\]"):
        view_of(written(state, per_expert, tmp_path))


def test_a_weight_under_two_spellings_is_refused(per_expert, fused, tmp_path):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    state = load_file(fused / "model.safetensors") | {name: torch.zeros(64, 128, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match=rf"{name} is there twice, as .* and as "):
        view_of(written(state, per_expert, tmp_path))


def test_gpt_oss_experts_are_taken_apart_only_when_asked(tmp_path):
    """gate and up alternate in the columns of [E, H, 2I]."""
    folder = make_model(tmp_path, "gpt_oss")
    assert view_of(folder).tensors.keys() == SafetensorsCheckpoint(folder).tensors.keys()
    view, state = view_of(folder, split_experts=True), load_file(folder / "model.safetensors")
    expert, fused = "model.layers.0.mlp.experts.2", "model.layers.0.mlp.experts"
    assert torch.equal(view.read(f"{expert}.gate_proj.weight"), state[f"{fused}.gate_up_proj"][2][:, 0::2].t())
    assert torch.equal(view.read(f"{expert}.up_proj.weight"), state[f"{fused}.gate_up_proj"][2][:, 1::2].t())
    assert torch.equal(view.read(f"{expert}.up_proj.bias"), state[f"{fused}.gate_up_proj_bias"][2][1::2])
    assert torch.equal(view.read(f"{expert}.down_proj.weight", 3, 5), state[f"{fused}.down_proj"][2].t()[3:5])
    assert torch.equal(view.read(f"{expert}.down_proj.bias"), state[f"{fused}.down_proj_bias"][2])
    assert f"{fused}.gate_up_proj" not in view.tensors


@torch.inference_mode()
def test_gpt_oss_with_single_experts_loads(tmp_path):
    folder = make_model(tmp_path / "fused", "gpt_oss")
    view = view_of(folder, split_experts=True)
    (tmp_path / "single").mkdir()
    single = written({name: view.read(name) for name in view.tensors}, folder, tmp_path / "single")
    ours, theirs = (load_model(SafetensorsCheckpoint(each)) for each in (single, folder))
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
