"""llama.cpp tokenizes hard texts as the Hugging Face tokenizer does whose key-values we wrote or rebuilt it from."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.formats.gguf.tokenizer import write_tokenizer
from lowbit.formats.gguf.write import packed_key_values
from lowbit.formats.gguf.write_tokenizer import tokenizer_key_values
from models import make_model
from tiny_tokenizers import BYTE_LEVEL, SENTENCEPIECE, TEXTS, as_metadata, write_kind

pytestmark = pytest.mark.interop

xllamacpp = pytest.importorskip("xllamacpp")

ROWS, WIDTH = 1024, 32


class Server:
    """llama.cpp with one model; `tokenize` asks for the ids of a text."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 64
        params.warmup = False
        params.verbosity = 0
        params.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(params)
        # A server that is dropped before its loop runs waits for it for ever; an answer shows that it does.
        self._ask("completion", prompt=[1], n_predict=1)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self._ask("tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]

    def _ask(self, what: str, **body: object) -> dict:
        address = f"{self._server.listening_address}/{what}"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def write_model(path: Path, key_values: dict[str, tuple]) -> Path:
    """A Llama of one block and no sense, with that tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH)
    for key, (value, kind, items) in key_values.items():
        writer.add_key_value(key, value, kind, items)
    shapes = {"token_embd.weight": (ROWS, WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.0.{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in matrices}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def differences(server: Server, tokenizer: Tokenizer, texts: list[str]) -> dict[str, tuple]:
    """Text → (llama.cpp's ids, tokenizers' ids) where they are not the same."""
    found = {text: (server.tokenize(text), tokenizer.encode(text).ids) for text in texts}
    return {text: pair for text, pair in found.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_llama_cpp_finds_the_same_tokens(tmp_path, kind, bos):
    folder = write_kind(tmp_path / "hf", kind, bos)
    made = tokenizer_key_values(folder, ROWS)
    assert packed_key_values(made.key_values)
    server = Server(write_model(tmp_path / "model.gguf", made.key_values))
    texts = [text for text in TEXTS if "\x00" not in text]
    if any("NFC" in note for note in made.notes):
        texts = [text for text in texts if "\u0301" not in text]
    if kind == "metaspace":
        texts = [text for text in texts if not (text.startswith(" ") or "> " in text)]
    assert len(texts) > 12
    assert differences(server, Tokenizer.from_file(str(folder / "tokenizer.json")), texts) == {}


def test_gemma4_merges_by_rank_in_llama_cpp_too(tmp_path):
    folder = write_kind(tmp_path / "hf", "gemma4", bos=True)
    made = tokenizer_key_values(folder, ROWS, spaced="gemma4")
    assert made.key_values["tokenizer.ggml.model"][0] == "gemma4"
    assert made.notes == ()
    server = Server(write_model(tmp_path / "model.gguf", made.key_values))
    texts = [text for text in TEXTS if "\x00" not in text]
    assert differences(server, Tokenizer.from_file(str(folder / "tokenizer.json")), texts) == {}
    (tmp_path / "back").mkdir()
    write_tokenizer(tmp_path / "back", as_metadata(made.key_values), "x.gguf")
    assert differences(server, Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json")), texts) == {}
    again = tokenizer_key_values(tmp_path / "back", ROWS, spaced="gemma4")
    assert as_metadata(again.key_values).keys() == as_metadata(made.key_values).keys()
    assert again.key_values["tokenizer.ggml.merges"] == made.key_values["tokenizer.ggml.merges"]


def phi3_like(folder: Path, rstrip: bool) -> Path:
    """A tiny Llama whose special tokens are Phi-3's."""
    make_model(folder, "llama", vocab_size=384)
    parsed = json.loads((folder / "tokenizer.json").read_text())
    texts = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<|user|>"]
    parsed["added_tokens"] = [
        {"id": index if index < 3 else 256 + index, "content": text, "special": True, "normalized": False,
         "lstrip": False, "rstrip": rstrip and text in ("</s>", "<|user|>"), "single_word": False}
        for index, text in enumerate(texts)
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    return folder


@pytest.mark.parametrize("rstrip", [True, False])
def test_llama_cpp_tokenizes_as_the_folder_does_whatever_its_name(tmp_path, rstrip):
    folder = phi3_like(tmp_path / ("plain" if rstrip else "my-phi3"), rstrip)
    done = lowbit.quantize(str(folder), tmp_path / "out.gguf", scheme="F16", pre_tokenizer="gpt-2")
    assert any("general.name is" in note for note in done.report.source.notes)
    text = "a<|user|>\n\nb</s> c<|endoftext|> d"
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert Server(done.path).tokenize(text, add_special=False) == expected


@pytest.mark.demo_model
def test_the_demo_model(tmp_path):
    """Its own file, and what we write of the folder that we rebuild from it."""
    demo = open_checkpoint("demo:smollm2")
    tokenizer = Tokenizer.from_file(str(demo.folder / "tokenizer.json"))
    texts = [text for text in TEXTS if "\x00" not in text]
    assert differences(Server(demo.tensors["model.norm.weight"].file), tokenizer, texts) == {}
    made = tokenizer_key_values(demo.folder, 49152)
    values = as_metadata(made.key_values)
    assert made.notes == ()
    stored = {key: value for key, value in demo.metadata.items() if key.startswith("tokenizer.")}
    del stored["tokenizer.ggml.add_space_prefix"]  # has no effect on a byte-level BPE
    assert stored.keys() <= values.keys()
    assert [key for key, value in stored.items() if not np.array_equal(value, values[key])] == []
