"""Tokenizers as GGUF key-values, and back: the same ids on hard texts; and what is refused or noted."""

import base64
import itertools
import json
import re
import struct

import pytest
from gguf.constants import GGUFValueType, TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lowbit.errors import ArchitectureError, CheckpointError, LowbitError, UsageError
from lowbit.formats.gguf.sentencepiece import read_sentencepiece
from lowbit.formats.gguf.tokenizer import write_tokenizer
from lowbit.formats.gguf.tokenizer_files import TokenizerFiles
from lowbit.formats.gguf.write_tokenizer import tokenizer_key_values
from tiny_tokenizers import (
    BYTE_LEVEL,
    CHAT,
    SENTENCEPIECE,
    TEXTS,
    as_metadata,
    parsed_tokenizer,
    write_kind,
    write_tokenizer_folder,
)

ROWS = 1024


def values_of(folder, **options):
    return {key: value for key, (value, *_) in tokenizer_key_values(folder, ROWS, **options).key_values.items()}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def there_and_back(tmp_path, folder):
    """(the tokenizer of a folder, the one rebuilt from its key-values, the key-values)."""
    made = tokenizer_key_values(folder, ROWS)
    (tmp_path / "back").mkdir()
    write_tokenizer(tmp_path / "back", as_metadata(made.key_values), "x.gguf")
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return original, Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json")), made


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_round_trip(tmp_path, kind, bos):
    original, rebuilt, made = there_and_back(tmp_path, write_kind(tmp_path / "hf", kind, bos))
    assert made.key_values["tokenizer.ggml.model"][0] == "gpt2"
    assert made.key_values["tokenizer.ggml.pre"][0] == kind
    assert made.key_values["tokenizer.ggml.add_bos_token"][0] is bos
    for text in TEXTS:
        ids = ids_of(original, text)
        assert ids_of(rebuilt, text) == ids
        assert rebuilt.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_round_trip(tmp_path, kind, bos):
    original, rebuilt, made = there_and_back(tmp_path, write_kind(tmp_path / "hf", kind, bos))
    assert made.key_values["tokenizer.ggml.model"][0] == "llama"
    assert made.key_values["tokenizer.ggml.add_space_prefix"][0] is (kind != "gemma")
    assert not any("by score" in note for note in made.notes), made.notes
    # Metaspace puts no space before one, also behind a special token; llama.cpp does, and a note says so
    texts = [text for text in TEXTS if kind != "metaspace" or not (text.startswith(" ") or "> " in text)]
    assert len(texts) > 12
    for text in texts:
        ids = ids_of(original, text)
        assert ids_of(rebuilt, text) == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)
    assert any("another one" in note for note in made.notes) is (kind == "metaspace")


def test_types_of_tokens_and_rows_without_a_token(tmp_path):
    values = values_of(write_kind(tmp_path, "llama2"))
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    found = dict(zip(tokens, types, strict=True))
    assert len(tokens) == len(types) == len(values["tokenizer.ggml.scores"]) == ROWS
    assert found["<unk>"] == TokenType.UNKNOWN
    assert found["<0x0A>"] == TokenType.BYTE
    assert found["<s>"] == found["<|im_end|>"] == TokenType.CONTROL
    assert found["<think>"] == TokenType.USER_DEFINED
    assert found["▁the"] == TokenType.NORMAL
    assert (tokens[-1], types[-1]) == (f"[PAD{ROWS - 1}]", TokenType.UNUSED)


