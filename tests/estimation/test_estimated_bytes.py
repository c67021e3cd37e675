"""The bytes of an estimate against files that were really written: every scheme, format and file type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.errors import LowbitError
from lowbit.estimation import weight_bytes
from lowbit.formats.gguf.imatrix_file import write_imatrix
from lowbit.formats.gguf.importance import ImportanceEntry, ImportanceMatrix
from lowbit.formats.gguf.mix_table import FILE_TYPES
from lowbit.pipeline import calibrate, write_checkpoint
from lowbit.plan.plan import Request, prepare
from lowbit.registry import folder_formats
from lowbit.schemes import SCHEMES
from lowbit.settings import make_settings
from models import SHORT_TEXT, make_model

# What does not stand in the files of a folder: the index of shards and the JSON around.
_TOLERANCE = 0.001
_CALIBRATION = {"calib": SHORT_TEXT, "samples": 1, "seqlen": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama whose rows divide by every block."""
    return make_model(tmp_path_factory.mktemp("estimated") / "llama", hidden_size=256, intermediate_size=512,
                      head_dim=64, num_hidden_layers=1)  # fmt: skip


def bytes_in(output: Path) -> int:
    if output.suffix == ".gguf":
        return sum(path.stat().st_size for path in output.parent.glob("*.gguf"))
    return sum(path.stat().st_size for path in output.glob("*.safetensors"))


def written(model: str | Path, output: Path, **settings) -> int | LowbitError:
    """What the pipeline writes; without verification and report, which change no byte of it."""
    try:
        prepared = prepare(Request(model, make_settings(**settings)), output)
        write_checkpoint(calibrate(prepared, output), output)
    except LowbitError as error:
        return error
    return bytes_in(output)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("format", [name for name in folder_formats() if name != "mxfp4"])
def test_every_scheme_of_a_format(model, tmp_path, format):
    held = 0
    for scheme in SCHEMES:
        settings = {"scheme": scheme, "format": format}
        activation = SCHEMES[scheme].activation
        if activation is not None and activation.needs_calibration:
            settings |= _CALIBRATION
        real = written(model, tmp_path / scheme, **settings)
        if isinstance(real, LowbitError):
            with pytest.raises(type(real)) as refused:
                weight_bytes(model, **settings)
            assert str(refused.value) == str(real)
            continue
        found = weight_bytes(model, **settings)
        assert (found.files, found.exact) == (real, True), scheme
        held += 1
    assert held


@pytest.fixture(scope="module")
def imatrix(model, tmp_path_factory) -> str:
    """A made-up importance matrix, for types that need one."""
    path = tmp_path_factory.mktemp("imatrix") / "made.imatrix"
    entries = {
        tensor.name: ImportanceEntry.of_means(torch.ones(1, tensor.shape[-1]), torch.tensor([512]))
        for tensor in lowbit.dry_run(model, scheme="F32").plan.tensors
        if len(tensor.shape) > 1
    }
    write_imatrix(ImportanceMatrix(entries, ("made up",), 4, 128), path)
    return str(path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_gguf_type(model, imatrix, tmp_path, file_type):
    settings: dict = {"scheme": file_type, "format": "gguf"}
    real = written(model, tmp_path / "x.gguf", **settings)
    if isinstance(real, LowbitError):
        with pytest.raises(type(real), match="needs an importance matrix"):
            weight_bytes(model, **settings)
        settings["imatrix"] = imatrix
        real = written(model, tmp_path / "x.gguf", **settings)
    assert weight_bytes(model, **settings).files == real


def test_a_matrix_that_is_yet_to_be_measured(model, tmp_path):
    settings = {"scheme": "IQ2_XXS", "format": "gguf", "imatrix": "measure", **_CALIBRATION}
    estimated = weight_bytes(model, **settings).files
    assert estimated == pytest.approx(written(model, tmp_path / "x.gguf", **settings), rel=_TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "W4A16", "group_size": 64},
        {"scheme": "W4A16", "overrides": {"down_proj$": "W8A16"}, "ignore": ("q_proj$", "k_proj$", "v_proj$")},
        {"scheme": "NF4", "double_quant": True},
        {"scheme": "W8A8", "kv_cache": "fp8", **_CALIBRATION},
        {"scheme": "W8A16", "shard_size": 1_000_000},
        {"scheme": "Q4_K_M", "shard_size": 1_000_000},
        {"scheme": "Q4_K_M", "pure": True, "output_type": "Q8_0"},
        {"scheme": "W4A16", "method": "gptq", "expert_tokens": 8, **_CALIBRATION},
        {"scheme": "Q4_K_M", "method": "gptq", "expert_tokens": 8, **_CALIBRATION},
    ],
)
def test_settings_are_those_of_quantize(model, tmp_path, settings):
    output = tmp_path / ("x.gguf" if settings["scheme"] == "Q4_K_M" else "x")
    assert weight_bytes(model, **settings).files == written(model, output, **settings)


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("scheme", ["W8A16", "Q8_0"])
def test_other_architectures(tmp_path, architecture, scheme):
    folder = make_model(tmp_path / "model", architecture)
    output = tmp_path / ("x.gguf" if scheme == "Q8_0" else "x")
    real = written(folder, output, scheme=scheme)
    if isinstance(real, LowbitError):
        with pytest.raises(type(real)):
            weight_bytes(folder, scheme)
    else:
        assert weight_bytes(folder, scheme).files == real


@pytest.mark.parametrize("scheme", ["W4A16", "Q4_K_M"])
def test_shapes_come_from_config_where_there_are_no_weights(model, tmp_path, scheme):
    known = weight_bytes(model, scheme)
    bare = tmp_path / model.name
    bare.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    found = weight_bytes(bare, scheme)
    assert found.files == known.files
    assert not found.exact
    assert "holds no weights" in found.notes[0]
    assert found.bits_per_weight == known.bits_per_weight


def test_a_parsed_config_is_enough(model):
    config = json.loads((model / "config.json").read_text())
    assert weight_bytes(config, "W4A16").files == weight_bytes(model, "W4A16").files
    found = weight_bytes(config, "Q4_K_M")
    assert not found.exact
    assert "61 bytes a token" in found.notes[-1]


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "Q8_0"])
def test_the_demo_model(tmp_path, scheme):
    output = tmp_path / ("x.gguf" if scheme == "Q8_0" else "x")
    assert weight_bytes("demo:smollm2", scheme).files == written("demo:smollm2", output, scheme=scheme)
