"""Kimi Linear as GGUF: what the converter of llama.cpp writes, names of the hub, there and back, what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from gguf_cases_hybrid import CASES
from gguf_models import describe_folder, make_case, write_plain
from lowbit.checkpoint import open_checkpoint, open_gguf
from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.imatrix import measure_importance, text_of
from lowbit.formats.gguf.layout import NEG_EXP
from lowbit.formats.gguf.raw import RawGGUF, open_raw_gguf, rows_and_columns
from models import SHORT_TEXT, make_model

_SIZES, _FULL = CASES["kimi_linear"][0], ["full_attention"] * 4
# what the message names → changes to the config
REFUSED = {
    "q_lora_rank is 64": {"q_lora_rank": 64},
    "linear_num_heads is 2 .* with 4": {"linear_num_heads": 2},
    r"layer_types is \['full_attention', .* with blocks of both kinds": {"layer_types": _FULL},
    "norm_topk_prob is False": {"norm_topk_prob": False},
    "mla_use_nope is False": {"mla_use_nope": False},
    "moe_router_activation_func is softmax": {"moe_router_activation_func": "softmax"},
    "biases on ATTN_KV_A_MQA, ATTN_OUT": {"attention_bias": True},
    "mlp_layer_types": {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
}
# config.json of the hub has these in place of what transformers writes
_OF_TRANSFORMERS = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim",
                    "qk_head_dim", "attention_bias")  # fmt: skip
_OF_HUB = {
    "auto_map": {"AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM"}, "first_k_dense_replace": 1,
    "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 32, "num_heads": 4,
                           "short_conv_kernel_size": 4},
    "mla_use_nope": True, "moe_layer_freq": 1, "moe_router_activation_func": "sigmoid", "head_dim": 72,
    "rope_theta": 10000.0, "rope_scaling": None, "num_nextn_predict_layers": 0, "use_grouped_topk": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose decays are those of a new one, 1 to 16, in float32, as on the hub."""
    folder = make_case(tmp_path_factory.mktemp("kimi") / "model", "kimi_linear")
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith("A_log"):
            tensors[name] = torch.rand(tensors[name].shape, generator=random).mul(15).add(1).log()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("found", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, found):
    folder = make_model(tmp_path / "hf", _SIZES, **REFUSED[found])
    with pytest.raises(ArchitectureError, match=found) as caught:
        describe_folder(folder)
    assert caught.value.hint