def test_every_value_has_its_type(tmp_path):
    values = tokenizer_key_values(write_kind(tmp_path, "llama2"), ROWS).key_values
    expected = {
        "tokenizer.ggml.model": (GGUFValueType.STRING, None),
        "tokenizer.ggml.tokens": (GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": (GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.scores": (GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        "tokenizer.ggml.bos_token_id": (GGUFValueType.UINT32, None),
        "tokenizer.ggml.add_bos_token": (GGUFValueType.BOOL, None),
    }
    assert {key: values[key][1:] for key in expected} == expected
    assert "tokenizer.ggml.merges" not in values


def test_roles_and_ends_of_turns(tmp_path):
    folder = write_kind(tmp_path, "qwen2", bos_token=None, pad_token={"content": "<|im_end|>"})
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [3, 4]}))
    ids = parsed_tokenizer("qwen2")["model"]["vocab"]
    values = values_of(folder)
    assert values["tokenizer.ggml.bos_token_id"] == 7
    assert values["tokenizer.ggml.eos_token_id"] == ids["</s>"]
    assert values["tokenizer.ggml.padding_token_id"] == values["tokenizer.ggml.eot_token_id"] == ids["<|im_end|>"]
    assert values["tokenizer.ggml.unknown_token_id"] == ids["<unk>"]
    assert values["tokenizer.ggml.add_bos_token"] is False


def test_what_tokenizer_config_says_of_bos_counts(tmp_path):
    assert values_of(write_kind(tmp_path / "a", "gpt-2", add_bos_token=True))["tokenizer.ggml.add_bos_token"] is True
    made = tokenizer_key_values(write_kind(tmp_path / "b", "gpt-2", bos=True, add_bos_token=False), ROWS)
    assert made.key_values["tokenizer.ggml.add_bos_token"][0] is False
    assert any("the latter counts" in note for note in made.notes)


def test_fill_in_the_middle(tmp_path):
    parsed = parsed_tokenizer("smollm")
    for text in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"):
        token = {"id": len(parsed["model"]["vocab"]), "content": text, "special": True}
        parsed["model"]["vocab"][text] = token["id"]
        parsed["added_tokens"].append(parsed["added_tokens"][0] | token)
    values = values_of(write_tokenizer_folder(tmp_path, parsed))
    for name, text in (("pre", "<fim_prefix>"), ("suf", "<fim_suffix>"), ("mid", "<fim_middle>")):
        assert values[f"tokenizer.ggml.fim_{name}_token_id"] == parsed["model"]["vocab"][text]
    assert "tokenizer.ggml.fim_sep_token_id" not in values


def test_chat_templates(tmp_path):
    assert values_of(write_kind(tmp_path / "a", "gpt-2"))["tokenizer.chat_template"] == CHAT
    named = [{"name": "default", "template": "A"}, {"name": "tool-use", "template": "B"}]
    values = values_of(write_kind(tmp_path / "b", "gpt-2", chat_template=named))
    assert values["tokenizer.chat_template"] == "A"
    assert (values["tokenizer.chat_templates"], values["tokenizer.chat_template.tool_use"]) == (["tool_use"], "B")
    folder = write_kind(tmp_path / "c", "gpt-2")
    (folder / "chat_template.jinja").write_text("file\r\n", newline="")
    assert values_of(folder)["tokenizer.chat_template"] == "file\r\n"
    assert "tokenizer.chat_template" not in values_of(write_kind(tmp_path / "d", "gpt-2", chat_template=None))


def test_other_spellings_of_a_regex_are_known(tmp_path):
    parsed = parsed_tokenizer("llama-bpe")
    split = parsed["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    split |= {"behavior": "Removed", "invert": True}
    assert values_of(write_tokenizer_folder(tmp_path, parsed))["tokenizer.ggml.pre"] == "llama-bpe"


def test_an_unknown_pre_tokenizer_names_the_nearest(tmp_path):
    parsed = parsed_tokenizer("llama-bpe")
    split = parsed["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}{1,4}")
    folder = write_tokenizer_folder(tmp_path, parsed)
    with pytest.raises(ArchitectureError, match=r"\{1,4\}.*the nearest, llama-bpe, cuts [0-9.]+ %") as caught:
        tokenizer_key_values(folder, ROWS)
    assert "--pre-tokenizer llama-bpe" in caught.value.hint
    made = tokenizer_key_values(folder, ROWS, pre="llama-bpe")
    assert made.key_values["tokenizer.ggml.pre"][0] == "llama-bpe"
    assert any("cuts" in note for note in made.notes)
    with pytest.raises(UsageError, match="'lama-bpe' is not known") as caught:
        tokenizer_key_values(folder, ROWS, pre="lama-bpe")
    assert "llama-bpe" in caught.value.hint


def test_a_step_that_is_no_split_is_refused(tmp_path):
    parsed = parsed_tokenizer("gpt-2")
    steps = [{"type": "UnicodeScripts"}, parsed["pre_tokenizer"]]
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    with pytest.raises(ArchitectureError, match="UnicodeScripts"):
        tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed), ROWS)


