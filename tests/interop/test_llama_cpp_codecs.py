"""llama.cpp's own decoders and encoders, bit for bit, of the types for which the gguf package has none."""

from __future__ import annotations

import pytest
import torch

from ggml_rows import hard_rows, same_bits, student_case
from llama_cpp import dequantized, quantized
from lowbit.numerics.ggml import TYPES, decode, encode

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "NVFP4"])
def test_any_bytes_decode_as_in_llama_cpp(name):
    """Every value of every byte, zeros of either sign among the scales, and random blocks."""
    kind = TYPES[name]
    random = torch.randint(0, 256, (64, kind.size * 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    every = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, kind.size * 4)
    for blocks in (random, every):
        assert same_bits(decode(name, blocks), dequantized(name, blocks, kind.weights * 4))


def test_signs_and_their_scale_are_llama_cpps():
    """Without importance, of ordinary weights; with it ours is better, since llama.cpp does not use it here."""
    rows = hard_rows(512)
    weight = torch.stack([rows[name] for name in ("normal", "heavy tails", "small", "constant", "ternary", "ties")])
    kind = TYPES["Q1_0"]
    assert torch.equal(encode("Q1_0", weight), quantized(kind.number, weight, kind.row_bytes(512)))
    weight, importance = student_case()
    theirs = quantized(kind.number, weight, kind.row_bytes(1024), importance)
    assert torch.equal(theirs, encode("Q1_0", weight))
