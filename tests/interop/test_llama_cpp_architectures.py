"""llama.cpp loads a tiny model of every architecture that we write, and its log-probabilities are transformers'."""

from __future__ import annotations

import math

import pytest

from gguf_models import (
    CASES,
    LLAMA_OPTIONS,
    LOOSER,
    TOLERANCE,
    describe_folder,
    make_case,
    prompt_and_logprobs,
    write_plain,
)
from llama_cpp import top_logprobs

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_model(tmp_path, case):
    folder = make_case(tmp_path / "hf", case)
    model, checkpoint = describe_folder(folder)
    path = write_plain(model, checkpoint, tmp_path / "model.gguf")
    ids, expected = prompt_and_logprobs(folder)
    found = top_logprobs(path, ids, options=LLAMA_OPTIONS.get(case))
    assert len(found) == 10
    assert max(found, key=found.__getitem__) == int(expected.argmax())
    worst = max(abs(logprob - expected[token].item()) for token, logprob in found.items())
    assert math.isfinite(worst)
    assert worst < LOOSER.get(case, TOLERANCE), worst
