"""Files beside the weights: which are refused, which are copied, and where links are followed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.companions import beyond_embedding, check_companions, code_of_tokenizer, find_companions
from lowbit.errors import CheckpointError


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_companions(folder, "model")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", '{"model": {', "tokenizer.json: not valid JSON"),
        ("tokenizer.json", "{}", "tokenizer.json: does not load as a tokenizer"),
        ("tokenizer_config.json", '{"a": 1,}', "tokenizer_config.json: not valid JSON"),
        ("generation_config.json", "", "generation_config.json: not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json: a JSON object is needed"),
        ("special_tokens_map.json", "null", "special_tokens_map.json: a JSON object is needed"),
        *((name, '{"chat_template": "a\\ud800b"}', f"{name}: half of a surrogate pair stands in a text")
          for name in ("tokenizer_config.json", "chat_template.json", "generation_config.json")),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(folder, name, text, said):
    (folder / name).write_text(text)
    assert said in refusal(folder)


def test_what_is_no_file_is_refused(folder):
    (folder / "tokenizer.model").mkdir()
    assert "tokenizer.model is a folder, and a file is needed" in refusal(folder)
    (folder / "tokenizer.model").rmdir()
    os.mkfifo(folder / "generation_config2.json")
    assert any("generation_config2.json, no regular file" in note for note in check_companions(folder, "model"))
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    assert "generation_config.json is a pipe, and a file is needed" in refusal(folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("gone.json")
    assert "a link to gone.json, which is not there" in refusal(folder)


def test_a_config_json_that_is_a_pipe_does_not_hang(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match="is a pipe"):
        open_checkpoint(folder)


def test_links_are_followed_inside_the_folder_and_into_a_cache_only(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    blob = tmp_path / "models--org--name" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    (folder / "out.txt").symlink_to(secret)
    (folder / "cached.json").symlink_to(blob)
    (folder / "same.txt").symlink_to("generation_config.json")
    names = [path.as_posix() for path in find_companions(folder)]
    assert {"cached.json", "same.txt"} <= set(names)
    assert "out.txt" not in names
    assert any("out.txt, a link out of the folder" in note for note in check_companions(folder, "model"))


def test_subfolders_of_templates_are_copied_and_those_of_weights_are_not(folder):
    for inside in ("additional_chat_templates/tool_use.jinja", "1_Pooling/config.json", "checkpoint-5/state.json",
                   ".cache/x.json", "onnx/a.json", "onnx/m.onnx"):  # fmt: skip
        (folder / inside).parent.mkdir(exist_ok=True)
        (folder / inside).write_text("{}")
    found = {path.as_posix() for path in find_companions(folder) if len(path.parts) > 1}
    assert found == {"additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"}


def test_an_adapter_beside_the_model_is_said_and_not_copied(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/b"}))
    assert any("a LoRA adapter of org/b lies beside" in note for note in check_companions(folder, "model"))
    assert Path("adapter_config.json") not in find_companions(folder)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_an_adapter_alone_is_named_with_its_base(tmp_path, weights):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "org/base"}')
    if weights:
        (tmp_path / weights).write_bytes(b"")
    with pytest.raises(CheckpointError, match="this is an IA3 adapter of org/base, not a model"):
        open_checkpoint(tmp_path)


def test_a_model_without_tokenizer_gets_a_note(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert any("there is no tokenizer in model" in note for note in check_companions(folder, "model"))


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_a_tokenizer_in_a_file_of_another_kind_gets_no_note(folder, name):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / name).write_bytes(b"YQ== 0\n")
    assert check_companions(folder, "model") == []
    assert Path(name) in find_companions(folder)


@pytest.mark.parametrize(("settings", "code"), [
    ({"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}},
     "tokenization_kimi.TikTokenTokenizer"),
    ({"auto_map": {"AutoTokenizer": "tokenization_kimi.TikTokenTokenizer"}}, "tokenization_kimi.TikTokenTokenizer"),
    ({"auto_map": ["tokenization_kimi.TikTokenTokenizer", None]}, "tokenization_kimi.TikTokenTokenizer"),
    ({"auto_map": {"AutoTokenizer": [None, {}]}}, None),
    ({"auto_map": 3}, None),
    ({}, None),
])  # fmt: skip
def test_the_code_that_a_tokenizer_needs(folder, settings, code):
    (folder / "tiktoken.model").write_bytes(b"YQ== 0\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert code_of_tokenizer(folder) is None
    (folder / "tokenizer.json").unlink()
    assert code_of_tokenizer(folder) == code


def test_a_token_without_a_row_is_named(folder):
    rows = 250
    assert beyond_embedding(folder, 384) is None
    assert f"has id {rows}, and the embedding {rows} rows" in (beyond_embedding(folder, rows) or "")


def test_placeholders_of_pictures_need_no_row(folder):
    path = folder / "tokenizer.json"
    stated = json.loads(path.read_text())
    added = {"id": 500, "content": "<image_soft_token>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(json.dumps(stated | {"added_tokens": [*stated["added_tokens"], added]}))
    assert beyond_embedding(folder, 384) is None


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/tools.jinja"]
)
def test_a_chat_template_that_does_not_compile_gets_a_note(folder, place):
    broken = "{% for m in messages %}{{ m.content }\n{% endfor %}"
    path = folder / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(broken if path.suffix == ".jinja" else json.dumps({"chat_template": broken}))
    (note,) = check_companions(folder, "model")
    assert note.startswith(f"{place}: the chat template does not compile (line 1: ")


def test_a_chat_template_with_the_tags_of_transformers_compiles(folder):
    fine = "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(fine)
    assert check_companions(folder, "model") == []


def test_a_chat_template_nested_without_end_gets_a_note(folder):
    (folder / "chat_template.jinja").write_text("{{" + "(" * 20_000 + "}}")
    (note,) = check_companions(folder, "model")
    assert "does not compile" in note


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja", "merges.txt"])
def test_a_text_that_is_not_utf_8_is_refused_by_its_name(folder, name):
    """Copied as it is, it keeps every loader from the whole tokenizer."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\xff\xfe{\x00")
    assert f"{name}: not UTF-8 text" in refusal(folder)
