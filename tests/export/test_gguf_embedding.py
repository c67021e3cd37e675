"""Embedding models as GGUF: pooling, dense layers, names without "model."; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from gguf import GGUFValueType, PoolingType

from embedding_models import make_embedding_model
from gguf_models import describe_folder, write_plain
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_gguf, open_safetensors
from lowbit.checkpoint.hub import choose_files
from lowbit.checkpoint.opening import OpenOptions
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.table import gguf_names


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(("case", "kind"), [
    ("qwen3", PoolingType.LAST), ("llama", PoolingType.MEAN), ("llama_first_token", PoolingType.CLS),
])  # fmt: skip
def test_pooling_becomes_a_key_value(tmp_path, case, kind):
    model, _ = describe_folder(make_embedding_model(tmp_path / "hf", case))
    assert model.key_values[f"{model.arch}.pooling_type"] == (kind, GGUFValueType.UINT32)
    assert "output.weight" not in {tensor.name for tensor in model.tensors}


def test_pooling_is_read_in_its_newer_spelling_too(tmp_path):
    folder = make_embedding_model(tmp_path / "hf", "qwen3")
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": "lasttoken"})
    assert describe_folder(folder)[0].key_values["qwen3.pooling_type"][0] == PoolingType.LAST


def test_dense_layers_become_tensors(tmp_path):
    folder = make_embedding_model(tmp_path / "hf", "gemma_dense")
    model, checkpoint = describe_folder(folder)
    sources = {tensor.name: tensor for tensor in model.tensors}
    for number, shape in ((2, (256, 128)), (3, (128, 256))):
        expected = open_safetensors(folder / f"{number}_Dense").read("linear.weight")
        assert sources[f"dense_{number}.weight"].shape == shape
        assert torch.equal(sources[f"dense_{number}.weight"].read(checkpoint, 0, shape[0]), expected)
        assert model.key_values[f"gemma-embedding.dense_{number}_feat_in"][0] == shape[1]
        assert model.key_values[f"gemma-embedding.dense_{number}_feat_out"][0] == shape[0]


def test_the_window_is_the_one_of_config_json(tmp_path):
    """transformers' object holds w / 2 + 1 of it."""
    folder = make_embedding_model(tmp_path / "hf", "gemma")
    assert json.loads((folder / "config.json").read_text())["sliding_window"] == 8
    assert describe_folder(folder)[0].key_values["gemma-embedding.attention.sliding_window"][0] == 8


def test_gemma_embedding_comes_back_with_attention_in_both_directions(tmp_path):
    folder = make_embedding_model(tmp_path / "hf", "gemma")
    back = open_gguf(write_plain(*describe_folder(folder), tmp_path / "model.gguf"))
    config = back.config()
    assert (config["use_bidirectional_attention"], config["sliding_window"]) == (True, 8)
    ids = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_model(open_safetensors(folder))(ids).last_hidden_state
        found = load_model(back).model(ids).last_hidden_state
    assert torch.equal(found, expected)


def spoil_pooling(folder):
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_max_tokens": True})


def add_dense(folder):
    rows = json.loads((folder / "modules.json").read_text())
    (folder / "2_Dense").mkdir()
    write_json(folder / "2_Dense" / "config.json", {"bias": True})
    write_json(folder / "modules.json", [*rows, {"path": "2_Dense", "type": "x.Dense"}])


def lead_out(folder):
    write_json(folder / "modules.json", [{"path": "../elsewhere", "type": "x.Pooling"}])


def lose_pooling(folder):
    (folder / "1_Pooling" / "config.json").unlink()


@pytest.mark.parametrize(("spoil", "kind", "found"), [
    (spoil_pooling, ArchitectureError, "pooling by max"), (add_dense, ArchitectureError, "a dense layer with a bias"),
    (lead_out, CheckpointError, "not in the folder"), (lose_pooling, CheckpointError, "cannot be read"),
    (lambda folder: (folder / "modules.json").write_text("{"), CheckpointError, "not valid JSON"),
    (lambda folder: write_json(folder / "modules.json", {}), CheckpointError, "a list of modules"),
])  # fmt: skip
def test_modules_that_llama_cpp_cannot_follow_are_refused(tmp_path, spoil, kind, found):
    folder = make_embedding_model(tmp_path / "hf", "qwen3")
    spoil(folder)
    with pytest.raises(kind, match=found):
        describe_folder(folder)


def test_dense_layers_without_a_place_are_refused(tmp_path):
    folder = make_embedding_model(tmp_path / "hf", "gemma_dense")
    qwen = make_embedding_model(tmp_path / "qwen", "qwen3")
    for path in ("modules.json", "2_Dense", "3_Dense"):
        (folder / path).rename(qwen / path)
    with pytest.raises(ArchitectureError, match="2 dense layers behind the pooling"):
        describe_folder(qwen)


def test_encoders_are_refused_with_the_reason():
    with pytest.raises(ArchitectureError, match="WordPiece"):
        gguf_names({"model_type": "bert"}, [])


def test_the_modules_are_downloaded_with_the_model():
    files = ["model.safetensors", "config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
             "2_Dense/model.safetensors", "onnx/config.json", "onnx/model.onnx"]  # fmt: skip
    assert set(choose_files("a/b", files, None, OpenOptions())) == set(files[:6])
