"""What an importance matrix gives, how matrices merge, and what is refused of one that does not fit."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.formats.gguf.importance import ImportanceEntry, ImportanceMatrix, check_fits, merge, statistics

Q, EXPERTS = "blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight"


def entry(values, counts) -> ImportanceEntry:
    return ImportanceEntry.of_means(torch.tensor(values), torch.tensor(counts))


def matrix(chunks=2, **changes) -> ImportanceMatrix:
    entries = {
        Q: entry([[1.0, 2.0, 0.0, 4.0]], [8]),
        EXPERTS: entry([[1.0, 3.0], [0.0, 0.0], [3.0, 5.0]], [5, 0, 3]),
    }
    return ImportanceMatrix(entries | changes, ("text",), chunks, 4)


SHAPES = {Q: (6, 4), EXPERTS: (3, 7, 2)}


def test_importance_of_a_linear_is_one_row_and_zero_channels_stay_zero():
    assert matrix().importance(Q, (6, 4)).tolist() == [[1.0, 2.0, 0.0, 4.0]]
    assert matrix().importance(Q, (6, 4)).dtype == torch.float32


def test_a_tensor_without_entry_has_no_importance():
    assert matrix().importance("blk.0.attn_k.weight", (6, 4)) is None


def test_an_expert_never_routed_to_counts_as_the_mean_of_the_others():
    assert matrix().importance(EXPERTS, (3, 7, 2)).tolist() == [[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]]
    assert matrix().unseen_experts == {EXPERTS: (1,)}


def test_an_expert_whose_inputs_were_zero_counts_as_the_mean_of_the_others():
    dead = matrix(**{EXPERTS: entry([[1.0, 3.0], [0.0, 0.0], [3.0, 5.0]], [5, 4, 3])})
    assert dead.importance(EXPERTS, (3, 7, 2)).tolist() == [[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]]


def test_where_no_expert_was_seen_every_channel_counts_one():
    nothing = matrix(**{EXPERTS: entry([[0.0, 0.0]] * 3, [0, 0, 0])})
    assert nothing.importance(EXPERTS, (3, 7, 2)).tolist() == [[1.0, 1.0]] * 3
    assert any("weigh its channels alike" in note for note in check_fits(nothing, SHAPES, "file"))


def test_importance_without_the_number_of_experts_takes_the_tensors():
    flat = matrix(**{EXPERTS: entry([[1.0, 3.0, 2.0, 4.0, 3.0, 5.0]], [512])})
    assert flat.importance(EXPERTS, (3, 7, 2)).tolist() == [[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]]


@pytest.mark.parametrize(("name", "shape"), [(Q, (6, 5)), (EXPERTS, (4, 7, 2)), (EXPERTS, (7, 2)), (Q, (2, 6, 4))])
def test_another_width_is_refused(name, shape):
    with pytest.raises(CheckpointError, match=name):
        matrix().importance(name, shape)
    with pytest.raises(CheckpointError, match=name):
        check_fits(matrix(), SHAPES | {name: shape}, "file")


def test_a_fitting_matrix_tells_what_it_lacks_and_which_experts_were_not_seen():
    assert check_fits(matrix(), SHAPES, "file") == [
        f"file: no token reached expert 1 of {EXPERTS}, which is taken to weigh its channels as the mean of the others "
        "does"
    ]
    notes = check_fits(matrix(), SHAPES | {"blk.1.attn_v.weight": (6, 4)}, "file")
    assert notes[0] == "file has nothing on 1 tensors: blk.1.attn_v.weight"


def test_a_matrix_of_another_model_is_refused_by_names():
    with pytest.raises(CheckpointError, match="none of its 2 names is a tensor of this model"):
        check_fits(matrix(), {"blk.0.attn_qkv.weight": (6, 4)}, "file")


def test_a_matrix_of_a_deeper_model_is_refused():
    deeper = matrix(**{"blk.7.attn_q.weight": entry([[1.0]], [8])})
    with pytest.raises(CheckpointError, match="goes up to block 7, this model to block 1"):
        check_fits(deeper, SHAPES, "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_weigh_nothing_are_refused_with_their_place(value):
    wrong = matrix(**{EXPERTS: entry([[1.0, 3.0], [1.0, value], [3.0, 5.0]], [5, 1, 3])})
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}, channel 1 of expert 1, is {value:g}"):
        check_fits(wrong, SHAPES, "file")


def test_an_all_zero_entry_is_refused():
    with pytest.raises(CheckpointError, match="is zero in every channel"):
        check_fits(matrix(**{Q: entry([[0.0] * 4], [8])}), SHAPES, "file")


def test_a_matrix_in_which_nothing_was_seen_is_refused():
    nothing = ImportanceMatrix({Q: entry([[0.0] * 4], [0])})
    with pytest.raises(CheckpointError, match="all counts are zero"):
        check_fits(nothing, SHAPES, "file")


def test_an_empty_matrix_is_refused():
    with pytest.raises(CheckpointError, match="no tensor's importance"):
        check_fits(ImportanceMatrix({}), SHAPES, "file")


def test_merging_adds_sums_and_counts():
    other = ImportanceMatrix(
        {Q: entry([[3.0, 2.0, 0.0, 0.0]], [24]), EXPERTS: entry([[9.0, 9.0], [7.0, 7.0], [0.0, 0.0]], [5, 2, 0])},
        ("text", "more"), 6, 4,
    )  # fmt: skip
    merged = merge([matrix(), other])
    assert merged.entries[Q].values.tolist() == [[2.5, 2.0, 0.0, 1.0]]
    assert merged.entries[Q].counts.tolist() == [32]
    assert merged.entries[EXPERTS].values.tolist() == [[5.0, 6.0], [7.0, 7.0], [3.0, 5.0]]
    assert merged.entries[EXPERTS].counts.tolist() == [10, 2, 3]
    assert (merged.datasets, merged.chunks, merged.chunk_tokens) == (("text", "more"), 8, 4)


def test_merging_equals_measuring_both_at_once():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double()
    parts = [
        ImportanceMatrix({Q: ImportanceEntry(part.square().sum(0)[None].float(), torch.tensor([len(part)]))})
        for part in (x[:13], x[13:])
    ]
    torch.testing.assert_close(merge(parts).entries[Q].values[0], x.square().mean(0).float())


def test_merging_different_models_is_refused():
    other = ImportanceMatrix({"blk.0.attn_qkv.weight": entry([[1.0]], [8])})
    with pytest.raises(CheckpointError, match=r"b\.gguf and a\.gguf are of different models"):
        merge([matrix(), other], ["a.gguf", "b.gguf"])


def test_merging_different_widths_is_refused():
    with pytest.raises(CheckpointError, match="has importance for"):
        merge([matrix(), matrix(**{Q: entry([[1.0, 2.0]], [8])})])


def test_the_head_may_be_in_one_of_the_merged_only():
    assert "output.weight" in merge([matrix(), matrix(**{"output.weight": entry([[1.0]], [8])})]).entries


def test_statistics_of_outliers_and_of_equal_channels():
    equal = entry([[2.0] * 200], [10])
    outlier = entry([[0.0] * 199 + [5.0]], [10])
    entries = {"blk.10.a.weight": outlier, "blk.9.a.weight": equal, EXPERTS: matrix().entries[EXPERTS]}
    rows = statistics(ImportanceMatrix(entries))
    assert [row.name for row in rows] == [EXPERTS, "blk.9.a.weight", "blk.10.a.weight"]
    experts, equal, outlier = rows
    assert (equal.total, equal.mean, equal.top_share) == (400.0, 2.0, pytest.approx(0.01))
    assert equal.entropy == pytest.approx(1.0)
    assert (outlier.top_share, outlier.entropy) == (1.0, 0.0)
    assert (experts.experts, experts.unseen, experts.total, experts.tokens) == (3, (1,), 12.0, 5)
