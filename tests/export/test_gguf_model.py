"""A model as GGUF and back: names, layouts, key-values; and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_models import CASES, READABLE, describe_folder, make_case, write_plain
from lowbit.architecture import describe_checkpoint
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_gguf, open_safetensors
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.families.seeing import AROUND
from lowbit.formats.gguf.mix import MixFacts, TensorShape, choose_types
from lowbit.formats.gguf.model import describe_gguf
from lowbit.formats.gguf.raw import RawGGUF, rows_and_columns
from lowbit.formats.gguf.stated_shapes import denied_shape, named_pattern
from lowbit.formats.gguf.table import MODEL_TYPES, ROWS, gguf_names, row_of_model
from lowbit.formats.gguf.table import REFUSED as WITHOUT_ROW
from models import make_model


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Case → (folder, GGUFModel, checkpoint, path of the file), made when first asked for."""
    made = {}

    def get(case: str):
        if case not in made:
            folder = make_case(tmp_path_factory.mktemp(case) / "hf", case)
            model, checkpoint = describe_folder(folder)
            made[case] = folder, model, checkpoint, write_plain(model, checkpoint, folder.parent / "model.gguf")
        return made[case]

    return get


@pytest.mark.sampled(4, shared=True)
@pytest.mark.parametrize("case", READABLE)
def test_every_tensor_comes_back_bit_for_bit(cases, case):
    _, _, checkpoint, path = cases(case)
    back = open_gguf(path)
    tied = {"lm_head.weight", "embed_out.weight"} - checkpoint.tensors.keys()
    assert back.tensors.keys() - tied == checkpoint.tensors.keys()
    for name in checkpoint.tensors:
        expected = checkpoint.read(name).float()
        if name.endswith("embed_tokens_per_layer.weight") and len(expected) < len(back.read(name)):
            # a row for every token: the first beyond the last
            expected = torch.cat([expected, expected[:1].expand(len(back.read(name)) - len(expected), -1)])
        assert back.tensors[name].shape == tuple(expected.shape), name
        found = back.read(name)
        if name.endswith("A_log"):  # the file has -exp of it
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(found, expected), name
        if expected.dim() == 0:
            continue
        rows = expected.shape[0]
        for start, stop in ((rows // 3, rows - 1), (0, 1), (rows, rows)):
            assert torch.equal(back.read(name, start, stop), found[start:stop]), (name, start, stop)


@pytest.mark.sampled(4, shared=True)
@pytest.mark.parametrize("case", READABLE)
def test_the_model_of_the_file_computes_what_the_original_does(cases, case):
    folder, _, _, path = cases(case)
    back = open_gguf(path)
    assert back.metadata["general.architecture"] == CASES[case][2]
    assert back.config()["model_type"] == CASES[case][3]
    ids = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_model(open_safetensors(folder))(ids).logits
        found = load_model(back)(ids).logits
    assert torch.allclose(found, expected, atol=1e-5) if "A_log" in str(back.tensors) else torch.equal(found, expected)


@pytest.mark.sampled(4, shared=True)
@pytest.mark.parametrize("case", CASES)
def test_the_key_values_state_the_shapes_of_the_tensors(cases, case):
    """The rule `gguf-shapes` has no false alarm in any family."""
    _, model, _, path = cases(case)
    metadata = RawGGUF(path).metadata
    for tensor in model.tensors:
        pattern, block = named_pattern(tensor.name)
        assert not denied_shape(model.arch, metadata, pattern, block, tensor.shape), tensor.name


@pytest.mark.sampled(4, shared=True)
@pytest.mark.parametrize("case", CASES)
def test_any_rows_are_the_rows_of_the_whole(cases, case):
    _, model, checkpoint, _ = cases(case)
    for tensor in model.tensors:
        if tensor.block not in (None, 1):
            continue
        rows, columns = rows_and_columns(tensor.shape)
        whole = tensor.read(checkpoint, 0, rows)
        assert tuple(whole.shape) == (rows, columns)
        for first, last in ((0, rows), (rows // 3, rows - rows // 5), (rows // 2, rows // 2 + 1), (rows, rows)):
            assert torch.equal(tensor.read(checkpoint, first, last), whole[first:last]), (tensor.name, first, last)


@pytest.mark.sampled(4, shared=True)
@pytest.mark.parametrize("case", CASES)
def test_names_and_order_are_those_of_the_gguf_package(cases, case):
    _, model, _, _ = cases(case)
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == model.arch), None)
    # the package is older than some architectures, but knows the names of their tensors
    known = {gguf.TENSOR_NAMES[tensor] for tensor in (gguf.MODEL_TENSORS[kind] if kind else gguf.MODEL_TENSOR)}
    if "blk.{bid}.ffn_gate_up_exps" in known:  # llama.cpp's loader takes its halves as well
        known |= {"blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps"}
    for tensor in model.tensors:
        name = tensor.name.replace(f"blk.{tensor.block}.", "blk.{bid}.")
        assert {name, name.rpartition(".")[0]} & (known | {"output"})
    blocks = [tensor.block for tensor in model.tensors if tensor.block is not None]
    assert blocks == sorted(blocks)
    assert model.tensors[0].name == "token_embd.weight"
    assert model.tensors[-1].name in ("output.weight", "output_norm.weight", "token_embd_norm.weight")


@pytest.mark.parametrize("case", ["llama", "qwen2_moe", "gpt_oss", "gemma2", "gpt2"])
def test_what_llama_cpp_keeps_in_f32(cases, case):
    model = cases(case)[1]
    facts = MixFacts(model.arch, layers=2)
    shapes = [TensorShape(tensor.name, tensor.shape) for tensor in model.tensors]
    choices = choose_types("F16", shapes, facts)
    for tensor in model.tensors:
        name = tensor.name
        expected = (
            len(tensor.shape) == 1
            or not name.endswith(".weight")
            or "_norm" in name
            or "ffn_gate_inp" in name
            or name == "position_embd.weight"
        )
        assert (choices[name].type_name == "F32") is expected, name


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's converter."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("case", ["llama", "mixtral", "granite", "smollm3"])
def test_rotary_pairs_are_permuted_as_the_converter_does(cases, case):
    _, model, checkpoint, _ = cases(case)
    sources = {tensor.name: tensor for tensor in model.tensors}
    for letter, heads in (("q", 4), ("k", 2)):
        weight = checkpoint.read(f"model.layers.1.self_attn.{letter}_proj.weight").float()
        found = sources[f"blk.1.attn_{letter}.weight"].read(checkpoint, 0, len(weight)).float()
        np.testing.assert_array_equal(found.numpy(), _permuted(weight.numpy(), heads))


def test_neox_puts_q_before_k_before_v(cases):
    _, model, checkpoint, _ = cases("gpt_neox")
    weight = checkpoint.read("gpt_neox.layers.0.attention.query_key_value.weight")
    parts = weight.reshape(4, 3, 32, 128)
    expected = torch.cat([parts[:, part].reshape(-1, 128) for part in range(3)])
    source = next(tensor for tensor in model.tensors if tensor.name == "blk.0.attn_qkv.weight")
    assert torch.equal(source.read(checkpoint, 0, 384), expected)


def test_experts_are_stacked_in_order(cases):
    _, model, checkpoint, _ = cases("gpt_oss")
    sources = {tensor.name: tensor for tensor in model.tensors}
    up = sources["blk.1.ffn_up_exps.weight"]
    assert up.shape == (4, 128, 128)
    assert up.role == "up_proj"
    assert sources["blk.1.ffn_up_exps.bias"].shape == (4, 128)
    fused = open_safetensors(cases("gpt_oss")[0]).read("model.layers.1.mlp.experts.gate_up_proj")  # [E, H, 2I]
    expected = fused[..., 1::2].transpose(1, 2).reshape(-1, 128)
    assert torch.equal(up.read(checkpoint, 0, 512), expected)


def test_key_values_of_a_llama(cases):
    values = {key: value[0] for key, value in cases("llama3")[1].key_values.items()}
    expected = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 256,
        "llama.embedding_length": 128, "llama.feed_forward_length": 192, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32, "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32, "llama.rope.freq_base": 500000.0, "llama.vocab_size": 384,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    assert values.items() >= expected.items()
    assert not any(key.startswith(("tokenizer.", "llama.rope.scaling")) for key in values)


def test_a_pattern_of_windows_is_written_where_it_is_not_the_usual_one(cases):
    key = "gemma3.attention.sliding_window_pattern"
    assert cases("gemma3_linear")[1].key_values[key] == (
        [False, True], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL,
    )  # fmt: skip
    assert key not in cases("gemma3_text")[1].key_values


def test_a_tied_output_is_left_out_unless_the_loader_needs_it(cases):
    assert "output.weight" not in {tensor.name for tensor in cases("llama3")[1].tensors}
    source = cases("gpt_neox_serial")[1].tensors[-1]
    assert (source.name, source.sources) == ("output.weight", ("gpt_neox.embed_in.weight",))


def test_a_window_that_llama_cpp_ignores_is_noted(cases):
    assert any("sliding window of 100" in note for note in cases("phi3")[1].notes)
    assert cases("mistral")[1].notes == ()


def test_what_llama_cpp_approximates_is_noted(cases):
    assert any("tanh form" in note for note in cases("gpt_neox")[1].notes)
    assert any("YaRN's ramp" in note for note in cases("gpt_oss_yarn")[1].notes)
    assert any("long ones" in note for note in cases("phi3_longrope")[1].notes)


def test_an_output_that_is_stored_though_tied_is_noted(tmp_path):
    folder = make_case(tmp_path / "hf", "llama3")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, checkpoint = describe_folder(folder)
    assert "output.weight" not in {tensor.name for tensor in model.tensors}
    assert any("lm_head.weight, equal to model.embed_tokens.weight" in note for note in checkpoint.notes)
    assert any("buffers" in note for note in model.notes)


def test_a_tensor_that_nobody_knows_is_refused(tmp_path):
    folder = make_case(tmp_path / "hf", "llama")
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.mystery.weight": torch.ones(4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no place for model\.layers\.0\.mystery\.weight"):
        describe_folder(folder)


def test_vision_is_left_out_and_said_to_be(tmp_path):
    folder = make_model(tmp_path / "hf", "gemma3", text_config={
        "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 384, "max_position_embeddings": 256,
        "query_pre_attn_scalar": 32,
    })  # fmt: skip
    model, checkpoint = describe_folder(folder)
    assert any("mmproj" in note for note in model.notes)
    back = open_gguf(write_plain(model, checkpoint, tmp_path / "model.gguf"))
    name = "model.layers.1.self_attn.q_norm.weight"
    assert torch.equal(back.read(name), checkpoint.read(f"language_model.{name}").float())


REFUSED = {
    "norm_topk_prob": ("qwen3_moe", {}),
    "query_pre_attn_scalar": ("gemma2", {}),
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "biases on": ("qwen3", {"attention_bias": True}),
    "no_rope_layers": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama3": ("qwen2", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}}),
    "laurel_rank": (CASES["gemma3n_text"][0], {"laurel_rank": 32}),
    r"activation_sparsity_pattern is \[0.0": (CASES["gemma3n_text"][0], {"activation_sparsity_pattern": [0.0] * 6}),
    "num_kv_shared_layers is 1": (CASES["gemma3n_text"][0], {"num_kv_shared_layers": 1}),
    "intermediate_size is": (CASES["gemma3n_text"][0], {"intermediate_size": [1024] * 5 + [512]}),
    "has no place": ("gemma2", {"query_pre_attn_scalar": 32, "tie_word_embeddings": False}),
    "'opt' has no place": ("opt", {}),
    "linear_value_head_dim": (CASES["qwen3_5_text"][0], {"linear_value_head_dim": 64}),
    "expand is 4": (CASES["mamba"][0], {"expand": 4}),
    "time_step_limit": (CASES["mamba2"][0], {"time_step_limit": (0.0, 0.1)}),
    "num_kv_shared_layers": (CASES["gemma4_text"][0], {
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"], "num_hidden_layers": 5,
        "num_kv_shared_layers": 1}),
    "routed_scaling_factor": (CASES["lfm2_moe"][0], {"routed_scaling_factor": 2.0}),
    r"mlp\.gate_proj\.weight' has no place": ("qwen2_moe", {"mlp_only_layers": [0]}),
}  # fmt: skip


@pytest.mark.parametrize("found", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, found):
    architecture, changes = REFUSED[found]
    folder = make_model(tmp_path / "hf", architecture, **changes)
    with pytest.raises(ArchitectureError, match=found) as caught:
        describe_folder(folder)
    assert caught.value.hint


@pytest.mark.parametrize("model_type", WITHOUT_ROW)
def test_what_is_refused_by_name_stands_in_the_document_and_says_why(model_type):
    document = Path(__file__).parents[2] / "docs" / "gguf-architectures.md"
    refused = document.read_text(encoding="utf-8").partition("## What is refused")[2]
    assert f"`{model_type}`" in refused
    with pytest.raises(ArchitectureError, match=f"{model_type} models do not become GGUF files: .{{20}}"):
        row_of_model({"model_type": model_type}, "config.json")


def test_keys_that_shared_blocks_of_gemma_3n_have_on_the_hub_are_left_out_and_zeros_in_the_file(tmp_path):
    folder = make_case(tmp_path / "hf", "gemma3n_shared")
    tensors = load_file(folder / "model.safetensors")
    beside = {name.replace(".19.", ".21."): torch.ones_like(values) for name, values in tensors.items()
              if ".19.self_attn.k_" in name}  # fmt: skip
    save_file(tensors | beside, folder / "model.safetensors", {"format": "pt"})
    model, checkpoint = describe_folder(folder)
    assert "left out (2 tensors): weights that the model does not use" in model.notes
    assert "zeros (6 tensors): llama.cpp's loader asks for them and computes nothing with them" in model.notes
    zeros = {tensor.name: tensor for tensor in model.tensors if not tensor.sources}
    assert sorted(zeros) == [f"blk.{block}.attn_{part}.weight" for block in (20, 21) for part in ("k", "k_norm", "v")]
    assert all(not tensor.read(checkpoint, 0, 1).any() for tensor in zeros.values())
    back = open_gguf(write_plain(model, checkpoint, tmp_path / "model.gguf"))
    assert "left out (6 tensors): keys and values of blocks that share others'" in back.notes


def test_fused_experts_must_be_split_before(tmp_path):
    folder = make_case(tmp_path / "hf", "gpt_oss")
    architecture, checkpoint = describe_checkpoint(open_safetensors(folder))
    with pytest.raises(AssertionError, match="split_experts"):
        describe_gguf(checkpoint, architecture)


def test_names_without_a_model():
    names = gguf_names({"model_type": "qwen3_moe"}, [
        "model.embed_tokens.weight", "model.layers.3.mlp.experts.17.gate_proj.weight", "model.layers.3.mlp.gate.weight",
    ])  # fmt: skip
    assert list(names.values()) == [
        ("token_embd.weight",), ("blk.3.ffn_gate_exps.weight",), ("blk.3.ffn_gate_inp.weight",),
    ]  # fmt: skip
    assert gguf_names({"model_type": "gpt_oss"}, ["model.layers.0.self_attn.sinks"]) == {
        "model.layers.0.self_attn.sinks": ("blk.0.attn_sinks.weight",)
    }
    with pytest.raises(ArchitectureError, match="'opt'") as caught:
        gguf_names({"model_type": "opt"}, [])
    assert all(name in caught.value.hint for name in MODEL_TYPES)


def test_a_float_survives_as_the_number_that_was_written(cases):
    config = open_gguf(cases("olmo2")[3]).config()
    assert config["rms_norm_eps"] == 1e-5
    assert math.isclose(config["rope_parameters"]["rope_theta"], 10000.0, rel_tol=0)


def test_the_document_lists_every_row():
    text = (Path(__file__).parents[2] / "docs" / "gguf-architectures.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \| (\w+) \|", text, flags=re.M)
    assert listed == list(dict.fromkeys((row.model_type, row.arch, row.model_class) for row in ROWS))


def test_the_documents_count_the_model_types_and_measured_every_case():
    root = Path(__file__).parents[2]
    assert f"from {len(MODEL_TYPES)} model types" in (root / "README.md").read_text(encoding="utf-8")
    assert f"{len(MODEL_TYPES)} 种模型类型" in (root / "README.zh-CN.md").read_text(encoding="utf-8")
    text = (root / "docs" / "gguf-architectures.md").read_text(encoding="utf-8")
    measured = text.partition("<!-- families -->")[2].partition("<!-- end -->")[0]
    assert re.findall(r"^\| ([\w.]+) \| `", measured, flags=re.M) == list(CASES)


def test_the_document_lists_every_model_around_a_decoder():
    text = (Path(__file__).parents[2] / "docs" / "gguf-architectures.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", text, flags=re.M)
    assert listed == [(model_type, around.model_class) for model_type, around in AROUND.items()]


@pytest.mark.sampled(3, shared=True)
@pytest.mark.parametrize("case", [
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm_ocr", "glm4v_moe", "paddleocr_vl", "llava", "internvl",
    "smolvlm", "voxtral", "kimi_k25",
])  # fmt: skip
def test_a_model_that_sees_comes_back_as_its_language_model(cases, case):
    folder, _, _, path = cases(case)
    back = open_gguf(path)
    ids = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_model(open_safetensors(folder))(ids).logits
        found = load_model(back)(ids).logits
    assert back.config()["architectures"][0].endswith("ForCausalLM")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("model_type", "found"), [("paligemma", "both directions"), ("mllama", "attend to the image")])
def test_why_a_model_type_has_no_row_is_said(model_type, found):
    with pytest.raises(ArchitectureError, match=found):
        gguf_names({"model_type": model_type}, [])


def test_positions_with_axes_need_their_sections(tmp_path):
    folder = make_case(tmp_path / "hf", "qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["rope_parameters"]["mrope_section"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match="mrope_section"):
        describe_folder(folder)
