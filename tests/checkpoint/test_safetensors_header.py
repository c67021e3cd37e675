"""Every way in which a safetensors file can be bad. Ours must refuse whatever the reference implementation refuses."""

import json
import random

import pytest
import torch
from checkpoint_files import safetensors_bytes, safetensors_entry
from safetensors import SafetensorError, safe_open

from lowbit.checkpoint import open_safetensors
from lowbit.errors import CheckpointError, LowbitError

ENTRY = safetensors_entry("F32", [2], 0, 8)
DATA = bytes(8)

# name → (file, what our message must say)
BAD = {
    "empty file": (b"", "0 bytes"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "7 bytes"),
    "header longer than 100 MB": (safetensors_bytes({}, length=100_000_001), "claims 100000001 bytes"),
    "header length of 2**63": (safetensors_bytes({}, length=2**63), "claims 9223372036854775808 bytes"),
    "header beyond the file": (safetensors_bytes({}, length=50), "claims 50 bytes, but the file ends after 10"),
    "header of length zero": (safetensors_bytes(b""), "must start with '{'"),
    "space before the header": (safetensors_bytes(b" {}"), "must start with '{'"),
    "header is a list": (safetensors_bytes(b"[]"), "must start with '{'"),
    "header is not UTF-8": (safetensors_bytes(b'{"\xff":1}'), "not valid UTF-8"),
    "lone surrogate in a name": (
        safetensors_bytes(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "not valid UTF-8",
    ),
    "header is cut off": (safetensors_bytes(b'{"a":'), "not valid JSON"),
    "junk after the header": (safetensors_bytes(b"{}x"), "not valid JSON"),
    "duplicate tensor name": (
        safetensors_bytes(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            DATA,
        ),
        "duplicate key 'a'",
    ),
    "duplicate field": (
        safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
        "duplicate key 'dtype'",
    ),
    "deeply nested": (safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
    "NaN as a number": (safetensors_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA), "NaN"),
    "metadata is a list": (safetensors_bytes({"__metadata__": []}), "__metadata__ must map strings to strings"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
    "tensor is a number": (safetensors_bytes({"a": 1}), "found 1"),
    "dtype missing": (safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA), "are needed"),
    "shape missing": (safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA), "are needed"),
    "offsets missing": (safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, DATA), "are needed"),
    "unknown dtype": (safetensors_bytes({"a": safetensors_entry("F99", [2], 0, 8)}, DATA), "unknown dtype 'F99'"),
    "dtype is a list": (safetensors_bytes({"a": safetensors_entry(["F32"], [2], 0, 8)}, DATA), "unknown dtype"),
    "shape is a number": (safetensors_bytes({"a": safetensors_entry("F32", 2, 0, 8)}, DATA), "shape must be a list"),
    "negative shape": (safetensors_bytes({"a": safetensors_entry("F32", [-2, -1], 0, 8)}, DATA), "-2 is out of range"),
    "minus zero": (safetensors_bytes(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "-0 is out of range"),
    "fractional shape": (safetensors_bytes({"a": safetensors_entry("F32", [2.0], 0, 8)}, DATA), "found [2.0]"),
    "boolean shape": (safetensors_bytes({"a": safetensors_entry("F32", [2, True], 0, 8)}, DATA), "found [2, True]"),
    "shape overflows": (
        safetensors_bytes({"a": safetensors_entry("F32", [2**40, 2**40], 0, 8)}, DATA),
        "overflows 64 bits",
    ),
    "shape overflows before a zero": (
        safetensors_bytes({"a": safetensors_entry("F32", [2**40, 2**40, 0], 0, 0)}),
        "overflows 64 bits",
    ),
    "shape beyond 64 bits": (
        safetensors_bytes({"a": safetensors_entry("F32", [10**30], 0, 8)}, DATA),
        "is out of range",
    ),
    "one offset": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, DATA),
        "must be two non-negative integers",
    ),
    "offsets backwards": (safetensors_bytes({"a": safetensors_entry("F32", [2], 8, 0)}, DATA), "begin at 8"),
    "offsets beyond the file": (
        safetensors_bytes({"a": safetensors_entry("F32", [4], 0, 16)}, DATA),
        "end at 16, but the file holds 8 bytes",
    ),
    "size is not shape × dtype": (
        safetensors_bytes({"a": safetensors_entry("F32", [3], 0, 8)}, DATA),
        "needs 12 bytes, data_offsets span 8",
    ),
    "overlap": (
        safetensors_bytes({"a": ENTRY, "b": safetensors_entry("F32", [2], 4, 12)}, bytes(12)),
        "'b' overlaps the tensor before it",
    ),
    "two tensors on the same bytes": (safetensors_bytes({"a": ENTRY, "b": ENTRY}, DATA), "'b' overlaps"),
    "hole before the first": (safetensors_bytes({"a": safetensors_entry("F32", [2], 4, 12)}, bytes(12)), "hole"),
    "hole between": (
        safetensors_bytes({"a": ENTRY, "b": safetensors_entry("F32", [2], 12, 20)}, bytes(20)),
        "'b' leaves a hole before it",
    ),
    "bytes after the last": (safetensors_bytes({"a": ENTRY}, bytes(9)), "the tensors end at byte"),
}


def _write(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("why", BAD)
def test_refuses_a_bad_header_and_says_what_is_wrong(tmp_path, why):
    content, message = BAD[why]
    path = _write(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def _reference_refuses(path):
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)
    except (SafetensorError, ValueError, OSError, TypeError, RuntimeError, OverflowError, KeyError):
        return True
    return False


# The specification forbids it, the reference implementation accepts it.
STRICTER = {"space before the header"}


@pytest.mark.parametrize("why", sorted(BAD.keys() - STRICTER))
def test_the_reference_implementation_refuses_it_too(tmp_path, why):
    assert _reference_refuses(_write(tmp_path, BAD[why][0]))


def test_random_mutations_never_do_more_than_raise_our_error(tmp_path):
    """And whatever the reference implementation refuses, so do we."""
    rng = random.Random(0)
    header = {
        "__metadata__": {"format": "pt"},
        "a": safetensors_entry("F32", [2, 3], 0, 24),
        "b": safetensors_entry("BF16", [4], 24, 32),
        "c": safetensors_entry("U8", [0, 7], 32, 32),
    }
    good = safetensors_bytes(header, bytes(32))
    opened = 0
    for _ in range(400):
        content = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(len(content) - 32)
            content[where] = rng.choice((rng.randrange(256), *b'0129{}[]",:-'))
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content))]
        path = _write(tmp_path, bytes(content))
        try:
            checkpoint = open_safetensors(tmp_path)
        except LowbitError:
            continue
        opened += 1
        for name in checkpoint.tensors:
            checkpoint.read(name)
        assert not _reference_refuses(path), bytes(content)
    assert opened < 300


def test_padding_after_the_header_is_allowed(tmp_path):
    _write(tmp_path, safetensors_bytes(json.dumps({"a": ENTRY}).encode() + b"   ", DATA))
    assert torch.equal(open_safetensors(tmp_path).read("a"), torch.zeros(2))
