"""What `lowbit refine` refuses, each by name; and runs that stop, gain nothing or are only planned."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import commands
import lowbit
from lowbit.calibrate import loop
from lowbit.calibrate.store import BlockStore
from lowbit.errors import LowbitError, NoGainError, OutputError, UsageError
from lowbit.settings import RunOptions
from models import make_model
from refinement.conftest import SIZES


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return lowbit.quantize(model, tmp_path_factory.mktemp("folder") / "start", scheme="W4A16", group_size=64).path


@pytest.fixture(scope="module")
def gguf(model, tmp_path_factory):
    return lowbit.quantize(model, tmp_path_factory.mktemp("gguf") / "start.gguf", scheme="Q4_0").path


def changed(folder: Path, copy: Path, change) -> Path:
    """A copy of a folder with some tensors changed in place."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


LAYER = "model.layers.0"


def another_vocabulary(path, model):
    return make_model(path, **(SIZES | {"vocab_size": 512}))


def another_width(path, model):
    return make_model(path, **(SIZES | {"intermediate_size": 512}))


def more_blocks(path, model):
    return make_model(path, **(SIZES | {"num_hidden_layers": 2}))


def another_type(path, model):
    return make_model(path, "mistral", **SIZES)


def another_seed(path, model):
    return make_model(path, seed=1, **SIZES)


def quantized(path, model):
    return lowbit.quantize(model, path, scheme="W8A16").path


def quantized_gguf(path, model):
    return lowbit.quantize(model, path.with_suffix(".gguf"), scheme="Q8_0").path


def another_tokens(path, model):
    return changed(model, path, lambda held: held.update(
        {"model.embed_tokens.weight": held["model.embed_tokens.weight"].roll(1, 0).contiguous()}))  # fmt: skip


def rotated(path, model):
    """Values rotated in a way that no scale explains: v and o of another basis, the same function."""

    def turn(held):
        basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
        value, output = f"{LAYER}.self_attn.v_proj.weight", f"{LAYER}.self_attn.o_proj.weight"
        held[value] = (basis @ held[value].float()).to(torch.bfloat16)
        held[output] = (held[output].float() @ torch.block_diag(basis.T, basis.T)).to(torch.bfloat16)

    return changed(model, path, turn)


REFERENCES = {
    another_vocabulary: "vocabulary of 384 tokens.* one of 512",
    another_width: r"gate_proj.weight \[256, 256\].* \[512, 256\]",
    more_blocks: "has 1 blocks.* 2",
    another_type: "type 'llama'.* type 'mistral'",
    another_seed: "not near|embedding",
    quantized: "is quantized itself .compressed-tensors",
    quantized_gguf: "is quantized itself .Q8_0",
    another_tokens: "the embedding .* is not the one of",
    rotated: "v_proj .* is not near",
}


@pytest.mark.parametrize("make", REFERENCES, ids=lambda make: make.__name__)
def test_a_reference_of_another_model(make, model, folder, refine, tmp_path):
    with pytest.raises(UsageError, match=f"(?s){REFERENCES[make]}"):
        refine(folder, tmp_path / "out", make(tmp_path / "reference", model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [another_vocabulary, another_width, another_type, another_seed])
def test_a_reference_of_another_model_than_a_gguf_file(make, model, gguf, refine, tmp_path):
    with pytest.raises(LowbitError, match=r"reference|architecture|has "):
        refine(gguf, tmp_path / "out.gguf", make(tmp_path / "reference", model))
    assert not (tmp_path / "out.gguf").exists()


def test_the_file_as_its_own_reference(folder, refine, tmp_path):
    with pytest.raises(UsageError, match="is the file itself"):
        refine(folder, tmp_path / "out", folder)


def test_files_without_codes(model, refine, tmp_path):
    other = shutil.copytree(model, tmp_path / "float")
    with pytest.raises(UsageError, match=r"is not quantized .safetensors.; there are no codes"):
        refine(other, tmp_path / "out", model)
    plain = lowbit.quantize(model, tmp_path / "f16.gguf", scheme="F16").path
    with pytest.raises(UsageError, match=r"no quantized linear .* F16"):
        refine(plain, tmp_path / "out.gguf", model)
    integers = lowbit.quantize(model, tmp_path / "int8", scheme="INT8").path
    with pytest.raises(UsageError, match=r"nothing of .* can be refined.* INT8 scales whole rows"):
        refine(integers, tmp_path / "out", model)


def test_a_norm_that_no_scale_explains(model, folder, refine, tmp_path):
    """Of a model before fine-tuning: the norm of the queries feeds no linear."""
    reference = make_model(tmp_path / "reference", "qwen3", **SIZES)
    start = lowbit.quantize(reference, tmp_path / "start", scheme="W4A16").path
    name = f"{LAYER}.self_attn.q_norm.weight"
    other = changed(reference, tmp_path / "other", lambda held: held.update({name: held[name] * 1.5}))
    with pytest.raises(UsageError, match=r"q_norm.weight .* differs .* no scale explains it"):
        refine(start, tmp_path / "out", other)


def test_layouts_that_lowbit_would_write_otherwise_stay(model, refine, tmp_path):
    """Scales in float32, which the writer of this format reads and never writes; the linear keeps its bytes."""
    start = lowbit.quantize(model, tmp_path / "start", scheme="W4A16", group_size=64, format="gptq").path
    name = f"{LAYER}.mlp.down_proj"
    changed(start, tmp_path / "wide", lambda held: held.update({f"{name}.scales": held[f"{name}.scales"].float()}))
    prepared = lowbit.refinement.dry_refine(tmp_path / "wide", reference=model)
    (tensor,) = (each for each in prepared.plan.tensors if each.name == f"{name}.weight")
    assert tensor.notes == ("not refined: lowbit stores scales otherwise than this file",)
    done = refine(tmp_path / "wide", tmp_path / "out", model)
    kept, was = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "wide" / "model.safetensors")
    assert torch.equal(kept[f"{name}.qweight"], was[f"{name}.qweight"])
    assert sum(entry.method == "refine" for entry in done.report.tensors) == 6


