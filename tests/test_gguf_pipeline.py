"""From a model to a GGUF file: types, values, parts, importance, what is refused, what a stopped run leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from gguf_models import make_case
from lowbit.api import dry_convert
from lowbit.checkpoint import open_checkpoint, open_gguf, open_safetensors
from lowbit.checkpoint.base import OpenOptions, report_path
from lowbit.errors import CheckpointError, NonFiniteError, OutputError, UsageError
from lowbit.export import weight_files
from lowbit.formats.gguf.imatrix_file import write_imatrix
from lowbit.formats.gguf.importance import ImportanceEntry, ImportanceMatrix
from lowbit.formats.gguf.mix_table import FILE_TYPES
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.numerics import ggml
from lowbit.report import schema
from models import SIZES, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama whose rows all divide by 256."""
    return make_model(
        tmp_path_factory.mktemp("gguf") / "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def imatrix(model, tmp_path_factory) -> Path:
    """A made-up importance matrix of that model."""
    path = tmp_path_factory.mktemp("imatrix") / "made.imatrix"
    random = torch.Generator().manual_seed(0)
    plan = lowbit.dry_run(model, scheme="F32").plan
    entries = {
        tensor.name: ImportanceEntry.of_means(
            torch.rand(1, tensor.columns, generator=random) + 0.1, torch.tensor([512])
        )
        for tensor in plan.tensors
        if len(tensor.shape) > 1 and tensor.name != "token_embd.weight"
    }
    write_imatrix(ImportanceMatrix(entries, ("made up",), 4, 128), path)
    return path


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in open_raw_gguf(path).tensors}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_is_written_verified_and_read_back(model, imatrix, tmp_path, file_type):
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme=file_type, format="gguf", imatrix=str(imatrix))
    assert done.report.verification is not None
    assert done.report.verification.ok, done.report.verification
    planned = {entry.name: entry for entry in done.report.tensors}
    beside = {name for name in types_in(done.path) if name.endswith(".scale")}  # of NVFP4 matrices
    assert types_in(done.path).keys() - beside == planned.keys()
    assert bool(beside) == (file_type == "NVFP4")
    base = FILE_TYPES[file_type].base
    assert base in types_in(done.path).values() or file_type == "MXFP4_MOE"  # which is of models with experts
    assert open_raw_gguf(done.path).metadata["general.file_type"] == FILE_TYPES[file_type].number
    original, decoded = open_checkpoint(model), open_checkpoint(done.path)
    assert set(decoded.tensors) <= set(original.tensors)
    for name in decoded.tensors:
        weight = original.read(name).float()
        error = (weight - decoded.read(name).float()).square().sum() / weight.square().sum()
        assert error < (0.37 if file_type == "Q1_0" else 0.35), name  # signs of a normal distribution leave 1 − 2 / π


def test_plain_conversion_is_exact(model, tmp_path):
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="BF16")
    original, decoded = open_checkpoint(model), open_checkpoint(done.path)
    for name in decoded.tensors:
        assert torch.equal(original.read(name).float(), decoded.read(name).float()), name
    assert done.report.totals.quantized_weights == 0


def test_a_gguf_goes_back_to_a_folder(model, tmp_path):
    path = lowbit.quantize(model, tmp_path / "x.gguf", scheme="BF16").path
    folder = lowbit.convert(path, tmp_path / "folder", format="float").path
    original, back = open_checkpoint(model), open_checkpoint(folder)
    assert set(back.tensors) == set(original.tensors)
    for name in back.tensors:
        assert torch.equal(original.read(name).float(), back.read(name).float()), name


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_the_config_has_the_dtype_of_the_file(model, tmp_path, scheme, dtype):
    path = lowbit.quantize(model, tmp_path / "x.gguf", scheme=scheme).path
    assert open_checkpoint(path).config()["dtype"] == dtype


def test_a_gguf_is_quantized_under_its_own_names(model, tmp_path):
    source = lowbit.quantize(model, tmp_path / "source.gguf", scheme="F32").path
    path = lowbit.quantize(source, tmp_path / "x.gguf", scheme="Q4_K_M").path
    direct = lowbit.quantize(model, tmp_path / "direct.gguf", scheme="Q4_K_M").path
    ours, others = open_raw_gguf(path), open_raw_gguf(direct)
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in others.tensors]
    for mine, other in zip(ours.tensors, others.tensors, strict=True):
        assert bytes(ours.bytes(mine)) == bytes(others.bytes(other)), mine.name
    kept = {key: str(value) for key, value in open_raw_gguf(source).metadata.items() if key != "general.file_type"}
    assert kept.items() <= {key: str(value) for key, value in ours.metadata.items()}.items()


