"""Files of importance with random damage: read or refused with our error, in bounded time and memory.

`make fuzz` looks for longer, from another seed.
"""

import pytest
import torch

from fuzzing import Sample, fuzz, gguf_sample
from lowbit.formats.gguf.imatrix_file import is_imatrix, read_imatrix, write_imatrix
from lowbit.formats.gguf.importance import ImportanceEntry, ImportanceMatrix


def _matrix():
    """Two dense tensors and one of four experts, one of which no token reached."""
    torch.manual_seed(0)
    experts = torch.rand(4, 32)
    experts[2] = 0
    entries = {
        "blk.0.attn_q.weight": ImportanceEntry.of_sums(torch.rand(1, 64), torch.tensor([1024])),
        "blk.0.ffn_down.weight": ImportanceEntry.of_sums(torch.rand(1, 96), torch.tensor([1024])),
        "blk.0.ffn_up_exps.weight": ImportanceEntry.of_sums(experts, torch.tensor([7, 900, 0, 117])),
    }
    return ImportanceMatrix(entries, ("text.txt",), 2, 512)


def _samples(form, folder):
    path = folder / f"sample.{form}"
    write_imatrix(_matrix(), path, form)
    assert len(read_imatrix(path).entries) == 3
    content = path.read_bytes()
    if form == "gguf":
        return [gguf_sample("imatrix", content, folder)]
    fields, at = [(0, 4), (len(content) - 4 - len("text.txt"), 4), (len(content) - 8 - len("text.txt"), 4)], 4
    for name, entry in sorted(_matrix().entries.items()):
        values = at + 4 + len(name)
        fields += [(at, 4), (values, 4), (values + 4, 4)]
        at = values + 8 + 4 * entry.values.numel()
    return [Sample("imatrix", content, len(content), fields)]


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_damaged_files_are_read_or_refused(form, tmp_path):
    def read(path):
        is_imatrix(path)
        matrix = read_imatrix(path)
        for entry in matrix.entries.values():
            assert entry.values.isfinite().all()
            assert (entry.values >= 0).all()
        again = path.with_name(f"again.{form}")
        write_imatrix(matrix, again, form)
        assert read_imatrix(again).entries.keys() <= matrix.entries.keys()

    read_count, refused = fuzz(_samples(form, tmp_path), read, tmp_path, f".{form}", 0.2)
    assert read_count > 0
    assert refused > 0