def test_no_gain_no_file(model, folder, refine, tmp_path):
    """Codes that fit eight tokens of calibration, undamped and unshrunk, are worse everywhere else."""
    with pytest.raises(NoGainError, match=r"gained nothing: 0\.\d+ nats .* before, 0\.\d+ after; nothing was written"):
        refine(folder, tmp_path / "out", model, samples=1, seqlen=8, expert_tokens=1, damping=1e-6, shrinkage=0)
    assert list(tmp_path.iterdir()) == []


def test_too_few_tokens_for_any_linear(model, folder, refine, tmp_path):
    with pytest.raises(UsageError, match=r"would refine none of 7 linears: the text has 288 tokens, .* 1000000"):
        refine(folder, tmp_path / "out", model, expert_tokens=10**6)


def test_names_and_texts_that_make_no_sense(model, folder, gguf, refine, tmp_path, calibration, held_out):
    with pytest.raises(UsageError, match="is the calibration text too"):
        refine(folder, tmp_path / "out", model, text=calibration)
    with pytest.raises(UsageError, match="is one GGUF file"):
        refine(gguf, tmp_path / "out", model)
    with pytest.raises(UsageError, match="is a folder, and a refinement keeps its format"):
        refine(folder, tmp_path / "out.gguf", model)
    with pytest.raises(UsageError, match="scheme is not read by a refinement"):
        refine(folder, tmp_path / "out", model, scheme="W8A16")
    with pytest.raises(UsageError, match="0 held-out windows"):
        refine(folder, tmp_path / "out", model, windows=0)
    with pytest.raises(OutputError, match="the model itself"):
        refine(folder, folder, model)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(OutputError, match="exists already"):
        refine(folder, tmp_path / "there", model)


def test_quantize_has_no_such_method(model, tmp_path):
    with pytest.raises(UsageError, match="starts from the codes of a finished file"):
        lowbit.quantize(model, tmp_path / "out", method="refine")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("states_every", [0.0, 1e9], ids=["with states", "without states"])
def test_a_stopped_run_goes_on_to_the_same_bytes(refine, tmp_path, monkeypatch, states_every):
    monkeypatch.setattr(loop, "KEEP_STATES_EVERY", states_every)
    model = make_model(tmp_path / "model", **(SIZES | {"num_hidden_layers": 2, "hidden_size": 64}))
    start = lowbit.quantize(model, tmp_path / "start", scheme="W4A16", group_size=32).path
    refine(start, tmp_path / "whole", model)

    class Stopped(Exception):
        pass

    save = BlockStore.save

    def save_and_stop(self, index, *arguments):
        save(self, index, *arguments)
        if index == 0:
            raise Stopped

    monkeypatch.setattr(BlockStore, "save", save_and_stop)
    with pytest.raises(Stopped):
        refine(start, tmp_path / "out", model)
    monkeypatch.undo()
    refine(start, tmp_path / "out", model, run=RunOptions(resume=True))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_changed_file_is_not_gone_on_from(model, refine, tmp_path, monkeypatch):
    start = lowbit.quantize(model, tmp_path / "start", scheme="W4A16", group_size=64).path
    monkeypatch.setattr("lowbit.refinement.run._verified", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        refine(start, tmp_path / "out", model)
    monkeypatch.undo()
    lowbit.quantize(model, start, scheme="W4A16", group_size=64, range="absmax", overwrite=True)
    with pytest.raises(UsageError, match=r"model.safetensors, which is refined, is not what it was"):
        refine(start, tmp_path / "out", model, run=RunOptions(resume=True))


def test_the_command(model, gguf, tmp_path, calibration, held_out):
    def run(*arguments):
        return commands.command(tmp_path, "refine", gguf, "--reference", model, *arguments)

    small = ("--calib", calibration, "--samples", 6, "--seqlen", 48, "--expert-tokens", 8, "--sweeps", 1, "--text",
             held_out, "--windows", 3, "--window-tokens", 32)  # fmt: skip
    plan = json.loads(run("--dry-run", "--json").stdout)
    assert sum(tensor["refined"] for tensor in plan["tensors"]) == 7
    assert plan["file_bytes"] == gguf.stat().st_size
    assert all(tensor["reason"] for tensor in plan["tensors"] if not tensor["refined"])
    table = run("--dry-run").stdout
    assert "7 of 12 tensors are refined" in " ".join(table.split())
    out = tmp_path / "out.gguf"
    done = run("-o", out, *small)
    assert done.code == 0, done.stderr
    assert "divergence" in done.stdout
    assert out.stat().st_size == gguf.stat().st_size
    assert run(*small).code == 2