def test_tensors_of_that_type_are_copied(model, tmp_path):
    source = lowbit.quantize(model, tmp_path / "source.gguf", scheme="Q4_K_M").path
    again = lowbit.quantize(source, tmp_path / "again.gguf", scheme="Q4_K_M")
    assert all(entry.repacked for entry in again.report.tensors if entry.scheme is not None)
    ours, others = open_raw_gguf(again.path), open_raw_gguf(source)
    assert [bytes(ours.bytes(t)) for t in ours.tensors] == [bytes(others.bytes(t)) for t in others.tensors]


def test_bytes_do_not_depend_on_threads_or_slabs(model, imatrix, tmp_path, monkeypatch):
    one = lowbit.quantize(model, tmp_path / "one.gguf", scheme="Q3_K_M", imatrix=str(imatrix), threads=1).path
    monkeypatch.setattr("lowbit.pipeline.SLAB_WEIGHTS", 3000)
    four = lowbit.quantize(model, tmp_path / "four.gguf", scheme="Q3_K_M", imatrix=str(imatrix), threads=4).path
    assert one.read_bytes() == four.read_bytes()


def test_parts(model, tmp_path):
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="F32", shard_size=1_000_000)
    parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    assert done.path.name == parts[0] == f"x-00001-of-{len(parts):05d}.gguf"
    assert report_path(done.path).name == "x.lowbit-report.json"
    assert schema.load(report_path(done.path)).output.bytes == sum((tmp_path / name).stat().st_size for name in parts)
    whole = lowbit.quantize(model, tmp_path / "whole.gguf", scheme="F32").path
    assert types_in(done.path) == types_in(whole)


def test_importance_weighs_the_errors_of_its_columns(model, tmp_path):
    name = "blk.0.ffn_up.weight"
    values = torch.ones(1, 256)
    values[0, ::4] = 1000.0
    entries = {name: ImportanceEntry.of_means(values, torch.tensor([1]))}
    write_imatrix(ImportanceMatrix(entries, ("t",), 1, 1), tmp_path / "i.gguf")

    def error(path: Path) -> torch.Tensor:
        raw, original = open_raw_gguf(path), open_checkpoint(model).read("model.layers.0.mlp.up_proj.weight").float()
        decoded = raw.decode(next(t for t in raw.tensors if t.name == name))
        return (original - decoded).square().sum(0)[::4].sum()

    plain = lowbit.quantize(model, tmp_path / "plain.gguf", scheme="Q2_K").path
    weighed = lowbit.quantize(model, tmp_path / "weighed.gguf", scheme="Q2_K", imatrix=str(tmp_path / "i.gguf")).path
    assert error(weighed) < 0.8 * error(plain)
    assert open_raw_gguf(weighed).metadata["quantize.imatrix.entries_count"] == len(entries)


def test_overrides_and_fallbacks_are_said(tiny_llama, tmp_path):
    prepared = lowbit.dry_run(tiny_llama, scheme="Q4_K_M", overrides={r"ffn_gate": "Q8_0"})
    kinds = {tensor.name: tensor.stored_as for tensor in prepared.plan.tensors}
    assert kinds["blk.1.ffn_gate.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q5_0"  # rows of 128
    assert "do not divide by 256" in prepared.plan.notes[0]
    assert any("Q5_0, because rows" in note for tensor in prepared.plan.tensors for note in tensor.notes)


def test_the_plan_knows_the_size(model, tmp_path):
    planned = lowbit.dry_run(model, scheme="Q5_K_M").plan.file_bytes
    assert lowbit.quantize(model, tmp_path / "x.gguf", scheme="Q5_K_M").path.stat().st_size == planned


def test_the_name_says_that_it_is_a_gguf(model, tmp_path):
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="NVFP4")  # a scheme of folders too
    assert "NVFP4" in types_in(done.path).values()
    with pytest.raises(UsageError, match="one GGUF file"):
        lowbit.quantize(model, tmp_path / "folder", scheme="Q4_K_M")


