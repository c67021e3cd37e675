"""Rules on codebook folders: a good one passes, and each rule breaks alone."""

from __future__ import annotations

import pytest
import torch

import lowbit
from changed_folders import change_folder
from models import make_model

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path):
    source = make_model(tmp_path / "model", num_hidden_layers=1)
    return lowbit.quantize(source, tmp_path / "out", scheme="KMEANS3", outliers=1).path


def failed(folder, engine: str = "transformers") -> set[str]:
    return {check.rule for check in lowbit.verify(folder, engine=engine).checks if not check.passed}


def test_a_good_folder_for_transformers_and_no_other_engine(folder):
    assert failed(folder) == set()
    assert failed(folder, "vllm") == {"engine-loader"}


def test_without_an_engine_a_folder_is_checked_for_the_one_that_loads_it(folder):
    found = lowbit.verify(folder)
    assert (found.engine, [check.rule for check in found.checks if not check.passed]) == ("transformers", [])


def test_values_that_fall(folder):
    def turn(tensors):
        tensors[f"{NAME}.table"] = tensors[f"{NAME}.table"].flip(1).contiguous()

    assert "codebook-tables" in failed(change_folder(folder, turn))


def test_outliers_beyond_the_weight(folder):
    def move(tensors):
        tensors[f"{NAME}.outlier_columns"] = torch.full((192, 1), 128, dtype=torch.uint16)

    assert "codebook-outliers" in failed(change_folder(folder, move))


def test_codes_of_a_linear_that_the_model_does_not_have(folder):
    def add(tensors):
        tensors["model.layers.0.extra.weight"] = tensors[f"{NAME}.weight"].clone()

    assert failed(change_folder(folder, add))


def test_a_quantized_conv1d_is_not_loaded(tmp_path):
    source = make_model(tmp_path / "gpt2", "gpt2", n_layer=1)
    done = lowbit.quantize(source, tmp_path / "out", scheme="LOG4")
    assert "transformers-conv1d" in failed(done.path)
