"""Calibration on several texts in shares: how --calib is read, how windows are shared out, what is refused."""

import pytest
import torch

from evaluation.tiny_models import byte_tokenizer
from lowbit.errors import CheckpointError, UsageError
from lowbit.text import (
    calibration_windows,
    cut_windows,
    mixed_windows,
    parse_mixture,
    read_text,
    stream_text,
    stream_windows,
)
from lowbit.text.mixture import SHARES, apportioned, filled, packaged_domains, packaged_windows


@pytest.fixture
def texts(tmp_path):
    """Two texts of one letter pair each, long enough for twenty windows of 16 bytes."""
    paths = tmp_path / "web.txt", tmp_path / "code.txt"
    for path, pattern in zip(paths, ("ab cd ", "xy zw "), strict=True):
        path.write_text(pattern * 60, encoding="utf-8")
    return paths


@pytest.mark.parametrize(
    ("calib", "expected"),
    [
        (None, [(None, 1)]),
        ("packaged", [(None, 1)]),
        ("c4", [("c4", 1)]),
        ("self", [("self", 1)]),
        ("web.txt", [("web.txt", 1)]),
        ("hub:a/b:en:train", [("hub:a/b:en:train", 1)]),
        ("hub:a/b:2024", [("hub:a/b:2024", 1)]),  # one dataset: its configuration
        ("c4:3,packaged:1", [("c4", 3), (None, 1)]),
        ("c4, web.txt:0.5", [("c4", 1), ("web.txt", 0.5)]),
        ("hub:a/b:en:train:2,c4", [("hub:a/b:en:train", 2), ("c4", 1)]),
    ],
)
def test_a_list_of_texts_is_read_with_its_shares(calib, expected):
    assert [(part.source, part.share) for part in parse_mixture(calib)] == expected


def test_a_file_whose_name_looks_like_a_mixture_is_one_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:3,b:1").write_text("text")
    assert [part.source for part in parse_mixture("a:3,b:1")] == ["a:3,b:1"]
    (tmp_path / "packaged").write_text("text")
    assert parse_mixture("packaged")[0].source == "packaged"


@pytest.mark.parametrize(
    ("calib", "said"),
    [
        ("a.txt:0,b.txt:1", "a share is above 0"),
        ("a.txt:-1,b.txt:1", "a share is above 0"),
        ("a.txt:2,a.txt:1", "names a.txt twice"),
        ("packaged,packaged:2", "names packaged twice"),
        ("self,c4", "cannot be mixed"),
        (" , ", "names no text"),
    ],
)
def test_a_bad_list_is_refused(calib, said):
    with pytest.raises(UsageError, match=said):
        parse_mixture(calib)


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [(8, [3, 1], [6, 2]), (7, [1, 1, 1], [3, 2, 2]), (128, [0.5, 0.25, 0.25], [64, 32, 32]), (1, [1, 9], [0, 1])],
)
def test_windows_are_shared_out_by_largest_remainders(total, shares, expected):
    assert apportioned(total, shares) == expected


def test_windows_alternate_in_the_shares_that_were_asked_for(texts):
    web, code = texts
    tokenizer = byte_tokenizer()
    found = mixed_windows(f"{web}:3,{code}:1", tokenizer, 8, 16)
    alone = [calibration_windows(path, tokenizer, 6, 16).ids for path in texts]
    of_code = [torch.isin(window, alone[1]).all().item() for window in found.ids]
    assert of_code == [False, False, True, False, False, False, True, False]
    assert torch.equal(found.ids[~torch.tensor(of_code)], alone[0])
    assert torch.equal(found.ids[torch.tensor(of_code)], alone[1][:2])
    assert found.notes[0] == f"windows of each text: 6 of {web}, 2 of {code}"
    assert found.asked == 8
    assert found.name == f"{web}:3,{code}:1"


def test_the_digest_changes_with_either_text(texts):
    web, code = texts
    calib = f"{web},{code}"
    before = mixed_windows(calib, byte_tokenizer(), 4, 16).sha256
    code.write_text("xy zw " * 59, encoding="utf-8")
    assert mixed_windows(calib, byte_tokenizer(), 4, 16).sha256 != before


def test_a_text_that_is_too_short_for_its_share_is_named(texts):
    web, code = texts
    code.write_text("xy zw " * 6, encoding="utf-8")
    found = mixed_windows(f"{web},{code}", byte_tokenizer(), 8, 16)
    assert len(found.ids) == 6
    assert found.notes[0] == f"windows of each text: 4 of {web}, 2 of {code}"
    assert f"the text '{code}' has 36 tokens: 2 windows of 16, not the 4 asked for" in found.notes