def test_gpt2_with_vocab_and_merges_only(tmp_path):
    parsed = parsed_tokenizer("gpt-2")
    whole = write_tokenizer_folder(tmp_path / "whole", parsed | {"added_tokens": []}, tokenizer_class="GPT2Tokenizer")
    folder = write_tokenizer_folder(tmp_path / "parts", parsed, tokenizer_class="GPT2Tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(parsed["model"]["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in parsed["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    values, expected = values_of(folder), values_of(whole)
    for key in ("pre", "tokens", "merges", "bos_token_id", "eos_token_id"):
        assert values[f"tokenizer.ggml.{key}"] == expected[f"tokenizer.ggml.{key}"]
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArchitectureError, match="do not say how text is cut") as caught:
        tokenizer_key_values(folder, ROWS)
    assert "save it again" in caught.value.hint


def test_merges_that_are_not_in_the_order_of_scores_are_noted(tmp_path):
    parsed = parsed_tokenizer("llama2")
    parsed["model"]["merges"] = [pair for pair in parsed["model"]["merges"] if pair[1] != "e"]
    made = tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed), ROWS)
    assert any("joins by score" in note for note in made.notes)


def test_normal_forms_are_noted_and_other_normalizers_refused(tmp_path):
    parsed = parsed_tokenizer("gpt-2")
    forms = {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}
    made = tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed | {"normalizer": forms}), ROWS)
    assert any("normalizes text to NFKC" in note for note in made.notes)
    folder = write_tokenizer_folder(tmp_path, parsed | {"normalizer": {"type": "Lowercase"}})
    with pytest.raises(ArchitectureError, match=r"no normalizer .*Lowercase"):
        tokenizer_key_values(folder, ROWS)


def test_a_space_before_the_text_is_noted(tmp_path):
    parsed = parsed_tokenizer("gpt-2")
    parsed["pre_tokenizer"]["add_prefix_space"] = True
    made = tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed), ROWS)
    assert made.key_values["tokenizer.ggml.pre"][0] == "gpt-2"
    assert any("a space before the text" in note for note in made.notes)


def test_tokens_that_no_merges_lead_to_are_counted(tmp_path):
    parsed = parsed_tokenizer("deepseek-v3")
    parsed["model"]["ignore_merges"] = True
    folder = write_tokenizer_folder(tmp_path, parsed)
    assert any("7 tokens differ" in note for note in tokenizer_key_values(folder, ROWS).notes)  # the added ones
    parsed["model"]["merges"] = parsed["model"]["merges"][:-2]
    assert any("9 tokens differ" in n for n in tokenizer_key_values(write_tokenizer_folder(folder, parsed), ROWS).notes)


JUNK = [None, 5, -1, "x", [], {}, [[]], [5], {"type": 3}, {"type": "Sequence"}, True, 1e300, "a b", ["a", "b"]]


