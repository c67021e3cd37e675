"""The one look at a source before any work: what is refused, what is left out, what is read in another way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.architecture import discover_once, open_described
from lowbit.architecture.view import find_renaming
from lowbit.checkpoint import OpenOptions
from lowbit.errors import CheckpointError
from models import config_of, make_model

Q_PROJ = "model.layers.0.self_attn.q_proj"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    """Add or replace tensors; dots of names are written as slashes."""
    edited = load_file(folder / "model.safetensors") | {name.replace("/", "."): t for name, t in changes.items()}
    save_file(edited, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def opened(folder: Path):
    return open_described(str(folder), OpenOptions())


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    return f"{caught.value} | {caught.value.hint}"


def test_a_tie_over_two_different_tensors_is_undone(folder, tmp_path):
    edit_config(folder, tie_word_embeddings=True)
    head = load_file(folder / "model.safetensors")[HEAD]
    checkpoint, architecture = opened(folder)
    assert checkpoint.config()["tie_word_embeddings"] is False
    assert architecture.tied == {}
    assert torch.equal(checkpoint.read(HEAD), head)
    assert any("two different tensors" in note for note in checkpoint.notes)
    written = lowbit.quantize(str(folder), tmp_path / "out", scheme="W8A16", group_size=32).path
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(written / "model.safetensors")[HEAD], head)
    gguf = lowbit.quantize(str(folder), tmp_path / "out.gguf", scheme="BF16").path
    with lowbit_open(gguf) as tensors:
        assert "output.weight" in tensors


class lowbit_open:
    """Names of a GGUF file's own tensors."""

    def __init__(self, path: Path):
        from lowbit.formats.gguf.raw import open_raw_gguf

        self.raw = open_raw_gguf(path)

    def __enter__(self) -> set[str]:
        return {tensor.name for tensor in self.raw.tensors}

    def __exit__(self, *_) -> None:
        self.raw.close()


def test_the_tie_of_a_model_that_sees_is_undone_inside_text_config_too(tmp_path):
    folder = make_model(tmp_path / "m", "gemma3")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, text_config=config["text_config"] | {"tie_word_embeddings": True}, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"]
    edit_tensors(folder, **{"language_model/lm_head/weight": embedding + 1})
    restated = opened(folder)[0].config()
    assert (restated["tie_word_embeddings"], restated["text_config"]["tie_word_embeddings"]) == (False, False)


def test_an_equal_copy_of_a_tied_tensor_is_left_out(folder):
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, **{HEAD.replace(".", "/"): load_file(folder / "model.safetensors")[EMBEDDING].clone()})
    checkpoint, architecture = opened(folder)
    assert HEAD not in checkpoint.tensors
    assert architecture.tied == {HEAD: EMBEDDING}


def test_a_tied_tensor_may_be_stored_under_either_name(folder):
    edit_config(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(opened(folder)[0].read(EMBEDDING), tensors[HEAD])


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"vocab_size": 400}, EMBEDDING),
        ({"intermediate_size": 256}, "model.layers.0.mlp.gate_proj.weight"),
        ({"num_attention_heads": 8}, f"{Q_PROJ}.weight"),
        ({"num_key_value_heads": 1}, "model.layers.0.self_attn.k_proj.weight"),
        ({"head_dim": 16}, f"{Q_PROJ}.weight"),
    ],
)
def test_a_shape_that_config_json_denies_is_refused_alike_for_folders_and_gguf(folder, tmp_path, change, tensor):
    edit_config(folder, **change)
    messages = set()
    for output, scheme in (("out", "W4A16"), ("out.gguf", "Q8_0")):
        with pytest.raises(CheckpointError, match=r"config\.json says") as caught:
            lowbit.dry_run(str(folder), output=tmp_path / output, scheme=scheme)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert tensor in messages.pop()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.ones(128, 128, dtype=torch.int8), "is I8, not a 16- or 32-bit float | this checkpoint is quantized"),
        (
            torch.ones(128, 128, dtype=torch.int16),
            "is I16, not a 16- or 32-bit float | bits of 16-bit floats",
        ),
        (
            torch.ones(128, 128, dtype=torch.int64),
            "is I64, not a 16- or 32-bit float | no format of weights holds",
        ),
        (torch.ones(128, 128, dtype=torch.bool), "is BOOL, not a 16- or 32-bit float | a mask was saved"),
        (torch.ones(128, 128).to(torch.float8_e4m3fn), "is F8_E4M3, not a 16- or 32-bit float | no scale was found"),
    ],
)
def test_weights_that_are_no_floats(folder, values, said):
    edit_tensors(folder, **{f"{Q_PROJ}.weight".replace(".", "/"): values})
    assert said in refusal(folder)


