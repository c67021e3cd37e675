"""QA-LoRA: adapters on sums of groups, which merging turns into minima without touching a code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

import lowbit
from lowbit.architecture.structure import Part
from lowbit.errors import NonFiniteError, UsageError
from lowbit.numerics import ggml
from lowbit.numerics.ggml.grid import GgmlGrid
from lowbit.rounding.target import GgmlTarget
from lowbit.train import Course, FakeQuantize, LoRA, adapters, prepare
from lowbit.train.adapters import LowRankUpdate, attach
from lowbit.train.fake_quantize import QuantizedPart
from lowbit.train.preparing import training_of
from models import SHORT_TEXT, make_model

COURSE = Course(steps=6, batch=4, windows=12, window_tokens=32, learning_rate=5e-3)
QA = LoRA(4, merge=True, qa=True)


def blocks_of(path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Matrices of decoder blocks in a file of Q4_1 → (bytes without m, the halves m)."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name == "Q4_1" and tensor.name.startswith("blk."):
            blocks = tensor.data.reshape(-1, 20)
            found[tensor.name] = (np.delete(blocks, [2, 3], axis=1), blocks[:, 2:4].copy().view(np.float16))
    return found


def test_a_merged_file_differs_from_the_quantized_one_in_its_minima_alone(tiny_llama, tmp_path):
    done = lowbit.finetune(tiny_llama, tmp_path / "out.gguf", scheme="Q4_1", lora=QA, data=SHORT_TEXT, course=COURSE)
    base = lowbit.quantize(tiny_llama, tmp_path / "base.gguf", scheme="Q4_1").path
    ours, theirs = blocks_of(done.path), blocks_of(base)
    assert len(ours) == 14
    for name, (rest, minima) in ours.items():
        np.testing.assert_array_equal(rest, theirs[name][0])
        assert not np.array_equal(minima, theirs[name][1])
    note = next(note for note in done.report.source.notes if note.startswith("trained"))
    before, after, merged = (float(word.rstrip(";")) for word in (note.split()[-5], note.split()[-3], note.split()[-1]))
    assert after < before
    assert merged == pytest.approx(after, rel=1e-3)
    assert "adapters of QA-LoRA of rank 4 (alpha 8) on 14 linears" in " ".join(done.report.source.notes)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["Q4_1", "Q5_1"])
def test_merging_changes_a_weight_by_no_more_than_the_rounding_of_a_minimum(tmp_path, kind, scheme):
    """Against the decoded base and the expanded product, linear by linear; and the logits of both forms."""
    model, _ = lowbit.load(make_model(tmp_path / "model", kind))
    prepare(model.requires_grad_(True), scheme, learn_scales=False)
    on = attach(model, QA, training_of(model).linears, 0, torch.bfloat16)
    base = {name: model.get_submodule(name).weight.clone() for name in on.updates}
    with torch.no_grad():
        for update in on.updates.values():
            update.B.normal_(std=0.02)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        apart = model(ids).logits
        on.merge()
        merged = model(ids).logits
    for name, update in on.updates.items():
        module, wanted = model.get_submodule(name), update.learned()
        wanted = base[name] + (wanted.t() if kind == "gpt2" else wanted)
        half_ulp = wanted.abs().max() * 2.0**-11
        assert (module.weight - wanted).abs().max() <= half_ulp
        assert parametrize.is_parametrized(module)
    torch.testing.assert_close(merged, apart, rtol=0, atol=2e-3 * apart.abs().max().item())


def test_sums_of_groups_are_the_expanded_matrix():
    """A·x̄ is (A, each column repeated)·x."""
    update = LowRankUpdate(torch.randn(3, 4), torch.randn(5, 3), 2.0, group=8)
    x = torch.randn(2, 7, 32)
    update.see(torch.nn.Identity(), (x,))
    torch.testing.assert_close(update.add(torch.nn.Identity(), (), torch.zeros(2, 7, 5)), x @ update.learned().t())


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_a_shifted_block_has_the_half_nearest_to_the_sum(name):
    weight, shift = torch.randn(3, 64), torch.randn(3, 2)
    blocks = ggml.encode(name, weight)
    codes, params = GgmlGrid(name).unpack(blocks)
    moved = GgmlTarget(name).shifted(blocks, shift)
    codes_now, params_now = GgmlGrid(name).unpack(moved.stored)
    assert torch.equal(codes_now, codes)
    assert torch.equal(params_now.stored["d"], params.stored["d"])
    assert torch.equal(params_now.stored["m"], (params.stored["m"].float() + shift).half())
    assert torch.equal(moved.decoded, ggml.decode(name, moved.stored))


def test_the_types_that_have_minima_to_shift():
    held = {name for name in ggml.TYPES if GgmlTarget(name).columns_per_minimum is not None}
    assert held == {"Q4_1", "Q5_1"}


def test_a_minimum_beyond_half_precision_is_refused():
    weight = torch.randn(2, 32)
    fake = FakeQuantize(weight, [QuantizedPart("proj", GgmlTarget("Q4_1"), Part("proj.weight"))])
    fake.hold(weight)
    with pytest.raises(NonFiniteError, match="holds NaN or inf"):
        fake.shift(torch.full((2, 1), 1e6))


def test_linears_of_other_types_get_none_and_are_counted(tiny_llama, tmp_path):
    done = lowbit.finetune(tiny_llama, tmp_path / "out.gguf", scheme="Q4_1", overrides={"down_proj": "Q8_0"}, lora=QA,
                           data=SHORT_TEXT, course=Course(steps=1, windows=4, window_tokens=16))  # fmt: skip
    said = " ".join(done.report.source.notes)
    assert "on 12 linears" in said
    assert "2 linears in Q8_0, without float minima, have none" in said


def test_a_quantized_model_is_rounded_to_the_type_first(tiny_llama, tmp_path):
    base = lowbit.quantize(tiny_llama, tmp_path / "base.gguf", scheme="Q5_1").path
    done = lowbit.finetune(base, tmp_path / "out.gguf", scheme="Q5_1", lora=QA, data=SHORT_TEXT,
                           course=Course(steps=1, windows=4, window_tokens=16))  # fmt: skip
    assert lowbit.verify(done.path).ok


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("W4A16", "W4A16 stores none"),
        ("W4A16_ASYM", "the zero points of W4A16_ASYM are integers"),
        ("NF4", "NF4 stores none"),
        ("Q4_K_M", "the types of Q4_K_M have integer codes for these, or none"),
        ("Q4_0", "the types of Q4_0 have"),
    ],
)
def test_other_schemes_are_refused_by_name(tiny_llama, tmp_path, scheme, said):
    output = tmp_path / ("out.gguf" if scheme.startswith("Q") else "out")
    with pytest.raises(UsageError, match=said) as caught:
        lowbit.finetune(tiny_llama, output, scheme=scheme, lora=QA, data=SHORT_TEXT, course=COURSE)
    assert "--scheme Q4_1 or Q5_1 and -o NAME.gguf" in caught.value.hint


@pytest.mark.parametrize(
    ("lora", "said"),
    [({"qa": True}, "these are kept apart"), ({"qa": True, "merge": True, "init": "loftq"}, "begin at zero")],
)
def test_what_goes_with_nothing_else_is_refused(lora, said):
    with pytest.raises(UsageError, match=said):
        LoRA(4, **lora)


def test_weights_beside_held_codes_keep_the_dtype_of_the_files(tmp_path):
    """And compute the same: what is kept in 16 bits is what was read from 16 bits."""
    model, _ = lowbit.load(make_model(tmp_path / "model", dtype=torch.bfloat16))
    prepare(model.requires_grad_(True), "W4A16", group_size=32, learn_scales=False)
    ids = torch.arange(24)[None]
    before = model(ids).logits
    on = attach(model, LoRA(4), training_of(model).linears, 0, torch.bfloat16)
    held = [adapters._weight_of(model.get_submodule(name)) for name in on.updates]
    assert {weight.dtype for weight in held} == {torch.bfloat16}
    assert torch.equal(model(ids).logits, before)
    assert model.get_submodule(next(iter(on.updates))).weight.dtype == torch.float32
    on.merge()
    assert {adapters._weight_of(model.get_submodule(name)).dtype for name in on.updates} == {torch.float32}


def test_weights_that_16_bits_would_change_stay(tmp_path):
    model, _ = lowbit.load(make_model(tmp_path / "model", dtype=torch.float32))
    prepare(model.requires_grad_(True), "W4A16", group_size=32, learn_scales=False)
    on = attach(model, LoRA(4), training_of(model).linears, 0, torch.bfloat16)
    assert {adapters._weight_of(model.get_submodule(name)).dtype for name in on.updates} == {torch.float32}
