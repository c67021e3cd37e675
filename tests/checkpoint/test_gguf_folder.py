"""The rebuilt Hugging Face folder: config, tokenizer, rope, cache; and the demo model end to end."""

import json
import threading

import numpy as np
import pytest
import torch
from checkpoint_files import tiny_tensors, write_tiny_gguf

from lowbit.checkpoint import open_checkpoint, open_gguf
from lowbit.errors import CheckpointError, OutputError
from lowbit.formats.gguf.rope import LLAMA3, llama3_divisors

TEXTS = [
    "Hello world",
    "  two  spaces, tabs\tand\nnewlines\n\n",
    "<|im_start|>user\nWhat is 12345 + 678?<|im_end|>\n",
    "naïve café — 你好, мир! 🙂",
    "def f(x):\n    return x**2  # comment",
    "",
]


@pytest.fixture(scope="module")
def demo():
    return open_checkpoint("demo:smollm2")


@pytest.mark.demo_model
def test_the_demo_config_says_what_the_model_is(demo):
    config = demo.config()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert (config["vocab_size"], config["num_hidden_layers"]) == (49152, 30)
    assert not config.keys() & {"quantization_config", "_model_name_or_path", "_name_or_path"}
    generation = json.loads((demo.folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert any("Q4_1 (210)" in note for note in demo.notes)


@pytest.mark.demo_model
def test_the_demo_tokenizer_equals_the_one_that_transformers_makes_of_the_file(demo):
    from transformers import AutoTokenizer

    path = demo.tensors["model.norm.weight"].file
    direct = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rebuilt = AutoTokenizer.from_pretrained(demo.folder)
    for text in TEXTS:
        ids = rebuilt(text)["input_ids"]
        assert ids == direct(text)["input_ids"]
        assert rebuilt.decode(ids, clean_up_tokenization_spaces=False) == text
    assert rebuilt("<|im_start|>")["input_ids"] == [1]
    chat = [{"role": "user", "content": "Hi"}]
    rendered = rebuilt.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == direct.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.demo_model
def test_the_demo_model_continues_a_well_known_sentence(demo):
    """Names, layouts and scales at once: one wrong permutation and this is noise."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo.folder), dtype=torch.float32)
    model.load_state_dict({name: demo.read(name) for name in demo.tensors}, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    tokenizer = AutoTokenizer.from_pretrained(demo.folder)
    ids = tokenizer("The capital of France is the city of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_llama3_rope_is_recovered_from_its_divisors(tmp_path):
    divisors = llama3_divisors(500000.0, 16, factor=8.0)
    tensors = tiny_tensors("llama") | {"rope_freqs.weight": divisors.numpy()}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors, extra=_with_theta(500000.0))
    checkpoint = open_gguf(path)
    rope = checkpoint.config()["rope_parameters"]
    assert rope == {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0} | LLAMA3
    assert "rope_freqs.weight" not in checkpoint.tensors
    assert any("rope_freqs.weight" in note for note in checkpoint.notes)


def _with_theta(theta):
    def add(writer):
        writer.kv_data[0].pop("llama.rope.freq_base")
        writer.add_rope_freq_base(theta)

    return add


def test_llama3_divisors_equal_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0} | LLAMA3
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / llama3_divisors(500000.0, 64, 32.0), frequencies, rtol=1e-5)


def test_other_rope_divisors_are_noted(tmp_path):
    tensors = tiny_tensors("llama") | {"rope_freqs.weight": np.linspace(1, 3, 8).astype(np.float32)}
    checkpoint = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors))
    assert any("no Llama 3 scaling" in note for note in checkpoint.notes)
    assert checkpoint.config()["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_linear_rope_scaling_reaches_the_config(tmp_path, architecture):
    def add_scaling(writer):
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
        writer.add_float32(f"{architecture}.rope.scaling.factor", 8.0)

    rope = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", architecture, extra=add_scaling)).config()[
        "rope_parameters"
    ]
    scaled = rope["full_attention"] if architecture == "gemma3" else rope
    assert (scaled["rope_type"], scaled["factor"], scaled["rope_theta"]) == ("linear", 8.0, 10000.0)
    if architecture == "gemma3":
        assert rope["sliding_attention"]["rope_type"] == "default"


def test_rope_divisors_of_the_wrong_shape_are_refused(tmp_path):
    tensors = tiny_tensors("llama") | {"rope_freqs.weight": np.ones((8, 2), np.float32)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight' has shape \[8, 2\]"):
        open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors))


def test_unknown_rope_scaling_is_noted(tmp_path):
    def add_scaling(writer):
        writer.add_string("llama.rope.scaling.type", "longrope")

    checkpoint = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", extra=add_scaling))
    assert any("'longrope'" in note for note in checkpoint.notes)


def test_the_end_of_a_turn_ends_generation_too(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", extra=lambda writer: writer.add_eot_token_id(5))
    generation = json.loads((open_gguf(path).folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 5]}


def test_opening_and_reading_rebuilds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    checkpoint = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"))
    checkpoint.read("model.norm.weight")
    assert not (tmp_path / "cache").exists()
    assert checkpoint.folder.is_relative_to(tmp_path / "cache")


def test_the_cache_is_used_again_and_never_holds_half_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    checkpoints = [open_gguf(path) for _ in range(3)]
    threads = [threading.Thread(target=lambda opened=opened: opened.folder) for opened in checkpoints]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (folder,) = (tmp_path / "cache" / "gguf").iterdir()
    written = (folder / "config.json").stat().st_mtime_ns
    assert {opened.folder for opened in (*checkpoints, open_gguf(path))} == {folder}
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_another_header_gets_another_folder(tmp_path):
    one = open_gguf(write_tiny_gguf(tmp_path / "one.gguf"))
    two = open_gguf(write_tiny_gguf(tmp_path / "two.gguf", tied=True))
    assert one.folder != two.folder


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OutputError, match="cannot be written") as caught:
        open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf")).config()
    assert "LOWBIT_CACHE" in caught.value.hint


def test_a_tokenizer_that_transformers_cannot_rebuild_names_the_file_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))

    def spoil(writer):
        writer.kv_data[0].pop("tokenizer.ggml.model")
        writer.add_tokenizer_model("unheard-of")

    path = write_tiny_gguf(tmp_path / "tiny.gguf", extra=spoil)
    with pytest.raises(CheckpointError, match="cannot rebuild the tokenizer") as caught:
        open_gguf(path).config()
    assert str(path) in str(caught.value)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