def test_a_share_too_small_for_one_window_is_refused(texts):
    with pytest.raises(UsageError, match=r"2 windows leave none for .*code\.txt"):
        mixed_windows(f"{texts[0]}:9,{texts[1]}:1", byte_tokenizer(), 2, 16)


def test_a_text_of_a_mixture_that_is_not_there_is_named(texts):
    with pytest.raises(UsageError, match=r"no calibration text 'nothing\.txt'"):
        mixed_windows(f"{texts[0]},nothing.txt", byte_tokenizer(), 4, 16)
    texts[1].write_text(" \n")
    with pytest.raises(CheckpointError, match=r"code\.txt' is empty"):
        mixed_windows(f"{texts[0]},{texts[1]}", byte_tokenizer(), 4, 16)


# The packaged text


def test_what_one_domain_lacks_the_others_give_in_their_shares():
    assert filled(10, [3, 2, 2, 2, 1], [9] * 5) == [3, 2, 2, 2, 1]
    assert filled(12, [2, 1, 1], [9, 9, 1]) == [7, 4, 1]
    assert filled(100, [3, 1], [5, 4]) == [5, 4]
    assert filled(0, [3, 1], [5, 4]) == [0, 0]


def test_the_domains_are_all_of_the_packaged_text():
    domains = packaged_domains()
    assert (
        sum(len(text.content.encode()) + 1 for text in domains.values())
        == len(read_text(None, "calibration").content.encode()) + 1
    )
    assert domains["code"].content.startswith("CREATE TABLE author (")
    assert "Gestern Abend" in domains["languages"].content


def test_the_packaged_text_is_a_mixture_in_its_stated_shares():
    tokenizer = byte_tokenizer()
    found = mixed_windows(None, tokenizer, 24, 64)
    assert (found.name, found.notes, found.ids.shape) == ("packaged calibration text", (), (24, 64))
    assert found.sha256 == read_text(None, "calibration").sha256
    counts = []
    for text in packaged_domains().values():
        own = {tuple(window) for window in cut_windows(text, tokenizer, 10**6, 64).ids.tolist()}
        counts.append(sum(tuple(window) in own for window in found.ids.tolist()))
    assert counts == [2 * share for share in SHARES.values()]


def test_windows_longer_than_a_domain_are_cut_from_the_whole_packaged_text():
    tokenizer = byte_tokenizer()
    whole = calibration_windows(None, tokenizer, 2, 150_000)
    assert torch.equal(packaged_windows(tokenizer, 2, 150_000).ids, whole.ids)


def test_one_domain_of_the_packaged_text_can_be_named():
    tokenizer = byte_tokenizer()
    found = mixed_windows("packaged/code:1,packaged/prose:3", tokenizer, 8, 64)
    assert found.notes[0] == "windows of each text: 2 of packaged/code, 6 of packaged/prose"
    with pytest.raises(UsageError, match="no domain 'cod'") as caught:
        mixed_windows("packaged/cod", tokenizer, 8, 64)
    assert "prose, technical, code, languages, dialogue" in caught.value.hint


def test_an_importance_matrix_takes_the_packaged_text_by_name_and_mixtures(texts):
    """Of one running text the windows of llama-imatrix, of several those that calibration would take."""
    tokenizer = byte_tokenizer()
    assert stream_text("packaged").sha256 == read_text(None, "calibration").sha256  # type: ignore[union-attr]
    assert torch.equal(stream_windows(texts[0], tokenizer, 2, 16).ids,
                       cut_windows(read_text(texts[0]), tokenizer, 2, 16, "second-half").ids)  # fmt: skip
    both = f"{texts[0]}:3,{texts[1]}:1"
    found, wanted = stream_windows(both, tokenizer, 4, 16), mixed_windows(both, tokenizer, 4, 16)
    assert torch.equal(found.ids, wanted.ids)
    assert found.sha256 == wanted.sha256
    assert found.notes[0].startswith("windows of each text: 3 of ")
    for calib, what in (("no-such-file:1,packaged:1", "no text 'no-such-file'"), ("self", "self is not for")):
        with pytest.raises(UsageError, match=what):
            stream_windows(calib, tokenizer, 4, 16)


@pytest.mark.parametrize(
    ("calib", "says"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("a text. " * 40, "is one of 320 characters"),
        ("a\nb", "is one of 3"),
    ],
    ids=["empty", "blank", "long", "lines"],
)
def test_what_names_no_text_is_refused(calib, says):
    """An empty name is that of the folder that one is in, and a long one is no path of any file system."""
    with pytest.raises(UsageError, match=says):
        parse_mixture(calib)
    if calib.strip():
        with pytest.raises(UsageError, match=says):
            read_text(calib)


def test_a_long_list_of_texts_is_no_file_name():
    names = ",".join(f"text-{number:03}.txt" for number in range(40))
    assert len(parse_mixture(names)) == 40
