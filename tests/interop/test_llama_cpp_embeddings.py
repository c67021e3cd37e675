"""llama.cpp makes the same embedding of a text as transformers with the pooling of sentence-transformers."""

from __future__ import annotations

import json

import pytest
import torch

from embedding_models import EMBEDDING_CASES, expected_embedding, make_embedding_model
from gguf_models import describe_folder, write_plain
from llama_cpp import embedding

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")
IDS = torch.randint(3, 250, (30,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("case", EMBEDDING_CASES)
def test_llama_cpp_makes_the_same_embedding(tmp_path, case):
    folder = make_embedding_model(tmp_path / "hf", case)
    model, checkpoint = describe_folder(folder)
    assert model.arch == EMBEDDING_CASES[case][4]
    path = write_plain(model, checkpoint, tmp_path / "model.gguf")
    found = torch.tensor(embedding(path, IDS))
    expected = expected_embedding(folder, IDS)
    tolerance = 5e-4 if "gemma" in case else 2e-6  # GELU comes from a float16 table
    assert (found - expected).abs().max().item() < tolerance


def test_a_decoder_whose_config_names_the_class_with_an_output_is_the_same_file(tmp_path):
    """Qwen 3 Embedding: config.json says Qwen3ForCausalLM, names lack "model." and the output is tied."""
    folder = make_embedding_model(tmp_path / "hf", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    path = write_plain(*describe_folder(folder), tmp_path / "model.gguf")
    assert (torch.tensor(embedding(path, IDS)) - expected_embedding(folder, IDS)).abs().max().item() < 2e-6
