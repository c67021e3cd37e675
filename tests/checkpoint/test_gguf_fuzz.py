"""GGUF files with random damage: they open or are refused with our error, in bounded time and memory.

`make fuzz` looks for longer, from another seed.
"""

import os
import shutil
import struct
import zlib

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf_bytes,
    gguf_key_value,
    gguf_tensor_row,
    write_tiny_gguf,
)

from fuzzing import TooSlowError, bounded_memory, bounded_time, fuzz, gguf_sample
from lowbit import kernels
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import LowbitError
from lowbit.formats.gguf.header import read_header
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.formats.gguf.read import open_gguf
from lowbit.numerics.ggml import TYPES, decode

ALIGNMENT = 32
# Random scales are inf and NaN too, and the gguf package's decoder says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf.*")
ARCHITECTURES = ("llama", "gemma3", "qwen2")


def _every_value_type():
    numbers = {U8: 1, I8: -1, U16: 2, I16: -2, U32: 3, I32: -3, F32: 0.5, BOOL: 1, U64: 4, I64: -4, F64: 0.25}
    pairs = [gguf_key_value(f"one.{kind}", kind, value) for kind, value in numbers.items()]
    pairs += [gguf_key_value(f"many.{kind}", ARRAY, (kind, [value] * 3)) for kind, value in numbers.items()]
    pairs += [gguf_key_value("text", STRING, "grüße"), gguf_key_value("words", ARRAY, (STRING, ["a", "", "bcd"]))]
    return gguf_bytes([*pairs, gguf_key_value("general.alignment", U32, 64)], [], alignment=64)


def _every_tensor_type():
    rows, data = [], b""
    random = np.random.default_rng(0)
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        rows.append(gguf_tensor_row(kind.name, [block, 2], int(kind), len(data)))
        data += random.integers(0, 256, 2 * size, dtype=np.uint8).tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    return gguf_bytes([gguf_key_value("general.architecture", STRING, "none")], rows, data)


@pytest.fixture
def samples(tmp_path):
    contents = {"values": _every_value_type(), "tensors": _every_tensor_type()}
    contents["version 2"] = gguf_bytes([], [gguf_tensor_row("w", [8, 2])], bytes(64), version=2)
    contents["nothing"] = gguf_bytes()
    for architecture in ARCHITECTURES:
        types = {"blk.0.ffn_gate.weight": gguf.GGMLQuantizationType.Q8_0} if architecture == "llama" else None
        contents[architecture] = write_tiny_gguf(tmp_path / "model.gguf", architecture, types=types).read_bytes()
    return [gguf_sample(name, content, tmp_path) for name, content in contents.items()]


def _read_all(path, with_folder=None):
    """As it is stored; then as a model: every tensor, and for one file in sixteen the config and the tokenizer."""
    if with_folder is None:
        with_folder = zlib.crc32(path.read_bytes()) % 16 == 0
    raw = open_raw_gguf(path)
    try:
        for tensor in raw.tensors:
            if tensor.type_name.startswith("type "):
                continue
            decoded = raw.decode(tensor)
            assert decoded.numel() == torch.Size(tensor.shape).numel()
    finally:
        raw.close()
    checkpoint = open_gguf(path)
    try:
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape
        if with_folder:
            _ = checkpoint.folder
    finally:
        checkpoint.close()
        shutil.rmtree(os.environ["LOWBIT_CACHE"], ignore_errors=True)


def _check_good(samples, folder):
    """So that what is refused later is the damage, and what is imported late is imported."""
    for sample in samples:
        path = folder / "sample.gguf"
        path.write_bytes(sample.content)
        if sample.name in ARCHITECTURES:
            _read_all(path, with_folder=True)
        else:
            read_header(MappedFile(path))


def test_damaged_files_open_or_are_refused(samples, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    _check_good(samples, tmp_path)
    opened, refused = fuzz(samples, _read_all, tmp_path, ".gguf", 0.6)
    assert opened > 0
    assert refused > 0


def _hang(path):
    while path:
        pass


def _flood(path):
    path.write_bytes(bytes(1 << 40))


def _raise(path):
    raise KeyError(path)


def test_the_harness_notices_a_hang_and_a_flood(tmp_path):
    with pytest.raises(TooSlowError), bounded_time(0.05):
        _hang(tmp_path)
    with pytest.raises((MemoryError, RuntimeError)), bounded_memory(1 << 28):
        torch.ones(1 << 28)


def test_the_harness_reports_a_bug_and_keeps_its_file(samples, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_FUZZ_SECONDS", "1")
    monkeypatch.setattr("fuzzing.CPU_SECONDS_PER_FILE", 0.2)
    for bug in (_raise, _flood, _hang):
        with pytest.raises(AssertionError, match=r"seed 0, try 0 .*failure-0-0\.gguf"):
            fuzz(samples, bug, tmp_path, ".gguf", 0.6)
        assert (tmp_path / "failure-0-0.gguf").exists()


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_random_bytes_decode_to_the_right_shape(isa):
    """Of all types; NaN and inf scales included, nothing is read or written outside."""
    generator = torch.Generator().manual_seed(0)
    with kernels.use_isa(isa):
        for name, kind in TYPES.items():
            for rows, blocks in ((1, 1), (3, 17), (0, 2), (2, 0)):
                data = torch.randint(0, 256, (rows, blocks * kind.size), dtype=torch.uint8, generator=generator)
                decoded = decode(name, data)
                assert decoded.shape == (rows, blocks * kind.weights), name
                assert decoded.dtype == torch.float32
                # the same blocks one by one: no block looks at another
                each = decode(name, data.reshape(rows * blocks, kind.size))
                assert torch.equal(each.reshape(decoded.shape).view(torch.int32), decoded.view(torch.int32)), name


def test_a_count_of_four_billion_strings_is_refused_without_reading_them(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([gguf_key_value("k", ARRAY, struct.pack("<IQ", STRING, 2**32) + bytes(10_000))]))
    file = MappedFile(path)
    with pytest.raises(LowbitError, match="claims 4294967296 items"), bounded_time(0.2), bounded_memory(1 << 26):
        read_header(file)
