"""Key-values about the model as a whole: model card, sampling, size, name; tensors that no file type concerns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType as V
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.formats.gguf.general import general_key_values, kept_key_values
from lowbit.formats.gguf.names import loadable_name, name_for_tokenizer
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.formats.gguf.write import packed_key_values
from models import SHORT_TEXT, make_model

SHAPES = [("token_embd.weight", (1000, 1000)), ("blk.0.ffn_up_exps.weight", (8, 1000, 1000))]
CARD = """---
license: other
license_name: my-license
license_link: LICENSE
language:
- en
- no
tags: [chat, merge]
pipeline_tag: text-generation
model_creator: Somebody
description: A tiny model.
url: https://example.com
base_model: [org/base-7B-v0.3, "https://huggingface.co/meta-llama/Llama-3.1-8B", "https://example.com/x", justaname]
datasets:
- HuggingFaceFW/fineweb-edu
- name: own
  url: https://example.com/d
---
# A model
"""


def said(folder: Path, card: str, name: str = "folder", generation: dict | None = None, config: dict | None = None):
    """({key without "general.": value}, notes) of a folder with this README.md."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "README.md").write_text(card, encoding="utf-8", newline="")
    found, notes = general_key_values(folder / name, str(folder / name), config or {}, generation or {}, SHAPES)
    packed_key_values(found)
    return {key.removeprefix("general."): value[0] for key, value in found.items()}, notes


def test_everything_that_llama_cpp_s_converter_derives(tmp_path):
    """The expected values are those that convert_hf_to_gguf.py wrote for this card, name and generation config."""
    generation = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    found, notes = said(tmp_path, CARD, "Tiny-Llama-v1.5-2.0M-Instruct", generation)
    assert not notes
    assert found == {
        "name": "Tiny Llama v1.5 2.0M Instruct", "basename": "Tiny-Llama-v1.5", "finetune": "Instruct",
        "size_label": "2.0M", "author": "Somebody", "description": "A tiny model.", "source.url": "https://example.com",
        "license": "other", "license.name": "my-license", "license.link": "LICENSE",
        "base_model.count": 4,
        "base_model.0.name": "Base 7B v0.3", "base_model.0.organization": "Org", "base_model.0.version": "v0.3",
        "base_model.0.repo_url": "https://huggingface.co/org/base-7B-v0.3",
        "base_model.1.name": "Llama 3.1 8B", "base_model.1.organization": "Meta Llama",
        "base_model.1.repo_url": "https://huggingface.co/meta-llama/Llama-3.1-8B",
        "base_model.2.repo_url": "https://example.com/x", "base_model.3.name": "Justaname",
        "dataset.count": 2, "dataset.0.name": "Fineweb Edu", "dataset.0.organization": "HuggingFaceFW",
        "dataset.0.repo_url": "https://huggingface.co/HuggingFaceFW/fineweb-edu",
        "dataset.1.name": "own", "dataset.1.url": "https://example.com/d",
        "tags": ["chat", "merge", "text-generation"], "languages": ["en", "no"],
        "sampling.temp": 0.6, "sampling.top_k": 20, "sampling.top_p": 0.95, "sampling.min_p": 0.05,
        "sampling.penalty_repeat": 1.1,
    }  # fmt: skip


def test_names_come_from_the_config_or_the_folder_and_sizes_from_the_tensors(tmp_path):
    found, _ = said(tmp_path, "", "x", config={"_name_or_path": "Qwen/Qwen3-0.6B-Base"})
    assert found == {"name": "Qwen3 0.6B Base", "organization": "Qwen", "basename": "Qwen3", "finetune": "0.6b-Base",
                     "size_label": "8x2.0M"}  # fmt: skip
    assert said(tmp_path, "", "my-model")[0] == {"name": "My Model", "size_label": "8x2.0M"}
    hub = general_key_values(tmp_path, "org/my-model:x.gguf", {}, {}, SHAPES)[0]
    assert (hub["general.name"][0], hub["general.organization"][0]) == ("My Model", "Org")


def test_sampling_settings_of_the_wrong_kind_are_noted(tmp_path):
    generation = {"temperature": 1, "top_k": 20.0, "top_p": float("nan"), "min_p": True, "mirostat": 1.5, "sequence": 3}
    found, notes = said(tmp_path, "", generation=generation)
    assert {key: value for key, value in found.items() if "sampling" in key} == {"sampling.temp": 1.0,
                                                                                "sampling.top_k": 20}  # fmt: skip
    assert "sequence of generation_config.json (no text), top_p of generation_config.json (no number)" in notes[0]
    assert all(key in notes[0] for key in ("min_p", "mirostat"))


