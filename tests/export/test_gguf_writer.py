"""GGUF files: the header as the gguf package reads it, bytes in their places, parts, refusal of holes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType as V

from lowbit.errors import CheckpointError, OutputError
from lowbit.export import Piece
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.formats.gguf.write import ALIGNMENT, GGUFWriter, StoredBlocks, packed_key_values, part_sizes

KEYS = {
    "general.architecture": ("llama", V.STRING),
    "llama.block_count": (2, V.UINT32),
    "llama.rope.freq_base": (10000.0, V.FLOAT32),
    "tokenizer.ggml.tokens": (["a", "ü", ""], V.ARRAY, V.STRING),
    "tokenizer.ggml.scores": ([0.5, -1.0, 0.0], V.ARRAY, V.FLOAT32),
    "tokenizer.ggml.token_type": ([1, 3, 6], V.ARRAY, V.INT32),
    "tokenizer.ggml.add_bos_token": (True, V.BOOL),
    "some.flags": ([True, False], V.ARRAY, V.BOOL),
    "some.big": (2**40, V.UINT64),
}


def tensors() -> dict[str, tuple[StoredBlocks, torch.Tensor]]:
    """Three tensors whose sizes are no multiples of the alignment, with random bytes."""
    shapes = {"a.weight": ((3, 32), 8, 34), "b.weight": ((5,), 0, 20), "c.weight": ((2, 7, 32), 2, 18)}
    made = {}
    for seed, (name, (shape, number, row_bytes)) in enumerate(shapes.items()):
        rows = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        random = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 255, (rows, row_bytes), dtype=torch.uint8, generator=random)
        made[name] = (StoredBlocks(name, shape, number, rows * row_bytes), values)
    return made


def write(folder, shard_size=None, left_out=()):
    content = tensors()
    stored = [stored for stored, _ in content.values()]
    writer = GGUFWriter(folder, "x.gguf", stored, packed_key_values(KEYS), shard_size)
    try:
        for name, (_, values) in reversed(content.items()):
            for row in reversed(range(len(values))):  # out of order
                if name not in left_out:
                    writer.write(Piece(name, values[row : row + 1], row))
        writer.close()
    finally:
        writer.abandon()
    return writer.files


def test_the_gguf_package_reads_what_was_written(tmp_path):
    (path,) = write(tmp_path)
    reader = gguf.GGUFReader(path)
    for key, value in KEYS.items():
        found = reader.fields[key].contents()
        assert found == pytest.approx(value[0]) if isinstance(value[0], float) else found == value[0], key
    for tensor in reader.tensors:
        stored, values = tensors()[tensor.name]
        assert tuple(reversed([int(size) for size in tensor.shape])) == stored.shape
        assert tensor.data_offset % ALIGNMENT == 0
        assert bytes(tensor.data.view(np.uint8).reshape(-1)) == bytes(values.reshape(-1).numpy())


def test_parts_hold_the_same_tensors(tmp_path):
    files = write(tmp_path, shard_size=150)
    assert [path.name for path in files] == ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    raw = open_raw_gguf(files[0])
    assert {t.name: bytes(raw.bytes(t)) for t in raw.tensors} == {
        name: bytes(values.reshape(-1).numpy()) for name, (_, values) in tensors().items()
    }
    assert raw.metadata["general.architecture"] == "llama"
    assert raw.metadata["split.tensors.count"] == 3


@pytest.mark.parametrize("shard_size", [None, 150, 1])
def test_sizes_are_known_beforehand(tmp_path, shard_size):
    files = write(tmp_path, shard_size)
    expected = part_sizes([stored for stored, _ in tensors().values()], packed_key_values(KEYS), shard_size)
    assert [path.stat().st_size for path in files] == expected


def test_a_hole_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"b\.weight"):
        write(tmp_path, left_out=("b.weight",))


def test_bytes_beyond_a_tensor_are_refused(tmp_path):
    stored, values = tensors()["a.weight"]
    writer = GGUFWriter(tmp_path, "x.gguf", [stored], packed_key_values(KEYS))
    try:
        with pytest.raises(AssertionError, match="overrun"):
            writer.write(Piece("a.weight", values, 1))
    finally:
        writer.abandon()


@pytest.mark.parametrize(
    "entry",
    [
        (1e308, V.FLOAT32), (float("inf"), V.FLOAT32), (-1, V.UINT32),
        (10**30, V.UINT32), ("x", V.UINT32), ([1, 2**40], V.ARRAY, V.UINT32),
        ([1.0, float("nan")], V.ARRAY, V.FLOAT32),
        ([10**30], V.ARRAY, V.INT32),
    ],
)  # fmt: skip
def test_a_number_that_its_type_cannot_hold_is_refused_by_its_key(entry):
    with pytest.raises(CheckpointError, match=r"llama\.some_key"):
        packed_key_values({"llama.block_count": (2, V.UINT32), "llama.some_key": entry})
