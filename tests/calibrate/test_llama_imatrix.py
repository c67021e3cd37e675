"""Against the files that the real llama-imatrix wrote of the same models (benchmarks/peers/llama_imatrix.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gguf_models import make_case
from lowbit.checkpoint import open_checkpoint
from lowbit.formats.gguf.imatrix import measure_importance, text_of
from lowbit.formats.gguf.imatrix_file import read_imatrix, write_imatrix
from lowbit.text import Text

RECORDED = Path(__file__).parent.parent / "data" / "imatrix"
TEXT = Text("text.txt", "The quick brown fox jumps over the lazy dog, and 12 old men: they laugh. " * 4)
CASES = ("llama", "qwen3_moe")


@pytest.mark.parametrize("case", CASES)
def test_the_same_tensors_counts_and_values_are_measured(tmp_path, case):
    recorded = read_imatrix(RECORDED / f"{case}.gguf")
    checkpoint = open_checkpoint(make_case(tmp_path / case, case))
    found = measure_importance(checkpoint, text_of(checkpoint, TEXT, 3, 64)).matrix
    assert (found.chunks, found.chunk_tokens, found.datasets) == (3, 64, ("text.txt",))
    assert (recorded.chunk_tokens, recorded.datasets) == (64, ("text.txt",))
    assert list(found.entries) == list(recorded.entries)
    for name, entry in recorded.entries.items():
        assert found.entries[name].counts.tolist() == entry.counts.tolist(), name
        torch.testing.assert_close(found.entries[name].values, entry.values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_both_forms_of_llama_cpp_say_the_same(case):
    new, old = (read_imatrix(RECORDED / f"{case}.{form}") for form in ("gguf", "dat"))
    assert list(new.entries) == list(old.entries)
    for name, entry in new.entries.items():
        experts, columns = entry.values.shape
        shape = (experts, 1, columns)
        torch.testing.assert_close(old.importance(name, shape), new.importance(name, shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_of_llama_cpp_is_written_again_byte_for_byte(tmp_path, case):
    write_imatrix(read_imatrix(RECORDED / f"{case}.gguf"), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (RECORDED / f"{case}.gguf").read_bytes()


def test_a_dat_has_the_layout_of_llama_cpp(tmp_path):
    write_imatrix(read_imatrix(RECORDED / "qwen3_moe.gguf"), tmp_path / "again.dat", "dat")
    recorded = read_imatrix(RECORDED / "qwen3_moe.dat")
    again = read_imatrix(tmp_path / "again.dat")
    assert (tmp_path / "again.dat").stat().st_size == (RECORDED / "qwen3_moe.dat").stat().st_size
    assert list(again.entries) == list(recorded.entries)
    for name, entry in recorded.entries.items():
        assert again.entries[name].counts.tolist() == entry.counts.tolist()
        torch.testing.assert_close(again.entries[name].values, entry.values, rtol=1e-6, atol=0)
