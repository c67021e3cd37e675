"""Every bit of the weight files is known: verify finds a change wherever it is, in every format."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import lowbit
from lowbit.files import hashes
from lowbit.files.hashes import FileHashes, as_text, file_digests, from_text
from lowbit.report import schema
from models import make_model

FORMATS = {
    "compressed-tensors": {"scheme": "W4A16", "group_size": 32},
    "gptq": {"scheme": "W4A16", "format": "gptq", "group_size": 32},  # written in strips
    "awq": {"scheme": "W4A16_ASYM", "format": "awq", "group_size": 32},
    "modelopt": {"scheme": "NVFP4A16", "format": "modelopt"},
    "bitsandbytes": {"scheme": "NF4", "shard_size": 1_000_000},
    "gguf": {"scheme": "Q4_0"},
    "split gguf": {"scheme": "Q8_0", "shard_size": 1_000_000},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("checksums") / "model", num_hidden_layers=1, vocab_size=6000)


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_bit_is_found_wherever_it_is(model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(hashes, "CHUNK", 1 << 16)
    output = tmp_path / ("x.gguf" if "gguf" in name else "x")
    done = lowbit.quantize(model, output, **FORMATS[name])
    rule = "gguf-checksums" if "gguf" in name else "checksums"
    passed = {check.rule: check for check in lowbit.verify(done.path).checks}[rule]
    assert passed.passed
    files = [
        done.path.parent / file.name if "gguf" in name else output / file.name for file in done.report.output.files
    ]
    draw = random.Random(0)
    for file in files:
        size = file.stat().st_size
        for position in [0, size - 1, *(draw.randrange(size) for _ in range(3))]:
            data = bytearray(file.read_bytes())
            data[position] ^= 1 << draw.randrange(8)
            kept = file.read_bytes()
            file.write_bytes(data)
            failed = {check.rule: check.detail for check in lowbit.verify(done.path).failed}
            file.write_bytes(kept)
            assert failed.get(rule, file.name).startswith(file.name), (position, failed)
            assert rule in failed or "files" in failed or "gguf-file" in failed


def test_what_changed_beside_the_weights_is_named_and_no_failure(model, tmp_path):
    output = lowbit.quantize(model, tmp_path / "x", scheme="FP8_DYNAMIC").path
    (output / "generation_config.json").write_text('{"max_length": 7}')
    found = {check.rule: check for check in lowbit.verify(output).checks}["checksums"]
    assert (found.passed, found.detail) == (
        True,
        "1 file as written, to the bit; changed since: generation_config.json",
    )


def test_without_a_report_nothing_is_compared(model, tmp_path):
    output = lowbit.quantize(model, tmp_path / "x", scheme="FP8_DYNAMIC").path
    (output / schema.REPORT_NAME).unlink()
    assert lowbit.verify(output).unchecked["checksums"] == "no report with checksums lies beside it"


def test_hashes_of_a_file_that_threads_write_out_of_order(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "CHUNK", 1000)
    data = bytes(torch.randint(0, 256, (12_345,), dtype=torch.uint8).numpy())
    path = tmp_path / "file"
    path.write_bytes(b"\0" * len(data))
    with path.open("r+b", buffering=0) as file:
        found = FileHashes(file.fileno(), len(data), [(0, 10)])
        starts = list(range(10, len(data) - 100, 700))
        random.Random(1).shuffle(starts)
        file.write(data[:10])

        def write(begin: int) -> None:
            part = data[begin : min(begin + 700, len(data) - 100)]
            hashes.os.pwrite(file.fileno(), part, begin)
            found.wrote(begin, len(part))

        threads = [threading.Thread(target=write, args=(start,)) for start in starts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hashes.os.pwrite(file.fileno(), data[-100:], len(data) - 100)  # as through a mapping: not counted
        digests = found.digests()
    assert digests == file_digests(path)
    assert len(digests) == 13 * 32
    assert from_text(as_text(digests)) == digests
