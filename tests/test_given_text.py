"""Calibration data in memory (`lowbit.text.given`): every kind of item, padding, and what is refused."""

from __future__ import annotations

import json
from itertools import count

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lowbit.errors import CheckpointError, UnsafeError, UsageError
from lowbit.text import GivenText
from lowbit.text.calibration import calibration_windows
from models import make_tokenizer

ONES = torch.ones(2, 8, dtype=torch.long)
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs.", ""] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def cut(data, tokenizer=None, windows=4, tokens=None, **more):
    return GivenText(data).windows(tokenizer, windows, tokens, **more)


def test_texts_are_packed_as_the_documents_of_a_file_are(tokenizer, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0]}))
    from_file = calibration_windows(str(path), tokenizer, 1, 16)
    given = cut([TEXTS[0]], tokenizer, 1, 16)
    assert torch.equal(given.ids, from_file.ids)
    assert given.sha256 == from_file.sha256
    assert given.name == "list in memory"


def test_the_order_is_the_one_given_and_empty_texts_are_counted(tokenizer):
    found = cut(TEXTS, tokenizer, 3, 16)
    whole = "".join(text + "\n\n" for text in TEXTS if text)
    assert tokenizer.decode(found.ids.reshape(-1)) == whole[:48]
    many = cut(TEXTS, tokenizer, 30, 16)
    assert any("4 of 12 rows passed over" in note for note in many.notes)
    assert any("not the 30 asked for" in note for note in many.notes)


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [{"role": "user", "content": "Hello there, how are you?"}]},
        [{"role": "user", "content": "Hello there, how are you?"}],
        {"conversations": [{"from": "human", "value": "Hello there, how are you?"}]},
    ],
    ids=["messages", "list of turns", "ShareGPT"],
)
def test_conversations_go_through_the_chat_template(tokenizer, item):
    ids = cut([item] * 4, tokenizer, 1, 16).ids
    assert tokenizer.decode(ids[0]).startswith("<s>user: Hello")


def test_rows_of_one_length_are_the_windows_as_they_are():
    rows = torch.arange(60).reshape(6, 10)
    for data in (rows, list(rows), rows.tolist(), [{"input_ids": row} for row in rows], DataLoader(rows, batch_size=4),
                 DataLoader(torch.utils.data.TensorDataset(rows), batch_size=4)):  # fmt: skip
        found = cut(data, windows=6)
        assert torch.equal(found.ids, rows)
        assert found.asked == 6
    assert torch.equal(cut(rows, windows=2).ids, rows[:2])
    assert "the first 2 of them were needed" in cut(rows, windows=2).notes


def test_a_number_of_tokens_per_window_cuts_one_stream():
    rows = torch.arange(60).reshape(6, 10)
    assert torch.equal(cut(rows, windows=9, tokens=15).ids, torch.arange(60).reshape(4, 15))


def test_windows_are_no_longer_than_the_context(tokenizer):
    """Where no length was asked for; one that was is refused."""
    found = cut(TEXTS, tokenizer, 2, longest=64)
    assert found.ids.shape == (2, 64)
    assert "windows of 64 tokens, the model's context, and not of 512" in found.notes
    with pytest.raises(UsageError, match="longer than the model's context of 64"):
        cut(TEXTS, tokenizer, 2, 65, longest=64)


def test_a_list_of_numbers_is_one_stream():
    assert cut(list(range(40)), windows=9, tokens=8).ids.tolist() == torch.arange(40).reshape(5, 8).tolist()


def padded(lengths: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    """A batch in which token t of row r is 10 r + t, padded with 999."""
    longest = max(lengths)
    ids, mask = torch.full((len(lengths), longest), 999), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[row, place], mask[row, place] = torch.arange(length) + 10 * row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True])
def test_masked_tokens_of_padded_batches_are_in_no_window(left):
    loader = [padded([6, 4, 8], left), padded([3, 7], left)]
    found = cut(loader, windows=9, tokens=7)
    stream = [*range(6), *range(10, 14), *range(20, 28), *range(3), *range(10, 17)]
    assert found.ids.tolist() == torch.tensor(stream).reshape(4, 7).tolist()
    assert 999 not in found.ids
    assert "10 of 38 tokens left out: masked" in found.notes


def test_a_single_padded_row_makes_all_rows_one_stream():
    found = cut([padded([8]), padded([8, 4])], windows=9, default=5)
    assert found.ids.shape == (4, 5)
    assert 999 not in found.ids


