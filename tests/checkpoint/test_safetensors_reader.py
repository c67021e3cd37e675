"""Reading safetensors folders: every dtype, row slices, shards, memory."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import safetensors_bytes, safetensors_entry
from safetensors.torch import save_file

from lowbit.checkpoint import open_safetensors
from lowbit.checkpoint.safetensors import TORCH_DTYPE
from lowbit.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize("stored", TORCH_DTYPE)
def test_reads_every_dtype_bit_for_bit(tmp_path, stored):
    dtype = TORCH_DTYPE[stored]
    values = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    values = values.gt(127) if dtype is torch.bool else values.view(dtype)
    save_file({"w": values}, tmp_path / "model.safetensors")
    checkpoint = open_safetensors(tmp_path)
    info = checkpoint.tensors["w"]
    assert (info.dtype, info.stored, info.shape, info.nbytes) == (dtype, stored, tuple(values.shape), values.nbytes)
    assert torch.equal(_bits(checkpoint.read("w")), _bits(values))
    assert torch.equal(_bits(checkpoint.read("w", 2, 5)), _bits(values[2:5]))
    assert bytes(checkpoint.raw("w", 2, 5)) == bytes(_bits(values[2:5]).numpy())


def test_reads_scalars_vectors_and_empty_tensors(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "vector": torch.arange(10.0),
        "no rows": torch.empty(0, 4),
        "no columns": torch.empty(4, 0),
        "cube": torch.arange(24).reshape(2, 3, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_safetensors(tmp_path)
    for name, expected in tensors.items():
        assert torch.equal(checkpoint.read(name), expected), name
        checkpoint.release(name)
    assert torch.equal(checkpoint.read("vector", 3, 7), torch.arange(3.0, 7.0))
    assert torch.equal(checkpoint.read("cube", 1, 2), tensors["cube"][1:2])
    assert checkpoint.read("no columns", 1, 3).shape == (2, 0)
    assert checkpoint.read("vector", 4, 4).shape == (0,)


def test_tensors_are_in_file_order_and_alias_the_file(tmp_path):
    header = {"late": safetensors_entry("F32", [2], 8, 16), "early": safetensors_entry("F32", [2], 0, 8)}
    content = safetensors_bytes(json.dumps(header).encode() + b" " * (-len(json.dumps(header)) % 8), bytes(16))
    (tmp_path / "model.safetensors").write_bytes(content)
    checkpoint = open_safetensors(tmp_path)
    assert list(checkpoint.tensors) == ["early", "late"]
    assert checkpoint.read("early").data_ptr() == checkpoint.read("early").data_ptr()


def test_a_misaligned_tensor_is_copied_to_an_aligned_address(tmp_path):
    header = {"byte": safetensors_entry("U8", [1], 0, 1), "w": safetensors_entry("F64", [3], 1, 25)}
    values = torch.tensor([1.5, -2.0, 7.25], dtype=torch.float64)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, b"\x07" + values.numpy().tobytes()))
    read = open_safetensors(tmp_path).read("w")
    assert torch.equal(read, values)
    assert read.data_ptr() % 8 == 0


def test_a_bool_byte_other_than_one_reads_as_true(tmp_path):
    header = {"b": safetensors_entry("BOOL", [3], 0, 3)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, b"\x00\x01\x07"))
    assert open_safetensors(tmp_path).read("b").tolist() == [False, True, True]


def test_slices_outlive_release_and_close(tmp_path):
    values = torch.randn(64, 1024)
    save_file({"w": values}, tmp_path / "model.safetensors")
    checkpoint = open_safetensors(tmp_path)
    rows = checkpoint.read("w", 8, 40)
    checkpoint.release("w")
    assert torch.equal(rows, values[8:40])
    checkpoint.close()
    assert torch.equal(rows, values[8:40])


def test_an_unknown_tensor_names_the_nearest(tmp_path):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.weigth'") as caught:
        open_safetensors(tmp_path).read("model.norm.weigth")
    assert "model.norm.weight" in caught.value.hint


def test_rows_out_of_range_are_an_error(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(IndexError, match=r"rows 2\.\.5 of w, which has 4"):
        open_safetensors(tmp_path).read("w", 2, 5)


def _write_shards(folder, weight_map=None):
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, folder / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = weight_map or {"a": first, "b": first, "c": second}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_shards_named_by_an_index(tmp_path):
    _write_shards(tmp_path)
    save_file({"mistral": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    checkpoint = open_safetensors(tmp_path)
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert torch.equal(checkpoint.read("c"), torch.full((4,), 2.0))
    assert checkpoint.tensors["c"].file.name == "model-00002-of-00002.safetensors"
    assert any("consolidated.safetensors" in note for note in checkpoint.notes)


def test_reads_shards_without_an_index(tmp_path):
    _write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    save_file({"mistral": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert sorted(open_safetensors(tmp_path).tensors) == ["a", "b", "c"]


def test_a_single_file_wins_over_others(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    checkpoint = open_safetensors(tmp_path)
    assert checkpoint.read("w").item() == 1
    assert any("model.fp16.safetensors" in note for note in checkpoint.notes)


def _assert_refused(folder, *fragments):
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(folder)
    for fragment in (str(folder), *fragments):
        assert fragment in str(caught.value)


def test_refuses_a_missing_shard_of_an_index(tmp_path):
    _write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    _assert_refused(tmp_path, "shard model-00002-of-00002.safetensors is missing")


def test_refuses_a_missing_shard_without_an_index(tmp_path):
    _write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    _assert_refused(tmp_path, "shard model-00001-of-00002.safetensors is missing")


def test_refuses_an_index_that_names_a_tensor_its_shard_does_not_hold(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    _write_shards(tmp_path, {"a": first, "b": first, "c": second, "d": second})
    _assert_refused(tmp_path, INDEX, "names tensor 'd'", second)


def test_refuses_a_tensor_that_the_index_does_not_name(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    _write_shards(tmp_path, {"a": first, "c": second})
    _assert_refused(tmp_path, first, "'b'", "does not name it")


def test_refuses_a_tensor_in_another_shard_than_the_index_says(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    _write_shards(tmp_path, {"a": first, "b": second, "c": second})
    _assert_refused(tmp_path, "'b'", f"puts it in {second}")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors"])
def test_refuses_a_shard_outside_the_folder(tmp_path, shard):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    _assert_refused(tmp_path, INDEX, repr(shard), "not a file of this folder")


def test_refuses_a_shard_that_is_no_string(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": 3}}))
    _assert_refused(tmp_path, INDEX, "not a file of this folder")


def test_refuses_a_tensor_in_two_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    _assert_refused(tmp_path, "two.safetensors", "'a' is also in one.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_refuses_a_broken_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    _assert_refused(tmp_path, INDEX)


def test_a_missing_config_says_so(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_safetensors(tmp_path).config()


def _resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_reading_and_releasing_keeps_memory_flat(tmp_path):
    rows, columns, count = 1024, 2560, 20  # 20 tensors of 10 MB
    header, position = {}, 0
    for index in range(count):
        header[f"w{index}"] = safetensors_entry("F32", [rows, columns], position, position + rows * columns * 4)
        position += rows * columns * 4
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(safetensors_bytes(header))
        for _ in range(count):
            file.write(b"\1" * (rows * columns * 4))
    checkpoint = open_safetensors(tmp_path)
    checkpoint.read("w0").sum()
    before = peak = _resident_bytes()
    for name in checkpoint.tensors:
        checkpoint.read(name).sum()
        peak = max(peak, _resident_bytes())
        checkpoint.release(name)
    assert peak - before < 40e6
