"""Pipes, sockets and devices are refused where a file is needed, without waiting for them."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError, LowbitError
from lowbit.files.regular import open_regular, read_regular
from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.report import schema
from lowbit.settings import make_settings


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_what_is_no_file(tmp_path, pipe):
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(tmp_path / "socket"))
    for path, kind in ((pipe, "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(CheckpointError, match=f"is {kind}, and a file is needed"):
            open_regular(path)
    bound.close()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"x"


@pytest.mark.parametrize("read", [read_imatrix, schema.load, make_settings])
def test_paths_of_the_user(pipe, read):
    with pytest.raises(LowbitError, match="is a pipe"):
        read(pipe)


def test_a_gguf_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="is a pipe"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "model.safetensors.index.json",
])  # fmt: skip
def test_files_of_a_checkpoint(tiny_llama, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(CheckpointError, match="is a pipe"):
        lowbit.quantize(model, tmp_path / "out", scheme="W8A16")
    failed = [check.detail for check in lowbit.verify(model, engine="vllm").failed]
    assert any("is a pipe" in detail for detail in failed)
