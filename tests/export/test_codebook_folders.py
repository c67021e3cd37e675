"""Codebook folders: golden bytes, the same model in lowbit.load and transformers, and every way one can be bad."""

from __future__ import annotations

import json
import shutil
from functools import partial
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lowbit
from changed_folders import change_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.cli.quantize import summary
from lowbit.errors import CheckpointError, FormatError, UsageError
from lowbit.formats.codebook import write as exporter
from lowbit.numerics import grid_for
from lowbit.numerics.fitted_grids import log_tables
from lowbit.report.schema import Report
from lowbit.schemes import SCHEMES, WeightSpec
from lowbit.tensors import Granularity, QuantizedTensor, SparseOutliers
from models import make_model

NAME = "model.layers.0.mlp.up_proj"
SHORT = {"samples": 8, "seqlen": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("codebook") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def kmeans(source, tmp_path_factory):
    return lowbit.quantize(source, tmp_path_factory.mktemp("codebook") / "out", scheme="KMEANS3", outliers=1).path


@pytest.fixture(scope="module")
def log(source, tmp_path_factory):
    return lowbit.quantize(source, tmp_path_factory.mktemp("codebook") / "out", scheme="LOG4").path


@pytest.fixture
def damaged(kmeans, log, tmp_path):
    """What makes a copy of a folder with changed tensors and config: scheme, tensors, config."""

    def change(scheme, tensors=None, **config):
        folder = shutil.copytree(kmeans if scheme == "KMEANS3" else log, tmp_path / "damaged")
        return change_folder(folder, tensors, **config)

    return change


def packed(spec: WeightSpec, quantized: QuantizedTensor) -> dict[str, list]:
    scheme = SCHEMES["KMEANS3"]
    pieces = exporter.pack("L", quantized, type(scheme)("S", spec, None, ""), 0, (1, 32), torch.bfloat16)
    return {piece.name: piece.values.tolist() for piece in pieces}


def test_golden_bytes_of_k_means():
    spec = WeightSpec("kmeans", 3, Granularity.CHANNEL, outliers=3)
    codes = torch.arange(32, dtype=torch.uint8)[None] % 8
    table = torch.arange(8).float()[None, None] / 4
    outliers = SparseOutliers(torch.tensor([[31]]), torch.tensor([[-2.0]]))
    quantized = QuantizedTensor(codes, torch.ones(1, 1), grid_for(spec, "float16"), spec.granularity, 32, table=table,
                                outliers=outliers)  # fmt: skip
    # eight codes 0 … 7 are 24 bits, 111 110 101 100 011 010 001 000: the bytes 88 C6 FA, four times
    words = torch.frombuffer(bytearray(bytes.fromhex("88C6FA" * 4)), dtype=torch.int32)
    assert packed(spec, quantized) == {
        "L.weight": [words.tolist()], "L.table": [[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]],
        "L.outlier_columns": [[31]], "L.outlier_values": [[-2.0]],
    }  # fmt: skip


def test_golden_bytes_of_logarithmic_codes():
    spec = WeightSpec("log", 4, Granularity.GROUP, 16)
    codes = torch.tensor([[0, 7, 15, 1, 0, 0, 0, 0] + [0] * 24], dtype=torch.uint8)
    table = log_tables(4, torch.tensor([[8, 2]]))
    quantized = QuantizedTensor(codes, torch.tensor([[0.5, 3.0]]), grid_for(spec, "float16"), spec.granularity, 16,
                                table=table)  # fmt: skip
    assert packed(spec, quantized) == {"L.weight": [[0x1F70, 0, 0, 0]], "L.scale": [[0.5, 3.0]], "L.base": [[8, 2]]}
    assert quantized.decode()[0, :4].tolist() == [0, 0.5, -0.5, 0.5 / 64]


def test_the_folder_says_what_it_holds(kmeans):
    config = json.loads((kmeans / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"]) == ("lowbit-codebook", 1)
    (group,) = config["groups"]
    assert {key: group[key] for key in ("number", "bits", "group_size", "outliers")} == {
        "number": "kmeans", "bits": 3, "group_size": None, "outliers": 1.0}  # fmt: skip
    assert NAME in group["linears"]
    stored = load_file(kmeans / "model.safetensors")
    shapes = {leaf: (stored[f"{NAME}.{leaf}"].dtype, tuple(stored[f"{NAME}.{leaf}"].shape))
              for leaf in ("weight", "table", "outlier_columns", "outlier_values")}  # fmt: skip
    assert shapes == {
        "weight": (torch.int32, (192, 12)),
        "table": (torch.float16, (192, 8)),
        "outlier_columns": (torch.uint16, (192, 1)),
        "outlier_values": (torch.float16, (192, 1)),
    }


def test_the_report_counts_tables_and_outliers(kmeans):
    """3 bits, 8 values of 16 bits a row, and 32 bits an outlier: 1 of 128, or 2 of 192."""
    weights = bits = 0
    for rows, columns, kept in ((128, 128, 1), (64, 128, 1), (64, 128, 1), (128, 128, 1), (192, 128, 1), (192, 128, 1),
                                (128, 192, 2)):  # fmt: skip
        weights += rows * columns
        bits += rows * (3 * columns + 8 * 16 + 32 * kept)
    report = json.loads((kmeans / "lowbit-report.json").read_text())
    assert report["totals"]["decoder_bits_per_weight"] == pytest.approx(bits / weights)


def test_no_range_is_named_where_there_is_none(kmeans):
    report = Report.model_validate_json((kmeans / "lowbit-report.json").read_text())
    assert report.settings.range == "none"
    table = Console(width=200, file=StringIO(), record=True)
    table.print(summary(report, kmeans))
    scheme = next(line for line in table.export_text().splitlines() if "KMEANS3" in line)
    assert "range" not in scheme


def test_a_folder_of_floats_holds_the_same_weights_and_says_their_true_bits(source, kmeans, tmp_path):
    done = lowbit.quantize(source, tmp_path / "out", scheme="KMEANS3", outliers=1, format="float")
    assert torch.equal(lowbit.inspect(done.path).read(f"{NAME}.weight").float(),
                       lowbit.inspect(kmeans).read(f"{NAME}.weight"))  # fmt: skip
    bits = json.loads((kmeans / "lowbit-report.json").read_text())["totals"]["decoder_bits_per_weight"]
    assert any(f"{bits:.3f} bits per weight" in note for note in done.report.source.notes)


def test_rows_can_be_read_in_slabs(kmeans):
    checkpoint = open_checkpoint(kmeans)
    parts = [checkpoint.read(f"{NAME}.weight", start, min(start + 37, 192)) for start in range(0, 192, 37)]
    assert torch.equal(torch.cat(parts), checkpoint.read(f"{NAME}.weight"))


def test_transformers_refuses_the_folder_until_lowbit_is_imported(kmeans, monkeypatch):
    """It skips a quantization that it does not know; the shapes of the codes then stop it."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import auto

    for table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(table, "lowbit-codebook", raising=False)
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(kmeans)


@pytest.mark.parametrize("which", ["kmeans", "log", "mixed"])
def test_transformers_computes_the_logits_of_lowbit(which, source, request, tmp_path):
    """Of a folder with two schemes and GPTQ, too."""
    from transformers import AutoModelForCausalLM

    import lowbit.transformers

    if which == "mixed":
        folder = lowbit.quantize(source, tmp_path / "out", scheme="KMEANS4", group_size=32, method="gptq",
                                 overrides={"down_proj": "LOG4"}, **SHORT).path  # fmt: skip
    else:
        folder = request.getfixturevalue(which)
    ids = torch.arange(40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, _ = lowbit.load(folder)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "CodebookLinear"
    with torch.no_grad():
        found, wanted = theirs(ids).logits, ours(ids).logits
    assert wanted.std() > 0.1
    assert torch.equal(found, wanted)


def test_transformers_saves_what_it_loaded(kmeans, tmp_path):
    from transformers import AutoModelForCausalLM

    import lowbit.transformers

    AutoModelForCausalLM.from_pretrained(kmeans).save_pretrained(tmp_path / "again")
    again, before = load_file(tmp_path / "again" / "model.safetensors"), load_file(kmeans / "model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert torch.equal(lowbit.inspect(tmp_path / "again").read(f"{NAME}.weight"),
                       lowbit.inspect(kmeans).read(f"{NAME}.weight"))  # fmt: skip


def test_codes_survive_a_conversion_to_the_same_format(kmeans, log, tmp_path):
    for folder in (kmeans, log):
        done = lowbit.convert(folder, tmp_path / folder.parent.name, format="codebook", overwrite=True)
        theirs, ours = load_file(done.path / "model.safetensors"), load_file(folder / "model.safetensors")
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_linear_that_does_not_fill_words_stays_in_16_bits():
    assert "not a multiple of 32" in (exporter.unfit((8, 48), SCHEMES["KMEANS4"]) or "")
    many = WeightSpec("kmeans", 4, Granularity.CHANNEL, outliers=1)
    scheme = type(SCHEMES["KMEANS4"])("S", many, None, "")
    assert "more than the 65536" in (exporter.unfit((8, 65568), scheme) or "")


def test_other_schemes_and_formats_are_refused(source, tmp_path):
    with pytest.raises(FormatError, match="not W4A16") as caught:
        lowbit.quantize(source, tmp_path / "out", scheme="W4A16", format="codebook")
    assert "KMEANS4" in caught.value.hint
    with pytest.raises(FormatError) as caught:
        lowbit.quantize(source, tmp_path / "out", scheme="KMEANS4", format="compressed-tensors")
    assert "--format codebook" in caught.value.hint


@pytest.mark.parametrize("method", ["hqq", "sign-sgd"])
def test_methods_that_move_scales_are_refused(method, source, tmp_path):
    with pytest.raises(UsageError, match="fitted to the weights"):
        lowbit.quantize(source, tmp_path / "out", scheme="KMEANS4", method=method)


def test_a_range_is_refused_where_there_is_none(source, tmp_path):
    with pytest.raises(UsageError, match="--range mse is read only by"):
        lowbit.quantize(source, tmp_path / "out", scheme="KMEANS4", range="mse")
    with pytest.raises(UsageError, match="--outliers"):
        lowbit.quantize(source, tmp_path / "out", scheme="W4A16", outliers=0.5)


def test_a_refinement_and_a_training_are_refused(kmeans, source, tmp_path):
    with pytest.raises(UsageError, match="KMEANS3"):
        lowbit.refine(kmeans, tmp_path / "out", reference=source)
    model, _ = lowbit.load(source)
    with pytest.raises(UsageError, match="fit anew"):
        lowbit.train.prepare(model.requires_grad_(True), "KMEANS4")


def rewrite(leaf, change, tensors):
    tensors[f"{NAME}.{leaf}"] = change(tensors[f"{NAME}.{leaf}"].clone())


def fill(value):
    return lambda tensor: tensor.fill_(value)


@pytest.mark.parametrize(
    ("scheme", "leaf", "change", "said"),
    [
        ("KMEANS3", "table", fill(float("nan")), "table holds NaN or inf"),
        ("KMEANS3", "outlier_columns", lambda _: torch.full((192, 1), 128, dtype=torch.uint16), "within 0 .. 127"),
        ("KMEANS3", "outlier_values", fill(float("inf")), "outlier_values holds NaN or inf"),
        ("LOG4", "base", fill(9), "not within 2 .. 8"),
    ],
)  # fmt: skip
def test_values_that_no_writer_makes(damaged, scheme, leaf, change, said):
    folder = damaged(scheme, partial(rewrite, leaf, change))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder).read(f"{NAME}.weight")
    assert not lowbit.verify(folder, engine="transformers").ok


@pytest.mark.parametrize(
    ("leaf", "change", "said"),
    [
        ("table", lambda tensor: tensor[:, :4].contiguous(), "[192, 8] is needed"),
        ("table", lambda tensor: tensor.float(), "float16 is needed"),
        ("outlier_columns", lambda tensor: torch.zeros(192, 2, dtype=torch.uint16), "[192, 1] is needed"),
        ("weight", lambda tensor: tensor.float(), "hold no int32"),
        ("weight", lambda tensor: tensor.reshape(-1).clone(), "a matrix is needed"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_config(damaged, leaf, change, said):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(damaged("KMEANS3", partial(rewrite, leaf, change)))
    assert said in str(caught.value)


def group(**changes):
    return {"number": "kmeans", "bits": 3, "group_size": None, "outliers": 1.0, "linears": [NAME]} | changes


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"version": 2}, "version is 2"),
        ({"groups": None}, "a list is needed"),
        ({"groups": ["x"]}, "groups[0] has 'x'"),
        ({"groups": [group() | {"more": 1}]}, "more"),
        ({"groups": [group(number="int")]}, "'int' of 3 bits"),
        ({"groups": [group(bits=7)]}, "of 7 bits"),
        ({"groups": [group(bits=True)]}, "of True bits"),
        ({"groups": [group(group_size=0)]}, "group_size is 0"),
        ({"groups": [group(outliers=-1)]}, "outliers is -1"),
        ({"groups": [group(outliers=float("nan"))]}, "outliers is nan"),
        ({"groups": [group(linears="all")]}, "a list of names"),
        ({"groups": [group(), group()]}, f"names {NAME} again"),
        ({"groups": [group(linears=[NAME, "model.layers.7.mlp.up_proj"])]}, "model.layers.7.mlp.up_proj"),
        ({"groups": [group()]}, "config.json does not say"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be(damaged, config, said):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(damaged("KMEANS3", **config))
    assert said in str(caught.value)
