"""What the tests of the command line share: a caller, a text, quantized folders and a model that takes a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import commands


@pytest.fixture(scope="session")
def lowbit(tmp_path_factory) -> Callable[..., commands.Outcome]:
    """Run a command to its end: lowbit("quantize", model, "-o", out) → Outcome."""
    scratch = tmp_path_factory.mktemp("streams")
    return lambda *arguments, **how: commands.command(scratch, *arguments, **how)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(scope="session")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    """tiny_llama in FP8_DYNAMIC, with report."""
    import lowbit

    return lowbit.quantize(tiny_llama, tmp_path_factory.mktemp("quantized") / "fp8", scheme="FP8_DYNAMIC").path


@pytest.fixture(scope="session")
def larger_llama(tmp_path_factory) -> Path:
    """58 million random weights: enough to interrupt, and to see memory."""
    from models import make_model

    return make_model(
        tmp_path_factory.mktemp("models") / "larger", hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64, num_hidden_layers=4, vocab_size=8192,
    )  # fmt: skip