@pytest.mark.parametrize(
    ("card", "why"),
    [
        ("", ""), ("# no YAML", ""), ("---\n[1, 2]\n---\n", ""), ("---\nlicense: mit", ""),
        ("---\nlicense:\n---\n", ""), ("---\ntags: []\n---\n", ""),
        ("---\ntags: [\n---\n", "tags of README.md (not YAML)"),
        ("---\nlicense: {a: b}\n---\n", "license of README.md (no text)"),
        ("---\ntags: {}\n---\n", "tags of README.md (no text)"),
        ("---\nauthor: !!python/object/apply:os.system [x]\n---\n", "author of README.md (not YAML)"),
        ("---\nauthor: !!int ''\n---\n", "author of README.md (not YAML)"),
        ('---\nauthor: "a\\0b"\n---\n', "characters that are no text"),
        ('---\nauthor: "\\ud800"\n---\n', "characters that are no text"),
        ("---\nauthor: a\x00b\n---\n", "author of README.md (not YAML)"),
        ("---\nauthor: " + "x" * 20_000 + "\n---\n", "over 16384 characters"),
        ("---\ntags: [" + "x," * 2000 + "]\n---\n", "over 1024 entries"),
        ("---\ntags: " + "[" * 5000 + "\n---\n", "tags of README.md (nested too deeply)"),
        ("---\ntags: " + "x" * 100_000 + "\n---\n", "over 65536 characters"),
        ("---\nbase_model: [[a/b]]\n---\n", "base_model of README.md (no text)"),
        ("---\ndatasets: [{name: [1]}]\n---\n", "datasets of README.md (no text)"),
        ("---\nversion: 0x" + "f" * 9000 + "\n---\n", "version of README.md (no text)"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_left_out_and_noted(tmp_path, card, why):
    found, notes = said(tmp_path, card)
    assert found == {"name": "Folder", "size_label": "8x2.0M"}
    assert (why in notes[0]) if why else not notes


def test_one_bad_entry_costs_no_other(tmp_path):
    found, notes = said(tmp_path, "---\r\nlicense: mit\r\ntags: [\r\nversion: 1.5\r\nlanguage: no\r\n---\r\nx")
    assert (found["license"], found["version"], found["languages"]) == ("mit", "1.5", ["no"])
    assert notes == ["left out of the file's metadata: tags of README.md (not YAML)"]


@given(text=st.text(max_size=60), key=st.sampled_from(["base_model", "name", "tags", "datasets", "author", "license"]))
@settings(max_examples=60, deadline=None)
def test_no_text_of_a_card_and_no_name_is_a_traceback(tmp_path_factory, text, key):
    folder = tmp_path_factory.mktemp("card")
    said(folder, f"---\n{key}: {text}\n---\n", config={"_name_or_path": text})
    said(folder, f"---\n{key}: {json.dumps([text])}\n---\n", config={"_name_or_path": "a-" + text})


def test_a_gguf_keeps_what_it_says_of_itself():
    metadata = {
        "general.architecture": "llama", "general.file_type": 7, "general.name": "phi3 merge", "general.tags": ["a"],
        "general.sampling.top_k": -1, "general.sampling.temp": 0.5, "general.base_model.count": 2, "llama.x": 3,
        "general.quantized_by": "somebody", "general.bad": -1, "general.other": [1, 2],
    }  # fmt: skip
    assert kept_key_values(metadata) == {
        "general.name": ("phi3 merge", V.STRING), "general.tags": (["a"], V.ARRAY, V.STRING),
        "general.sampling.top_k": (-1, V.INT32), "general.sampling.temp": (0.5, V.FLOAT32),
        "general.base_model.count": (2, V.UINT32), "general.quantized_by": ("somebody", V.STRING),
    }  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"method": "gptq", "calib": SHORT_TEXT, "samples": 8, "seqlen": 32}])
def test_what_a_gguf_says_of_itself_outlasts_a_quantization(tmp_path, how):
    folder = make_model(tmp_path / "Tiny-0.4M-Chat", "llama")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    first = lowbit.quantize(str(folder), tmp_path / "one.gguf", scheme="F16", pre_tokenizer="gpt-2").path
    second = lowbit.quantize(str(first), tmp_path / "two.gguf", scheme="Q4_0", **how).path
    one, two = (
        {k: v for k, v in GGUFReader(path).fields.items() if k.startswith("general.")} for path in (first, second)
    )
    assert one.keys() == two.keys()
    assert one["general.base_model.0.name"].contents() == "Base 7B v0.3"
    changed = {key for key in one if (one[key].contents(), one[key].types) != (two[key].contents(), two[key].types)}
    assert changed == {"general.file_type"}


def test_names_that_make_llama_cpp_look_up_tokens():
    assert loadable_name("distilled-PHI-3", ["a"])[0] == "distilled-Phi 3"
    phi3 = ["</s>", "<unk>", "<s>", "<|endoftext|>"]
    assert loadable_name("Phi-3-mini", phi3) == ("Phi-3-mini", None)
    assert loadable_name("Llama", []) == ("Llama", None)


@pytest.mark.parametrize(
    ("name", "strips", "written"),
    [
        ("My Phi3 Distill", False, "My Phi 3 Distill"), ("My Phi3 Distill", True, "My Phi3 Distill"),
        ("Phi 3 Mini 4k Instruct", True, "Phi-3 Mini 4k Instruct"), ("Checkpoint 5", True, "Checkpoint 5 (Phi-3)"),
        ("Phi 3.5 Mini", True, "Phi-3.5 Mini"), ("x-modern-bert", False, "x-ModernBert"), ("Llama", False, "Llama"),
    ],
)  # fmt: skip
def test_the_tokenizer_and_not_the_name_decides_whether_llama_cpp_drops_whitespace(name, strips, written):
    found, note = name_for_tokenizer(name, strips)
    assert found == written
    assert (note is None) == (found == name)


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