def damaged(model: Path, folder: Path, name: str, value: float) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != "" or path.name.startswith(".")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model, tmp_path, value):
    folder = damaged(model, tmp_path / "bad", "model.layers.1.mlp.down_proj.weight", value)
    with pytest.raises(NonFiniteError, match=r"blk\.1\.ffn_down\.weight"):
        lowbit.quantize(folder, tmp_path / "x.gguf", scheme="Q4_K_M")
    assert leftovers(tmp_path) == []


def test_weights_beyond_float16_are_refused_in_f16(model, tmp_path):
    folder = damaged(model, tmp_path / "big", "model.layers.1.mlp.down_proj.weight", 1e6)
    with pytest.raises(NonFiniteError, match="beyond the range of F16"):
        lowbit.quantize(folder, tmp_path / "x.gguf", scheme="F16")
    assert lowbit.quantize(folder, tmp_path / "y.gguf", scheme="BF16").path.exists()


def test_a_type_that_needs_an_imatrix(model, tmp_path):
    with pytest.raises(UsageError, match="importance") as caught:
        lowbit.quantize(model, tmp_path / "x.gguf", scheme="IQ2_XS")
    assert "lowbit imatrix" in caught.value.hint


def test_an_imatrix_of_another_model(model, tiny_llama, imatrix, tmp_path):
    with pytest.raises(CheckpointError, match="has importance for 256 channels"):
        lowbit.quantize(tiny_llama, tmp_path / "x.gguf", scheme="Q4_K_M", imatrix=str(imatrix))
    assert leftovers(tmp_path) == []


def test_an_existing_file_is_kept(model, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"somebody's")
    for overwrite in (False, True):  # not ours: there is no report beside it
        with pytest.raises(OutputError, match="exists already"):
            lowbit.quantize(model, path, scheme="Q8_0", overwrite=overwrite)
    assert path.read_bytes() == b"somebody's"
    path.unlink()
    lowbit.quantize(model, path, scheme="Q8_0")
    lowbit.quantize(model, path, scheme="Q4_0", overwrite=True)
    assert "Q4_0" in types_in(path).values()


def test_an_existing_part_is_kept(model, tmp_path):
    plan = lowbit.dry_run(model, scheme="F32", shard_size=1_000_000).plan
    first = plan.opened_at(tmp_path / "x.gguf")
    second = first.with_name(first.name.replace("-00001-", "-00002-"))
    second.write_bytes(b"somebody's")
    with pytest.raises(OutputError, match="exists already"):
        lowbit.quantize(model, tmp_path / "x.gguf", scheme="F32", shard_size=1_000_000)
    assert second.read_bytes() == b"somebody's"


def test_a_dry_conversion_to_gguf_is_a_plan_and_needs_a_type(model):
    planned = dry_convert(model, format="gguf", scheme="Q8_0").plan
    assert planned.file_bytes == lowbit.dry_run(model, scheme="Q8_0").plan.file_bytes
    with pytest.raises(UsageError, match="needs a type"):
        dry_convert(model, format="gguf")


def test_ignored_matrices_stay_in_16_bits_under_either_name(model, tmp_path):
    for pattern in ("ffn_down", r"mlp\.down_proj$"):
        plan = lowbit.dry_run(model, scheme="Q4_K_M", ignore=(pattern,)).plan
        left = {tensor.name: tensor.reason for tensor in plan.tensors if tensor.reason and "--ignore" in tensor.reason}
        assert left == {f"blk.{block}.ffn_down.weight": f"matches --ignore {pattern}" for block in range(2)}
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="Q4_K_M", ignore=("ffn_down",))
    assert types_in(done.path)["blk.1.ffn_down.weight"] == "BF16"
    with pytest.raises(UsageError, match="--ignore 'nothing' matches no tensor"):
        lowbit.dry_run(model, scheme="Q4_K_M", ignore=("nothing",))


