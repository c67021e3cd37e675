import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from evaluation.tiny_models import byte_tokenizer
from lowbit.errors import CheckpointError, DependencyError, UsageError
from lowbit.text import Text, cut_windows, read_text, wants_bos
from lowbit.text.hub import hub_or_cache

ALPHABET = Text("alphabet", "abcdefghijklmnopqrstuvwxyz")


def ids_of(content: str) -> list[int]:
    return byte_tokenizer()(content).input_ids


def test_full_windows_are_consecutive_and_score_all_but_the_first_token():
    cut = cut_windows(ALPHABET, byte_tokenizer(), windows=3, window_tokens=8)
    assert cut.ids.tolist() == [ids_of("abcdefgh"), ids_of("ijklmnop"), ids_of("qrstuvwx")]
    assert (cut.first_scored, cut.scored_tokens, cut.text_tokens, cut.bos) == (1, 21, 26, False)


def test_full_windows_with_bos_hold_one_text_token_less():
    cut = cut_windows(ALPHABET, byte_tokenizer(), windows=2, window_tokens=8, bos=True)
    assert cut.ids.tolist() == [[256, *ids_of("abcdefg")], [256, *ids_of("hijklmn")]]


def test_second_half_scores_what_llama_cpp_scores():
    cut = cut_windows(ALPHABET, byte_tokenizer(), windows=2, window_tokens=8, protocol="second-half")
    assert cut.ids.tolist() == [ids_of("abcdefgh"), ids_of("ijklmnop")]
    assert cut.first_scored == 5  # n_ctx − 1 − n_ctx/2 = 3 tokens a window
    assert cut.scored_tokens == 6


def test_second_half_with_bos_overwrites_the_first_token_of_each_window():
    cut = cut_windows(ALPHABET, byte_tokenizer(), windows=2, window_tokens=8, protocol="second-half", bos=True)
    assert cut.ids.tolist() == [[256, *ids_of("abcdefg")], [256, *ids_of("ijklmno")]]


def test_bos_is_automatic_where_the_tokenizer_adds_it():
    assert wants_bos(byte_tokenizer(add_bos=True), "auto")
    assert not wants_bos(byte_tokenizer(add_bos=False), "auto")
    assert not wants_bos(byte_tokenizer(add_bos=True), False)


def test_the_text_itself_gets_no_special_tokens():
    cut = cut_windows(ALPHABET, byte_tokenizer(add_bos=True), windows=1, window_tokens=8, bos=False)
    assert cut.ids.tolist() == [ids_of("abcdefgh")]


def test_bos_without_such_a_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="no BOS"):
        wants_bos(tokenizer, True)


def test_a_short_text_gives_fewer_windows():
    assert len(cut_windows(ALPHABET, byte_tokenizer(), windows=40, window_tokens=8).ids) == 3


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(CheckpointError, match=r"'alphabet' has 26 tokens; one window needs 27"):
        cut_windows(ALPHABET, byte_tokenizer(), windows=1, window_tokens=27)


@pytest.mark.parametrize(("windows", "window_tokens"), [(0, 8), (1, 3)])
def test_windows_that_score_nothing_are_refused(windows, window_tokens):
    with pytest.raises(UsageError):
        cut_windows(ALPHABET, byte_tokenizer(), windows, window_tokens)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UsageError, match="protocol"):
        cut_windows(ALPHABET, byte_tokenizer(), 1, 8, protocol="sliding")


def test_a_file_is_read_and_hashed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hé", encoding="utf-8")
    text = read_text(path)
    assert (text.content, text.name) == ("hé", str(path))
    assert text.sha256 == "7dfbe0eab96510b11c9a2671d83019cd52953211294db5f917ffa0b7cc84f534"


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_text(tmp_path / "absent.txt")
    path = tmp_path / "b.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(path)


def test_rows_are_no_running_text(tmp_path):
    """Of a .jsonl the figures were of its braces and keys."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one two"}\n')
    with pytest.raises(UsageError, match=r"rows.jsonl holds rows, and figures are of one running text"):
        read_text(path)
    assert read_text(path, "calibration").content.startswith("{")


def test_a_hub_dataset_is_read_through_datasets(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return {"text": ["one", "", "two"]}

    stub = ModuleType("datasets")
    stub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert read_text("wikitext").content == "one\n\n\n\ntwo"
    assert read_text("hub:someone/texts").name == "hub:someone/texts"
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), ("someone/texts", None, "test")]


def test_a_dataset_that_does_not_exist_is_named(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise FileNotFoundError("Couldn't find it")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UsageError, match="hub:no/such"):
        read_text("hub:no/such:c:train")
    with pytest.raises(UsageError, match="form"):
        read_text("hub:a:b:c:d")


@pytest.mark.parametrize("reached", [True, False])
def test_without_a_network_the_cache_of_datasets_is_read_and_nothing_is_tried_again(monkeypatch, reached):
    import huggingface_hub

    def head(_url, timeout):
        assert timeout <= 10
        if not reached:
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(config=config))
    with hub_or_cache():
        assert huggingface_hub.constants.HF_HUB_OFFLINE is config.HF_HUB_OFFLINE is not reached
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not config.HF_HUB_OFFLINE


def test_hub_datasets_need_the_eval_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError) as caught:
        read_text("wikitext")
    assert "lowbit[eval]" in caught.value.hint


def test_windows_are_int64():
    assert cut_windows(ALPHABET, byte_tokenizer(), 1, 8).ids.dtype == torch.int64