def test_doubles_are_read_as_single_precision(folder):
    doubled = {name.replace(".", "/"): t.double() for name, t in load_file(folder / "model.safetensors").items()}
    edit_tensors(folder, **doubled)
    checkpoint, _ = opened(folder)
    assert checkpoint.read(HEAD).dtype == checkpoint.tensors[HEAD].dtype == torch.float32


def test_an_adapter_that_was_not_merged(folder):
    edit_tensors(folder, **{f"{Q_PROJ}.lora_A.default.weight".replace(".", "/"): torch.ones(4, 128)})
    assert "an adapter that was not merged" in refusal(folder)


def test_biases_that_the_model_lacks(folder):
    edit_tensors(folder, **{"lm_head/bias": torch.zeros(384)})
    checkpoint, _ = opened(folder)
    assert "lm_head.bias" not in checkpoint.tensors
    assert any("lm_head.bias, biases of zeros" in note for note in checkpoint.notes)
    edit_tensors(folder, **{f"{Q_PROJ}.bias".replace(".", "/"): torch.ones(128)})
    assert "attention_bias" in refusal(folder)


def test_a_bias_that_no_key_of_the_config_gives(tmp_path):
    """Qwen3 has attention_bias, and no key for biases of its MLP."""
    folder = make_model(tmp_path / "qwen3", "qwen3")
    edit_tensors(folder, **{"model/layers/0/mlp/down_proj/bias": torch.ones(128)})
    said = refusal(folder)
    assert "Qwen3ForCausalLM has no such bias" in said
    assert "mlp_bias" not in said


def test_what_is_empty_or_beyond_num_hidden_layers_is_left_out(folder):
    edit_tensors(folder, **{"model/layers/0/extra": torch.zeros(0, 4)})
    edit_config(folder, num_hidden_layers=1)
    checkpoint, architecture = opened(folder)
    assert checkpoint.tensors.keys() == architecture.parameters.keys()
    assert any("num_hidden_layers" in note for note in checkpoint.notes)
    assert any("without elements" in note for note in checkpoint.notes)


def test_what_no_module_has_is_named(folder):
    edit_tensors(folder, **{"[]": torch.ones(4)})
    assert "has no place for []" in refusal(folder)


@pytest.mark.parametrize("leaf", ["qweight", "weight_packed", "weight_scale", "weight.absmax", "table"])
def test_codes_without_a_statement_of_config_json_are_called_so(folder, leaf):
    edit_tensors(folder, **{f"model/layers/0/mlp/up_proj/{leaf}": torch.ones(4)})
    said = refusal(folder)
    assert f"model.layers.0.mlp.up_proj.{leaf} is part of a quantized weight, and config.json states no" in said
    assert "get config.json again" in said


def test_a_head_that_is_absent_names_the_flag(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors")
    assert "tie_word_embeddings" in refusal(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", "module.", "module._orig_mod.", "student."])
def test_prefixes_of_wrappers_are_dropped(architecture, prefix):
    found = discover_once(config_of(architecture), "m")
    renamed, notes = find_renaming([prefix + name for name in found.parameters], found)
    assert renamed == {prefix + name: name for name in found.parameters}
    assert notes


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "gemma3", "qwen3_moe", "qwen2_5_vl"])
def test_names_of_a_base_model_get_its_prefix(architecture):
    found = discover_once(config_of(architecture), "m")
    beginning = found.blocks[0].rsplit(".", 2)[0] + "."
    names = {name.removeprefix(beginning): name for name in found.parameters}
    renamed, _ = find_renaming(names, found)
    assert renamed == {name: full for name, full in names.items() if name != full}


def test_wrappers_inside_names_are_dropped(folder):
    found = opened(folder)[1]
    names = {name.replace("layers.0.", "layers.0._fsdp_wrapped_module.", 1): name for name in found.parameters}
    renamed, _ = find_renaming(names, found)
    assert renamed == {name: full for name, full in names.items() if name != full}


def test_good_names_stay(folder):
    found = opened(folder)[1]
    assert find_renaming(found.parameters, found) == ({}, [])


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "head_dim"])
def test_a_size_beyond_the_largest_tensor_is_refused_before_the_model_is_traced(tmp_path, key):
    """A trace with inputs of a billion columns fills the memory, or fails in torch."""
    folder = make_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: 10**9}))
    with pytest.raises(CheckpointError, match=f"{key} is 1000000000, and the largest tensor holds"):
        lowbit.dry_run(folder, scheme="W4A16")
