"""Where two models part: cut at the first differing token, characters kept whole, probabilities of the reference."""

from __future__ import annotations

import pytest
import torch
from tiny_models import byte_tokenizer, save_model

from lowbit.architecture.loading import load
from lowbit.evaluation import evaluate
from lowbit.evaluation.samples import OPENINGS, QUESTIONS, GreedyText, parted, prompts, say


def said(text: str, tokenizer, shift: float = 0.0) -> GreedyText:
    tokens = tokenizer(text)["input_ids"]
    log_p = torch.full((len(tokens), 300), 0.25).log()
    return GreedyText(tokens, log_p + shift)


def test_the_first_differing_token_is_found():
    tokenizer = byte_tokenizer()
    sample = parted(tokenizer, "p", True, said("the cat", tokenizer), said("the dog barks", tokenizer))
    assert (sample.shared, sample.shared_tokens) == ("the ", 4)
    assert sample.reference is not None
    assert sample.quantized is not None
    assert (sample.reference.token, sample.reference.rest, sample.reference.tokens) == ("c", "at", 3)
    assert (sample.quantized.token, sample.quantized.rest) == ("d", "og barks")
    assert sample.quantized.token_probability == pytest.approx(0.25)


def test_models_that_agree_never_part():
    tokenizer = byte_tokenizer()
    sample = parted(tokenizer, "p", False, said("same", tokenizer), said("same", tokenizer))
    assert (sample.shared, sample.reference, sample.quantized) == ("same", None, None)


def test_a_character_cut_in_two_stays_whole():
    """é and è share their first byte: the models part inside a character."""
    tokenizer = byte_tokenizer()
    sample = parted(tokenizer, "p", False, said("caf\u00e9!", tokenizer), said("caf\u00e8?", tokenizer))
    assert sample.shared == "caf"
    assert sample.reference is not None
    assert sample.reference.token + sample.reference.rest == "\u00e9!"


def test_one_that_stops_first_has_ended():
    tokenizer = byte_tokenizer()
    sample = parted(tokenizer, "p", False, said("one two", tokenizer), said("one", tokenizer))
    assert sample.quantized is not None
    assert (sample.quantized.ended, sample.quantized.tokens) == (True, 0)


def test_chat_models_are_asked_and_others_continue():
    assert prompts(byte_tokenizer(), 2) == (OPENINGS[:2], False)
    chat = byte_tokenizer(chat_template="{{ messages[0]['content'] }}")
    assert prompts(chat, 3) == (QUESTIONS[:3], True)


def test_say_takes_the_most_probable_token_each_time(tmp_path):
    save_model(tmp_path, "qwen2")
    model, tokenizer = load(tmp_path)
    made = say(model, tokenizer, "hello", False, 6, keep_probabilities=True)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    for token, log_p in zip(made.tokens, made.log_probabilities, strict=True):
        logits = model(ids).logits[0, -1]
        assert token == int(logits.argmax())
        assert torch.allclose(log_p, logits.float().log_softmax(-1), atol=1e-4)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_say_stops_where_the_model_sees_no_further(tmp_path):
    save_model(tmp_path, "qwen2")
    model, tokenizer = load(tmp_path)
    assert len(say(model, tokenizer, "x" * 250, False, 48).tokens) == 6
    assert say(model, tokenizer, "x" * 256, False, 48).tokens == []


def test_samples_are_on_the_last_row_and_only_where_asked_for(tmp_path, text_file):
    save_model(tmp_path / "a", "qwen2")
    save_model(tmp_path / "b", "qwen2", seed=1)
    arguments = {"text": text_file, "windows": 2, "window_tokens": 16}
    [row] = evaluate(tmp_path / "b", tmp_path / "a", **arguments, samples=2, sample_tokens=4)
    assert [sample.prompt for sample in row.samples] == list(OPENINGS[:2])
    assert row.model_dump(mode="json")["samples"][0]["prompt"] == OPENINGS[0]
    [row] = evaluate(tmp_path / "b", tmp_path / "a", **arguments)
    assert row.samples == ()
    [row] = evaluate(tmp_path / "b", **arguments, samples=2)
    assert row.samples == ()


def test_the_fingerprint_tells_models_apart(tmp_path, text_file):
    save_model(tmp_path / "a", "qwen2")
    save_model(tmp_path / "b", "qwen2", seed=1)
    arguments = {"text": text_file, "windows": 1, "window_tokens": 16}
    prints = [evaluate(tmp_path / "a", tmp_path / other, **arguments)[0].reference_sha256 for other in ("a", "b", "a")]
    assert prints[0] == prints[2] != prints[1]
    assert len(prints[0] or "") == 64
