"""The one loop: what it writes decodes to what was rounded; whatever goes wrong leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import pipeline
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError, NonFiniteError, OutputError
from lowbit.export import default_format, find_exporter
from lowbit.numerics import grid_for
from lowbit.pipeline import write_checkpoint
from lowbit.plan.plan import Request, prepare
from lowbit.rounding.rtn import measure_range, round_to_nearest
from lowbit.schemes import SCHEMES
from lowbit.settings import make_settings
from lowbit.tensors import RangeSearch
from models import FAMILIES, make_model

WRITABLE = [name for name, s in SCHEMES.items() if s.activation is None or not s.activation.needs_calibration]


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    """Every kind of tensor once, for tests that write it in every scheme."""
    return make_model(tmp_path_factory.mktemp("one-block") / "model", num_hidden_layers=1)


def write(model, output, threads=2, **settings):
    results = {}
    prepared = prepare(Request(model, make_settings(**settings), threads=threads))
    write_checkpoint(prepared, output, finish=lambda work, written: results.update(written.results))
    return results


@pytest.mark.parametrize("scheme", WRITABLE)
def test_what_is_read_back_is_what_was_rounded(one_block, tmp_path, scheme, monkeypatch):
    """Read, round, pack, write, read, unpack, decode: in small slabs, equal to rounding the whole weight."""
    monkeypatch.setattr(pipeline, "SLAB_WEIGHTS", 128 * 64)
    write(one_block, tmp_path / "out", scheme=scheme, range="absmax")
    source, written = open_checkpoint(one_block), open_checkpoint(tmp_path / "out")
    assert written.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        weight = source.read(name)
        if name not in written.schemes:
            assert torch.equal(written.read(name), weight)
            continue
        spec = written.schemes[name].weight
        if scheme == "W4A8_QOQ":  # whose files are those of W4A8
            spec = replace(spec, scale_format="qoq")
        fused = [name]
        for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if spec.number not in ("int", "ternary") and name.split(".")[-2] in members:
                fused = [name.replace(name.split(".")[-2], member) for member in members]
        known = measure_range(torch.cat([source.read(member) for member in fused]), spec)
        exporter = find_exporter(default_format(SCHEMES[scheme]))
        scales = exporter.scale_format(SCHEMES[scheme], torch.bfloat16)
        expected = round_to_nearest(weight, spec, grid_for(spec, scales), RangeSearch(), known)
        assert torch.equal(written.read(name), expected.decode()), name
        middle = weight.shape[0] // 2
        assert torch.equal(written.read(name, 0, middle), expected.decode()[:middle])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_goes_through(tmp_path, model_type):
    model = make_model(tmp_path / "m", model_type)
    results = write(model, tmp_path / "out", scheme="W8A8")
    assert len(results) == 14
    assert max(result.relative_error for result in results.values()) < 1e-3


def test_output_is_the_same_bytes_whatever_the_threads(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SLAB_WEIGHTS", 4096)
    errors = [write(tiny_llama, tmp_path / f"out{n}", threads=n) for n in (1, 3)]
    files = [(tmp_path / f"out{n}" / "model.safetensors").read_bytes() for n in (1, 3)]
    assert files[0] == files[1]
    assert errors[0] == errors[1]


def test_shards_in_and_out(tmp_path, tiny_llama):
    model = make_model(tmp_path / "m", shard_size="100KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    write(model, tmp_path / "out", shard_size=1_000_000)
    write(tiny_llama, tmp_path / "single", shard_size=1_000_000)
    a, b = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "single")
    assert all(torch.equal(a.read(name), b.read(name)) for name in b.tensors)


def test_reported_error_is_that_of_the_weights(tiny_llama, tmp_path):
    results = write(tiny_llama, tmp_path / "out")
    source, written = open_checkpoint(tiny_llama), open_checkpoint(tmp_path / "out")
    for name, result in results.items():
        weight = source.read(name).double()
        difference = written.read(name).double() - weight
        assert result.relative_error == pytest.approx(
            (difference.square().sum() / weight.square().sum()).item(), rel=1e-4
        )
        assert result.max_error == pytest.approx(difference.abs().max().item(), rel=1e-6)


def test_companions_come_along_and_contradictions_do_not(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "m")
    (model / "custom_code.py").write_text("x = 1")
    (model / "LICENSE").write_text("free")
    (model / "quantize_config.json").write_text("{}")
    write(model, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "custom_code.py", "LICENSE", "model.safetensors"} <= names  # fmt: skip
    assert "quantize_config.json" not in names


def broken(tiny_llama, tmp_path, name: str, value: float):
    model = shutil.copytree(tiny_llama, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, model / "model.safetensors")
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "NVFP4A16", "FP8_BLOCK"])
def test_nan_and_inf_weights_are_refused_by_name(tiny_llama, tmp_path, name, value, scheme):
    model = broken(tiny_llama, tmp_path, name, value)
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        write(model, tmp_path / "out", scheme=scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_percentile_does_not_hide_an_inf(tiny_llama, tmp_path):
    model = broken(tiny_llama, tmp_path, "model.layers.1.mlp.up_proj.weight", float("inf"))
    with pytest.raises(NonFiniteError):
        write(model, tmp_path / "out", range="percentile")


def test_full_disk_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="no space left"):
        write(tiny_llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_while_writing_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full_later(descriptor, data, position):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full_later)
    with pytest.raises(OutputError, match="no space left"):
        write(tiny_llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_small_disk_is_refused_before_anything_is_written(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"needs 0\.\d MB"):
        write(tiny_llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_any_work(tiny_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        write(tiny_llama, tmp_path / "out")


def test_interrupt_leaves_nothing(tiny_llama, tmp_path):
    prepared = prepare(Request(tiny_llama, make_settings()))

    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(prepared, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_unknown_architecture_and_absent_folder_write_nothing(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "m")
    (model / "config.json").write_text('{"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}')
    for bad in (model, tmp_path / "absent"):
        with pytest.raises(LowbitError):
            write(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predicted_bytes_are_the_written_bytes(one_block, tmp_path):
    for scheme in WRITABLE:
        prepared = prepare(Request(one_block, make_settings(scheme=scheme)))
        write_checkpoint(prepared, tmp_path / scheme)
        assert (tmp_path / scheme / "model.safetensors").stat().st_size == prepared.plan.file_bytes