def test_ignored_tensors_of_a_gguf_keep_their_bytes(model, tmp_path):
    source = lowbit.quantize(model, tmp_path / "source.gguf", scheme="Q8_0").path
    path = lowbit.quantize(source, tmp_path / "x.gguf", scheme="Q4_K_M", ignore=("ffn_down",)).path
    ours, others = open_raw_gguf(path), open_raw_gguf(source)
    before = {tensor.name: bytes(others.bytes(tensor)) for tensor in others.tensors}
    assert types_in(path)["blk.0.ffn_down.weight"] == "Q8_0"
    assert types_in(path)["blk.0.ffn_up.weight"] == "Q4_K"
    assert all(bytes(ours.bytes(t)) == before[t.name] for t in ours.tensors if "ffn_down" in t.name)


def test_a_preview_measures_nothing(model, monkeypatch):
    from lowbit.formats.gguf import imatrix

    monkeypatch.setattr(imatrix, "measure_importance", lambda *_: pytest.fail("a dry run measures"))
    assert lowbit.dry_run(model, scheme="IQ2_XS", imatrix="measure").plan.file_bytes


def test_a_run_that_fails_leaves_the_earlier_file(model, tmp_path, monkeypatch):
    path = lowbit.quantize(model, tmp_path / "x.gguf", scheme="Q8_0").path
    before = path.read_bytes(), report_path(path).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "write_all", fail)
    with pytest.raises(OutputError, match="no space left"):
        lowbit.quantize(model, path, scheme="Q4_0", overwrite=True)
    assert (path.read_bytes(), report_path(path).read_bytes()) == before
    assert not list(tmp_path.glob(".*"))


def test_the_report_and_its_page(model, imatrix, tmp_path):
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="IQ3_M", imatrix=str(imatrix))
    said = json.loads((tmp_path / "x.lowbit-report.json").read_text())
    assert said["output"]["format"] == "gguf"
    assert said["settings"]["given"]["imatrix"] == str(imatrix)
    assert said["verification"]["engine"] == "llama.cpp"
    assert done.report.serve[0].command.startswith("llama-server -m ")
    assert "IQ3_M" in (tmp_path / "x.report.html").read_text()
    row = next(entry for entry in said["tensors"] if entry["name"] == "blk.0.ffn_up.weight")
    kind = ggml.TYPES[row["scheme"]]
    assert row["bits_per_weight"] == pytest.approx(kind.bits_per_weight)
    assert 0 < row["relative_error"] < 0.2


def test_an_output_never_takes_the_place_of_its_source(model, tmp_path):
    path = lowbit.quantize(model, tmp_path / "x.gguf", scheme="F16").path
    folder = lowbit.quantize(model, tmp_path / "folder", scheme="W8A16").path
    for source, settings in ((path, {"scheme": "Q4_0"}), (folder, {"scheme": "W4A16"})):
        with pytest.raises(OutputError, match="is the model itself"):
            lowbit.quantize(source, source, overwrite=True, **settings)
        assert source.exists()


def test_a_scheme_of_folders_is_told_from_a_typing_mistake(model):
    with pytest.raises(UsageError) as caught:
        lowbit.dry_run(model, output=Path("x.gguf"))
    assert "Q4_K_M" in caught.value.hint


def test_a_revision_of_a_local_model_is_refused(model):
    with pytest.raises(UsageError, match="read only for a Hugging Face id"):
        lowbit.dry_run(model, options=OpenOptions(revision="main"))


def test_the_language_model_of_one_that_sees_is_verified_against_it(tmp_path):
    """Gemma 3 has other names in the file's config than in its own: its weights were once called absent, at the end."""
    text = {**SIZES, "query_pre_attn_scalar": 32, "sliding_window": 16}
    folder = make_model(tmp_path / "hf", "gemma3", text_config=text)
    done = lowbit.quantize(folder, tmp_path / "text.gguf", scheme="BF16")
    weights = next(check for check in done.report.verification.checks if check.rule == "gguf-weights")
    assert (done.report.verification.ok, weights.detail.split(";")[0]) == (True, "28 tensors")


def test_multipliers_of_the_config_are_in_the_weights(tmp_path):
    """Falcon-H1: what is verified against the source is the product."""
    folder = make_case(tmp_path / "hf", "falcon_h1_multiplied")
    lowbit.quantize(str(folder), tmp_path / "model.gguf", scheme="Q8_0")
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = open_safetensors(folder).read(name).float() * 1.1 * 0.7
    found = open_gguf(tmp_path / "model.gguf").read(name)
    assert ((found - expected).norm() / expected.norm()).item() < 0.01