def test_tensors_are_stored_as_the_converter_does(folder):
    model, checkpoint = describe_folder(folder)
    stored = {tensor.name: tensor for tensor in model.tensors}
    for part in "qkv":
        kernels = stored[f"blk.0.ssm_conv1d_{part}.weight"]
        expected = checkpoint.read(f"model.layers.0.self_attn.{part}_conv1d.weight")
        assert kernels.shape == (1, 128, 1, 4)
        assert torch.equal(kernels.read(checkpoint, 0, 128), expected.reshape(128, 4))
    decays, expected = stored["blk.0.ssm_a"], checkpoint.read("model.layers.0.self_attn.A_log")
    assert decays.shape == tuple(expected.shape) == (1, 1, 4, 1)
    assert torch.equal(decays.read(checkpoint, 0, 4).flatten(), -expected.exp().flatten())
    assert torch.equal(decays.read(checkpoint, 1, 3).flatten(), -expected.exp().flatten()[1:3])
    assert {"blk.0.ssm_dt.bias", "blk.3.attn_k_b.weight", "blk.3.attn_v_b.weight"} <= stored.keys()
    values = {key.removeprefix("kimi-linear."): value[0] for key, value in model.key_values.items()}
    expected = {
        "attention.head_count": 4, "attention.head_count_kv": [0, 0, 0, 1], "attention.key_length": 96 + 16,
        "attention.key_length_mla": 32 + 16, "attention.value_length_mla": 64, "attention.kv_lora_rank": 96,
        "rope.dimension_count": 16, "ssm.conv_kernel": 4, "kda.head_dim": 32, "expert_count": 8,
        "expert_shared_count": 2, "expert_gating_func": 2, "leading_dense_block_count": 1,
        "expert_weights_scale": 2.446,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert [note for note in model.notes if "rms_norm_eps" in note]


def test_no_note_where_the_epsilons_agree(tmp_path):
    assert not describe_folder(make_case(tmp_path / "hf", "kimi_linear_groups"))[0].notes


def test_the_folder_of_the_hub_is_the_same_model(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    saved, hub = "layers.0.block_sparse_moe.", "layers.0.mlp."
    assert f"model.{saved}up_proj.weight" in tensors  # as transformers saves a dense block
    made = tmp_path / "model"
    made.mkdir()
    save_file({name.replace(saved, hub): value for name, value in tensors.items()}, made / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in _OF_TRANSFORMERS} | _OF_HUB
    (made / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of rope_scaling, by transformers
        model, checkpoint = describe_folder(made)
    other, theirs = describe_folder(folder)
    assert model.key_values == other.key_values
    assert model.tensors == other.tensors
    for mine, its in zip(model.tensors, other.tensors, strict=True):
        rows, _ = rows_and_columns(mine.shape)
        assert torch.equal(mine.read(checkpoint, 0, rows), its.read(theirs, 0, rows)), mine.name


@pytest.mark.parametrize("scheme", ["F32", "BF16"])
def test_a_file_becomes_a_folder_and_the_same_file_again(folder, tmp_path, scheme):
    if scheme == "BF16":  # the dtype of the whole folder, so that decays of float32 would be rounded
        folder = make_case(tmp_path / "source" / "model", "kimi_linear")
    first = lowbit.quantize(folder, tmp_path / "first.gguf", scheme=scheme).path
    back = lowbit.convert(first, tmp_path / "model", format="float").path
    assert "model.layers.0.mlp.up_proj.weight" in open_checkpoint(back).tensors
    config = json.loads((back / "config.json").read_text())
    assert config["linear_attn_config"] == _OF_HUB["linear_attn_config"]
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    again = lowbit.quantize(back, tmp_path / "again.gguf", scheme=scheme).path
    assert again.read_bytes() == first.read_bytes()


def test_decays_come_back_as_logarithms_that_give_the_same_decays():
    for least, most in ((-20.0, 4.0), (-1e-2, 1e-2), (0.0, 3.0)):
        decays = NEG_EXP.values(torch.empty(100_000).uniform_(least, most, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(NEG_EXP.values(NEG_EXP.undo(decays)), decays)


def test_decays_near_one_are_no_damage(tmp_path):
    """Their logarithms, near 0, come back with the error of numbers near 1."""
    folder = make_case(tmp_path / "model", "kimi_linear")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("A_log"):
            tensors[name] = torch.tensor([1e-3, -2e-3, 3.1e-3, 0.0]).reshape(1, 1, 4, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = lowbit.quantize(folder, tmp_path / "x.gguf", scheme="F32").path
    assert lowbit.verify(path, reference=folder).ok
    tensors["model.layers.1.self_attn.A_log"][0, 0, 1, 0] += 1e-5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert [check.rule for check in lowbit.verify(path, reference=folder).failed] == ["gguf-weights"]


def test_a_file_of_llama_quantize_is_read(folder, tmp_path):
    """It writes no dimensions of 1 at the end of ggml's order."""
    model, checkpoint = describe_folder(folder)
    path = write_plain(model, checkpoint, tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "kimi-linear")
    raw = RawGGUF(path)
    for key, value in gguf.GGUFReader(path).fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kinds = value.types
            writer.add_key_value(key, value.contents(), kinds[0], *kinds[1:2])
    for tensor in raw.tensors:
        shape = tensor.shape
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        writer.add_tensor(tensor.name, raw.decode(tensor, 0, None).numpy().reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back, other = open_gguf(path), open_gguf(tmp_path / "other.gguf")
    shapes = {tensor.name: tensor.shape for tensor in other.raw.tensors}
    assert shapes["blk.0.ssm_conv1d_q.weight"] == (128, 1, 4)
    assert shapes["blk.0.ssm_a"] == (4, 1)
    assert {name: info.shape for name, info in back.tensors.items()} == {
        name: info.shape for name, info in other.tensors.items()
    }
    assert all(torch.equal(back.read(name), other.read(name)) for name in back.tensors)


def test_a_file_of_one_kind_of_blocks_is_refused(folder, tmp_path):
    model, checkpoint = describe_folder(folder)
    key = "kimi-linear.attention.head_count_kv"
    values = model.key_values | {key: ([1] * 4, *model.key_values[key][1:])}
    path = write_plain(type(model)(model.arch, model.tensors, values, ()), checkpoint, tmp_path / "model.gguf")
    with pytest.raises(ArchitectureError, match="is of one kind of blocks"):
        open_gguf(path)


def test_every_byte_of_the_source_is_accounted_for_and_small_parts_stay_float(folder, tmp_path):
    done = lowbit.quantize(folder, tmp_path / "x.gguf", scheme="Q8_0")
    stored = sum(info.nbytes for info in open_checkpoint(folder).tensors.values())
    assert sum(each.bytes_in for each in done.report.totals.accounts) == stored
    types = {tensor.name: tensor.type_name for tensor in open_raw_gguf(done.path).tensors}
    rounded = {name for name, kind in types.items() if kind == "Q8_0"}
    assert {name.split(".")[2] for name in types if name.startswith("blk.") and name not in rounded} == {
        "attn_norm", "attn_kv_a_norm", "ffn_norm", "ssm_norm", "ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v", "ssm_a",
        "ssm_dt", "ffn_gate_inp", "exp_probs_b",
    }  # fmt: skip
    assert {types[name] for name in types.keys() - rounded} == {"F32"}


def test_importance_is_measured_of_every_matrix_that_is_rounded(folder):
    checkpoint = open_checkpoint(folder)
    entries = measure_importance(checkpoint, text_of(checkpoint, SHORT_TEXT, 2, 32)).matrix.entries
    model, _ = describe_folder(folder)
    matrices = {tensor.name for tensor in model.tensors if len(tensor.shape) > 1}
    assert {name.split(".", 2)[-1] for name in matrices - entries.keys()} == {
        "weight", "attn_k_b.weight", "ssm_a", *(f"ssm_conv1d_{part}.weight" for part in "qkv"),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"imatrix": "measure"}])
def test_it_is_calibrated_alike_from_the_folder_and_from_a_file(folder, tmp_path, options):
    given = {"scheme": "Q4_0", "calib": SHORT_TEXT, "samples": 4, "seqlen": 32, **options}
    done = lowbit.quantize(folder, tmp_path / "x.gguf", **given)
    changed = _changed(done.path, lowbit.quantize(folder, tmp_path / "plain.gguf", scheme="Q4_0").path)
    assert {
        "blk.0.attn_q.weight", "blk.0.ssm_f_a.weight", "blk.0.ssm_f_b.weight", "blk.0.ssm_beta.weight",
        "blk.0.ssm_g_a.weight", "blk.0.ssm_g_b.weight", "blk.0.ffn_down.weight", "blk.3.attn_q.weight",
        "blk.3.attn_kv_a_mqa.weight", "blk.3.ffn_down_exps.weight", "blk.3.ffn_up_shexp.weight",
    } <= changed  # fmt: skip
    source = lowbit.quantize(folder, tmp_path / "source.gguf", scheme="F32").path
    again = lowbit.quantize(source, tmp_path / "again.gguf", **given).path
    assert not _changed(done.path, again)


def _changed(path: Path, other: Path) -> set[str]:
    """Tensors with other bytes."""
    first, second = open_raw_gguf(path), open_raw_gguf(other)
    theirs = {tensor.name: tensor for tensor in second.tensors}
    return {t.name for t in first.tensors if bytes(first.bytes(t)) != bytes(second.bytes(theirs[t.name]))}
