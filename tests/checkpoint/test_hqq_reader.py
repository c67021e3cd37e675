"""HQQ folders: what is read from files made here by hand, against a decoder of plain loops; and bad files.

With `hqq` installed, its own tensors are decoded by both.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError
from lowbit.numerics.scalar_grids import FloatZeroGrid
from lowbit.tensors import GroupParams, RangeSearch
from models import make_model

# packing → (rows of codes in an item, bits, dtype of an item)
PACKINGS = {"8bit_u8": (1, 8, torch.uint8), "4bit_u8": (2, 4, torch.uint8), "3bit_32": (10, 3, torch.int32),
            "2bit_u8": (4, 2, torch.uint8), "1bit_u8": (8, 1, torch.uint8)}  # fmt: skip
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def word(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def packed(codes: Tensor, packing: str) -> Tensor:
    """Codes [R, C] → items [P, C], the first row of an item in its most significant bits."""
    slots, bits, dtype = PACKINGS[packing]
    step = -(-len(codes) // slots)
    items = torch.zeros(step, codes.shape[1], dtype=torch.int64)
    for row, line in enumerate(codes.tolist()):
        slot, place = divmod(row, step)
        items[place] |= torch.tensor(line) << bits * (slots - 1 - slot)
    return items.to(dtype)


def linear(shape, packing="4bit_u8", axis=1, group=16, dtype=torch.bfloat16, seed=0, as_float=False):
    """(tensors of a linear without its name, the weight as its definition gives it)."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = shape
    bits = PACKINGS[packing][1]
    matrix = (rows * columns // group, group) if axis == 1 else (group, rows * columns // group)
    codes = torch.randint(0, 1 << bits, matrix, generator=random)
    scales = (matrix[0], 1) if axis == 1 else (1, matrix[1])
    scale = (torch.rand(scales, generator=random) * 0.02 + 0.001).to(dtype)
    zero = (torch.rand(scales, generator=random) * (1 << bits)).to(dtype)
    weight = torch.empty(matrix, dtype=dtype)
    for row in range(matrix[0]):
        for column in range(matrix[1]):
            place = (row, 0) if axis == 1 else (0, column)
            weight[row, column] = (codes[row, column].to(dtype) - zero[place]) * scale[place]
    items = packed(codes, packing)
    tensors = {
        "W_q": items.view(dtype) if as_float else items, "scale": scale, "zero": zero, "packing": word(packing),
        "shape": torch.tensor(shape), "axis": torch.tensor(axis, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32), "nbits": torch.tensor(bits, dtype=torch.int32),
        "view_as_float": torch.tensor(int(as_float), dtype=torch.uint8), "compute_dtype": word(str(dtype)),
        **{flag: torch.tensor(0, dtype=torch.uint8) for flag in ("quant_scale", "quant_zero", "offload_meta")},
        **{flag: torch.tensor(1, dtype=torch.uint8) for flag in ("channel_wise", "optimize", "round_zero",
                                                                   "encoded_state_dict", "stores_quant_config")},
        "unpack_view_dtype": word("torch.uint8"),
    }  # fmt: skip
    return tensors, weight.reshape(shape).float()


def opened(folder: Path, tensors: dict[str, Tensor], stated: bool = True) -> Checkpoint:
    save_file({f"l.{leaf}": tensor for leaf, tensor in tensors.items()}, folder / "model.safetensors")
    quantization = {"quantization_config": {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}}
    (folder / "config.json").write_text(json.dumps(quantization if stated else {"model_type": "llama"}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.schemes
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("packing", PACKINGS)
def test_decoded_weights(packing, axis, dtype, tmp_path):
    tensors, weight = linear((8, 32), packing, axis, dtype=dtype)
    checkpoint = opened(tmp_path, tensors)
    assert list(checkpoint.tensors) == ["l.weight"]
    assert torch.equal(checkpoint.read("l.weight"), weight)
    for start, stop in ((0, 1), (3, 4), (1, 7), (7, 8)):
        assert torch.equal(checkpoint.read("l.weight", start, stop), weight[start:stop])


@pytest.mark.parametrize(("shape", "axis", "group"), [((4, 24), 1, 16), ((6, 40), 0, 16), ((8, 16), 1, 16)])
def test_groups_that_cross_rows_and_that_span_them(shape, axis, group, tmp_path):
    tensors, weight = linear(shape, axis=axis, group=group)
    checkpoint = opened(tmp_path, tensors)
    assert torch.equal(checkpoint.read("l.weight"), weight)
    assert torch.equal(checkpoint.read("l.weight", 1, 3), weight[1:3])


def test_three_bits_whose_rows_do_not_fill_the_words(tmp_path):
    tensors, weight = linear((7, 32), "3bit_32", group=32)
    assert tensors["W_q"].shape == (1, 32)
    assert torch.equal(opened(tmp_path, tensors).read("l.weight", 2, 7), weight[2:7])


@pytest.mark.parametrize("packing", ["4bit_u8", "3bit_32"])
def test_codes_that_are_called_floats(packing, tmp_path):
    tensors, weight = linear((8, 64), packing, as_float=True)
    assert tensors["W_q"].dtype == torch.bfloat16
    assert torch.equal(opened(tmp_path, tensors).read("l.weight"), weight)


def test_the_scheme_says_what_it_is(tmp_path):
    tensors, _ = linear((8, 32), "4bit_u8")
    scheme = opened(tmp_path, tensors).schemes["l.weight"]
    assert (scheme.name, scheme.weight.number, scheme.weight.group_size) == ("HQQ4", "hqq", 16)
    assert not scheme.weight.symmetric
    tensors["packing"], tensors["nbits"] = word("8bit_u8"), torch.tensor(5, dtype=torch.int32)
    tensors["W_q"] = torch.zeros(16, 16, dtype=torch.uint8)
    assert opened(tmp_path, tensors).schemes["l.weight"].name == "HQQ5"


def test_folders_of_hqq_itself_are_known_by_their_tensors(tmp_path):
    tensors, weight = linear((8, 32))
    assert torch.equal(opened(tmp_path, tensors, stated=False).read("l.weight"), weight)


BAD = {
    "absent scale": (lambda t: t.pop("scale"), r"l\.scale .* is absent"),
    "absent packing": (lambda t: t.pop("packing"), r"l\.packing, which says what it is, is absent"),
    "another packing": (lambda t: t.update(packing=word("5bit_u8")), "packing '5bit_u8'"),
    "another axis": (lambda t: t.update(axis=torch.tensor(2, dtype=torch.int32)), "axis 2"),
    "groups of nothing": (lambda t: t.update(group_size=torch.tensor(0, dtype=torch.int32)), "groups of 0"),
    "groups that do not fit": (lambda t: t.update(group_size=torch.tensor(48, dtype=torch.int32)), "groups of 48"),
    "a shape of three": (lambda t: t.update(shape=torch.tensor([2, 4, 32])), r"shape \[2, 4, 32\]"),
    "a negative shape": (lambda t: t.update(shape=torch.tensor([-8, -32])), "do not fit -8"),
    "a shape that is no number": (lambda t: t.update(shape=torch.tensor([torch.nan, 32])), "holds NaN or inf"),
    "infinitely many bits": (lambda t: t.update(packing=word("8bit_u8"), nbits=torch.tensor(torch.inf)), "NaN or inf"),
    "a shape of other files": (lambda t: t.update(shape=torch.tensor([8, 64])), "is needed"),
    "quantized scales": (lambda t: t.update(quant_scale=torch.tensor(1, dtype=torch.uint8)), "quant_scale is set"),
    "stacked scales": (lambda t: t.update(offload_meta=torch.tensor(1, dtype=torch.uint8)), "offload_meta is set"),
    "one scale for all": (lambda t: t.update(channel_wise=torch.tensor(0, dtype=torch.uint8)), "channel_wise is 0"),
    "words for bytes": (lambda t: t.update(W_q=t["W_q"].to(torch.int32)), "W_q is int32; uint8 is needed"),
    "zeros of another dtype": (lambda t: t.update(zero=t["zero"].float()), "zero is float32; bfloat16 is needed"),
    "a long word": (lambda t: t.update(packing=torch.zeros(300, dtype=torch.uint8)), "has 300 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, tmp_path):
    damage, said = BAD[case]
    tensors, _ = linear((8, 32))
    damage(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        opened(tmp_path, tensors)
    assert caught.value.hint


@pytest.fixture
def model(tmp_path) -> Path:
    """A whole tiny model whose linears HQQ quantized, axis 0 for one of them."""
    source = make_model(tmp_path / "plain", num_hidden_layers=1)
    plain = open_checkpoint(source)
    tensors: dict[str, Tensor] = {}
    for name in plain.tensors:
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            rows, columns = plain.tensors[name].shape
            made, _ = linear((rows, columns), axis=0 if module.endswith("o_proj") else 1, group=32)
            tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in made.items()}
        else:
            tensors[name] = plain.read(name)
    folder = tmp_path / "hqq"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_a_model_to_floats_and_to_another_format(model, tmp_path):
    source = open_checkpoint(model)
    report = lowbit.convert(model, tmp_path / "float", format="float").report
    written = open_checkpoint(tmp_path / "float")
    assert set(written.tensors) == set(source.tensors)
    for name in source.tensors:
        assert torch.equal(written.read(name).float(), source.read(name).to(torch.bfloat16).float())
    report = lowbit.convert(model, tmp_path / "ct", format="compressed-tensors").report
    notes = [note for tensor in report.tensors if tensor.scheme for note in tensor.notes]
    assert len(notes) == 7
    assert all("requantized: compressed-tensors has no HQQ4" in note for note in notes)
    report = lowbit.quantize(model, tmp_path / "w8", scheme="W8A16").report
    assert sum(tensor.scheme == "W8A16" for tensor in report.tensors) == 7


def test_the_grid_rounds_to_the_nearest_code_and_covers_what_it_fits():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.3
    grid = FloatZeroGrid(4, "float32")
    params = grid.fit(weight, 16, RangeSearch())
    codes = grid.round(weight, params, 16)
    decoded = grid.decode(codes, params, 16)
    scale = params.scale.repeat_interleave(16, dim=1)[:, :40]
    assert bool(((weight - decoded).abs() <= scale / 2 * 1.0001).all())
    assert torch.equal(grid.round(decoded, params, 16), codes)
    errors = grid.error(weight, params, 16)
    assert errors.shape == (5, 3)
    assert torch.allclose(errors.sum(), (weight - decoded).square().sum())
    same = GroupParams(torch.ones(1, 1), torch.zeros(1, 1))
    assert grid.params_from_range(torch.zeros(1, 1), torch.zeros(1, 1)).scale == same.scale


@pytest.mark.interop
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2, 1.58, 1])
def test_linears_of_hqq(bits, axis, tmp_path):
    core = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    config = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    theirs = core.HQQLinear(torch.nn.Linear(64, 128), config, compute_dtype=torch.bfloat16, device="cpu")
    checkpoint = opened(tmp_path, theirs.state_dict())
    assert torch.equal(checkpoint.read("l.weight"), theirs.dequantize().float())
