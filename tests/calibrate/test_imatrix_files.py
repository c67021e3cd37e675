"""Both forms of imatrix files: bytes as llama.cpp has them, round trips, and every kind of damage by name."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import CheckpointError, LowbitError, OutputError
from lowbit.formats.gguf.imatrix_file import is_imatrix, read_imatrix, unpack_dat, write_imatrix
from lowbit.formats.gguf.importance import ImportanceEntry, ImportanceMatrix

Q, EXPERTS = "blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight"


@pytest.fixture
def matrix():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 5, generator=generator)
    values[1] = 0
    entries = {
        Q: ImportanceEntry.of_means(torch.rand(1, 7, generator=generator), torch.tensor([1024])),
        EXPERTS: ImportanceEntry.of_means(values, torch.tensor([900, 0, 124])),
    }
    return ImportanceMatrix(entries, ("first.txt", "second.txt"), 2, 512)


def written(path, entries: dict[str, tuple[object, object]], kind="imatrix", **extra):
    """A GGUF imatrix of any content: name → (sums, counts)."""
    writer = GGUFWriter(path, "none")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["a"])
    for key, value in ({"imatrix.chunk_count": 2, "imatrix.chunk_size": 512} | extra).items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, (sums, counts) in entries.items():
        for suffix, values in ((".in_sum2", sums), (".counts", counts)):
            if values is not None:
                writer.add_tensor(name + suffix, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_form_is_what_llama_cpp_writes(matrix, tmp_path):
    write_imatrix(matrix, tmp_path / "x.gguf")
    reader = GGUFReader(tmp_path / "x.gguf")
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} == {
        "general.type": "imatrix", "imatrix.datasets": ["first.txt", "second.txt"], "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [f"{name}{suffix}" for name in (Q, EXPERTS) for suffix in (".in_sum2", ".counts")]
    assert [tensors[f"{EXPERTS}{suffix}"].shape.tolist() for suffix in (".in_sum2", ".counts")] == [[5, 3], [1, 3]]
    assert [tensors[f"{Q}{suffix}"].shape.tolist() for suffix in (".in_sum2", ".counts")] == [[7], [1]]
    assert tensors[f"{EXPERTS}.counts"].data.flatten().tolist() == [900, 0, 124]
    np.testing.assert_array_equal(tensors[f"{Q}.in_sum2"].data.flatten(), matrix.entries[Q].sums[0].numpy())


def test_gguf_form_comes_back(matrix, tmp_path):
    write_imatrix(matrix, tmp_path / "x.gguf")
    again = read_imatrix(tmp_path / "x.gguf")
    assert (again.datasets, again.chunks, again.chunk_tokens) == (matrix.datasets, 2, 512)
    for name, entry in matrix.entries.items():
        assert torch.equal(again.entries[name].counts, entry.counts)
        assert torch.equal(again.entries[name].sums, entry.sums)


GOLDEN_DAT = (
    b"\x01\x00\x00\x00" b"\x07\x00\x00\x00" b"blk.0.a" b"\x02\x00\x00\x00" b"\x03\x00\x00\x00"
    b"\x00\x00\x80\x3f" b"\x00\x00\x00\x40" b"\x00\x00\x00\x00"  # 1, 2, 0: means 0.5, 1, 0 in two calls
    b"\x02\x00\x00\x00" b"\x01\x00\x00\x00" b"t"
)  # fmt: skip


def test_dat_form_byte_for_byte(tmp_path):
    entry = ImportanceEntry.of_means(torch.tensor([[0.5, 1.0, 0.0]]), torch.tensor([1000]))
    write_imatrix(ImportanceMatrix({"blk.0.a": entry}, ("t",), 2, 512), tmp_path / "x.dat", "dat")
    assert (tmp_path / "x.dat").read_bytes() == GOLDEN_DAT
    again = read_imatrix(tmp_path / "x.dat")
    assert again.entries["blk.0.a"].values.tolist() == [[0.5, 1.0, 0.0]]
    assert again.entries["blk.0.a"].counts.tolist() == [1024]
    assert (again.datasets, again.chunks, again.chunk_tokens) == (("t",), 2, 0)


def test_dat_form_without_its_last_part_is_read(tmp_path):
    (tmp_path / "x.dat").write_bytes(GOLDEN_DAT[:-9])
    assert read_imatrix(tmp_path / "x.dat").chunks == 0


def test_dat_form_gives_unseen_experts_one_as_llama_cpp_does(matrix, tmp_path):
    write_imatrix(matrix, tmp_path / "x.dat", "dat")
    importance = read_imatrix(tmp_path / "x.dat").importance(EXPERTS, (3, 4, 5))
    torch.testing.assert_close(importance[[0, 2]], matrix.entries[EXPERTS].values[[0, 2]])
    assert importance[1].tolist() == [1.0] * 5


def test_either_form_is_told_by_its_content(matrix, tmp_path):
    write_imatrix(matrix, tmp_path / "x.dat", "gguf")
    write_imatrix(matrix, tmp_path / "x.gguf", "dat")
    assert read_imatrix(tmp_path / "x.dat").chunk_tokens == 512
    assert read_imatrix(tmp_path / "x.gguf").chunk_tokens == 0
    assert is_imatrix(tmp_path / "x.dat")


def test_a_gguf_that_is_a_model_is_no_imatrix(tmp_path):
    path = written(tmp_path / "x.gguf", {Q: ([1.0], None)}, kind="model", **{"general.architecture": "llama"})
    assert not is_imatrix(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="sums or counts but not both"):
        read_imatrix(path)
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not is_imatrix(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="of 'llama' is no imatrix"):
        read_imatrix(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([1.0, float("nan")], [512.0], "channel 1, is nan"),
        ([float("inf"), 1.0], [512.0], "channel 0, is inf"),
        ([1.0, -2.0], [512.0], "channel 1, is -0.0039"),
        ([0.0, 0.0], [512.0], "zero in every channel"),
        ([0.0, 0.0], [0.0], "all counts are zero"),
        ([1.0, 2.0], [0.0], "sums and was measured on no tokens"),
        ([1.0, 2.0], [-512.0], "count of -512"),
        ([1.0, 2.0], [float("nan")], "count of nan"),
        ([1.0, 2.0], [float("inf")], "count of inf"),
        ([1.0, 2.0], [1.5], "count of 1.5; tokens are whole"),
        ([1.0, 2.0, 3.0], [512.0, 512.0], "3 sums and 2 counts"),
        ([1.0, 2.0], None, "sums or counts but not both"),
        (None, [1.0], "sums or counts but not both"),
    ],
)
def test_gguf_damage_is_named(tmp_path, sums, counts, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_imatrix(written(tmp_path / "x.gguf", {Q: (sums, counts)}))
    assert "x.gguf" in str(caught.value)
    assert caught.value.hint


def test_gguf_without_tensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor's importance"):
        read_imatrix(written(tmp_path / "x.gguf", {}))


def test_gguf_with_text_for_a_number_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"imatrix\.chunk_count is many"):
        read_imatrix(written(tmp_path / "x.gguf", {Q: ([1.0], [1.0])}, **{"imatrix.chunk_count": "many"}))


def integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it ends in the number of entries"),
        (b"\x01\x00", "it ends in the number of entries"),
        (integers(0), "0 entries cannot be in a file of 4 bytes"),
        (integers(-5) + b"\0" * 40, "-5 entries cannot be"),
        (integers(2**31 - 1) + b"\0" * 40, "2147483647 entries cannot be"),
        (integers(1, 2**31 - 1) + b"\0" * 40, "the name of entry 1 of 1 is 2147483647 bytes long"),
        (integers(1, -1) + b"\0" * 40, "the name of entry 1 of 1 is -1 bytes long"),
        (integers(1, 1000) + b"a" * 40, "it ends in the name of entry 1"),
        (integers(1, 1) + b"\xff" + integers(1, 1, 0), "is not UTF-8"),
        (integers(1, 1) + b"a" + integers(1, 2**31 - 1) + b"\0" * 8, "'a' claims 2147483647 values"),
        (integers(1, 1) + b"a" + integers(1, -1) + b"\0" * 8, "'a' claims -1 values"),
        (integers(1, 1) + b"a" + integers(-1, 1) + b"\0" * 8, "of -1 calls"),
        (integers(1, 1) + b"a" + integers(0, 1) + struct.pack("<f", 1.0), "was measured on no tokens"),
        (integers(1, 1) + b"a" + integers(1, 2) + b"\0" * 4, "4 bytes are left"),
        (GOLDEN_DAT[:-9] + integers(-3, 0), "made of -3 chunks"),
        (GOLDEN_DAT[:-9] + integers(3, 2**30), "the name of the text is 1073741824 bytes long"),
        (GOLDEN_DAT[:-1], "it ends in the name of the text"),
        (GOLDEN_DAT + b"more", "4 bytes follow where the file should end"),
        (integers(2) + GOLDEN_DAT[4:-9] * 2, "occurs twice"),
    ],
)
def test_dat_damage_is_named(tmp_path, data, message):
    (tmp_path / "x.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(tmp_path / "x.dat")


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800000, 0xBF800000])
def test_dat_with_nan_inf_or_a_negative_value_is_refused(tmp_path, bits):
    place = GOLDEN_DAT.index(b"\x00\x00\x80\x3f")
    (tmp_path / "x.dat").write_bytes(GOLDEN_DAT[:place] + struct.pack("<I", bits) + GOLDEN_DAT[place + 4 :])
    with pytest.raises(CheckpointError, match="channel 0, is"):
        read_imatrix(tmp_path / "x.dat")


def test_every_truncation_of_a_dat_is_refused_or_complete(tmp_path):
    optional = {len(GOLDEN_DAT) - 9, len(GOLDEN_DAT) - 5}  # before and within the part that may be missing
    for length in range(len(GOLDEN_DAT)):
        if length in optional:
            unpack_dat(GOLDEN_DAT[:length], tmp_path)
        else:
            with pytest.raises(CheckpointError):
                unpack_dat(GOLDEN_DAT[:length], tmp_path)


@given(st.lists(st.tuples(st.integers(0, len(GOLDEN_DAT) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_damaged_dat_is_an_error_of_ours_or_a_matrix(tmp_path_factory, damage):
    data = bytearray(GOLDEN_DAT)
    for place, value in damage:
        data[place] = value
    with contextlib.suppress(LowbitError):
        unpack_dat(bytes(data), tmp_path_factory.getbasetemp())


def test_names_that_llama_cpp_cannot_hold_are_refused(matrix, tmp_path):
    long = ImportanceMatrix({"blk.0." + "x" * 60: matrix.entries[Q]})
    with pytest.raises(OutputError, match="longer than the 63 bytes"):
        write_imatrix(long, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_matrix_that_cannot_be_used(matrix, tmp_path):
    matrix.entries[Q].sums[0, 3] = float("nan")
    with pytest.raises(CheckpointError, match="channel 3, is nan"):
        write_imatrix(matrix, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.gguf: cannot be read"):
        read_imatrix(tmp_path / "absent.gguf")
