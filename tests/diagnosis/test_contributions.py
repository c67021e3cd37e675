"""Contributions are what evaluating a model with the tensors restored gives, and the search spends what it may."""

import numpy as np
import pytest
import torch
from faults import diagnosed
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.diagnosis.contributions import contribution
from lowbit.diagnosis.tree import Node
from lowbit.evaluation.metrics import standard_error
from lowbit.text import read_text
from models import make_model


def evaluated(folder, reference, text):
    (row,) = lowbit.evaluate(folder, reference, text, windows=4, window_tokens=64, activations="none")
    return row.kld_mean


def decoded(source, quantized, out, restored):
    """The quantized model as a plain folder, with some tensors as the source has them."""
    from lowbit.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(quantized)
    (path,) = source.glob("*.safetensors")
    tensors = load_file(path)
    for name in checkpoint.tensors:
        if not restored(name):
            tensors[name] = checkpoint.read(name).float()
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    save_file({name: values.float().contiguous() for name, values in tensors.items()}, out / path.name,
              metadata={"format": "pt"})  # fmt: skip
    return out


@pytest.fixture(scope="module")
def both(tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("both") / "q"
    lowbit.quantize(llama, folder, scheme="W2A16", group_size=32, overrides={"lm_head": "W4A16"})
    return llama, folder


@pytest.fixture(scope="module")
def found(both, text):
    llama, quantized = both
    return diagnosed(quantized, llama, text)


@pytest.fixture(scope="module")
def whole(both, text):
    """The KLD that evaluating finds."""
    llama, quantized = both
    return evaluated(quantized, llama, text)


@pytest.mark.parametrize(
    ("name", "restored"),
    [
        ("model.layers.1", lambda name: ".layers.1." in name),
        ("down_proj", lambda name: "down_proj" in name),
        ("lm_head.weight", lambda name: name == "lm_head.weight"),
        ("model.layers.0.self_attn.qkv_proj", lambda name: ".layers.0." in name and name.split(".")[-2][0] in "qkv"),
    ],
)
def test_a_contribution_is_the_drop_of_the_kld(both, found, whole, text, tmp_path, name, restored):
    llama, quantized = both
    (mine,) = [each for each in found.contributions if each.name == name]
    without = evaluated(decoded(llama, quantized, tmp_path / "restored", restored), llama, text)
    assert found.kld == pytest.approx(whole, rel=1e-4)
    assert mine.kld == pytest.approx(whole - without, abs=2e-4 * whole)
    assert mine.se > 0
    assert mine.bytes > 0


def test_a_quantized_embedding_and_a_tied_head(tmp_path, text):
    source = make_model(tmp_path / "tied", tie_word_embeddings=True, hidden_size=256, intermediate_size=512)
    lowbit.quantize(source, tmp_path / "q.gguf", scheme="Q2_K")
    found = diagnosed(tmp_path / "q.gguf", source, text)
    outside = [each for each in found.contributions if each.level == "outside"]
    assert [each.role for each in outside] == ["embedding and lm_head"]
    plain = decoded(source, tmp_path / "q.gguf", tmp_path / "plain", lambda name: name == "model.embed_tokens.weight")
    whole = evaluated(tmp_path / "q.gguf", source, text)
    assert outside[0].kld == pytest.approx(whole - evaluated(plain, source, text), abs=2e-4 * whole)


def test_in_reverse_one_group_is_quantized(both, whole, text, tmp_path):
    llama, quantized = both
    found = diagnosed(quantized, llama, text, reverse=True)
    (mine,) = [each for each in found.contributions if each.name == "model.layers.2"]
    alone = decoded(llama, quantized, tmp_path / "alone", lambda name: ".layers.2." not in name)
    assert mine.kld == pytest.approx(evaluated(alone, llama, text), rel=1e-3)
    assert found.kld == pytest.approx(whole, rel=1e-4)


def test_the_budget_is_kept(both, text):
    llama, quantized = both
    few, many = (diagnosed(quantized, llama, text, budget=budget) for budget in (6, 60))
    assert few.forward_passes <= 6 + 3  # the two passes with statistics, and the base's own
    assert few.forward_passes < many.forward_passes
    assert len(few.contributions) < len(many.contributions)
    assert any("--budget" in note for note in few.notes)


def test_runs_of_blocks_where_single_ones_are_too_many(tmp_path, text):
    source = make_model(tmp_path / "deep", num_hidden_layers=8, hidden_size=64, intermediate_size=64, head_dim=16)
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16", group_size=32)
    found = diagnosed(tmp_path / "q", source, text, budget=8, windows=2)
    runs = [each for each in found.contributions if each.level == "blocks"]
    assert [(each.block, each.last_block) for each in runs] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_what_is_within_noise_is_said_to_be():
    node = Node("set", "a", "a", frozenset({"a.weight"}), 8, 0, 0)
    values = np.random.default_rng(0).normal(0, 1, 1000)
    assert not contribution(node, values).significant
    assert contribution(node, values + 0.2).significant
    assert contribution(node, values).se == pytest.approx(standard_error(values)) == pytest.approx(0.0316, rel=0.1)


def test_flips_have_context_and_probabilities(both, found, text):
    llama, quantized = both
    worst = found.flips[0]
    assert [each.kld for each in found.flips] == sorted((each.kld for each in found.flips), reverse=True)
    content = read_text(text).content
    first, at = worst.window * 64, worst.window * 64 + worst.position
    assert worst.context == content[max(first, at - 15) : at + 1]
    assert worst.token == content[at + 1]
    for folder, shown, probability in (
        (llama, worst.reference, worst.reference_p),
        (quantized, worst.quantized, worst.quantized_p),
    ):
        model, tokenizer = lowbit.load(folder)
        ids = torch.tensor([tokenizer(content[first : at + 1], add_special_tokens=False).input_ids])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, -1].softmax(-1)
        assert shown == tokenizer.decode([int(p.argmax())])
        assert probability == pytest.approx(p.max().item(), rel=1e-3)
