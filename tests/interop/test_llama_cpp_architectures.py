"""llama.cpp loads a tiny model of every architecture that we write, and its log-probabilities are transformers'."""

from __future__ import annotations

import math

import pytest
import torch

from gguf_models import CASES, LOOSER, TOLERANCE, describe_folder, make_case, write_plain
from llama_cpp import top_logprobs
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_safetensors

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")


def prompt_and_logprobs(folder) -> tuple[list[int], torch.Tensor]:
    """(a random prompt, float64 log-probabilities after it); one that an ASCII letter follows, because llama.cpp holds
    back half a character and stops at the end of the text."""
    model = load_model(open_safetensors(folder))
    for seed in range(100):
        ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        if 3 <= int(logits.argmax()) < 97:
            return ids[0].tolist(), logits.double().log_softmax(-1)
    raise AssertionError("no prompt is followed by a letter")


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_model(tmp_path, case):
    folder = make_case(tmp_path / "hf", case)
    model, checkpoint = describe_folder(folder)
    path = write_plain(model, checkpoint, tmp_path / "model.gguf")
    ids, expected = prompt_and_logprobs(folder)
    found = top_logprobs(path, ids)
    assert len(found) == 10
    assert max(found, key=found.__getitem__) == int(expected.argmax())
    worst = max(abs(logprob - expected[token].item()) for token, logprob in found.items())
    assert math.isfinite(worst)
    assert worst < LOOSER.get(case, TOLERANCE), worst
