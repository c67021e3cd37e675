"""Adapter files for llama.cpp: names, order of rows, one alpha; and what has no place in them."""

from __future__ import annotations

import pytest
import torch
from gguf import GGUFReader
from typer.testing import CliRunner

import lowbit
from lora import linears_of, make_adapter, matrices, write_adapter
from lowbit.checkpoint.adapter import open_adapter
from lowbit.cli.main import app
from lowbit.errors import ArchitectureError, LowbitError, OutputError, UsageError
from lowbit.formats.gguf.adapter import convert_adapter
from models import SHORT_TEXT, make_model

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (128, 128), UP: (192, 128)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("gguf adapters") / "base")


def tensors_in(path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}


def value(path, key: str):
    return GGUFReader(path).fields[key].contents()


def test_names_and_rows_are_those_of_the_bases_file(base, tmp_path):
    tensors = matrices(SHAPES)
    done = convert_adapter(write_adapter(tmp_path / "a", tensors), tmp_path / "a.gguf", base=base)
    assert (done.arch, done.pairs, done.alpha, done.notes) == ("llama", 2, 8.0, ())
    assert (value(done.path, "general.type"), value(done.path, "adapter.type")) == ("adapter", "lora")
    assert value(done.path, "adapter.lora.alpha") == 8.0
    # within a head of 32 rows the halves of a rotary pair become neighbours
    paired = tensors[f"{Q}.lora_B.weight"].reshape(4, 2, 16, 4).transpose(1, 2).reshape(128, 4)
    wanted = {
        "blk.0.attn_q.weight.lora_a": tensors[f"{Q}.lora_A.weight"], "blk.0.attn_q.weight.lora_b": paired,
        "blk.1.ffn_up.weight.lora_a": tensors[f"{UP}.lora_A.weight"],
        "blk.1.ffn_up.weight.lora_b": tensors[f"{UP}.lora_B.weight"],
    }  # fmt: skip
    found = tensors_in(done.path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_experts_are_stacked(tmp_path):
    base = make_model(tmp_path / "base", "mixtral")
    tensors = matrices(linears_of(base, "w1"))
    done = convert_adapter(write_adapter(tmp_path / "a", tensors), tmp_path / "a.gguf", base=base)
    found, path = tensors_in(done.path), "model.layers.1.block_sparse_moe.experts"
    for side in "AB":
        wanted = torch.stack([tensors[f"{path}.{expert}.w1.lora_{side}.weight"] for expert in range(4)])
        assert torch.equal(found[f"blk.1.ffn_gate_exps.weight.lora_{side.lower()}"], wanted)
    del tensors[f"{path}.2.w1.lora_A.weight"], tensors[f"{path}.2.w1.lora_B.weight"]
    with pytest.raises(LowbitError, match=r"experts\.2\.w1\.weight has no matrices"):
        convert_adapter(write_adapter(tmp_path / "b", tensors), tmp_path / "b.gguf", base=base)


def test_an_alpha_of_its_own_is_multiplied_into_b(base, tmp_path):
    tensors = matrices(SHAPES) | matrices({"model.layers.1.self_attn.v_proj": (64, 128)})
    adapter = write_adapter(tmp_path / "a", tensors, alpha_pattern={"up_proj": 6})
    done = convert_adapter(adapter, tmp_path / "a.gguf", base=base)
    assert done.alpha == 8.0
    assert "1 of 3 tensors, the first blk.1.ffn_up.weight" in done.notes[0]
    found = tensors_in(done.path)["blk.1.ffn_up.weight.lora_b"]
    assert torch.equal(found, tensors[f"{UP}.lora_B.weight"] * 0.75)


def test_rslora_of_one_rank_needs_no_factor(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", matrices(SHAPES), use_rslora=True)
    done = convert_adapter(adapter, tmp_path / "a.gguf", base=base, scheme="BF16")
    assert (done.alpha, done.notes) == (16.0, ())  # 8 / √4 = 16 / 4
    assert {tensor.tensor_type.name for tensor in GGUFReader(done.path).tensors} == {"BF16"}


HEAD = matrices({"lm_head": (384, 128)})


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (matrices(SHAPES) | {f"{key}.lora_magnitude_vector": torch.ones(rows) for key, (rows, _) in SHAPES.items()},
         {"use_dora": True}, "has DoRA"),
        ({"lm_head.weight": torch.ones(384, 128)}, {}, "lm_head.weight has a saved module"),
        ({"model.norm.weight": torch.ones(128)}, {}, "model.norm.weight has a saved module"),
        ({f"{name}.weight": torch.ones(400, 128) for name in ("model.embed_tokens", "lm_head")}, {},
         "changes the size of the vocabulary"),
        (matrices({Q: (64, 128)}), {}, "do not fit"),
        (matrices(SHAPES), {"lora_alpha": 0}, "lora_alpha is 0"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused_and_nothing_is_written(base, tmp_path, tensors, config, words):
    with pytest.raises(LowbitError, match=words):
        convert_adapter(write_adapter(tmp_path / "a", tensors, **config), tmp_path / "a.gguf", base=base)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_of_two_tied_tensors_is_refused(tmp_path):
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(LowbitError, match=r"llama\.cpp has one tensor for both"):
        convert_adapter(write_adapter(tmp_path / "a", HEAD), tmp_path / "a.gguf", base=base)


def test_the_base_is_what_the_adapter_names_and_only_its_config_is_read(base, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((base / "config.json").read_bytes())
    adapter = write_adapter(tmp_path / "a", matrices(SHAPES), base_model_name_or_path=str(tmp_path / "base"))
    assert convert_adapter(adapter, tmp_path / "a.gguf").pairs == 2
    assert open_adapter(adapter).base == str(tmp_path / "base")
    write_adapter(tmp_path / "b", matrices(SHAPES), base_model_name_or_path=None)
    with pytest.raises(UsageError, match="does not name the base"):
        convert_adapter(tmp_path / "b", tmp_path / "b.gguf")


def test_an_adapter_is_replaced_on_demand_and_nothing_else(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", matrices(SHAPES))
    convert_adapter(adapter, tmp_path / "a.gguf", base=base)
    with pytest.raises(OutputError, match="exists already"):
        convert_adapter(adapter, tmp_path / "a.gguf", base=base)
    convert_adapter(adapter, tmp_path / "a.gguf", base=base, overwrite=True)
    (tmp_path / "b.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="is no adapter"):
        convert_adapter(adapter, tmp_path / "b.gguf", base=base, overwrite=True)
    with pytest.raises(UsageError, match="one GGUF file"):
        convert_adapter(adapter, tmp_path / "folder", base=base)


def test_a_file_that_is_no_model_is_called_by_its_name_by_every_command(base, tmp_path):
    """Of any GGUF that is requantized all tensors are taken as they are: a Q4_0 adapter would be written."""
    adapter = convert_adapter(make_adapter(tmp_path / "a", base), tmp_path / "a.gguf", base=base).path
    matrix = lowbit.imatrix(base, tmp_path / "m.gguf", calib=SHORT_TEXT, samples=1, seqlen=16).file
    for file, what in ((adapter, "a LoRA adapter"), (matrix, "an importance matrix")):
        for run in (
            lambda file: lowbit.quantize(file, tmp_path / "out.gguf", scheme="Q8_0"),
            lambda file: lowbit.convert(file, tmp_path / "out", format="float"),
            lambda file: lowbit.estimate(file, scheme="Q8_0"),
        ):
            with pytest.raises(ArchitectureError, match=f"this is {what}, not a model"):
                run(file)
        assert f"this is {what}" in lowbit.inspect(file).notes[-1]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--threads", "1"), "--threads is not read for a LoRA adapter"),
        (("--shard-size", "1GB"), "--shard-size is not read for a LoRA adapter"),
        (("--revision", "x"), "--revision x is read only for a Hugging Face id"),
    ],
)
def test_options_that_an_adapter_does_not_read_are_refused(base, tmp_path, option, says):
    adapter = write_adapter(tmp_path / "a", matrices(SHAPES))
    asked = ["convert", str(adapter), "-o", str(tmp_path / "a.gguf"), "--format", "gguf", "--base", str(base), *option]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception).startswith(says)
    assert not (tmp_path / "a.gguf").exists()