def spoiled(parsed, data):
    """The same JSON with one value anywhere replaced; merges are cut short to let the rest have a turn."""
    parsed["model"]["merges"] = parsed["model"]["merges"][:3]
    node, key = parsed, data.draw(st.sampled_from(sorted(parsed)))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 4)):
        node = node[key]
        keys = sorted(node)[:6] + ["<s>"] * ("<s>" in node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
    node[key] = data.draw(st.sampled_from(JUNK))
    return parsed


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_tokenizer_json_raises_anything_else(tmp_path_factory, data):
    parsed = spoiled(
        parsed_tokenizer(data.draw(st.sampled_from(["gpt-2", "qwen2", "llama2", "metaspace"])), True), data
    )
    options = {"chat_template": data.draw(st.sampled_from(JUNK)), "bos_token": data.draw(st.sampled_from(JUNK)),
               "added_tokens_decoder": data.draw(st.sampled_from([*JUNK, {"x": {}}, {"3": 4}, {"3": {}}]))}  # fmt: skip
    chosen = data.draw(st.sampled_from([None, *options]))
    more = {chosen: options[chosen]} if chosen else {}
    folder = write_tokenizer_folder(tmp_path_factory.mktemp("junk"), parsed, **more)
    try:
        values = tokenizer_key_values(folder, ROWS).key_values
    except LowbitError:
        return
    assert len(values["tokenizer.ggml.tokens"][0]) == len(set(values["tokenizer.ggml.tokens"][0])) == ROWS


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("gpt-2", lambda p: p["model"].update(type="Unigram"), ArchitectureError, "of type Unigram"),
        ("gpt-2", lambda p: p["model"].update(end_of_word_suffix="</w>"), ArchitectureError, "end_of_word_suffix"),
        ("gpt-2", lambda p: p["model"].update(vocab=[]), CheckpointError, "no object"),
        ("gpt-2", lambda p: p["model"]["vocab"].update(zz=ROWS), CheckpointError, "'zz' has id 1024"),
        ("gpt-2", lambda p: p["model"]["vocab"].update(zz=-1), CheckpointError, "'zz' has id -1"),
        ("gpt-2", lambda p: p["model"]["vocab"].update(zz=0), CheckpointError, "both have id 0"),
        ("gpt-2", lambda p: p["model"].pop("merges"), CheckpointError, "no merges"),
        ("gpt-2", lambda p: p["model"]["merges"].append(["a", "💥"]), CheckpointError, "does not have"),
        ("gpt-2", lambda p: p["model"]["merges"].append("a b c"), CheckpointError, "not two tokens"),
        ("gpt-2", lambda p: p["added_tokens"].append({"id": "x"}), CheckpointError, "no token id"),
        ("gpt-2", lambda p: p["added_tokens"].append({"id": 5}), CheckpointError, "5 has no text"),
        ("gpt-2", lambda p: p.pop("model"), CheckpointError, "no model"),
        ("llama2", lambda p: p["model"]["vocab"].pop("<0x07>"), ArchitectureError, "no byte token <0x07>"),
        ("llama2", lambda p: p.update(normalizer={"type": "Lowercase"}), ArchitectureError, "no normalizer.*Lowercase"),
        ("llama2", lambda p: p.update(pre_tokenizer={"type": "Whitespace"}), ArchitectureError, "no pre-tokenizer"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, kind, change, error, message):
    parsed = parsed_tokenizer(kind)
    change(parsed)
    with pytest.raises(error, match=message):
        tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed), ROWS)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        tokenizer_key_values(tmp_path, ROWS)


def test_added_tokens_beyond_the_embedding_are_noted(tmp_path):
    parsed = parsed_tokenizer("gpt-2")
    parsed["added_tokens"].append(parsed["added_tokens"][0] | {"id": ROWS, "content": "<more>"})
    made = tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed), ROWS)
    assert any("'<more>' is 1024" in note for note in made.notes)
    assert "<more>" not in made.key_values["tokenizer.ggml.tokens"][0]


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def sentencepiece_bytes(pieces, model_type=2, prefix=True) -> bytes:
    """tokenizer.model of (text, score, type)."""
    body = b""
    for text, score, kind in pieces:
        fields = message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        body += message(1, fields + (varint(3 << 3) + varint(kind) if kind != 1 else b""))
    trainer = varint(3 << 3) + varint(model_type) + varint(43 << 3) + varint(2**64 - 1) + message(1, b"corpus.txt")
    return body + message(2, trainer) + message(3, varint(3 << 3) + varint(prefix))


