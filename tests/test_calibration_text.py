"""Calibration windows of every source: what is read, how it is packed, what is said, what is refused."""

import hashlib
import itertools
import json
import random
import re
import sys
from types import ModuleType

import pytest
import torch

from evaluation.tiny_models import byte_tokenizer
from lowbit.errors import CheckpointError, DependencyError, UsageError
from lowbit.text import calibration_windows, context_length, cut_windows, read_text
from lowbit.text.given import GivenText
from lowbit.text.packing import Renderer
from lowbit.text.rows import LAYOUTS, document_of, shuffled

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
BOS, EOS = 256, 257


def packed_text(source, tokenizer=None, windows=1, window_tokens=64, **options):
    """The windows of a byte-level tokenizer as text, special tokens left out."""
    tokenizer = tokenizer or byte_tokenizer(chat_template=CHAT)
    found = calibration_windows(source, tokenizer, windows, window_tokens, **options)
    return "".join(bytes(id for id in window if id < BOS).decode() for window in decoded(found.ids, tokenizer)), found


def decoded(ids, tokenizer):
    """Ids of the byte tokenizer are places in its sorted alphabet; back to bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = [[tokenizer.convert_ids_to_tokens(int(i)) for i in window] for window in ids]
    return [[byte_of.get(token, 300) for token in window] for window in tokens]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`: rows by (repository, config, split), and what was asked of it."""

    class Hub:
        def __init__(self):
            self.rows = {}
            self.calls = []
            self.read = 0

        def load_dataset(self, repository, config, split, streaming=False):
            self.calls.append((repository, config, split, streaming))
            if (repository, config, split) not in self.rows:
                raise ValueError(f"Unknown split {split!r}")
            return self.stream(self.rows[repository, config, split])

        def stream(self, rows):
            for row in rows:
                self.read += 1
                yield row

    hub = Hub()
    stub = ModuleType("datasets")
    stub.load_dataset = hub.load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return hub


# Running text


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_packaged_text_is_cut_as_cut_windows_cuts_it(add_bos):
    tokenizer = byte_tokenizer(add_bos=add_bos)
    found = calibration_windows(None, tokenizer, 6, 40)
    text = read_text(None, "calibration")
    assert torch.equal(found.ids, cut_windows(text, tokenizer, 6, 40).ids)
    assert (found.name, found.sha256, found.asked, found.notes) == ("packaged calibration text", text.sha256, 6, ())
    assert found.ids.dtype == torch.int64


def test_a_plain_file_is_cut_the_same_way_and_fewer_windows_are_said(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 5, encoding="utf-8")
    text, found = packed_text(path, windows=8, window_tokens=16)
    assert text == ("0123456789" * 5)[:48]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (note,) = found.notes
    assert note == f"the text '{path}' has 50 tokens: 3 windows of 16, not the 8 asked for"


def test_a_huge_file_is_read_only_as_far_as_the_windows_need(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.text.calibration.WHOLE_CHARACTERS", 100)
    path = tmp_path / "big.txt"
    path.write_text("abcdefgh" * 10_000, encoding="utf-8")
    text, found = packed_text(path, windows=2, window_tokens=8)
    assert text == "abcdefgh" * 2
    assert found.text_tokens == 2 * 8 * 32
    assert "first 512 characters of" in found.notes[0]
    assert found.sha256 == hashlib.sha256(b"abcdefgh" * 64).hexdigest()


# Rows of files


ROWS = {
    "text": ({"text": "plain words"}, "plain words\n\n"),
    "messages": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "text": "no"},
        "[user]hi[assistant]yes",
    ),
    "conversations": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        "[user]hi[assistant]yes",
    ),
    "instruction": ({"instruction": "Add", "input": "1+1", "output": "2"}, "[user]Add\n\n1+1[assistant]2"),
    "instruction without input": ({"instruction": "Add", "output": "2"}, "[user]Add[assistant]2"),
    "prompt": ({"prompt": "Add 1+1", "completion": "2"}, "[user]Add 1+1[assistant]2"),
    "prompt of turns": (
        {"prompt": [{"role": "user", "content": "Add"}], "completion": [{"role": "assistant", "content": "2"}]},
        "[user]Add[assistant]2",
    ),
    "a string": ("plain words", "plain words\n\n"),
}


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_every_layout_of_rows_is_understood(tmp_path, layout, suffix):
    row, expected = ROWS[layout]
    path = jsonl(tmp_path / f"rows{suffix}", [row] * 3)
    text, found = packed_text(path, window_tokens=len(expected))
    assert text == expected
    assert ("chat template applied to 1 conversation" in found.notes) == expected.startswith("[")


