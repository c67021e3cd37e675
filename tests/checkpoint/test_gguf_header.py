"""Every way in which a GGUF file can be bad."""

import os
import random
import struct

import numpy as np
import pytest
from checkpoint_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf_bytes,
    gguf_key_value,
    gguf_string,
    gguf_tensor_row,
    write_tiny_gguf,
)

from lowbit.checkpoint import open_gguf
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import CheckpointError, LowbitError
from lowbit.formats.gguf.header import IK_LLAMA_TYPES, REMOVED_TYPES, STORED_TYPES, ggml_type, read_header

ROW = gguf_tensor_row("w", [8])
DATA = bytes(32)
Q4_0 = 2


def _nested(depth):
    return struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQB", U8, 1, 0)


# name → (file, what the message must say)
BAD = {
    "empty file": (b"", "0 bytes"),
    "twenty bytes": (gguf_bytes()[:20], "20 bytes"),
    "wrong magic": (gguf_bytes(magic=b"ggjt"), "starts with b'ggjt'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "is a big-endian GGUF file"),
    "big-endian, version 2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0) + bytes(8), "is a big-endian GGUF file"),
    "version 0": (gguf_bytes(version=0), "is GGUF version 0"),
    "version 1": (gguf_bytes(version=1), "is GGUF version 1"),
    "version 4": (gguf_bytes(version=4), "is GGUF version 4"),
    "more tensors than bytes": (gguf_bytes(counts=(2**60, 0)), "claims 1152921504606846976 tensors"),
    "more key-values than bytes": (gguf_bytes(counts=(0, 2**60)), "claims 1152921504606846976 key-values"),
    "fewer tensors than claimed": (
        gguf_bytes([], [gguf_tensor_row("w" * 20, [8])], counts=(2, 0)),
        "ends after 96 bytes, inside tensor ''",
    ),
    "key beyond the file": (gguf_bytes([struct.pack("<Q", 2**20) + bytes(30)]), "ends after"),
    "key of 2**63 bytes": (
        gguf_bytes([struct.pack("<Q", 2**63) + bytes(30)]),
        "claims a string of 9223372036854775808",
    ),
    "key longer than any": (
        gguf_bytes([struct.pack("<Q", 2**26 + 1) + bytes(30)]),
        "a metadata key claims a string of 67108865 bytes; at most 67108864 are read",
    ),
    "tensor name of 2**64 - 1 bytes": (
        gguf_bytes([], [struct.pack("<Q", 2**64 - 1) + bytes(30)]),
        "a tensor name claims a string of 18446744073709551615 bytes",
    ),
    "string in an array beyond the file": (
        gguf_bytes([gguf_key_value("k", ARRAY, struct.pack("<IQQ", STRING, 1, 10**6))]),
        "inside metadata 'k'",
    ),
    "key is not UTF-8": (gguf_bytes([gguf_key_value(b"\xff", U8, 1)]), "a metadata key is not valid UTF-8"),
    "value is not UTF-8": (
        gguf_bytes([gguf_key_value("k", STRING, b"\1\0\0\0\0\0\0\0\xff")]),
        "'k' is not valid UTF-8",
    ),
    "value beyond the file": (
        gguf_bytes([gguf_key_value("key", STRING, struct.pack("<Q", 10**6))]),
        "inside metadata 'key'",
    ),
    "duplicate key": (gguf_bytes([gguf_key_value("k", U8, 1)] * 2), "metadata key 'k' occurs twice"),
    "unknown value type": (gguf_bytes([gguf_key_value("k", 13, b"\0")]), "'k' has unknown value type 13"),
    "unknown array type": (
        gguf_bytes([gguf_key_value("k", ARRAY, struct.pack("<IQ", 77, 0))]),
        "'k' has unknown value type 77",
    ),
    "array of arrays": (gguf_bytes([gguf_key_value("k", ARRAY, _nested(1))]), "'k' is an array of arrays"),
    "arrays nested a thousand deep": (gguf_bytes([gguf_key_value("k", ARRAY, _nested(1000))]), "an array of arrays"),
    "array longer than the file": (
        gguf_bytes([gguf_key_value("k", ARRAY, struct.pack("<IQ", F64, 2**61))]),
        "claims 2305843009213693952 items of metadata 'k'",
    ),
    "string array longer than the file": (
        gguf_bytes([gguf_key_value("k", ARRAY, struct.pack("<IQ", STRING, 1000))]),
        "claims 1000 items",
    ),
    "alignment zero": (gguf_bytes([gguf_key_value("general.alignment", U32, 0)]), "general.alignment is 0"),
    "alignment 24": (gguf_bytes([gguf_key_value("general.alignment", U32, 24)]), "general.alignment is 24"),
    "alignment of 2**31": (gguf_bytes([gguf_key_value("general.alignment", U32, 2**31)]), "alignment is 2147483648"),
    "alignment is a string": (gguf_bytes([gguf_key_value("general.alignment", STRING, "32")]), "alignment is '32'"),
    "tensor name is not UTF-8": (gguf_bytes([], [gguf_tensor_row(b"\xff", [8])], DATA), "a tensor name is not valid"),
    "nine dimensions": (gguf_bytes([], [gguf_tensor_row("w", [1] * 9)], DATA), "'w' has 9 dimensions; at most 8"),
    "four billion dimensions": (
        gguf_bytes([], [gguf_string("w") + struct.pack("<I", 2**32 - 1) + bytes(16)]),
        "'w' has 4294967295 dimensions",
    ),
    "element count overflows": (
        gguf_bytes([], [gguf_tensor_row("w", [2**40, 2**40])], DATA),
        "shape [1099511627776, 1099511627776] overflows",
    ),
    "overflow hidden by a zero": (gguf_bytes([], [gguf_tensor_row("w", [2**40, 2**40, 0])], DATA), "overflows 64 bits"),
    "bytes of the data overflow 64 bits": (
        gguf_bytes([], [gguf_tensor_row("w", [2**31, 2**31])], DATA),
        "'w' ends at byte 18446744073709",
    ),
    "counts that would overflow when multiplied": (
        gguf_bytes([gguf_key_value("k", ARRAY, struct.pack("<IQ", U64, 2**61 + 1))]),
        "claims 2305843009213693953 items",
    ),
    "offset that wraps around": (
        gguf_bytes([], [gguf_tensor_row("w", [8], offset=2**64 - 32)], DATA),
        "'w' ends at byte 18446744073709551",
    ),
    "offset unaligned to the alignment of the file": (
        gguf_bytes(
            [gguf_key_value("general.alignment", U32, 128)],
            [gguf_tensor_row("w", [8], offset=32)],
            bytes(64),
            alignment=128,
        ),
        "'w' has offset 32, not a multiple of the alignment 128",
    ),
    "unaligned offset": (gguf_bytes([], [gguf_tensor_row("w", [4], offset=16)], DATA), "'w' has offset 16"),
    "offset beyond the file": (
        gguf_bytes([], [gguf_tensor_row("w", [8], offset=2**40)], DATA),
        "'w' ends at byte 1099511",
    ),
    "data cut off": (gguf_bytes([], [ROW], DATA[:31]), "'w' ends at byte"),
    "row is not whole blocks": (
        gguf_bytes([], [gguf_tensor_row("w", [33], Q4_0)], DATA),
        "rows of 33 are not whole blocks of 32 (Q4_0)",
    ),
    "duplicate tensor": (
        gguf_bytes([], [ROW, gguf_tensor_row("w", [8], offset=32)], bytes(64)),
        "tensor 'w' occurs twice",
    ),
    "overlap": (
        gguf_bytes([], [gguf_tensor_row("w", [16]), gguf_tensor_row("v", [8], offset=32)], bytes(64)),
        "tensor 'v' overlaps 'w'",
    ),
    "overlap by part of a block row": (
        gguf_bytes([], [gguf_tensor_row("w", [32, 2], Q4_0), gguf_tensor_row("v", [32], Q4_0, offset=32)], bytes(64)),
        "tensor 'v' overlaps 'w'",
    ),
    "two tensors on the same bytes": (gguf_bytes([], [ROW, gguf_tensor_row("v", [8])], DATA), "overlaps"),
}


@pytest.mark.parametrize("why", BAD)
def test_refuses_a_bad_header_and_says_what_is_wrong(tmp_path, why):
    content, message = BAD[why]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def _header(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return read_header(MappedFile(path))


@pytest.mark.parametrize("version", [2, 3])
def test_all_metadata_is_available(tmp_path, version):
    values = {
        "u8": (U8, 200), "i8": (I8, -3), "u16": (U16, 60000), "u32": (U32, 2**32 - 1), "u64": (U64, 2**64 - 1),
        "i64": (I64, -(2**63)), "f32": (F32, 0.5), "f64": (F64, 0.1), "yes": (BOOL, 1), "text": (STRING, "grüße"),
        "words": (ARRAY, (STRING, ["a", "", "▁b"])), "none": (ARRAY, (STRING, [])),
    }  # fmt: skip
    content = gguf_bytes([gguf_key_value(key, *pair) for key, pair in values.items()], version=version)
    metadata = _header(tmp_path, content).metadata
    expected = {key: value for key, (_, value) in values.items()} | {"words": ["a", "", "▁b"], "none": [], "yes": True}
    assert metadata == expected
    assert metadata["yes"] is True


def test_arrays_of_numbers_are_numpy_arrays(tmp_path):
    content = gguf_bytes(
        [gguf_key_value("ints", ARRAY, (I64, [1, -2])), gguf_key_value("flags", ARRAY, (BOOL, [0, 1, 5]))]
    )
    metadata = _header(tmp_path, content).metadata
    np.testing.assert_array_equal(metadata["ints"], np.array([1, -2], np.int64))
    np.testing.assert_array_equal(metadata["flags"], [False, True, True])


def test_offsets_count_from_the_alignment_that_the_file_states(tmp_path):
    content = gguf_bytes(
        [gguf_key_value("general.alignment", U32, 128)],
        [gguf_tensor_row("w", [8]), gguf_tensor_row("v", [4, 3], offset=128)],
        bytes(128 + 48),
        alignment=128,
    )
    header = _header(tmp_path, content)
    assert header.data_start % 128 == 0
    assert [(tensor.name, tensor.shape) for tensor in header.tensors] == [("w", (8,)), ("v", (3, 4))]
    assert header.tensors[1].start == header.data_start + 128


STRANGE = {
    4: ("Q4_2", "stored as Q4_2 .number 4., which llama.cpp no longer reads"),
    31: ("Q4_0_4_4", "stored as Q4_0_4_4 .number 31., which llama.cpp no longer reads"),
    137: ("IQ2_K", "stored as IQ2_K .number 137., a type of ik_llama.cpp"),
    399: ("Q8_K_R8", "stored as Q8_K_R8 .number 399., a type of ik_llama.cpp"),
    500: ("type 500", "has ggml type 500, which is not known"),
    2**32 - 1: ("type 4294967295", "has ggml type 4294967295, which is not known"),
}


@pytest.mark.parametrize("number", STRANGE)
def test_a_ggml_type_that_llama_cpp_does_not_have_is_called_by_its_name_and_does_not_stop_the_header(tmp_path, number):
    name, message = STRANGE[number]
    header = _header(tmp_path, gguf_bytes([], [gguf_tensor_row("w", [7], kind=number)], DATA))
    assert header.tensors[0].type_name == name
    with pytest.raises(CheckpointError, match=f"tensor 'w' {message.replace('stored', 'is stored', 1)}"):
        ggml_type(header.tensors[0], "model.gguf")


def test_no_number_is_both_of_llama_cpp_and_of_a_fork():
    assert not STORED_TYPES.keys() & (IK_LLAMA_TYPES.keys() | REMOVED_TYPES.keys())
    assert not IK_LLAMA_TYPES.keys() & REMOVED_TYPES.keys()


def test_kernels_of_3_d_convolutions_have_five_dimensions(tmp_path):
    header = _header(tmp_path, gguf_bytes([], [gguf_tensor_row("w", [1, 2, 2, 1, 2])], DATA))
    assert header.tensors[0].shape == (2, 1, 2, 2, 1)
    assert header.tensors[0].stop - header.tensors[0].start == 32


@pytest.mark.parametrize(("counts", "what"), [((2**20 + 1, 0), "tensors"), ((0, 2**20 + 1), "key-values")])
def test_a_big_file_of_nothing_is_not_read_to_its_end(tmp_path, counts, what):
    """Every count fits into the file, but the table would take gigabytes of memory."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(counts=counts))
    os.truncate(path, 1 << 26)
    with pytest.raises(CheckpointError, match=f"claims 1048577 {what}; at most 1048576 are read"):
        read_header(MappedFile(path))


def test_random_mutations_never_do_more_than_raise_our_error(tmp_path):
    """Bytes of the header of a whole model, changed, doubled or cut off."""
    good = write_tiny_gguf(tmp_path / "good.gguf").read_bytes()
    header_end = read_header(MappedFile(tmp_path / "good.gguf")).data_start
    rng = random.Random(0)
    path = tmp_path / "bad.gguf"
    opened = 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(header_end)] = rng.choice((0, 1, 255, rng.randrange(256)))
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content))]
        path.write_bytes(content)
        try:
            checkpoint = open_gguf(path)
            for name in checkpoint.tensors:
                checkpoint.read(name)
        except LowbitError:
            continue
        opened += 1
    assert 0 < opened < 290  # a changed letter of a token is no damage that could be seen
