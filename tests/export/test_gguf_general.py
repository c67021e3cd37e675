"""Key-values about the model as a whole: model card, sampling, size, name; tensors that no file type concerns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGUFValueType as V

import lowbit
from lowbit.formats.gguf.general import general_key_values, loadable_name
from lowbit.formats.gguf.raw import open_raw_gguf

SHAPES = [("token_embd.weight", (1000, 1000)), ("blk.0.ffn_up_exps.weight", (8, 1000, 1000))]


def test_the_model_card_and_the_sampling_settings(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [chat]\npipeline_tag: text-generation\n"
        "base_model: [org/base-7B, https://example.com/x]\n---\n# A model\n"
    )
    found = general_key_values(
        tmp_path, {"temperature": 0.6, "top_k": 20, "top_p": float("nan"), "min_p": True}, SHAPES
    )
    assert {key.removeprefix("general."): value[0] for key, value in found.items()} == {
        "size_label": "8x2.0M", "license": "apache-2.0", "tags": ["chat", "text-generation"], "languages": ["en", "de"],
        "base_model.count": 2, "base_model.0.name": "Base 7B", "base_model.0.organization": "Org",
        "base_model.0.repo_url": "https://huggingface.co/org/base-7B", "base_model.1.repo_url": "https://example.com/x",
        "sampling.temp": 0.6, "sampling.top_k": 20,
    }  # fmt: skip
    assert found["general.sampling.top_k"][1] is V.INT32


@pytest.mark.parametrize(
    "card", ["", "# no YAML", "---\n[1, 2]\n---\n", "---\na: [\n---\n", "---\nlicense: 3\ntags: {}\n---\n"]
)
def test_a_card_of_another_kind_is_left_out(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert general_key_values(tmp_path, {}, SHAPES).keys() == {"general.size_label"}


def test_names_that_make_llama_cpp_look_up_tokens():
    assert loadable_name("distilled-PHI-3", ["a"])[0] == "distilled-Phi 3"
    phi3 = ["</s>", "<unk>", "<s>", "<|endoftext|>"]
    assert loadable_name("Phi-3-mini", phi3) == ("Phi-3-mini", None)
    assert loadable_name("Llama", []) == ("Llama", None)


def test_integers_of_a_gguf_are_copied(tmp_path):
    table, order = np.arange(200, dtype=np.int32).reshape(100, 2), np.arange(50, dtype=np.int64)
    writer = GGUFWriter(tmp_path / "in.gguf", "deepseek4")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((64, 64), np.float16))
    writer.add_tensor("blk.0.ffn_gate_tid2eid.weight", table)
    writer.add_tensor("d2t", order)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = open_raw_gguf(Path(lowbit.quantize(str(tmp_path / "in.gguf"), tmp_path / "out.gguf", scheme="Q8_0").path))
    kept = {tensor.name: (tensor.type_name, tensor.shape, bytes(raw.bytes(tensor))) for tensor in raw.tensors}
    raw.close()
    assert kept["blk.0.ffn_gate_tid2eid.weight"] == ("I32", (100, 2), table.tobytes())
    assert kept["d2t"] == ("I64", (50,), order.tobytes())