def test_a_json_list_is_rows_too(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "plain words"}]))
    assert packed_text(path, window_tokens=8)[0] == "plain wo"


def test_layouts_are_all_tried():
    assert {layout[0] for layout in LAYOUTS} <= set(ROWS)


def test_columns_that_are_not_understood_are_named(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "label": 1}])
    with pytest.raises(UsageError, match=r"columns prompt, label; understood are messages.*instruction \+ output"):
        calibration_windows(path, byte_tokenizer(), 1, 8)


def test_a_row_that_is_no_object_is_refused():
    with pytest.raises(CheckpointError, match="a row is int"):
        document_of(7, "numbers.jsonl")


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("plain\nwords\n")
    with pytest.raises(CheckpointError, match=r"rows.jsonl: line \d is not JSON"):
        calibration_windows(path, byte_tokenizer(), 4, 8)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ('{"prompt": "a", "label": 1}', "has the columns prompt, label"), ("7", "a row is int"),
        ('{"text": "cut off', "is not JSON"), ("[]", "a row is list"), ("null", "a row is NoneType"),
        ("{}", r"has the columns \(none\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_row_that_cannot_be_used_is_counted_and_told(tmp_path, odd, why, position):
    lines = [json.dumps({"text": f"row {number} of plain words "}) for number in range(6)]
    lines.insert(position, odd)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    text, found = packed_text(path, windows=99, window_tokens=4)
    assert text.count("of plain words") >= 5
    (note,) = [note for note in found.notes if "cannot be used" in note]
    assert note.startswith("1 of 7 rows passed over, which cannot be used: ")
    assert re.search(why, note)


def test_rows_of_another_kind_without_end_are_refused_early():
    with pytest.raises(UsageError, match="has the columns label"):
        GivenText(itertools.repeat({"label": 1})).windows(byte_tokenizer(), 1, 8)


def test_rows_without_text_and_odd_ones_are_both_told_where_nothing_is_left(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": ""}, {"label": 1}])
    with pytest.raises(CheckpointError, match=r"2 rows, none with text; 1 of 2 rows passed over.*columns label"):
        calibration_windows(path, byte_tokenizer(), 1, 8)


@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        {"text": "  \n"},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"instruction": "", "output": "x"},
        {"instruction": "x", "output": None},
        {"instruction": "x", "output": ["y"]},
    ],
    ids=str,
)
def test_rows_without_text_are_counted_and_passed_over(tmp_path, row):
    path = jsonl(tmp_path / "rows.jsonl", [row, {"text": "0123456789"}, row])
    text, found = packed_text(path, windows=2, window_tokens=8)
    assert text == "01234567"
    assert any(note.startswith("2 of 3 rows passed over") for note in found.notes)


def test_an_empty_turn_is_left_out_of_its_conversation():
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    assert document_of({"messages": turns}, "x") == turns[1:]


def test_halves_of_surrogate_pairs_do_not_stop_a_run(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ab\\ud800cdef"}\n')
    assert packed_text(path, window_tokens=8)[0] == "ab?cdef\n"


def test_parquet_is_read_with_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DependencyError, match="pyarrow"):
        calibration_windows(path, byte_tokenizer(), 1, 8)

    class Batch:
        def to_pylist(self):
            return [{"text": "0123456789"}]

    class ParquetFile:
        def __init__(self, opened):
            assert opened == path

        def iter_batches(self, batch_size):
            return [Batch()]

    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    parquet.ParquetFile, package.parquet = ParquetFile, parquet
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert packed_text(path, window_tokens=8)[0] == "01234567"


# Packing


def test_documents_are_separated_by_bos_and_eos_where_the_tokenizer_adds_bos(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "abc"}] * 4)
    found = calibration_windows(path, byte_tokenizer(add_bos=True), 2, 8)
    a, b, c = byte_tokenizer()("abc").input_ids
    # The stream is B abc E B abc E B abc E …; the second window would open with BOS twice.
    assert found.ids.tolist() == [[BOS, a, b, c, EOS, BOS, a, b], [BOS, c, EOS, BOS, a, b, c, EOS]]


