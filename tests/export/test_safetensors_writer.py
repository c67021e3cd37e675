from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lowbit.errors import OutputError
from lowbit.export import Piece, safetensors_writer
from lowbit.export.safetensors_writer import SafetensorsWriter, StoredTensor, file_sizes

VALUES = {
    "a": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    "b": torch.randn(5, 3).to(torch.bfloat16),
    "c": torch.arange(2, dtype=torch.int64),
    "d": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "e": torch.zeros(0, 7),
    "f": torch.tensor(3.5),
}
STORED = [StoredTensor(name, value.dtype, tuple(value.shape)) for name, value in VALUES.items()]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("shard_size", [10, 40, 10**9])
def test_written_rows_are_read_by_safetensors(tmp_path, shard_size):
    writer = SafetensorsWriter(tmp_path, STORED, shard_size)
    for name, value in reversed(VALUES.items()):
        if value.dim() == 2 and value.shape[0] > 1:
            writer.write(Piece(name, value[1:], row=1))
            writer.write(Piece(name, value[:1]))
        else:
            writer.write(Piece(name, value))
    writer.close()
    read = {}
    for path in writer.files:
        read |= load_file(path)
    assert read.keys() == VALUES.keys()
    assert all(same(read[name], value) for name, value in VALUES.items())
    assert file_sizes(STORED, shard_size) == [path.stat().st_size for path in writer.files]


def test_shards_have_an_index_that_names_every_tensor(tmp_path):
    import json

    writer = SafetensorsWriter(tmp_path, STORED, 10)
    for name, value in VALUES.items():
        writer.write(Piece(name, value))
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == VALUES.keys()
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118


def test_tensors_are_aligned_to_their_item_size(tmp_path):
    writer = SafetensorsWriter(tmp_path, STORED, 10**9)
    shard = writer._parts[0]
    for tensor in shard.tensors:
        assert shard.offsets[tensor.name] % tensor.dtype.itemsize == 0
    writer.abandon()


def test_unwritten_rows_are_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path, STORED, 10**9)
    for name, value in VALUES.items():
        writer.write(Piece(name, value[:2] if name == "b" else value))
    with pytest.raises(OutputError, match="first b"):
        writer.close()
    writer.abandon()


def test_overrun_is_a_bug(tmp_path):
    writer = SafetensorsWriter(tmp_path, STORED, 10**9)
    with pytest.raises(AssertionError, match="overrun"):
        writer.write(Piece("a", VALUES["a"], row=1))
    writer.abandon()


@pytest.mark.parametrize("assembled", [0, 1 << 20])
def test_strips_of_columns_make_the_whole(tmp_path, monkeypatch, assembled):
    """Formats that store a weight transposed write a slab of rows as a strip of columns, in memory or in the file."""
    monkeypatch.setattr(safetensors_writer, "ASSEMBLED_BYTES", assembled)
    value = torch.arange(6 * 10, dtype=torch.int32).reshape(6, 10)
    writer = SafetensorsWriter(tmp_path, [StoredTensor("t", value.dtype, (6, 10))], 10**9)
    for first, last in ((4, 10), (0, 1), (1, 4)):
        writer.write(Piece("t", value[:, first:last], column=first))
    writer.close()
    assert torch.equal(load_file(writer.files[0])["t"], value)


@pytest.mark.parametrize("assembled", [0, 1 << 20])
@pytest.mark.parametrize("column", [8, -1])
def test_a_strip_beyond_the_last_column_is_refused(tmp_path, monkeypatch, column, assembled):
    monkeypatch.setattr(safetensors_writer, "ASSEMBLED_BYTES", assembled)
    writer = SafetensorsWriter(tmp_path, [StoredTensor("t", torch.int32, (6, 10))], 10**9)
    with pytest.raises(AssertionError, match="overruns"):
        writer.write(Piece("t", torch.zeros(6, 3, dtype=torch.int32), column=column))
    writer.abandon()
