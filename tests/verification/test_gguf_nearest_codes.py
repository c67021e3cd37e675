"""`gguf-nearest-codes`: one code off by one is found in any type; what was not rounded to nearest is not judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import report_path
from lowbit.errors import UsageError
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.numerics.ggml.types import TYPES, family
from models import SHORT_TEXT, make_model

RULE = "gguf-nearest-codes"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Rows of 256 columns, so that super-blocks fit."""
    folder = tmp_path_factory.mktemp("nearest")
    return make_model(folder / "model", "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1)


def found(path: Path, source: Path):
    """The check of the rule, or why it was not made."""
    verification = lowbit.verify(path, reference=source)
    made = [check for check in verification.checks if check.rule == RULE]
    return made[0] if made else verification.unchecked[RULE]


def with_another_code(path: Path, name: str, row: int) -> None:
    """The first code of a row changed to its neighbour, in place."""
    raw = open_raw_gguf(path)
    tensor = next(tensor for tensor in raw.tensors if tensor.name == name)
    kind = TYPES[tensor.type_name]
    before = raw.blocks(tensor, row, row + 1).clone()
    raw.close()
    blocks = family(kind).unpack(kind, before)
    codes = blocks.codes.clone()
    codes[0, 0] += -1 if codes[0, 0] > 1 else 1
    after = family(kind).pack(kind, codes, blocks.stored)
    content = bytearray(path.read_bytes())
    start = tensor.start + row * before.numel()
    content[start : start + before.numel()] = after.numpy().tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("scheme", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "NVFP4"])
def test_a_file_rounded_to_nearest_holds_and_one_other_code_is_found(model, tmp_path, scheme):
    path = lowbit.quantize(model, tmp_path / "m.gguf", scheme=scheme, pure=True).path
    assert found(path, model).passed
    with_another_code(path, "blk.0.attn_q.weight", 3)  # rotary rows, which lie in another order in the file
    check = found(path, model)
    assert not check.passed
    assert check.outcome == "misreads"
    assert "blk.0.attn_q.weight[3, 0] decodes to" in check.detail


def test_an_importance_matrix_moves_scales_and_no_code(model, tmp_path):
    path = lowbit.quantize(model, tmp_path / "m.gguf", scheme="Q4_K_M", imatrix="measure", calib=SHORT_TEXT, samples=2,
                           seqlen=64).path  # fmt: skip
    assert found(path, model).passed


def test_codes_of_i_quants_are_counted_and_not_judged(model, tmp_path):
    path = lowbit.quantize(model, tmp_path / "m.gguf", scheme="IQ3_S", pure=True).path
    assert "of i-quants or without a source are not judged" in found(path, model).detail


def test_a_gguf_made_of_a_gguf_is_compared_with_that_one_alone(model, tmp_path):
    first = lowbit.quantize(model, tmp_path / "q8.gguf", scheme="Q8_0").path
    second = lowbit.quantize(first, tmp_path / "q4.gguf", scheme="Q4_0").path
    assert found(second, first).passed
    assert "from this source" in found(second, model)


@pytest.mark.parametrize("settings", [{"method": "gptq"}, {"method_overrides": {"down_proj": "gptq"}}])
def test_codes_of_another_method_are_not_judged(model, tmp_path, settings):
    path = lowbit.quantize(model, tmp_path / "m.gguf", scheme="Q4_0", calib=SHORT_TEXT, samples=8, seqlen=64,
                           **settings).path  # fmt: skip
    assert "nothing says" in found(path, model)


def test_a_folder_with_one_other_method_is_not_judged(model, tmp_path):
    lowbit.quantize(model, tmp_path / "out", scheme="W4A16", method_overrides={"down_proj": "gptq"}, calib=SHORT_TEXT,
                    samples=8, seqlen=64)  # fmt: skip
    verification = lowbit.verify(tmp_path / "out", reference=model)
    assert verification.ok
    assert "nothing says" in verification.unchecked["nearest-codes"]


def test_a_folder_made_of_a_gguf_is_not_compared_with_codes_of_the_float_model(model, tmp_path):
    first = lowbit.quantize(model, tmp_path / "q8.gguf", scheme="Q8_0").path
    lowbit.quantize(first, tmp_path / "out", scheme="W4A16")
    assert "nearest-codes" in lowbit.verify(tmp_path / "out", reference=model).unchecked
    assert "nearest-codes" not in lowbit.verify(tmp_path / "out", reference=first).unchecked


@pytest.mark.parametrize("damaged", ["{", "[]", "{}", '{"settings": {"method": "rtn"}, "source": 1}'])
def test_a_damaged_report_states_nothing(model, tmp_path, damaged):
    path = lowbit.quantize(model, tmp_path / "m.gguf", scheme="Q4_0").path
    report_path(path).write_text(damaged)
    assert "nothing says" in found(path, model)


def test_without_a_report_nothing_is_judged_unless_asked(model, tmp_path):
    path = lowbit.quantize(model, tmp_path / "m.gguf", scheme="Q4_0").path
    report = json.loads(report_path(path).read_text())
    assert report["settings"]["method"] == "rtn"
    report_path(path).unlink()
    assert "nothing says" in found(path, model)
    with_another_code(path, "blk.0.ffn_down.weight", 0)
    assert RULE in {check.rule for check in lowbit.verify(path, reference=model, nearest=True).failed}


def test_the_reference_is_named_once(model, tmp_path):
    with pytest.raises(UsageError, match="reference and source"):
        lowbit.verify(model, reference=model, source=open_checkpoint(model))
