"""Rules on transform_config: what a loader does to inputs as the model runs."""

from __future__ import annotations

import shutil

import pytest
import torch

import lowbit
from models import make_model
from verification.breaking import assert_breaks, edit_config, edit_tensors

DOWN = "model.layers.0.mlp.down_proj"
ONLINE = [{"targets": ["re:.*\\.down_proj$"], "location": "input"}]
R4 = {"type": "hadamard", "head_dim": 64, "apply": ONLINE}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder per architecture, rounded to nearest; a transform_config is stated over it, which no rule can see."""
    base = tmp_path_factory.mktemp("transforms")
    folders = {}

    def folder_of(architecture: str, out, **group):
        if architecture not in folders:
            model = make_model(base / architecture, architecture)
            folders[architecture] = lowbit.quantize(model, base / f"{architecture}-out", scheme="W8A8").path
        folder = shutil.copytree(folders[architecture], out)
        edit_config(folder, lambda config: config.update(transform_config={"config_groups": {"R4": {**R4, **group}}}))
        return folder

    return folder_of


def test_a_rotation_that_fits_is_counted(written, tmp_path):
    checks = {check.rule: check for check in lowbit.verify(written("llama", tmp_path / "out")).checks}
    assert checks["transforms"].passed
    assert checks["engine-transforms"].passed
    assert "2 inputs rotated" in checks["engine-transforms"].detail


def test_blocks_divide_the_columns(written, tmp_path):
    assert_breaks(written("llama", tmp_path / "out", head_dim=50), "transforms", DOWN, "192 columns", "50")


def test_the_whole_width_is_a_power_of_two(written, tmp_path):
    assert_breaks(written("llama", tmp_path / "out", head_dim=None), "transforms", DOWN, "no power of two")


def test_a_matrix_of_a_transform_belongs_to_a_linear_that_has_it(written, tmp_path):
    folder = written("llama", tmp_path / "out", type="random-hadamard")
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.R4_input.weight": torch.eye(4)}))
    assert_breaks(folder, "transforms", "up_proj has the matrix of a transform", f"{DOWN}.R4_input.weight")


def test_a_config_that_cannot_be_parsed(written, tmp_path):
    folder = written("llama", tmp_path / "out", type="cayley")
    assert_breaks(folder, "quantization-config", "transform_config.config_groups.R4.type")


def test_vllm_rotates_no_linear_with_a_bias(written, tmp_path):
    apply = [{"targets": ["re:.*\\.fc2$"], "location": "input"}]
    folder = written("opt", tmp_path / "out", apply=apply)
    assert_breaks(folder, "engine-transforms", "fc2 has a bias")


def test_vllm_rotates_no_expert(written, tmp_path):
    assert_breaks(written("qwen3_moe", tmp_path / "out"), "engine-transforms", "is an expert: FusedMoE")


def test_members_of_a_fused_set_read_one_input(written, tmp_path):
    apply = [{"targets": ["re:.*\\.q_proj$"], "location": "input"}]
    folder = written("llama", tmp_path / "out", apply=apply)
    assert_breaks(folder, "engine-transforms", "qkv_proj", "only some have it rotated")


@pytest.mark.parametrize("engine", ["transformers", "sglang"])
def test_engines_without_transforms(written, tmp_path, engine):
    assert_breaks(written("llama", tmp_path / "out"), "no-transforms", "does not read transform_config", engine=engine)
