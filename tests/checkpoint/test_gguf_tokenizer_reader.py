"""Tokenizers rebuilt from GGUF key-values: what is written, and every list and id that can lie."""

import json

import numpy as np
import pytest
from checkpoint_files import ARRAY, STRING, gguf_bytes, gguf_key_value, gguf_string
from tokenizers import Tokenizer

from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.errors import CheckpointError
from lowbit.formats.gguf.header import read_header
from lowbit.formats.gguf.pre_tokenizers import BY_NAME, PRE_TOKENIZERS
from lowbit.formats.gguf.tokenizer import generation_config, write_tokenizer

LETTERS = [chr(ord("!") + index) for index in range(90)]


def byte_level(**changes):
    """Key-values of a byte-level BPE; None takes one away."""
    tokens = ["<s>", "</s>", *LETTERS, "Ġ", "ab", "abc", "Ġab", "<think>", "[PAD98]"]
    types = np.full(len(tokens), 1, np.int32)
    types[[0, 1]], types[-2], types[-1] = 3, 4, 5
    values = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": ["a b", "ab c", "Ġ ab"],
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return _metadata(values | changes)


def sentencepiece(**changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "bb"]
    types = np.array([2, 3, 3, *[6] * 256, *[1] * 6], np.int32)
    scores = np.array([0.0] * 262 + [-2.0, -1.0, -3.0], np.float32)
    return _metadata({"model": "llama", "tokens": tokens, "token_type": types, "scores": scores} | changes)


