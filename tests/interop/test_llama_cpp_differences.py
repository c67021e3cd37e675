"""Where llama.cpp computes something else than transformers, that is all: made to compute the same, they agree."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from as_llama_cpp import one_epsilon, sample_deviation, steps_of_gelu, table_of_gelu
from gguf_models import describe_folder, make_case, prompt_and_logprobs, write_plain
from llama_cpp import top_logprobs

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")


# The second case of Gemma 3n has 22 random blocks, through which what is left of ggml's table grows.
@pytest.mark.parametrize(
    ("case", "imitated", "most"),
    [
        ("kimi_linear", [lambda: one_epsilon(1e-5)], 2e-5),
        ("gemma3n_text", [sample_deviation, table_of_gelu], 5e-4),
        ("gemma3n_shared", [sample_deviation, table_of_gelu], 1e-2),
        ("gemma3n_text", [sample_deviation, steps_of_gelu], 5e-5),
        ("gemma3n_shared", [sample_deviation, steps_of_gelu], 1e-4),
    ],
)
def test_nothing_else_differs(tmp_path, case, imitated, most):
    folder = make_case(tmp_path / "hf", case)
    model, checkpoint = describe_folder(folder)
    path = write_plain(model, checkpoint, tmp_path / "model.gguf")
    with ExitStack() as stack:
        for each in imitated:
            stack.enter_context(each())
        ids, expected = prompt_and_logprobs(folder)
        found = top_logprobs(path, ids)
    assert max(abs(value - expected[token].item()) for token, value in found.items()) < most