def test_a_bos_that_would_come_second_in_a_window_is_dropped(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "abc"}] * 3)
    found = calibration_windows(path, byte_tokenizer(add_bos=True), 3, 5)
    one = [BOS, *byte_tokenizer()("abc").input_ids, EOS]
    assert found.ids.tolist() == [one, one, one]


def test_a_bos_that_the_template_writes_is_not_doubled(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [ROWS["instruction"][0]] * 3)
    tokenizer = byte_tokenizer(add_bos=True, chat_template="<bos>" + CHAT)
    plain = byte_tokenizer(add_bos=True, chat_template=CHAT)
    assert torch.equal(calibration_windows(path, tokenizer, 1, 64).ids, calibration_windows(path, plain, 1, 64).ids)


def test_the_hash_is_of_the_documents_with_a_blank_line_between(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "same"}] * 2)
    found = calibration_windows(path, byte_tokenizer(), 1, 12)
    assert found.sha256 == hashlib.sha256(b"same\n\nsame").hexdigest()


def test_without_a_chat_template_turns_are_joined_and_that_is_said(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [ROWS["messages"][0]])
    text, found = packed_text(path, byte_tokenizer(), window_tokens=9)
    assert text == "hi\n\nyes\n\n"
    assert any("no chat template" in note for note in found.notes)


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [ROWS["messages"][0]])
    template = "\n{% set today = strftime_now('%d %b %Y') %}{{ today }}: " + CHAT
    assert packed_text(path, byte_tokenizer(chat_template=template), window_tokens=14)[0] == "\n01 Jan 2025: "


def test_conversations_that_the_template_refuses_are_counted(tmp_path):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHAT
    refused = {"messages": [{"role": "assistant", "content": "hello"}]}
    path = jsonl(tmp_path / "rows.jsonl", [refused, ROWS["messages"][0], refused])
    _, found = packed_text(path, byte_tokenizer(chat_template=strict), windows=9, window_tokens=8)
    assert any(note.startswith("2 conversations passed over") and "user first" in note for note in found.notes)
    only = jsonl(tmp_path / "only.jsonl", [refused])
    with pytest.raises(CheckpointError, match="user first"):
        calibration_windows(only, byte_tokenizer(chat_template=strict), 1, 8)


# Order


