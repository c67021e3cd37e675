"""What is not taken of a source, or otherwise than its files say, is said by commands that convert nothing too."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.train import Course
from models import SHORT_TEXT, make_model

COURSE = Course(windows=2, window_tokens=16, steps=1)
TIED = "config.json ties lm_head.weight to model.embed_tokens.weight, but the files hold two different tensors"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A trained output layer under a flag that ties it."""
    folder = make_model(tmp_path_factory.mktemp("notes") / "tied", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


LEFT = "config.json states a quantization (fbgemm_fp8), but all tensors are plain floats"


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory):
    """Plain floats under a quantization that was undone: what opening the model says, not its description."""
    folder = make_model(tmp_path_factory.mktemp("notes") / "left", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fbgemm_fp8"}}))
    return folder


def test_what_opening_says_is_said_by_an_importance_matrix(unquantized, tmp_path):
    done = lowbit.imatrix(unquantized, tmp_path / "x.gguf", calib=SHORT_TEXT, samples=1, seqlen=16)
    assert sum(note.startswith(LEFT) for note in done.notes) == 1


def test_what_opening_says_is_said_by_an_answer(unquantized, caplog):
    with caplog.at_level(logging.WARNING, "lowbit"):
        lowbit.generate(unquantized, "one", max_tokens=1, chat="raw")
    assert sum(LEFT in record.getMessage() for record in caplog.records) == 1


def with_prediction_block(folder: Path) -> Path:
    """A block for multi-token prediction under Qwen's names."""
    make_model(folder, "qwen3")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    block = {n.replace("model.layers.1.", "mtp.layers.0."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    save_file(tensors | block | {"mtp.fc.weight": torch.zeros(128, 256)}, path, metadata={"format": "pt"})
    return folder


def test_an_importance_matrix_of_it(tied, tmp_path):
    done = lowbit.imatrix(tied, tmp_path / "x.gguf", calib=SHORT_TEXT, samples=1, seqlen=16)
    assert any(note.startswith(TIED) for note in done.notes)


def test_an_answer_of_it(tied, caplog):
    with caplog.at_level(logging.WARNING, "lowbit"):
        lowbit.generate(tied, "one", max_tokens=1, chat="raw")
    assert any(TIED in record.getMessage() for record in caplog.records)


def test_a_finetuned_model_of_it(tied, tmp_path):
    done = lowbit.finetune(tied, tmp_path / "out", data=SHORT_TEXT, course=COURSE)
    assert any(note.startswith(TIED) for note in done.report.source.notes)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_what_a_finetuned_model_lacks(tmp_path):
    model = with_prediction_block(tmp_path / "model")
    done = lowbit.finetune(model, tmp_path / "out", data=SHORT_TEXT, course=COURSE)
    left = [note for note in done.report.source.notes if note.startswith("left out (12 tensors): ")]
    assert len(left) == 1
    assert "mtp.fc.weight" in left[0]
