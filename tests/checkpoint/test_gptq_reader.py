"""GPTQ folders are read back as they were written; every way one can be wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError
from lowbit.formats.gptq.write import GPTQ_V1, GPTQ_V2
from lowbit.numerics import grid_for
from lowbit.schemes import Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity, QuantizedTensor

LINEAR = "model.layers.0.self_attn.q_proj"
SHAPE = (96, 128)


def scheme_of(bits: int, symmetric: bool = True, group_size: int = 32) -> Scheme:
    granularity = Granularity.CHANNEL if group_size == -1 else Granularity.GROUP
    return scheme_of_specs(
        WeightSpec("int", bits, granularity, None if group_size == -1 else group_size, symmetric), None
    )


def random_codes(scheme: Scheme, shape=SHAPE, seed: int = 0, lowest_zero: int = 1) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    spec, half = scheme.weight, 1 << (scheme.weight.bits - 1)
    group_size = spec.columns_per_scale(shape[1])
    groups = -(-shape[1] // group_size)
    codes = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    scale = (torch.rand(shape[0], groups, generator=generator) * 0.02 + 0.001).half().float()
    zeros = torch.randint(lowest_zero - half, half, (shape[0], groups), generator=generator).to(torch.int32)
    zero_point = None if spec.symmetric else zeros
    return QuantizedTensor(codes, scale, grid_for(spec, "float32"), spec.granularity, group_size, zero_point)


def stored(exporter, quantized: QuantizedTensor, scheme: Scheme, linear: str = LINEAR) -> dict[str, torch.Tensor]:
    pieces = exporter.pack(linear, quantized, scheme, 0, quantized.shape, torch.float16)
    return {piece.name: piece.values.contiguous() for piece in pieces}


def write(
    folder: Path, tensors: dict[str, torch.Tensor], quantization: dict | None, companion: dict | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"model.norm.weight": torch.ones(4), **tensors}, folder / "model.safetensors")
    config = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(config))
    if companion is not None:
        (folder / "quantize_config.json").write_text(json.dumps(companion))
    return folder


def config_of(bits: int = 4, group_size: int = 32, sym: bool = True, **more) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": False,
            "checkpoint_format": "gptq", **more}  # fmt: skip


def good(folder: Path, scheme: Scheme | None = None, exporter=GPTQ_V1, change=None, **more) -> Path:
    """A folder of one linear; `change` edits its tensors, `more` its config."""
    scheme = scheme or scheme_of(4)
    tensors = stored(exporter, random_codes(scheme), scheme)
    if change is not None:
        change(tensors)
    config = exporter.quantization_config({LINEAR: scheme}, ["lm_head"]) | more
    return write(folder, tensors, {key: value for key, value in config.items() if value is not None})


def read(folder: Path, linear: str = LINEAR) -> QuantizedTensor:
    return open_checkpoint(folder).read_quantized(f"{linear}.weight")  # type: ignore[attr-defined]


def refused(folder: Path, *said: str, reading: bool = False) -> CheckpointError:
    """The error of opening the folder, or of reading its weight."""
    if reading:
        open_checkpoint(folder)
    with pytest.raises(CheckpointError) as error:
        read(folder)
    for part in said:
        assert part in f"{error.value}", f"{error.value}"
    return error.value


@pytest.mark.parametrize("exporter", [GPTQ_V1, GPTQ_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_what_is_written_is_read_and_written_again_the_same(tmp_path, exporter, bits, symmetric, group_size):
    scheme = scheme_of(bits, symmetric, group_size)
    quantized = random_codes(scheme, lowest_zero=1 if exporter is GPTQ_V1 else 0)
    tensors = stored(exporter, quantized, scheme)
    folder = write(tmp_path / "m", tensors, exporter.quantization_config({LINEAR: scheme}, ["lm_head"]))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors[f"{LINEAR}.weight"].shape == SHAPE
    assert checkpoint.schemes[f"{LINEAR}.weight"] == scheme  # type: ignore[attr-defined]
    found = read(folder)
    assert torch.equal(found.codes, quantized.codes)
    assert torch.equal(found.scale, quantized.scale)
    assert found.g_idx is None
    if symmetric:
        assert found.zero_point is None
    else:
        assert torch.equal(found.zero_point, quantized.zero_point)  # type: ignore[arg-type]
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight"), quantized.decode())
    again = stored(exporter, found, scheme)
    assert all(torch.equal(again[name], values) for name, values in tensors.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_slabs_equal_the_whole(tmp_path, bits):
    folder = good(tmp_path / "m", scheme_of(bits, symmetric=False))
    checkpoint = open_checkpoint(folder)
    name = f"{LINEAR}.weight"
    whole = checkpoint.read(name)
    step = checkpoint.row_multiple(name)  # type: ignore[attr-defined]
    for first in range(0, SHAPE[0], step):
        slab = checkpoint.read_quantized(name, first, first + step)  # type: ignore[attr-defined]
        assert torch.equal(slab.decode(), whole[first : first + step])
    assert torch.equal(checkpoint.read(name, 5, 41), whole[5:41])


def test_golden_words():
    """One word by hand: nibbles 0..7 are the codes −8..−1, stored zero 6 is a zero of 7, (u − 7) · 0.5."""
    from lowbit.formats.gptq.read import GptqLayout

    class Stored:
        source, tensors = "x", {}

        def read(self, name):
            return {"l.qweight": torch.tensor([[0x76543210] * 8], dtype=torch.int32),
                    "l.qzeros": torch.tensor([[0x66666666]], dtype=torch.int32),
                    "l.scales": torch.full((1, 8), 0.5, dtype=torch.float16)}[name]  # fmt: skip

    from lowbit.checkpoint.base import TensorInfo

    stored = Stored()
    stored.tensors = {"l.qzeros": TensorInfo("l.qzeros", (1, 1), torch.int32, "I32", 4, Path("f"))}
    layout = GptqLayout(stored, {"bits": 4, "group_size": -1, "sym": False})  # type: ignore[arg-type]
    assert layout.read("l", (8, 8), 0, 8).decode()[3].tolist() == [-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]


def test_quantize_config_json_alone_is_enough(tmp_path):
    scheme = scheme_of(4)
    folder = write(tmp_path / "m", stored(GPTQ_V1, random_codes(scheme), scheme), None,
                   {"bits": 4, "group_size": 32, "desc_act": False})  # fmt: skip
    assert torch.equal(read(folder).codes, random_codes(scheme).codes)


def test_format_is_another_name_of_checkpoint_format(tmp_path):
    folder = good(tmp_path / "m", scheme_of(4, False), GPTQ_V2, checkpoint_format=None, format="gptq_v2")
    assert torch.equal(read(folder).zero_point, random_codes(scheme_of(4, False)).zero_point)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(tmp_path, dtype):
    def change(tensors):
        tensors[f"{LINEAR}.scales"] = tensors[f"{LINEAR}.scales"].to(dtype)

    folder = good(tmp_path / "m", change=change)
    assert open_checkpoint(folder).scale_dtype(f"{LINEAR}.weight") is dtype  # type: ignore[attr-defined]
    assert torch.equal(read(folder).scale, random_codes(scheme_of(4)).scale.to(dtype).float())


def test_biases_are_shown_as_they_are(tmp_path):
    folder = good(tmp_path / "m", change=lambda tensors: tensors.update({f"{LINEAR}.bias": torch.arange(96.0)}))
    assert open_checkpoint(folder).read(f"{LINEAR}.bias")[5] == 5


def test_linears_stored_as_floats_are_not_quantized(tmp_path):
    folder = good(
        tmp_path / "m", change=lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)})
    )
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.says_quantized("model.layers.0.mlp.up_proj")  # type: ignore[attr-defined]
    assert checkpoint.read("model.layers.0.mlp.up_proj.weight").dtype is torch.float32
    assert checkpoint.says_quantized("model.layers.0.mlp.down_proj")  # type: ignore[attr-defined]


def test_floats_beside_the_codes_of_a_linear_are_refused(tmp_path):
    def both(tensors):
        tensors[f"{LINEAR}.weight"] = torch.ones(SHAPE)

    refused(good(tmp_path, change=both), f"{LINEAR}.weight and {LINEAR}.qweight are both there")


def test_dynamic_overrides(tmp_path):
    eight, other = scheme_of(8, False, -1), "model.layers.1.mlp.down_proj"
    tensors = stored(GPTQ_V2, random_codes(scheme_of(4)), scheme_of(4)) | stored(
        GPTQ_V2, random_codes(eight), eight, other
    )
    config = GPTQ_V2.quantization_config({LINEAR: scheme_of(4), "x": scheme_of(4), other: eight}, ["lm_head"])
    folder = write(tmp_path / "m", tensors, config)
    assert torch.equal(read(folder, other).codes, random_codes(eight).codes)
    assert open_checkpoint(folder).schemes[f"{other}.weight"] == eight  # type: ignore[attr-defined]


# g_idx


def in_order_of(tensors: dict, order: torch.Tensor) -> None:
    """Groups of 32 columns take the scales of other groups."""
    for leaf in ("qzeros", "scales"):
        values = tensors[f"{LINEAR}.{leaf}"]
        tensors[f"{LINEAR}.{leaf}"] = values[torch.argsort(order)].contiguous()
    tensors[f"{LINEAR}.g_idx"] = order.repeat_interleave(32).to(torch.int32)


def test_a_permuted_order_of_groups_is_undone(tmp_path):
    scheme = scheme_of(4, symmetric=False)
    folder = good(tmp_path / "m", scheme, change=lambda tensors: in_order_of(tensors, torch.tensor([2, 0, 3, 1])))
    found, wanted = read(folder), random_codes(scheme)
    assert found.g_idx is None
    assert torch.equal(found.scale, wanted.scale)
    assert torch.equal(found.zero_point, wanted.zero_point)  # type: ignore[arg-type]


def test_activation_order_goes_along(tmp_path):
    g_idx = torch.randperm(128, generator=torch.Generator().manual_seed(1)).to(torch.int32) // 32
    scheme = scheme_of(4, symmetric=False)
    folder = good(tmp_path / "m", scheme, change=lambda tensors: tensors.update({f"{LINEAR}.g_idx": g_idx}))
    found, wanted = read(folder), random_codes(scheme)
    assert torch.equal(found.g_idx, g_idx)  # type: ignore[arg-type]
    columns = g_idx.long()
    assert wanted.zero_point is not None
    expected = wanted.scale[:, columns] * (wanted.codes - wanted.zero_point[:, columns])
    assert torch.equal(open_checkpoint(folder).read(f"{LINEAR}.weight"), expected)
    assert "activation order" in (GPTQ_V1.inexact(found, scheme, torch.float16) or "")


def test_without_g_idx(tmp_path):
    folder = good(tmp_path / "m", change=lambda tensors: tensors.pop(f"{LINEAR}.g_idx"))
    assert torch.equal(read(folder).codes, random_codes(scheme_of(4)).codes)


@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_g_idx_out_of_range_is_refused(tmp_path, value):
    def change(tensors):
        tensors[f"{LINEAR}.g_idx"][7] = value

    refused(good(tmp_path / "m", change=change), f"{LINEAR}.g_idx holds {value}; there are groups 0 to 3", reading=True)


# Version 1 or 2


@pytest.mark.parametrize(("exporter", "claimed", "holds"), [(GPTQ_V2, "gptq", 8), (GPTQ_V1, "gptq_v2", 7)])
def test_the_wrong_version_of_symmetric_files_is_named(tmp_path, exporter, claimed, holds):
    folder = good(tmp_path / "m", exporter=exporter, checkpoint_format=claimed)
    error = refused(folder, f"qzeros holds {holds} everywhere", f"v{exporter.version}", reading=True)
    assert f'"checkpoint_format": "{exporter.FORMAT}"' in error.hint


def test_v2_files_without_checkpoint_format_are_named(tmp_path):
    folder = good(tmp_path / "m", exporter=GPTQ_V2, checkpoint_format=None)
    assert "gptq_v2" in refused(folder, "config.json says v1", reading=True).hint


def test_v1_without_checkpoint_format_is_read_and_said_where_it_cannot_be_checked(tmp_path):
    asymmetric = good(tmp_path / "a", scheme_of(4, symmetric=False), checkpoint_format=None)
    assert torch.equal(read(asymmetric).zero_point, random_codes(scheme_of(4, False)).zero_point)  # type: ignore[arg-type]
    assert any("GPTQ v1" in note for note in open_checkpoint(asymmetric).notes)
    assert open_checkpoint(good(tmp_path / "b", checkpoint_format=None)).notes == []


def test_sym_with_other_zero_points_is_refused(tmp_path):
    folder = good(tmp_path / "m", scheme_of(4, symmetric=False), sym=True)
    assert '"sym": false' in refused(folder, "config.json says sym, which needs 7 everywhere", reading=True).hint


def test_two_versions_at_once_are_refused(tmp_path):
    refused(good(tmp_path / "m", format="gptq_v2"), "checkpoint_format 'gptq' and format 'gptq_v2'", "contradict")


def borrowing(tensors: dict) -> None:
    tensors[f"{LINEAR}.qzeros"][1, 0] = 0x6666666F


@pytest.mark.parametrize("maker", ["auto_gptq:0.7.1", None])
def test_a_borrowed_zero_point_of_unknown_origin_is_refused(tmp_path, maker):
    folder = good(tmp_path / "m", scheme_of(4, symmetric=False), change=borrowing, meta={"quantizer": [maker]})
    assert "gptq_v2" in refused(folder, "qzeros holds 15: a zero point of 0", reading=True).hint


@pytest.mark.parametrize("maker", ["gptqmodel:7.7.0", ["gptqmodel:0.9.1", "optimum:1.24"]])
def test_a_borrowed_zero_point_of_gptqmodel_is_undone_word_by_word(tmp_path, maker):
    """GPTQModel subtracts 0x11111111 from the word 0x77777780: 0x6666666F."""
    folder = good(tmp_path / "m", scheme_of(4, symmetric=False), change=borrowing, meta={"quantizer": maker})
    zero_point = read(folder).zero_point
    assert zero_point is not None
    assert (zero_point[:8, 1] + 8).tolist() == [0, 8, 7, 7, 7, 7, 7, 7]


# What config.json can get wrong


def test_no_bits(tmp_path):
    refused(good(tmp_path / "m", bits=None), "config.json", "has no bits")


def test_no_group_size(tmp_path):
    refused(good(tmp_path / "m", group_size=None), "has no group_size")


@pytest.mark.parametrize("bits", [5, 6, 7, 1, 16, "4", True, 4.5, [4]])
def test_bits_that_are_not_read(tmp_path, bits):
    refused(good(tmp_path / "m", bits=bits), f"has bits {bits!r}")


@pytest.mark.parametrize("group_size", [0, -2, "128", True, 32.5])
def test_group_sizes_that_are_none(tmp_path, group_size):
    refused(good(tmp_path / "m", group_size=group_size), f"has group_size {group_size!r}")


def test_sym_that_is_no_bool(tmp_path):
    refused(good(tmp_path / "m", sym="yes"), "has sym 'yes'")


@pytest.mark.parametrize("name", ["marlin", "bitblas", "gptq_p", "exl2"])
def test_other_layouts_are_refused_by_name(tmp_path, name):
    refused(good(tmp_path / "m", checkpoint_format=name), f"checkpoint_format is {name!r}")


def test_marlin_of_autogptq_is_refused(tmp_path):
    refused(good(tmp_path / "m", is_marlin_format=True), "is_marlin_format")


def test_other_words_are_refused(tmp_path):
    refused(good(tmp_path / "m", pack_dtype="int16"), "pack_dtype is 'int16'")


def test_dynamic_that_is_no_mapping(tmp_path):
    refused(good(tmp_path / "m", dynamic=["x"]), "dynamic is ['x']")


def test_dynamic_with_a_broken_pattern(tmp_path):
    refused(good(tmp_path / "m", dynamic={"+:(": {"bits": 8}}), "is no regular expression")


def test_dynamic_with_bad_bits(tmp_path):
    refused(good(tmp_path / "m", dynamic={"+:x": {"bits": 5}}), "dynamic['+:x'] has bits 5")


def test_dynamic_whose_value_is_no_mapping(tmp_path):
    refused(good(tmp_path / "m", dynamic={"+:x": 8}), "dynamic['+:x'] is 8")


def test_modules_in_block_to_quantize_that_is_no_list(tmp_path):
    refused(good(tmp_path / "m", modules_in_block_to_quantize=[[1]]), "modules_in_block_to_quantize")


def test_a_linear_that_dynamic_leaves_alone_but_the_files_hold_quantized(tmp_path):
    refused(good(tmp_path / "m", dynamic={r"-:.*q_proj": {}}), f"{LINEAR}.qweight", "does not say how")


def test_a_linear_that_modules_in_block_to_quantize_leaves_out(tmp_path):
    refused(good(tmp_path / "m", modules_in_block_to_quantize=[["mlp.up_proj"]]), "does not say how")


def test_a_quantized_head_that_config_json_does_not_know(tmp_path):
    scheme = scheme_of(4)
    folder = write(tmp_path / "m", stored(GPTQ_V1, random_codes(scheme), scheme, "lm_head"), config_of())
    with pytest.raises(CheckpointError, match="lm_head"):
        open_checkpoint(folder)
    write(folder, stored(GPTQ_V1, random_codes(scheme), scheme, "lm_head"), config_of(lm_head=True))
    assert torch.equal(read(folder, "lm_head").codes, random_codes(scheme).codes)


# What tensors can get wrong


@pytest.mark.parametrize("leaf", ["qzeros", "scales"])
def test_an_absent_tensor(tmp_path, leaf):
    refused(
        good(tmp_path / "m", change=lambda tensors: tensors.pop(f"{LINEAR}.{leaf}")), f"{LINEAR}.{leaf}", "is absent"
    )


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "g_idx"])
def test_a_tensor_of_another_dtype(tmp_path, leaf):
    def change(tensors):
        tensors[f"{LINEAR}.{leaf}"] = tensors[f"{LINEAR}.{leaf}"].to(torch.float32)

    refused(good(tmp_path / "m", change=change), f"{LINEAR}.{leaf} is float32")


@pytest.mark.parametrize("leaf", ["qzeros", "scales", "g_idx"])
def test_a_tensor_of_another_shape(tmp_path, leaf):
    def change(tensors):
        tensors[f"{LINEAR}.{leaf}"] = tensors[f"{LINEAR}.{leaf}"][1:].clone()

    refused(good(tmp_path / "m", change=change), f"{LINEAR}.{leaf} has shape")


def test_a_qweight_that_is_no_matrix(tmp_path):
    refused(good(tmp_path / "m", change=lambda t: t.update({f"{LINEAR}.qweight": t[f"{LINEAR}.qweight"].flatten()})),
            "a matrix is needed")  # fmt: skip


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (2, 32), (3, 32), (4, 64), (4, 16), (4, -1)])
def test_tensors_that_do_not_fit_the_bits_or_the_group_size(tmp_path, bits, group_size):
    refused(good(tmp_path / "m", bits=bits, group_size=group_size), "is needed; config.json says gptq")


def test_an_awq_file_that_claims_to_be_gptq(tmp_path):
    """AWQ's qweight is packed along N: its shape gives other scales."""
    from lowbit.formats.awq import write as awq

    pieces = awq.pack(LINEAR, random_codes(scheme_of(4)), scheme_of(4), 0, SHAPE, torch.float16)
    tensors = {piece.name: piece.values.contiguous() for piece in pieces}
    refused(write(tmp_path / "m", tensors, config_of()), "is needed; config.json says gptq")