def test_the_order_depends_on_the_seed_alone(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": f"document {i}"} for i in range(50)])
    one, again, other = (packed_text(path, windows=8, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(one.ids, again.ids)
    assert one.sha256 == again.sha256
    assert not torch.equal(one.ids, other.ids)
    assert any("seed 1" in note for note in one.notes)


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_shuffling_gives_every_row_once_and_looks_ahead_no_further_than_its_buffer(buffer):
    taken = []

    def rows():
        for row in range(100):
            taken.append(row)
            yield row

    order = []
    for row in shuffled(rows(), 0, buffer):
        assert len(taken) <= len(order) + buffer + 1
        order.append(row)
    assert sorted(order) == list(range(100))
    assert order != list(range(100))


# Folders


def test_a_folder_is_read_in_the_order_of_names_and_says_what_it_skipped(tmp_path):
    (tmp_path / "b.txt").write_text("second ")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first ")
    jsonl(tmp_path / "c.jsonl", [{"text": "third"}])
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
    (tmp_path / "zeros.bin").write_bytes(bytes(20))
    (tmp_path / "config.json").write_text('{"size": 3}')
    (tmp_path / ".hidden.txt").write_text("hidden")
    text, found = packed_text(tmp_path, windows=9, window_tokens=4)
    assert text == "first \n\nsecond \n\nthird\n\n"[:24]
    (skipped,) = [note for note in found.notes if note.startswith("passed over")]
    assert all(name in skipped for name in ("image.png", "zeros.bin", "config.json"))
    assert "hidden" not in skipped


def test_no_more_files_are_read_than_needed(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    _, found = packed_text(tmp_path, window_tokens=8)
    assert found.notes == ("the first 1 of 2 files were enough",)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(CheckpointError, match=r"no text in it; passed over: image.png"):
        calibration_windows(tmp_path, byte_tokenizer(), 1, 8)


# The hub


def test_datasets_are_known_by_short_names(hub):
    row = ROWS["instruction"][0]
    chat = ROWS["messages"][0]
    hub.rows = {
        ("garage-bAInd/Open-Platypus", None, "train"): [row] * 3,
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft"): [chat] * 3,
        ("allenai/c4", "en", "train"): [{"text": "web words"}] * 3,
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"): [{"text": t} for t in (" = A = \n", "", " one \n")],
    }
    expected = {"open_platypus": "[user]Ad", "Open-Platypus": "[user]Ad", "ultrachat": "[user]hi", "c4": "web word",
                "wikitext": " = A = \n"}  # fmt: skip
    for name, text in expected.items():
        found, said = packed_text(name, window_tokens=8)
        assert (found, said.name) == (text, name)
    assert all(streaming for *_, streaming in hub.calls)


def test_only_as_many_rows_are_read_as_are_needed(hub):
    hub.rows["allenai/c4", "en", "train"] = ({"text": f"{i:08}"} for i in range(10**9))
    _, found = packed_text("c4", windows=10, window_tokens=20)
    assert len(found.ids) == 10
    assert hub.read <= 1000 + 21


def test_wikitext_is_articles_of_the_training_split(hub):
    lines = [" = One = \n", "", " == Part == \n", " alpha \n", " = Two = \n", " beta \n"]
    hub.rows["Salesforce/wikitext", "wikitext-2-raw-v1", "train"] = [{"text": line} for line in lines]
    text, found = packed_text("wikitext", windows=30, window_tokens=4)
    one, two = " = One = \n\n\n\n\n == Part == \n\n\n alpha ", " = Two = \n\n\n beta "
    assert text in (f"{one}\n\n{two}\n\n"[: len(text)], f"{two}\n\n{one}\n\n"[: len(text)])
    assert len(text) > len(one + two) - 4
    assert any("articles of wikitext" in note for note in found.notes)
    assert not any("split" in note for note in found.notes)


def test_calibrating_on_a_test_split_is_said(hub):
    key = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    hub.rows[key] = [{"text": " = A = \n"}, {"text": "alpha beta"}]
    _, found = packed_text("hub:" + ":".join(key), window_tokens=8)
    assert any("split test" in note and "look better" in note for note in found.notes)


def test_other_datasets_are_read_by_their_address(hub):
    hub.rows["someone/rows", "small", "validation"] = [{"text": "0123456789"}]
    assert packed_text("hub:someone/rows:small:validation", window_tokens=8)[0] == "01234567"
    with pytest.raises(UsageError, match=r"someone/rows, config default, split train\).*Unknown split"):
        calibration_windows("hub:someone/rows", byte_tokenizer(), 1, 8)
    with pytest.raises(UsageError, match="form"):
        calibration_windows("hub:a:b:c:d", byte_tokenizer(), 1, 8)


def test_an_empty_dataset_and_one_without_text_are_refused(hub):
    hub.rows["a/b", None, "train"] = []
    with pytest.raises(CheckpointError, match="hub:a/b: no text in it"):
        calibration_windows("hub:a/b", byte_tokenizer(), 1, 8)
    hub.rows["a/b", None, "train"] = ({"text": ""} for _ in range(10**9))
    with pytest.raises(CheckpointError, match=r"hub:a/b: 10 000 rows, none with text"):
        calibration_windows("hub:a/b", byte_tokenizer(), 1, 8)


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError) as caught:
        calibration_windows("c4", byte_tokenizer(), 1, 8)
    assert "lowbit[eval]" in caught.value.hint


def test_wikitext_as_one_text_is_the_training_split_for_calibration(monkeypatch):
    asked = []
    stub = ModuleType("datasets")
    stub.load_dataset = lambda *names, split: asked.append(split) or {"text": ["a"]}
    monkeypatch.setitem(sys.modules, "datasets", stub)
    read_text("wikitext", packaged="calibration")
    read_text("wikitext")
    assert asked == ["train", "test"]


# Refusals


def test_windows_longer_than_the_context_are_refused():
    with pytest.raises(UsageError, match=r"300 tokens .*context of 256") as caught:
        calibration_windows(None, byte_tokenizer(), 1, 300, longest=256)
    assert "--seqlen 256" in caught.value.hint
    assert len(calibration_windows(None, byte_tokenizer(), 1, 256, longest=256).ids) == 1


def test_the_context_is_found_in_every_config():
    assert context_length({"max_position_embeddings": 256}) == 256
    assert context_length({"n_positions": 1024}) == 1024
    assert context_length({"text_config": {"max_position_embeddings": 512}}) == 512
    assert context_length({"max_position_embeddings": "long", "text_config": None}) is None


@pytest.mark.parametrize(("windows", "window_tokens"), [(0, 8), (1, 3)])
def test_windows_that_say_nothing_are_refused(windows, window_tokens):
    with pytest.raises(UsageError):
        calibration_windows(None, byte_tokenizer(), windows, window_tokens)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.json"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("\n")
    with pytest.raises(CheckpointError, match=name):
        calibration_windows(tmp_path / name, byte_tokenizer(), 1, 8)


@pytest.mark.parametrize("name", ["short.txt", "short.jsonl"])
def test_less_text_than_one_window_is_refused(tmp_path, name):
    (tmp_path / name).write_text('"0123456789"\n')
    with pytest.raises(CheckpointError, match=r"short.* tokens; one window needs 64"):
        calibration_windows(tmp_path / name, byte_tokenizer(), 1, 64)


def test_a_source_that_is_not_there_is_named():
    with pytest.raises(UsageError, match=r"'absent.txt'.*no such file") as caught:
        calibration_windows("absent.txt", byte_tokenizer(), 1, 8)
    assert "open_platypus" in caught.value.hint


def test_null_content_beside_tool_calls_and_parts_are_rendered():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image", "image": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "why"},
    ]}  # fmt: skip
    document = document_of(row, "x")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}{{ m.reasoning_content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a + 1 }}{% endfor %}]{% endfor %}"
    )
    render = Renderer(tokenizer, 1000)
    assert render(document)[0] == "[hi][why2]"
    assert "1 part of turns dropped: it is no text" in render.notes()
    assert "1 turn without text, which calls tools" in render.notes()