def _metadata(values):
    named = {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return {key: value for key, value in named.items() if value is not None}


def rebuilt(folder, metadata) -> Tokenizer:
    write_tokenizer(folder, metadata, "x.gguf")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def tokens_of(tokenizer, text):
    return tokenizer.encode(text).tokens


def test_a_byte_level_tokenizer(tmp_path):
    tokenizer = rebuilt(tmp_path, byte_level())
    assert tokens_of(tokenizer, "abc ab<think>a</s>") == ["abc", "Ġab", "<think>", "a", "</s>"]
    assert tokenizer.decode(tokenizer.encode("abc ab<think></s>").ids) == "abc ab<think>"
    assert tokenizer.token_to_id("[PAD98]") is None
    assert tokenizer.token_to_id("<think>") == 96


def test_a_sentencepiece_tokenizer(tmp_path):
    tokenizer = rebuilt(tmp_path, sentencepiece())
    assert tokens_of(tokenizer, "ab a") == ["<s>", "▁", "ab", "▁a"]  # "ab" has the higher score
    scores = np.array([0.0] * 262 + [-1.0, -2.0, -3.0], np.float32)
    assert tokens_of(rebuilt(tmp_path, sentencepiece(scores=scores)), "ab a") == ["<s>", "▁a", "b", "▁a"]
    assert tokens_of(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é a").ids) == "ab é a"
    tokenizer = rebuilt(tmp_path, sentencepiece(add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    assert tokens_of(tokenizer, "ab a") == ["ab", "▁a", "</s>"]


@pytest.mark.parametrize(("said", "first"), [(None, "<s>"), (True, "<s>"), (False, "ab")])
def test_llama3_begins_with_bos_unless_the_file_says_not_to(tmp_path, said, first):
    tokenizer = rebuilt(tmp_path, byte_level(pre="llama-bpe", add_bos_token=said))
    assert tokens_of(tokenizer, "ab")[0] == first


def test_both_ends_are_added_to_both_texts(tmp_path):
    tokenizer = rebuilt(tmp_path, byte_level(add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("a", "b").tokens == ["<s>", "a", "</s>", "<s>", "b", "</s>"]


def test_transformers_loads_it_with_the_roles(tmp_path):
    from transformers import AutoTokenizer

    template = "{{ messages[0].content }}\n\n"
    changes = {"tokenizer.chat_template": template, "tokenizer.chat_template.rag": "R",
               "general.architecture": "llama", "llama.context_length": 77}  # fmt: skip
    write_tokenizer(tmp_path, byte_level(add_bos_token=True, padding_token_id=1) | changes, "x.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert tokenizer.model_max_length == 77
    assert tokenizer("ab")["input_ids"] == [0, 93]
    assert tokenizer.chat_template == {"default": template, "rag": "R"}
    assert not json.loads((tmp_path / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"]


def test_a_file_without_a_pre_tokenizer_is_cut_as_llama_cpp_does(tmp_path):
    def words(**changes):
        tokenizer = rebuilt(tmp_path, byte_level(**changes))
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 1234567,b")]

    assert words(pre=None) == words(pre="default") == ["a", "Ġ", "123", "456", "7", ",", "b"]


@pytest.mark.parametrize("name", BY_NAME)
def test_every_pre_tokenizer_loads(tmp_path, name):
    tokenizer = rebuilt(tmp_path, byte_level(pre=name))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12,345 naïve words\n\n  in 中文.")
    assert len(cut) > 5


def test_pre_tokenizers_differ_where_their_rows_do():
    cuts = {}
    for row in PRE_TOKENIZERS:
        cuts.setdefault((row.splits, row.ignore_merges, row.add_bos, row.nfc), []).append(row.name)
    assert all(len(names) == 1 for names in cuts.values()), cuts


def test_generation_ends_at_the_end_of_a_turn_too():
    values = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.eot_token_id": 4}
    assert generation_config(values) == {"bos_token_id": 1, "eos_token_id": [4, 9]}


def test_equal_merges_count_once_and_the_first_decides(tmp_path):
    tokenizer = rebuilt(tmp_path, byte_level(merges=["a b", "Ġ ab", "a b", "ab c"]))
    assert tokens_of(tokenizer, "abc ab") == ["abc", "Ġab"]


def test_an_empty_token_is_named_as_llama_cpp_names_it(tmp_path):
    tokens = byte_level()["tokenizer.ggml.tokens"]
    tokenizer = rebuilt(tmp_path, byte_level(tokens=[*tokens[:-1], ""]))
    assert tokenizer.id_to_token(97) == "[EMPTY_97]"


def test_line_ends_of_a_template_stay(tmp_path):
    write_tokenizer(tmp_path, byte_level() | {"tokenizer.chat_template": "a\r\nb\n"}, "x.gguf")
    assert (tmp_path / "chat_template.jinja").read_bytes() == b"a\r\nb\n"


BAD = {
    "no tokens": (byte_level(tokens=None), "there is no tokenizer"),
    "an empty list": (byte_level(tokens=[]), "tokens has 0 strings"),
    "numbers for tokens": (byte_level(tokens=np.arange(5)), "tokens has 5 strings; 1 to 4194304 are needed"),
    "another model": (byte_level(model="unheard-of"), "model is 'unheard-of'"),
    "no model": (byte_level(model=None), "model is 'None'"),
    "another pre-tokenizer": (byte_level(pre="lama-bpe"), "'lama-bpe', which is not known; .*llama-bpe"),
    "a number for it": (byte_level(pre=7), "pre is '7'"),
    "a token twice": (byte_level(tokens=["<s>", "</s>", *LETTERS, "!", "ab", "abc", "Ġab", "x", "[PAD98]"]),
                      "tokens 2 and 92 are both '!'"),
    "too few types": (byte_level(token_type=np.ones(5, np.int32)), "token_type has 5 items, and there are 98 tokens"),
    "a type from the future": (byte_level(token_type=np.full(98, 9, np.int32)), "token_type of token 0 is 9"),
    "types that are no numbers": (byte_level(token_type=["1"] * 98), "token_type is no array of numbers"),
    "types that are fractions": (byte_level(token_type=np.ones(98, np.float32)), "token_type is no array of numbers"),
    "no merges": (byte_level(merges=None), "there is no list tokenizer.ggml.merges"),
    "merges that are numbers": (byte_level(merges=np.ones(3)), "there is no list tokenizer.ggml.merges"),
    "a merge of one part": (byte_level(merges=["ab"]), "merge 0 is 'ab'"),
    "an empty merge": (byte_level(merges=["a b", ""]), "merge 1 is ''"),
    "a merge of unknown parts": (byte_level(merges=["a 💥"]), "merge 0 is 'a 💥'"),
    "a merge without result": (byte_level(merges=["c b"]), "lacks a part or the result"),
    "an end beyond the list": (byte_level(eos_token_id=98), "eos_token_id is 98, and there are 98 tokens"),
    "an id below zero": (byte_level(bos_token_id=-5), "bos_token_id is -5"),
    "an id that is text": (byte_level(bos_token_id="0"), "bos_token_id is 0, and"),
    "a flag that is a number": (byte_level(add_bos_token=1), "add_bos_token is 1, not true or false"),
    "a token of absurd length": (byte_level(tokens=["x" * 20000]), "token 0 has 20000 characters"),
    "a template that is no text": (byte_level() | {"tokenizer.chat_template": 5}, "chat_template is no text"),
    "a template with a path": (byte_level() | {"tokenizer.chat_template.../../x": "t"}, "its name no name"),
    "no scores": (sentencepiece(scores=None), "there is no tokenizer.ggml.scores"),
    "too few scores": (sentencepiece(scores=np.ones(3, np.float32)), "scores has 3 items, and there are 265 tokens"),
    "a score that is no number": (sentencepiece(scores=np.full(265, np.nan, np.float32)), "scores of token 0 is no"),
    "a piece of absurd length": (
        sentencepiece(tokens=["<unk>", "<s>", "</s>", "y" * 2000], token_type=None, scores=np.ones(4, np.float32)),
        "token 3 has 2000 characters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_key_values_that_lie_are_named(tmp_path, case):
    metadata, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        write_tokenizer(tmp_path, metadata, "x.gguf")
    assert str(caught.value).startswith("x.gguf: ")


def test_minus_one_means_no_token(tmp_path):
    write_tokenizer(tmp_path, byte_level(padding_token_id=2**32 - 1), "x.gguf")
    assert "pad_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_token_that_is_no_utf8_is_named_by_the_header(tmp_path):
    tokens = gguf_key_value("tokenizer.ggml.tokens", ARRAY, (STRING, [b"ok", b"\xff\xfe"]))
    assert gguf_string(b"\xff\xfe") in tokens
    (tmp_path / "x.gguf").write_bytes(gguf_bytes([tokens]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens' is not valid UTF-8"):
        read_header(MappedFile(tmp_path / "x.gguf"))
