"""llama.cpp makes the same embedding of a text as transformers with the pooling of sentence-transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

import lowbit
from embedding_models import EMBEDDING_CASES, expected_embedding, make_embedding_model
from gguf_models import describe_folder, write_plain
from llama_cpp import embedding, ranks
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_safetensors
from lowbit.errors import CheckpointError
from lowbit.formats.gguf.raw import open_raw_gguf
from models import make_model

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


def make_reranker(folder, tied):
    """A Qwen 3 with the tokens "yes" and "no"."""
    folder = make_model(folder, "qwen3", tie_word_embeddings=tied, max_position_embeddings=1024)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"yes": 300, "no": 301}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_reranker_scores_by_the_logits_of_yes_and_no(tmp_path, tied):
    folder = make_reranker(tmp_path / "Qwen3-Reranker-0.6B", tied)
    path = lowbit.quantize(folder, tmp_path / "x.gguf", scheme="F32").path
    metadata = open_raw_gguf(path).metadata
    assert list(metadata["qwen3.classifier.output_labels"]) == ["yes", "no"]
    query, documents = "what is blue?", ["the sky", "grass"]
    found = ranks(path, query, documents)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(open_safetensors(folder))
    for document, score in zip(documents, found, strict=True):
        prompt = metadata["tokenizer.chat_template.rerank"].replace("{query}", query).replace("{document}", document)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        assert abs(logits[[300, 301]].softmax(0)[0].item() - score) < 1e-4


def test_a_language_model_of_another_name_is_no_reranker(tmp_path):
    folder = make_reranker(tmp_path / "Qwen3-0.6B", True)
    model, _ = describe_folder(folder)
    assert "cls.output.weight" not in {tensor.name for tensor in model.tensors}
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Qwen3-Reranker-0.6B\n")
    model, _ = describe_folder(folder)
    assert "cls.output.weight" in {tensor.name for tensor in model.tensors}


def test_a_reranker_needs_its_two_words(tmp_path):
    folder = make_model(tmp_path / "Qwen3-Reranker", "qwen3")
    with pytest.raises(CheckpointError, match="no tokens 'yes' and 'no'"):
        describe_folder(folder)
