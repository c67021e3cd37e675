"""AMD Quark folders: what is read from files made here by hand, by plain loops; and bad files and configurations.

`benchmarks/peers/quark_exports.py` compares with amd-quark itself.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lowbit
from checkpoint.checkpoint_files import open_quantized
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError
from lowbit.schemes import SCHEMES, KVCacheScheme
from models import make_model

SHAPE = (24, 64)  # N, K
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GROUP = {"qscheme": "per_group", "group_size": 16, "ch_axis": -1}
CHANNEL = {"qscheme": "per_channel", "ch_axis": 0, "group_size": None}
TENSOR = {"qscheme": "per_tensor", "ch_axis": None, "group_size": None}
INTEGERS = [f"{sign}int{bits} {scales}" for sign in ("", "u") for bits in (4, 8) for scales in ("group", "row", "all")]
FLOATS = ["fp8 row", "fp8 all", "fp8 block", "mxfp8", "mxfp4", "nvfp4"]


def packed(codes: Tensor, order: str) -> Tensor:
    """Codes [n, m] → int32 words [n, ⌈m/8⌉]: nibble i of a word is its code number ORDER[i]."""
    places = [0, 2, 4, 6, 1, 3, 5, 7] if order == "reorder" else list(range(8))
    words = torch.zeros(len(codes), -(-codes.shape[1] // 8), dtype=torch.int64)
    for row in range(len(codes)):
        for word in range(words.shape[1]):
            for nibble, place in enumerate(places):
                if 8 * word + place < codes.shape[1]:
                    words[row, word] |= (int(codes[row, 8 * word + place]) & 15) << 4 * nibble
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Files:
    """A folder in the making, with one linear `l`: its tensors, its configuration, and the weight they stand for."""

    def __init__(self, folder: Path, kind: str, shape=SHAPE, order="reorder", symmetric=False, seed=0):
        self.folder, self.random = folder, torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {"lm_head.weight": torch.ones(4, 8)}
        self.layer: dict[str, Any] = {"weight": {}, "input_tensors": None, "output_tensors": None, "bias": None}
        self.config: dict[str, Any] = {
            "quant_method": "quark", "global_quant_config": self.layer, "layer_type_quant_config": {},
            "layer_quant_config": {}, "exclude": ["lm_head"], "quant_mode": "eager_mode", "version": "0.13",
            "export": {"pack_method": order, "weight_format": "real_quantized", "kv_cache_group": []},
        }  # fmt: skip
        if kind in INTEGERS:
            self._integers(*kind.split(), shape, order, symmetric)
        else:
            self._floats(kind, shape)

    def _integers(self, dtype: str, scales: str, shape, order, symmetric) -> None:
        (rows, columns), bits, unsigned = shape, 4 if "4" in dtype else 8, dtype.startswith("u")
        low = 0 if unsigned else -(1 << (bits - 1))
        scale_shape = {"group": (rows, columns // 16), "row": (rows, 1), "all": (1, 1)}[scales]
        codes = torch.randint(low, low + (1 << bits), shape, generator=self.random)
        zero = torch.randint(low, low + (1 << bits), scale_shape, generator=self.random)
        zero = torch.zeros_like(zero) if symmetric else zero
        scale = (torch.rand(scale_shape, generator=self.random) + 0.5).to(torch.bfloat16)
        repeats = (rows // scale_shape[0], columns // scale_shape[1])
        spread = [each.repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1) for each in (zero, scale)]
        self.weight = (codes - spread[0]).float() * spread[1].float()
        self.layer["weight"] = {"dtype": dtype, "is_dynamic": False, "symmetric": symmetric,
                                **{"group": GROUP, "row": CHANNEL, "all": TENSOR}[scales]}  # fmt: skip
        item = {"int8": torch.int8, "uint8": torch.uint8}.get(dtype, torch.int32)
        if scales == "group":
            codes, zero, scale = codes.t(), zero.t(), scale.t()
        stored = packed(codes, order) if bits == 4 else codes.to(item)
        if scales == "all":
            zero, scale = zero.reshape(()).to(item), scale.reshape(())
        elif scales == "row":
            zero = packed(zero.t(), order)[0] if bits == 4 else zero[:, 0].to(item)
            scale = scale.flatten()
        else:
            zero = packed(zero, order) if bits == 4 else zero.to(item)
        self.add(weight=stored, weight_scale=scale, weight_zero_point=zero)

    def _floats(self, kind: str, shape) -> None:
        rows, columns = shape
        if "fp8" in kind:
            codes = torch.randn(shape, generator=self.random).mul(100).to(torch.float8_e4m3fn)
            values, dtype = codes.float(), "fp8_e4m3"
        else:
            nibbles = torch.randint(0, 16, shape, generator=self.random)
            codes = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
            values, dtype = E2M1[nibbles], "fp4"
        mx = {"qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
        said = {"fp8 row": CHANNEL, "fp8 all": TENSOR, "fp8 block": {"qscheme": "per_block", "block_size": [8, 8]},
                "mxfp8": mx, "mxfp4": mx, "nvfp4": mx | {"group_size": 16, "scale_format": None}}[kind]  # fmt: skip
        stated = {"dtype": dtype, "is_dynamic": False, "symmetric": True, **said}
        blocks = {"fp8 row": (rows, 1), "fp8 all": (1, 1), "fp8 block": (rows // 8, columns // 8)}
        scale_shape = blocks.get(kind, (rows, columns // stated["group_size"] if stated.get("group_size") else 1))
        scale = torch.rand(scale_shape, generator=self.random) + 0.5
        stored, factor = scale, 1.0
        if kind in ("mxfp8", "mxfp4"):
            stored = torch.randint(100, 130, scale_shape, generator=self.random).to(torch.uint8)
            scale = 2.0 ** (stored.float() - 127)
        if kind == "nvfp4":
            stored, factor = scale.to(torch.float8_e4m3fn), 0.0123
            scale = stored.float() * torch.tensor(factor)
            self.add(weight_scale_2=torch.tensor(factor))
        spread = scale.repeat_interleave(rows // scale_shape[0], 0).repeat_interleave(columns // scale_shape[1], 1)
        self.weight = values * spread
        self.layer["weight"] = [stated, {"dtype": "fp8_e4m3", **TENSOR}] if kind == "nvfp4" else stated
        self.add(weight=codes, weight_scale=stored.reshape(()) if kind == "fp8 all" else stored)

    def add(self, **tensors: Tensor) -> None:
        self.tensors |= {f"l.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}

    def open(self) -> Checkpoint:
        return open_quantized(self.folder, self.tensors, self.config)


@pytest.fixture
def files(tmp_path):
    return lambda kind, **settings: Files(tmp_path, kind, **settings)


def refusal(files: Files) -> str:
    with pytest.raises(CheckpointError) as caught:
        files.open()
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
def test_decoded_weights(kind, files):
    made = files(kind)
    checkpoint = made.open()
    assert set(checkpoint.tensors) == {"l.weight", "lm_head.weight"}
    assert torch.equal(checkpoint.read("l.weight"), made.weight)
    for start, stop in ((0, 3), (5, 6), (8, 21), (23, 24)):
        assert torch.equal(checkpoint.read("l.weight", start, stop), made.weight[start:stop])


@pytest.mark.parametrize("kind", ["int4 group", "uint4 group", "int4 row"])
@pytest.mark.parametrize("order", ["reorder", "order"])
def test_both_orders_of_packing(kind, order, files):
    made = files(kind, order=order)
    assert torch.equal(made.open().read("l.weight"), made.weight)


def test_golden_words():
    """Codes 0 .. 7: the word as `Pack_4_bits` writes it, in both orders."""
    codes = torch.arange(8)[None]
    assert packed(codes, "reorder").item() == 0x75316420
    assert packed(codes, "order").item() == 0x76543210


@pytest.mark.parametrize("kind", ["int4 group", "uint4 group", "int8 group"])
def test_rows_that_do_not_fill_the_words(kind, files):
    made = files(kind, shape=(21, 32))
    checkpoint = made.open()
    assert checkpoint.tensors["l.weight"].shape == (21, 32)
    assert torch.equal(checkpoint.read("l.weight"), made.weight)


def test_schemes(files):
    assert files("int4 group", symmetric=True).open().schemes["l.weight"] == SCHEMES["W4A16"].with_group_size(16)
    assert files("uint4 group").open().schemes["l.weight"] == SCHEMES["W4A16_ASYM"].with_group_size(16)
    assert files("fp8 row").open().schemes["l.weight"].name == "FP8A16"
    assert files("mxfp4").open().schemes["l.weight"] == SCHEMES["MXFP4A16"]
    assert files("nvfp4").open().schemes["l.weight"] == SCHEMES["NVFP4A16"]


STATIC, DYNAMIC = {"is_dynamic": False, "symmetric": True}, {"is_dynamic": True, "symmetric": True}
MX_INPUT = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", **DYNAMIC}
ACTIVATIONS = {
    "FP8": ("fp8 all", {"dtype": "fp8_e4m3", **TENSOR, **STATIC}),
    "FP8_DYNAMIC": ("fp8 row", {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 1, **DYNAMIC}),
    "W8A8": ("int8 row", {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 1, **DYNAMIC}),
    "W8A8_STATIC": ("int8 row", {"dtype": "int8", **TENSOR, **STATIC}),
    "W8A8_STATIC_ASYM": ("int8 row", {"dtype": "int8", **TENSOR, **STATIC, "symmetric": False}),
    "MXFP4": ("mxfp4", MX_INPUT),
    "MXFP8": ("mxfp8", MX_INPUT | {"dtype": "fp8_e4m3"}),
    "NVFP4": ("nvfp4", [MX_INPUT | {"group_size": 16, "scale_format": None}, {"dtype": "fp8_e4m3", **TENSOR}]),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, files):
    kind, stated = ACTIVATIONS[name]
    made = files(kind, symmetric=True) if kind in INTEGERS else files(kind)
    made.layer["input_tensors"] = stated
    static = name in ("FP8", "W8A8_STATIC", "W8A8_STATIC_ASYM", "NVFP4")
    leaf = "input_scale_2" if name == "NVFP4" else "input_scale"
    if static:
        made.add(**{leaf: torch.tensor(0.25), "input_zero_point": torch.tensor(-3, dtype=torch.int8)})
    checkpoint = made.open()
    assert checkpoint.schemes["l.weight"] == SCHEMES[name]
    assert checkpoint.input_scales == ({"l.weight": 0.25} if static else {})
    assert checkpoint.input_zero_points == ({"l.weight": -3} if name == "W8A8_STATIC_ASYM" else {})
    if static:
        del made.tensors[f"l.{leaf}"]
        assert f"l.{leaf} [] is absent" in refusal(made)


def test_activations_that_no_scheme_has_are_named(files):
    made = files("mxfp4")
    made.layer["input_tensors"] = {"dtype": "fp6_e2m3", "qscheme": "per_group", "group_size": 32, **DYNAMIC}
    checkpoint = made.open()
    assert checkpoint.schemes["l.weight"] == SCHEMES["MXFP4A16"]
    assert any("fp6_e2m3" in note for note in checkpoint.notes)


def test_patterns_types_and_exclusions(files):
    made = files("int4 group")
    inner = made.config["global_quant_config"]
    made.config |= {"global_quant_config": {"weight": {"dtype": "int3"}}, "layer_quant_config": {"l*": inner}}
    assert torch.equal(made.open().read("l.weight"), made.weight)
    made.config |= {"layer_quant_config": {"m*": {}}, "layer_type_quant_config": {"Linear": inner}}
    assert torch.equal(made.open().read("l.weight"), made.weight)
    for entry in ("l", "*", "re:l$"):
        made.config["exclude"] = [entry]
        assert "config.json does not say how l is quantized" in refusal(made)
    made.config["exclude"] = ["re:("]
    assert "regular expression" in refusal(made)


def test_an_exclusion_that_takes_python_exponential_time_is_matched_at_once(files):
    made = files("int4 group")
    name = "l" + "a" * 40
    made.tensors = {leaf.replace("l.", f"{name}.", 1): tensor for leaf, tensor in made.tensors.items()}
    made.config["exclude"] = ["lm_head", "re:l(([a-z])+)+X"]
    assert torch.equal(made.open().read(f"{name}.weight"), made.weight)


def test_the_scales_of_a_cache(files):
    made = files("fp8 all")
    attention = "model.layers.0.self_attn"
    made.tensors |= {f"{attention}.{each}_proj.output_scale": torch.tensor(0.5) for each in "qkv"}
    made.config["export"]["kv_cache_group"] = ["*k_proj", "*v_proj"]
    outputs = {"output_tensors": {"dtype": "fp8_e4m3", **TENSOR, **STATIC}}
    made.config["layer_quant_config"] = dict.fromkeys(("*k_proj", "*v_proj"), made.layer | outputs)
    cache = made.open().kv_cache  # type: ignore[attr-defined]
    assert isinstance(cache.scheme, KVCacheScheme)
    assert [each.item() for each in cache.absmax[0]] == [224.0, 224.0]


WEIGHTS = {
    "three bits": {"dtype": "int3"},
    "six bits": {"dtype": "fp6_e3m2"},
    "mx9": {"dtype": "mx9"},
    "E5M2": {"dtype": "fp8_e5m2"},
    "no scheme": {"qscheme": None},
    "along columns": {"qscheme": "per_channel", "ch_axis": 1},
    "groups of nothing": {"group_size": 0},
    "groups of a word": {"group_size": "all"},
    "dynamic": {"is_dynamic": True},
    "float zeros": {"zero_point_type": "float32"},
    "a dict for a name": {"dtype": {}},
    "FP4 with float scales": {"dtype": "fp4", "scale_format": "float32"},
    "fp8 in groups": {"dtype": "fp8_e4m3"},
    "blocks of blocks": {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [[1], [1]]},
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_refused(case, files):
    made = files("int4 group")
    made.layer["weight"] |= WEIGHTS[case]
    assert "quantization_config.global_quant_config" in refusal(made)


@pytest.mark.parametrize(
    ("place", "value"),
    [("export", []), ("export", {"pack_method": "sideways"}), ("export", {"weight_format": "fake_quantized"}),
     ("exclude", "lm_head"), ("exclude", [3]), ("layer_quant_config", [1]), ("layer_quant_config", {"l": 4}),
     ("global_quant_config", "int4"), ("global_quant_config", {"weight": 4}), ("global_quant_config", {"weight": [4]}),
     ("global_quant_config", {"weight": [{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]})],
)  # fmt: skip
def test_configurations_that_are_refused(place, value, files):
    made = files("int4 group")
    made.config[place] = value
    assert place in refusal(made)


@pytest.mark.parametrize("leaf", ["input_rotation", "input_pre_scale", "bias_scale", "output_scale"])
def test_what_changes_a_linear_otherwise_is_refused(leaf, files):
    made = files("int4 group")
    made.add(**{leaf: torch.ones(4)})
    assert f"l.{leaf}" in refusal(made)


def test_bad_tensors(files):
    made = files("int4 group")
    good = copy.copy(made.tensors)
    for leaf in ("weight", "weight_scale", "weight_zero_point"):
        made.tensors = {name: tensor for name, tensor in good.items() if name != f"l.{leaf}"}
        assert f"l.{leaf}" in refusal(made)
    made.tensors = good | {"l.weight_scale": torch.ones(4, 12)}
    assert "is needed" in refusal(made)
    made.tensors = good | {"l.weight": good["l.weight"].to(torch.int8)}
    assert "l.weight is int8; int32 is needed" in refusal(made)
    made.tensors = good | {"l.weight": torch.zeros(2, 64, 3, dtype=torch.int32)}
    assert "a matrix is needed" in refusal(made)
    made = files("int4 group", symmetric=True)
    made.tensors["l.weight_zero_point"][0, 0] = 1
    with pytest.raises(CheckpointError, match=r"is not all zeros; config\.json says symmetric"):
        made.open().read("l.weight")


def test_symmetric_integers_need_no_zero_points(files):
    made = files("int4 group", symmetric=True)
    del made.tensors["l.weight_zero_point"]
    assert torch.equal(made.open().read("l.weight"), made.weight)


def test_a_model_to_compressed_tensors_is_exact(tmp_path):
    """Codes, scales and zero points of every linear are repacked, none is rounded."""
    source = make_model(tmp_path / "plain", num_hidden_layers=1)
    plain, tensors = open_checkpoint(source), {}
    folder = tmp_path / "quark"
    folder.mkdir()
    for name in plain.tensors:
        module, rank = name.removesuffix(".weight"), len(plain.tensors[name].shape)
        if module.endswith("_proj") and rank == 2:
            made = Files(folder, "uint4 group", shape=plain.tensors[name].shape)
            tensors |= {f"{module}{key[1:]}": tensor for key, tensor in made.tensors.items() if key.startswith("l.")}
            config = made.config
        else:
            tensors[name] = plain.read(name)
    save_file(tensors, folder / "model.safetensors")
    stated = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(stated))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())
    report = lowbit.convert(folder, tmp_path / "ct", format="compressed-tensors").report
    assert sum(tensor.repacked for tensor in report.tensors) == 7
    one, other = open_checkpoint(folder), open_checkpoint(tmp_path / "ct")
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
