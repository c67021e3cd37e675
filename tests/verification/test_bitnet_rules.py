"""Rules on BitNet folders: a good one passes, and each rule breaks alone."""

from __future__ import annotations

import pytest
import torch

import lowbit
from changed_folders import change_folder
from models import make_model

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("rules") / "model", num_hidden_layers=1)


@pytest.fixture
def folder(source, tmp_path):
    return lowbit.quantize(source, tmp_path / "out", scheme="TERNARY").path


def failed(folder) -> set[str]:
    return {check.rule for check in lowbit.verify(folder, engine="transformers").checks if not check.passed}


def change(folder, tensors=None, **config):
    change_folder(folder, tensors, **config)
    return failed(folder)


def test_a_good_folder(folder):
    assert failed(folder) == set()


def test_an_unknown_class(folder):
    assert {"quantization-config", "bitnet-config"} & change(folder, linear_class="trilinear")


def test_a_scale_beyond_reason(folder):
    assert "bitnet-scales" in change(folder, lambda tensors: tensors[f"{NAME}.weight_scale"].fill_(1e9))


def test_rows_that_are_not_a_quarter(folder):
    def halve(tensors):
        tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"][:24].clone()

    assert "bitnet-rows" in change(folder, halve)


def test_a_linear_that_is_left_out_by_name_only(folder):
    assert "coverage" in change(folder, modules_to_not_convert=["lm_head", "up_proj"])


def test_a_quantized_conv1d_is_not_loaded(tmp_path):
    source = make_model(tmp_path / "gpt2", "gpt2", n_layer=1, dtype=torch.float32)
    done = lowbit.quantize(source, tmp_path / "out", scheme="TERNARY")
    assert "transformers-conv1d" in failed(done.path)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "lmdeploy", "tgi"])
def test_only_transformers_loads_it(folder, engine):
    assert lowbit.verify(folder).engine == "transformers"
    found = lowbit.verify(folder, engine=engine)
    assert [check.rule for check in found.failed] == ["engine-loader"]
    assert not found.broken