def pieces_of(parsed):
    """The pieces of a tokenizer.json; scores as SentencePiece numbers them."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    order = dict.fromkeys("".join(merge) for merge in parsed["model"]["merges"])
    ranks = {text: -float(rank) for rank, text in enumerate(order)}
    added = {token["content"] for token in parsed["added_tokens"]} - kinds.keys()
    return [
        (text, ranks.get(text, -1e6), kinds.get(text, 6 if text.startswith("<0x") else 4 if text in added else 1))
        for text in parsed["model"]["vocab"]
    ]


def test_sentencepiece_model_alone(tmp_path):
    parsed = parsed_tokenizer("llama2")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.model").write_bytes(sentencepiece_bytes(pieces_of(parsed)))
    made = tokenizer_key_values(tmp_path / "hf", ROWS)
    values = made.key_values
    assert values["tokenizer.ggml.bos_token_id"][0] == 1
    assert "tokenizer.ggml.padding_token_id" not in values
    assert values["tokenizer.ggml.add_bos_token"][0] is True
    write_tokenizer(tmp_path, as_metadata(values), "x.gguf")
    rebuilt, original = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), Tokenizer.from_str(json.dumps(parsed))
    for text in TEXTS:
        assert ids_of(rebuilt, text) == [1, *ids_of(original, text)]


def test_scores_come_from_the_sentencepiece_model_beside_it(tmp_path):
    parsed = parsed_tokenizer("llama2")
    folder = write_tokenizer_folder(tmp_path, parsed)
    pieces = [(text, score * 2, kind) for text, score, kind in pieces_of(parsed)]
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(pieces))
    assert values_of(folder)["tokenizer.ggml.scores"][: len(pieces)] == [score for _, score, _ in pieces]
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes([*pieces[:-1], ("other", 0.0, 1)]))
    assert any("other tokens" in note for note in tokenizer_key_values(folder, ROWS).notes)


def test_unigram_models_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes([("a", 0.0, 1)], model_type=1))
    with pytest.raises(ArchitectureError, match="unigram"):
        tokenizer_key_values(tmp_path, ROWS)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "no pieces"),
        (b"\x0a\xff\xff\xff\xff\x7f", "where 0 are left"),
        (b"\x0a" + b"\xff" * 11, "more than 64 bits"),
        (b"\x0b", "wire type 3"),
        (message(1, message(1, b"\xff\xfe")), "utf-8"),
        (message(1, varint(3 << 3) + varint(9)), "type 9"),
        (message(1, varint(2 << 3 | 5) + struct.pack("<f", float("nan"))), "score nan"),
        (message(1, varint(2 << 3 | 1) + b"12345678"), "unpack"),
        (varint(1 << 3) + varint(7), "a number where"),
        (b"\x0a", "ends within"),
    ],
)
def test_damaged_sentencepiece_models_are_named(tmp_path, data, found):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"not a SentencePiece model.*{found}"):
        read_sentencepiece(tmp_path / "tokenizer.model")


@settings(deadline=None)
@given(st.data())
def test_no_sentencepiece_bytes_raise_anything_else(tmp_path_factory, data):
    whole = sentencepiece_bytes([("<unk>", 0.0, 2), ("▁a", -1.0, 1), ("b", -2.0, 1)])
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(changed)
    try:
        model = read_sentencepiece(path)
    except CheckpointError:
        return
    assert len(model.pieces) == len(model.scores) == len(model.types)


def test_gemma4_keeps_its_merges_and_shows_what_the_chat_parser_reads(tmp_path):
    parsed = parsed_tokenizer("gemma4", bos=True)
    token = {"id": len(parsed["model"]["vocab"]), "content": "<|channel>", "special": True}
    parsed["model"]["vocab"]["<|channel>"] = token["id"]
    parsed["added_tokens"].append(parsed["added_tokens"][0] | token)
    made = tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed), ROWS, spaced="gemma4")
    values = {key: value for key, (value, *_) in made.key_values.items()}
    assert values["tokenizer.ggml.model"] == values["tokenizer.ggml.pre"] == "gemma4"
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in parsed["model"]["merges"]]
    assert "tokenizer.ggml.scores" not in values
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.token_type"][token["id"]] == TokenType.USER_DEFINED
    assert made.notes == ()


def test_gemma4_without_bos_or_with_merges_over_newlines_is_noted(tmp_path):
    parsed = parsed_tokenizer("gemma4")
    for text in ("\n", "\ne"):
        parsed["model"]["vocab"].setdefault(text, len(parsed["model"]["vocab"]))
    parsed["model"]["merges"].insert(0, ("\n", "e"))
    made = tokenizer_key_values(write_tokenizer_folder(tmp_path, parsed), ROWS, spaced="gemma4")
    assert any("begins every text of this vocabulary with BOS" in note for note in made.notes)
    assert any("joins no newline" in note for note in made.notes)


# --- tiktoken.model -------------------------------------------------------------------------------------------------

RANKED = [*(bytes([byte]) for byte in range(256)), b"in", b"th", b"the", b" the", b"ing", "你".encode()[:2],
          "你".encode()]  # fmt: skip


def write_tiktoken(folder, tokens=RANKED, code="tokenization_kimi.TikTokenTokenizer"):
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    end = len(tokens)
    settings = {"auto_map": {"AutoTokenizer": [code, None]}, "bos_token": "[BOS]",
                "added_tokens_decoder": {str(end): {"content": "[BOS]", "special": True}}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ranked_parts(word):
    """tiktoken's algorithm: of all neighbours the pair of the lowest rank is joined."""
    parts = [bytes([byte]) for byte in word]
    while True:
        ranks = {RANKED.index(a + b): at for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in RANKED}
        if not ranks:
            return [RANKED.index(part) for part in parts]
        at = ranks[min(ranks)]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_a_vocabulary_by_ranks_gets_the_merges_that_make_its_tokens(tmp_path):
    files = TokenizerFiles(write_tiktoken(tmp_path))
    assert files.tokenizer["model"]["merges"] == [
        ["i", "n"], ["t", "h"], ["th", "e"], ["Ġ", "the"], ["in", "g"], ["ä", "½"], ["ä½", "ł"],
    ]  # fmt: skip
    for word in (" thething", "the", "inthe", "你好", " ing"):
        assert files.loaded.encode(word).ids == [
            token for piece in re.findall("[你好]+|[^你好]+", word) for token in ranked_parts(piece.encode())
        ]


