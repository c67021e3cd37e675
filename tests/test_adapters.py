"""Runs with --adapter: the bytes are those of a model that was merged by hand, and the report says what was merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from calibrate.calibrated import calibrated, write_text
from lora import linears_of, make_adapter, summed, tensors_of, write_adapter
from lowbit.calibrate.store import BlockStore
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import OutputError, UsageError
from lowbit.report import schema
from lowbit.settings import RunOptions
from models import SHORT_TEXT, make_model

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("adapters") / "base", "qwen2", **SMALL)


@pytest.fixture(scope="module")
def adapter(base):
    return make_adapter(base.parent / "adapter", base, *LEAVES)


@pytest.fixture(scope="module")
def merged(base, adapter):
    """The base with the sums in float32 in its files."""
    folder = shutil.copytree(base, base.parent / "merged")
    matrices = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors_of(adapter).items()}
    tensors = load_file(folder / "model.safetensors")
    for module in linears_of(base, *LEAVES):
        tensors[f"{module}.weight"] = summed(tensors[f"{module}.weight"], matrices, module).float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_adapter(adapter: Path) -> OpenOptions:
    return OpenOptions(adapter=str(adapter))


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "W4A16", "group_size": 32},
        {"scheme": "W8A8", "method": "gptq", "calib": SHORT_TEXT, "samples": 4, "seqlen": 32},
    ],
    ids=["rtn", "gptq"],
)
def test_a_folder_has_the_bytes_of_the_merged_model(base, adapter, merged, tmp_path, settings):
    lowbit.quantize(base, tmp_path / "a", options=with_adapter(adapter), **settings)
    lowbit.quantize(merged, tmp_path / "b", **settings)
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


@pytest.mark.parametrize("scheme", ["Q8_0", "Q2_K"])
def test_a_gguf_has_the_tensors_of_the_merged_model(base, adapter, merged, tmp_path, scheme):
    from gguf import GGUFReader

    settings = {"scheme": scheme, "imatrix": "measure", "calib": SHORT_TEXT, "samples": 4, "seqlen": 32}
    lowbit.quantize(base, tmp_path / "a.gguf", options=with_adapter(adapter), **settings)
    lowbit.quantize(merged, tmp_path / "b.gguf", **settings)
    one, other = (GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert [tensor.name for tensor in one] == [tensor.name for tensor in other]
    for a, b in zip(one, other, strict=True):
        assert a.data.tobytes() == b.data.tobytes(), a.name


def test_a_sum_that_is_not_quantized_is_rounded_once_to_the_dtype_of_the_base(base, adapter, merged, tmp_path):
    lowbit.quantize(base, tmp_path / "a", options=with_adapter(adapter), ignore=("(q|k|v)_proj$",))
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = load_file(merged / "model.safetensors")[name].to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "a" / "model.safetensors")[name], wanted)


def test_the_report_names_the_adapter_and_the_command_repeats_the_run(base, adapter, tmp_path):
    report = lowbit.quantize(base, tmp_path / "a", options=with_adapter(adapter)).report
    assert report.source.adapter == str(adapter)
    assert len(report.source.adapter_sha256 or "") == 64
    assert any(note.startswith("merged: a LoRA adapter of org/base") for note in report.source.notes)
    assert f"--adapter {adapter}" in (report.command or "")
    assert report.verification is not None
    assert report.verification.ok
    assert str(adapter) in (tmp_path / "a" / "report.html").read_text()
    other = make_adapter(tmp_path / "other", base, *LEAVES, seed=1)
    again = lowbit.quantize(base, tmp_path / "b", options=with_adapter(other)).report
    assert again.source.adapter_sha256 != report.source.adapter_sha256
    assert not (tmp_path / "a" / "adapter_config.json").exists()


def test_evaluation_merges_the_adapter_that_the_report_names(base, adapter, tmp_path):
    lowbit.quantize(base, tmp_path / "a", options=with_adapter(adapter), scheme="W8A16")
    (found,) = lowbit.evaluate(tmp_path / "a", text=SHORT_TEXT, windows=2, window_tokens=32)
    assert found.reference_from == "report"
    assert found.kld_mean is not None
    assert found.kld_mean < 1e-3
    (to_base,) = lowbit.evaluate(tmp_path / "a", base, text=SHORT_TEXT, windows=2, window_tokens=32)
    assert to_base.kld_mean is not None
    assert to_base.kld_mean > 100 * found.kld_mean


def test_a_report_of_schema_7_is_read_without_an_adapter(base, tmp_path):
    lowbit.quantize(base, tmp_path / "a")
    path = tmp_path / "a" / "lowbit-report.json"
    document = json.loads(path.read_text())
    del document["source"]["adapter"], document["source"]["adapter_sha256"]
    path.write_text(json.dumps(document | {"schema": 7}))
    assert schema.load(path).source.adapter is None


def test_resuming_with_another_adapter_is_refused(base, adapter, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(self, index, *arguments):
        raise Stopped

    text, copy = write_text(tmp_path), shutil.copytree(adapter, tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", stop)
        with pytest.raises(Stopped):
            calibrated(base, tmp_path / "out", text, options=with_adapter(copy))
    make_adapter(copy, base, *LEAVES, seed=1)
    with pytest.raises(UsageError, match=r"(?m)adapter_model\.safetensors of .* is not what it was$"):
        calibrated(base, tmp_path / "out", text, options=with_adapter(copy), run=RunOptions(resume=True))
    with pytest.raises(UsageError, match="of the adapter was read, and is not now"):
        calibrated(base, tmp_path / "out", text, run=RunOptions(resume=True))


def test_the_adapter_is_never_overwritten(base, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    (copy / "lowbit-report.json").write_text("{}")
    with pytest.raises(OutputError, match="which the run reads"):
        lowbit.quantize(base, copy, options=with_adapter(copy), overwrite=True)


def test_a_tied_head_of_its_own_is_in_the_output(tmp_path):
    base = make_model(tmp_path / "base", "qwen2", **SMALL, tie_word_embeddings=True)
    head = torch.randn(384, 64)
    adapter = write_adapter(tmp_path / "adapter", {"lm_head.weight": head}, modules_to_save=["lm_head"])
    report = lowbit.quantize(base, tmp_path / "out", options=with_adapter(adapter)).report
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"].float(), head.to(tensors["lm_head.weight"].dtype).float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("config.json ties lm_head.weight" in note for note in report.source.notes)