def test_a_template_that_wants_parts_gets_them():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
    document = document_of({"messages": [{"role": "user", "content": "hi"}]}, "x")
    assert Renderer(tokenizer, 1000)(document)[0] == "hi;"


@pytest.mark.parametrize(
    "turns", [[{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image"}]}]]
)
def test_conversations_without_any_text_are_empty(turns):
    assert document_of({"messages": turns}, "x") == []


def test_one_token_again_and_again_is_refused(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(2000))
    with pytest.raises(CheckpointError, match="one token again and again"):
        calibration_windows(tmp_path / "text.txt", byte_tokenizer(), 4, 64)


def test_a_text_without_words_gets_a_note(tmp_path):
    (tmp_path / "text.txt").write_text("!?.,;:-+*/" * 200)
    assert any(
        "hardly a word" in note for note in calibration_windows(tmp_path / "text.txt", byte_tokenizer(), 4, 64).notes
    )


def notes_of(tmp_path, text: str, windows: int = 60, tokens: int = 64) -> str:
    (tmp_path / "text.txt").write_text(text)
    return "; ".join(calibration_windows(tmp_path / "text.txt", byte_tokenizer(), windows, tokens).notes)


@pytest.mark.parametrize("text", ["the " * 2000, "aaaaaaaaab" * 800, "the quick brown fox jumps over the dog. " * 200])
def test_a_text_that_says_the_same_again_and_again_gets_a_note(tmp_path, text):
    assert "says the same again and again" in notes_of(tmp_path, text)


@pytest.mark.parametrize(("windows", "tokens"), [(1, 32), (1, 64), (2, 64), (4, 32)])
def test_few_tokens_are_judged_by_their_entropy(tmp_path, windows, tokens):
    assert "2 different tokens, an entropy of 0.7 bits a token" in notes_of(tmp_path, "aaaa " * 40, windows, tokens)
    assert "again and again" not in notes_of(tmp_path, read_text(None).content[:5000], windows, tokens)


def test_ordinary_prose_gets_no_note(tmp_path):
    assert notes_of(tmp_path, read_text(None).content[:5000]) == ""


def test_a_text_without_the_tokens_of_the_evaluation_text_gets_a_note(tmp_path):
    """By a tokenizer that knows both; a script of its own, or digits alone."""
    draw = random.Random(0)
    words = ["".join(draw.choices("абвгдежзиклмнопрст", k=draw.randint(2, 9))) for _ in range(1000)]
    assert "100% of the tokens of the packaged evaluation text do not occur in" in notes_of(tmp_path, "\n".join(words))
    assert "do not occur" not in notes_of(tmp_path, " ".join(read_text(None).content[4000:6000].split()))