def test_the_tokenizer_of_kimi_k2_is_written(tmp_path):
    values = tokenizer_key_values(write_tiktoken(tmp_path), 300).key_values
    assert values["tokenizer.ggml.pre"][0] == "kimi-k2"
    tokens = values["tokenizer.ggml.tokens"][0]
    assert tokens[len(RANKED)] == "[BOS]"
    assert tokens[-1] == "[PAD299]"
    assert values["tokenizer.ggml.bos_token_id"][0] == len(RANKED)


def test_another_tiktoken_model_is_refused(tmp_path):
    with pytest.raises(ArchitectureError, match="does not say how text is cut"):
        tokenizer_key_values(write_tiktoken(tmp_path, code="tokenization_qwen.QWenTokenizer"), 300)


@pytest.mark.parametrize(("tokens", "found"), [
    (RANKED[1:], "no token for byte 0"), ([*RANKED, b"a"], "is no token and its rank"), ([b""], "is no token"),
])  # fmt: skip
def test_a_damaged_tiktoken_model_is_named(tmp_path, tokens, found):
    with pytest.raises(CheckpointError, match=found):
        tokenizer_key_values(write_tiktoken(tmp_path, tokens), 300)


def test_half_of_a_surrogate_pair_in_a_chat_template_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a\\ud800b"}')
    with pytest.raises(CheckpointError, match="half of a surrogate pair stands in the chat template 'default'"):
        TokenizerFiles(tmp_path).chat_templates()