def test_pad_tokens_without_a_mask_are_left_out_where_they_cannot_be_text(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    pad = tokenizer.pad_token_id
    rows = [[5, 6, 7, pad, 8, 9, pad, pad], [10, 11, 12, 13, 14, 15, pad, pad]]
    found = cut([{"input_ids": row} for row in rows], tokenizer, 1, 12)
    assert found.ids.tolist() == [[5, 6, 7, pad, 8, 9, 10, 11, 12, 13, 14, 15]]
    assert any("4 of these are pad tokens" in note for note in found.notes)
    tokenizer.pad_token = tokenizer.eos_token
    assert cut([{"input_ids": row} for row in rows], tokenizer, 2).ids.shape == (2, 8)


def test_an_endless_iterable_is_read_no_further_than_needed():
    taken = count()
    assert cut(([next(taken)] * 4 + list(range(4)) for _ in count()), windows=5).ids.shape == (5, 8)
    assert next(taken) <= 6


def test_a_generator_is_read_once_however_often_windows_are_asked():
    text = GivenText(torch.arange(12).reshape(3, 4)[index] for index in range(3))
    assert text.windows(None, 3, None) is text.windows(None, 3, None)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "empty"),
        ({}, "empty"),
        (iter(()), "empty"),
        (torch.zeros(0, dtype=torch.long), "it is empty"),
        ([padded([1])["input_ids"][:, :0]], "it is empty"),
        ([{"input_ids": ONES, "attention_mask": torch.zeros(2, 8)}], "every token is masked"),
        ([ONES[:, :3]], "one window needs"),
    ],
)  # fmt: skip
def test_data_with_nothing_to_learn_from_is_refused(data, said):
    with pytest.raises(CheckpointError, match=said):
        cut(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (7, "which cannot be read"),
        ({"train": [], "test": []}, "keys train, test"),
        ([torch.rand(2, 8)], "float32 tensor"),
        ([ONES[..., None]], r"\[2, 8, 1\]"),
        ([{"input_ids": ONES, "attention_mask": torch.ones(2, 1, 8, 8)}], "attention_mask"),
        ([[ONES, torch.ones(2, 8)]], "2 tensors at once"),
        ([ONES, "a text"], "mixes token ids with a str"),
        ([[[1, 2], [3]]], "several lengths"),
        ([[5, -1, 3, 4]], "token -1"),
        ([[1, 2, 3, 400]], "token 400; the model's embedding has 384 rows"),
        (["a text"], "there is no tokenizer"),
        ([torch.ones(300, dtype=torch.long)], "longer than the model's context of 256"),
        (b"some bytes", "calib is bytes"),
        ([{"input_ids": ONES, "attention_mask": "x"}], "attention_mask is no tensor of numbers"),
        ([{"input_ids": ONES, "attention_mask": torch.full((2, 8), -1e9)}], "attention_mask holds -1e[+]09"),
        ([{"input_ids": None}], "input_ids is a NoneType"),
        ([{"input_ids": "abc"}], "input_ids is a str"),
        ([torch.zeros(2, 8, dtype=torch.long, device="meta")], "meta device"),
        ([torch.eye(8).long().to_sparse()], "sparse tensor"),
        ([[10**30] * 8], "numbers that are no token ids"),
    ],
)  # fmt: skip
def test_what_is_no_calibration_data_is_named(data, said):
    with pytest.raises(UsageError, match=said):
        cut(data, vocabulary=384, longest=256)


def test_texts_need_the_tokenizer_that_was_refused_and_token_ids_do_not():
    refused = UnsafeError("its tokenizer needs code")
    with pytest.raises(UnsafeError, match="needs code"):
        cut(["a text"], refused=refused)
    assert cut(ONES, refused=refused).ids.shape == ONES.shape


@pytest.mark.parametrize("item", [None, b"abc", 7.5, [["a"]]], ids=str)
def test_an_item_that_is_neither_text_nor_token_ids_is_named(tokenizer, item):
    """And not a damaged file, which nobody gave."""
    with pytest.raises(UsageError, match=f"list in memory holds a {type(item).__name__}, which is neither"):
        cut([item], tokenizer)


@pytest.mark.parametrize("ids", [-1, 400])
def test_ids_without_a_row_are_named_before_their_text_is_looked_at(tokenizer, ids):
    with pytest.raises(UsageError, match=f"Tensor in memory has token {ids}"):
        cut(torch.full((4, 64), ids), tokenizer, vocabulary=384)


class Numbered:
    """A dataset of torch's kind: items by number, and no iterator."""

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, index):
        return {"text": TEXTS[index]}


def test_batches_of_texts_and_datasets_of_torch_are_read_as_their_texts_are(tokenizer):
    plain = cut(TEXTS, tokenizer, 3, 16).ids
    for data in (Numbered(), DataLoader(Numbered(), batch_size=4), DataLoader(TEXTS, batch_size=5), np.array(TEXTS)):
        assert torch.equal(cut(data, tokenizer, 3, 16).ids, plain)


def test_unknown_columns_are_listed(tokenizer):
    with pytest.raises(UsageError, match="columns prompt, answer"):
        cut([{"prompt": "a", "answer": "b"}], tokenizer)


def test_a_row_of_other_columns_is_passed_over_and_told(tokenizer):
    found = cut([{"answer": "b"}, *({"text": text} for text in TEXTS)], tokenizer, 3, 16)
    assert torch.equal(found.ids, cut(TEXTS, tokenizer, 3, 16).ids)
    assert any("rows passed over, which cannot be used" in note and "columns answer" in note for note in found.notes)


def test_the_same_token_again_and_again_is_refused(tokenizer):
    with pytest.raises(CheckpointError, match="one token again and again"):
        cut(torch.full((4, 64), 7), tokenizer)
