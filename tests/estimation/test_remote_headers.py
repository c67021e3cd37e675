"""Models of the Hub without their weights: what is fetched, that it plans the same bytes, and hostile answers."""

from __future__ import annotations

import json
import re
import shutil
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants as hub_constants
import huggingface_hub.errors as hub_errors
import pytest

import lowbit
from lowbit.checkpoint import open_checkpoint, remote
from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.remote import remote_headers
from lowbit.errors import CheckpointError, OutputError, UnsafeError
from lowbit.estimation import weight_bytes
from models import make_model


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder by ranges and counts what it sends. answer  replaces how a range is answered."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.sent, self.requests = folder, 0, []
        self.answer: Any = None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        name = self.path.lstrip("/")
        data = (self.server.folder / name).read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match is not None, "nothing is fetched whole"
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        self.server.requests.append((name, first, last))
        status, about, body = 206, f"bytes {first}-{last}/{len(data)}", data[first : last + 1]
        if self.server.answer is not None:
            status, about, body = self.server.answer(status, about, body)
        self.send_response(status)
        if about is not None:
            self.send_header("Content-Range", about)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.sent += len(body)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub, with one repository org/name, which is the folder `hub.folder`."""
    folder = tmp_path / "repository"
    folder.mkdir()
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def files():
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def snapshot_download(repo, *, allow_patterns, **_):
        assert not [name for name in allow_patterns if name.endswith((".safetensors", ".gguf"))]
        side = tmp_path / "snapshot"
        side.mkdir(exist_ok=True)
        for name in allow_patterns:
            shutil.copyfile(folder / name, side / name)
        return str(side)

    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: files())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo, name, revision=None: f"{address}/{name}")
    yield server
    server.shutdown()
    server.server_close()


def fill(hub: Hub, source: Path) -> None:
    shutil.copytree(source, hub.folder, dirs_exist_ok=True)


@pytest.mark.parametrize("scheme", ["W4A16", "Q8_0"])
def test_shards_are_planned_from_their_headers(hub, tmp_path, scheme):
    # 6 MB of embedding, so that headers are a small part of the files
    model = make_model(tmp_path / "model", vocab_size=24576, shard_size="4MB")
    fill(hub, model)
    assert len(list(model.glob("*.safetensors"))) > 1
    found = weight_bytes("org/name", scheme)
    assert (found.files, found.exact) == (weight_bytes(model, scheme).files, True)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert hub.sent < size / 20
    assert f"{hub.sent / 1e6:.2f} MB of headers were read" in found.notes[0]


def test_the_whole_estimate_of_a_hub_id(hub, tiny_llama):
    fill(hub, tiny_llama)
    found = lowbit.estimate("org/name", scheme="W8A16", memory=24 << 30)
    assert found.files.bytes == weight_bytes(tiny_llama, "W8A16").files
    assert found.fit is not None
    assert found.fit.fits


@pytest.mark.parametrize("split", [None, 1_000_000])
def test_a_gguf_is_planned_from_its_header(hub, tmp_path, split):
    model = make_model(tmp_path / "model", vocab_size=24576)
    lowbit.quantize(model, tmp_path / "x.gguf", scheme="BF16", **({"shard_size": split} if split else {}))
    for path in tmp_path.glob("*.gguf"):
        shutil.copyfile(path, hub.folder / path.name)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))
    local = next(iter(sorted(tmp_path.glob("*.gguf"))))
    assert weight_bytes("org/name", "Q8_0").files == weight_bytes(local, "Q8_0").files
    assert hub.sent < size / 3
    assert weight_bytes("org/name", "W4A16").files == weight_bytes(local, "W4A16").files


def test_small_tensors_that_headers_do_not_replace_are_fetched(hub, tmp_path, tiny_llama):
    # bitsandbytes' quant_state says what shape a packed weight has
    lowbit.quantize(tiny_llama, tmp_path / "nf4", scheme="NF4")
    fill(hub, tmp_path / "nf4")
    with remote_headers("org/name", OpenOptions()) as found:
        assert found is not None
        theirs, ours = open_checkpoint(found[0]), open_checkpoint(tmp_path / "nf4")
        assert {n: t.shape for n, t in theirs.tensors.items()} == {n: t.shape for n, t in ours.tensors.items()}
    assert weight_bytes("org/name", "W4A16").files == weight_bytes(tmp_path / "nf4", "W4A16").files


def test_nothing_is_left_behind(hub, tiny_llama):
    fill(hub, tiny_llama)
    with remote_headers("org/name", OpenOptions()) as found:
        assert found is not None
        folder = found[0]
        copy = folder / "model.safetensors"
        assert copy.stat().st_size == (tiny_llama / "model.safetensors").stat().st_size
        assert copy.stat().st_blocks * 512 < copy.stat().st_size / 2
    assert not folder.exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda status, about, body: (200, None, body), "does not answer ranges"),
        (lambda status, about, body: (206, None, body), "does not answer ranges"),
        (lambda status, about, body: (206, about.replace("bytes 0", "bytes 1"), body), "does not answer ranges"),
        (lambda status, about, body: (206, about, body[:-1]), "came where"),
        (lambda status, about, body: (206, about, body + b"more"), "came where"),
        (lambda status, about, body: (500, None, b"broken"), "cannot be fetched"),
        (lambda status, about, body: (404, None, b"gone"), "cannot be fetched"),
    ],
)
def test_other_answers_are_refused(hub, tiny_llama, answer, message):
    fill(hub, tiny_llama)
    hub.answer = answer
    with pytest.raises(CheckpointError, match=message) as caught:
        weight_bytes("org/name", "W4A16")
    assert "org/name/model.safetensors" in str(caught.value)


def test_a_server_that_sends_everything_is_cut_off(hub, tiny_llama):
    fill(hub, tiny_llama)
    endless = b"\0" * (32 << 20)
    hub.answer = lambda status, about, body: (206, about, endless)
    with pytest.raises(CheckpointError, match="came where"):
        weight_bytes("org/name", "W4A16")


def header(text: str, size: int) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode().ljust(size, b" ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "claims"),
        (struct.pack("<Q", 2) + b"[]", "must start with"),
        (
            header(json.dumps({"w": {"dtype": "BF16", "shape": [1 << 40], "data_offsets": [0, 2 << 40]}}), 64),
            "ends? at",
        ),
        (b"\0", "at least 8"),
    ],
)
def test_hostile_headers_are_refused_by_the_readers_own_rules(hub, tiny_llama, data, message):
    fill(hub, tiny_llama)
    (hub.folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        weight_bytes("org/name", "W4A16")


def test_a_header_without_end_is_refused(hub, tiny_llama, monkeypatch):
    fill(hub, tiny_llama)
    monkeypatch.setattr(remote, "MAX_HEADER_BYTES", 1 << 17)
    (hub.folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 20) + b"{" + b" " * (1 << 20))
    with pytest.raises(CheckpointError, match="goes beyond 131072 bytes"):
        weight_bytes("org/name", "W4A16")


def test_pickles_have_no_header(hub):
    (hub.folder / "config.json").write_text("{}")
    (hub.folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeError, match="no header to read"):
        weight_bytes("org/name", "W4A16", options=OpenOptions(allow_pickle=True))


def test_the_local_cache_serves_without_network(hub, tiny_llama, monkeypatch):
    def unreachable(self, repo, revision):
        raise hub_errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tiny_llama))
    found = weight_bytes("org/name", "W4A16")
    assert found.files == weight_bytes(tiny_llama, "W4A16").files
    assert "cannot be reached" in found.notes[0]


def test_a_file_system_without_holes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PROBE", 0)
    monkeypatch.setattr(remote.os, "stat", lambda path: type("Stat", (), {"st_blocks": 1}))
    with pytest.raises(OutputError, match="no holes"):
        remote.require_holes(tmp_path)


def test_errors_name_the_repository_and_not_the_copy(hub, tiny_llama):
    fill(hub, tiny_llama)
    config = json.loads((tiny_llama / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"^org/name: tensor model\.layers\.2\..* is absent"):
        weight_bytes("org/name", "W4A16")
