"""bitsandbytes folders: what is read from files made here by hand, and a test for each way in which they can be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError
from lowbit.kernels.tables import CODEBOOKS, values
from lowbit.numerics.scales import dynamic_map
from lowbit.tensors import Granularity

SHAPE = (24, 128)
STATE = "l.weight.quant_state.bitsandbytes__nf4"
CONFIG = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": ["lm_head"],
}  # fmt: skip
CONFIG_8BIT = CONFIG | {"load_in_4bit": False, "load_in_8bit": True}


class Files:
    """A folder in the making: tensors and config, to be spoiled, and the weight that good ones decode to."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], config: dict, weight: torch.Tensor):
        self.folder, self.tensors, self.config, self.weight = folder, tensors, dict(config), weight
        self.tensors["lm_head.weight"] = torch.ones(4, 8, dtype=torch.bfloat16)

    @property
    def state(self) -> dict:
        return json.loads(bytes(self.tensors[STATE].tolist()))

    def set_state(self, text: str | bytes) -> None:
        self.tensors[STATE] = torch.tensor(list(text if isinstance(text, bytes) else text.encode()), dtype=torch.uint8)

    def change_state(self, **changes) -> None:
        self.set_state(json.dumps(self.state | changes))

    def open(self):
        self.folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.folder / "m.safetensors")
        (self.folder / "config.json").write_text(json.dumps({"quantization_config": self.config}))
        checkpoint = open_checkpoint(self.folder)
        assert checkpoint.schemes
        return checkpoint

    def refused(self, pattern: str) -> None:
        with pytest.raises(CheckpointError, match=pattern):
            self.open()


def four_bit(folder: Path, shape=SHAPE, block=64, nested=False, number="nf4", storage=torch.uint8) -> Files:
    """A random weight, packed here: codes of the flat weight two to a byte, the first in the high nibble."""
    generator = torch.Generator().manual_seed(1)
    count = shape[0] * shape[1]
    codes = torch.randint(0, 16, (count,), generator=generator, dtype=torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, count % 2))
    packed = padded[0::2] * 16 + padded[1::2]
    packed = torch.nn.functional.pad(packed, (0, -len(packed) % storage.itemsize)).view(storage)
    scales = -(-count // block)
    state = {"quant_type": number, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    if nested:
        scale_codes = torch.randint(100, 200, (scales,), generator=generator, dtype=torch.uint8)
        absmax = torch.rand(-(-scales // 256), generator=generator) * 0.1
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        scale = dynamic_map()[scale_codes.long()] * absmax.repeat_interleave(256)[:scales] + 0.25
        extra = {"absmax": scale_codes, "nested_absmax": absmax, "nested_quant_map": dynamic_map().clone()}
    else:
        scale = torch.rand(scales, generator=generator) + 0.1
        extra = {"absmax": scale}
    tensors = {"l.weight": packed[:, None], "l.weight.quant_map": values(CODEBOOKS[number]).clone()}
    tensors |= {f"l.weight.{leaf}": tensor for leaf, tensor in extra.items()}
    key = f"l.weight.quant_state.bitsandbytes__{number}"
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    weight = values(CODEBOOKS[number])[codes.long()] * scale.repeat_interleave(block)[:count]
    config = CONFIG | {"bnb_4bit_quant_type": number, "bnb_4bit_use_double_quant": nested}
    return Files(folder, tensors, config, weight.reshape(shape))


def eight_bit(folder: Path) -> Files:
    codes = torch.randint(-127, 128, SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    scb = torch.rand(SHAPE[0], generator=torch.Generator().manual_seed(3))
    tensors = {"l.weight": codes, "l.SCB": scb, "l.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Files(folder, tensors, CONFIG_8BIT, codes * (scb / 127)[:, None])


@pytest.fixture
def nf4(tmp_path) -> Files:
    return four_bit(tmp_path / "m")


@pytest.fixture
def nested(tmp_path) -> Files:
    return four_bit(tmp_path / "m", nested=True)


@pytest.fixture
def int8(tmp_path) -> Files:
    return eight_bit(tmp_path / "m")


@pytest.mark.parametrize("number", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "block"), [
    ((24, 128), 64), ((300, 192), 64), ((24, 128), 32), ((3, 8192), 4096),  # whole blocks in a row
    ((40, 96), 64), ((33, 30), 64), ((7, 5), 32), ((1, 3), 64), ((600, 100), 32),  # blocks that cross rows, odd sizes
])  # fmt: skip
def test_four_bit_weights_decode_whole_and_in_slabs(tmp_path, number, nested, shape, block):
    files = four_bit(tmp_path / "m", shape, block, nested, number)
    checkpoint = files.open()
    assert checkpoint.tensors["l.weight"].shape == shape
    assert torch.equal(checkpoint.read("l.weight"), files.weight)
    for start in range(0, shape[0], 7):
        stop = min(start + 7, shape[0])
        assert torch.equal(checkpoint.read("l.weight", start, stop), files.weight[start:stop])
    multiple = checkpoint.row_multiple("l.weight")
    for start in range(0, shape[0], multiple):
        rows = checkpoint.read_quantized("l.weight", start, min(start + multiple, shape[0]))
        assert torch.equal(rows.decode(), files.weight[start : start + multiple])
        assert rows.granularity is Granularity.GROUP
        assert (rows.nested is not None) == (nested and shape[1] % block == 0)
    scheme = checkpoint.schemes["l.weight"]
    assert scheme.name == number.upper()
    assert scheme.weight.group_size == (block if shape[1] % block == 0 else 1)
    assert checkpoint.scale_dtype("l.weight") == torch.float32


@pytest.mark.parametrize("storage", [torch.int8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(24, 128), (33, 30), (3, 3)])
def test_codes_stored_as_floats_are_the_same_bytes(tmp_path, storage, shape):
    """bnb_4bit_quant_storage, for FSDP: the bytes are reinterpreted, NaN patterns and all."""
    files = four_bit(tmp_path / "m", shape, storage=storage)
    checkpoint = files.open()
    for start in range(shape[0]):
        assert torch.equal(checkpoint.read("l.weight", start, start + 1), files.weight[start : start + 1])


def test_int8_weights_decode(int8):
    checkpoint = int8.open()
    assert torch.equal(checkpoint.read("l.weight"), int8.weight)
    assert torch.equal(checkpoint.read("l.weight", 5, 9), int8.weight[5:9])
    assert checkpoint.schemes["l.weight"].name == "INT8"
    assert checkpoint.input_scales == {}
    del int8.tensors["l.weight_format"]  # older files have none
    assert torch.equal(int8.open().read("l.weight"), int8.weight)


def test_logical_tensors_replace_the_stored_ones(nested):
    checkpoint = nested.open()
    assert set(checkpoint.tensors) == {"l.weight", "lm_head.weight"}
    owned = sum(tensor.nbytes for name, tensor in nested.tensors.items() if name.startswith("l."))
    assert checkpoint.tensors["l.weight"].nbytes == owned
    assert checkpoint.kind == "bitsandbytes"
    assert checkpoint.says_quantized("model.other")
    assert not checkpoint.says_quantized("lm_head")


def test_a_config_without_quant_method_is_known_by_its_flags(nf4):
    del nf4.config["quant_method"]
    assert torch.equal(nf4.open().read("l.weight"), nf4.weight)


def test_files_decide_about_double_quantization_and_a_note_says_so(nested):
    nested.config["bnb_4bit_use_double_quant"] = False
    checkpoint = nested.open()
    assert torch.equal(checkpoint.read("l.weight"), nested.weight)
    assert any("bnb_4bit_use_double_quant is false" in note for note in checkpoint.notes)


def test_trailing_spaces_of_a_state_do_not_matter(nf4):
    nf4.set_state(json.dumps(nf4.state) + "   ")
    assert torch.equal(nf4.open().read("l.weight"), nf4.weight)


# What config.json can have wrong.


def test_both_bit_widths(nf4):
    nf4.config["load_in_8bit"] = True
    nf4.refused("load_in_4bit is True; needed is one of")


def test_neither_bit_width(nf4):
    nf4.config["load_in_4bit"] = False
    nf4.refused("load_in_4bit is False; needed is one of")


def test_a_flag_that_is_no_flag(nf4):
    nf4.config["load_in_4bit"] = "yes"
    nf4.refused("load_in_4bit is 'yes'; needed is true or false")


def test_an_unknown_number(nf4):
    nf4.config["bnb_4bit_quant_type"] = "af4"
    nf4.refused("bnb_4bit_quant_type is 'af4'; needed is nf4 or fp4")


def test_a_number_that_is_a_list(nf4):
    nf4.config["bnb_4bit_quant_type"] = ["nf4"]
    nf4.refused("bnb_4bit_quant_type")


def test_int8_with_16_bit_main_weights(int8):
    int8.config["llm_int8_has_fp16_weight"] = True
    int8.refused("llm_int8_has_fp16_weight is True")


@pytest.mark.parametrize("entries", ["lm_head", [3], [["a"]], ["a("], ["x" * 5000]])
def test_skip_modules_that_are_no_names(nf4, entries):
    nf4.config["llm_int8_skip_modules"] = entries
    nf4.refused("llm_int8_skip_modules")


def test_a_quantized_weight_that_config_skips(nf4):
    nf4.config["llm_int8_skip_modules"] = ["l"]
    nf4.refused(r"l\.weight is part of a quantized weight, but config\.json does not say")


# Config of one kind, files of another.


def test_config_says_fp4_and_the_files_nf4(nf4):
    nf4.config["bnb_4bit_quant_type"] = "fp4"
    nf4.refused(r"l\.weight is quantized to nf4; config\.json says fp4")


def test_config_says_4_bit_and_the_files_8(int8):
    int8.config |= CONFIG
    int8.refused(r"l\.weight is quantized to int8; config\.json says nf4")


def test_config_says_8_bit_and_the_files_4(nf4):
    nf4.config |= CONFIG_8BIT
    nf4.refused(r"l\.weight is quantized to nf4; config\.json says int8")


def test_a_weight_of_both_kinds(nf4):
    nf4.tensors["l.SCB"] = torch.ones(SHAPE[0])
    nf4.refused("two kinds")


# Tensors that are absent, or of another dtype or shape.


@pytest.mark.parametrize("leaf", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_an_absent_part_of_a_four_bit_weight(nested, leaf):
    del nested.tensors[f"l.weight.{leaf}"]
    nested.refused(rf"l\.weight\.{leaf} .* is absent")


def test_an_absent_quant_state(nf4):
    del nf4.tensors[STATE]
    nf4.refused(r"l\.weight is U8, but l\.weight\.quant_state\.bitsandbytes__nf4 is absent")


def test_packed_codes_with_nothing_beside_them(nf4):
    for leaf in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4"):
        del nf4.tensors[f"l.weight.{leaf}"]
    nf4.refused(r"quant_state\.bitsandbytes__nf4 is absent")


def test_absent_codes(nf4):
    del nf4.tensors["l.weight"]
    nf4.refused(r"l\.weight is absent")


def test_absent_int8_scales(int8):
    del int8.tensors["l.SCB"]
    int8.refused(r"l\.weight is I8, but l\.SCB is absent")


def test_int8_scales_of_another_length(int8):
    int8.tensors["l.SCB"] = torch.ones(SHAPE[0] + 1)
    int8.refused(r"l\.SCB has shape \[25\]; \[24\] is needed")


def test_int8_codes_of_another_dtype(int8):
    int8.tensors["l.weight"] = int8.tensors["l.weight"].float()
    int8.refused(r"l\.weight is float32; int8 is needed")


def test_int8_codes_that_are_no_matrix(int8):
    int8.tensors["l.weight"] = int8.tensors["l.weight"].reshape(-1)
    int8.refused("a matrix is needed")


def test_int8_in_a_layout_of_old_gpus(int8):
    int8.tensors["l.weight_format"] = torch.tensor(1, dtype=torch.uint8)
    int8.refused("weight_format is 1; only 0, row by row")


def test_too_few_scales(nf4):
    nf4.tensors["l.weight.absmax"] = nf4.tensors["l.weight.absmax"][:-1]
    nf4.refused(r"l\.weight\.absmax has shape \[47\]; \[48\] is needed")


def test_scales_that_are_floats_where_codes_are_needed(nested):
    nested.tensors["l.weight.absmax"] = nested.tensors["l.weight.absmax"].float()
    nested.refused(r"l\.weight\.absmax is float32; uint8 is needed")


def test_too_few_codes(nf4):
    nf4.tensors["l.weight"] = nf4.tensors["l.weight"][:-1]
    nf4.refused(r"l\.weight has 1535 bytes; .* \[24, 128\] need 1536")


def test_codes_in_another_form(nf4):
    nf4.tensors["l.weight"] = nf4.tensors["l.weight"].reshape(24, 64)
    nf4.refused(r"l\.weight has shape \[24, 64\]; \[1536, 1\] is needed")


def test_codes_of_a_dtype_that_nothing_is_packed_into(nf4):
    nf4.tensors["l.weight"] = nf4.tensors["l.weight"].to(torch.int64)
    nf4.refused(r"l\.weight is I64; bytes or floats are needed")


def test_another_codebook(nf4):
    nf4.tensors["l.weight.quant_map"][3] += 0.01
    nf4.refused(r"l\.weight\.quant_map is not bitsandbytes' table")


def test_a_codebook_of_nan(nf4):
    nf4.tensors["l.weight.quant_map"][3] = float("nan")
    nf4.refused(r"l\.weight\.quant_map is not bitsandbytes' table")


def test_another_table_of_scales(nested):
    nested.tensors["l.weight.nested_quant_map"] += 0.01
    nested.refused(r"l\.weight\.nested_quant_map is not bitsandbytes' table")


# The JSON of quant_state.


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"{", b"[" * 4000, b'{"quant_type": "nf4"'])
def test_a_state_that_is_no_json(nf4, text):
    nf4.set_state(text)
    nf4.refused("is not JSON")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"nf4"'])
def test_a_state_that_is_no_object(nf4, text):
    nf4.set_state(text)
    nf4.refused("an object is needed")


def test_a_state_that_is_too_long(nf4):
    nf4.set_state(json.dumps(nf4.state) + " " * 5000)
    nf4.refused("at most 4096 uint8 are needed")


def test_a_state_of_floats(nf4):
    nf4.tensors[STATE] = nf4.tensors[STATE].float()
    nf4.refused("at most 4096 uint8 are needed")


@pytest.mark.parametrize(("key", "value"), [
    ("quant_type", "fp4"), ("quant_type", None), ("blocksize", 0), ("blocksize", -64), ("blocksize", 48),
    ("blocksize", 64.0), ("blocksize", True), ("blocksize", "64"), ("dtype", "int8"), ("dtype", ["float16"]),
    ("shape", None), ("shape", [24]), ("shape", [24, 128, 1]), ("shape", [24, -128]), ("shape", [24, 128.0]),
    ("shape", [True, 128]), ("shape", [2**31, 2]), ("shape", "24x128"), ("surprise", 1),
    ("nested_blocksize", 64), ("nested_blocksize", 256.0), ("nested_dtype", "float64"), ("nested_offset", None),
    ("nested_offset", float("nan")), ("nested_offset", float("inf")), ("nested_offset", 1e300), ("nested_offset", True),
    ("nested_offset", "0.25"),
])  # fmt: skip
def test_a_state_with_a_wrong_value(nested, key, value):
    nested.change_state(**{key: value})
    nested.refused(rf"{STATE}: {key} is ")


@pytest.mark.parametrize("key", ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"])
def test_a_state_without_a_key(nested, key):
    state = nested.state
    del state[key]
    nested.set_state(json.dumps(state))
    nested.refused(rf"{STATE}: {key} is None")


@pytest.mark.parametrize("shape", [[24, 64], [48, 128], [2**30, 2**30], [1, 3]])
def test_a_state_whose_shape_does_not_fit_the_codes(nf4, shape):
    nf4.change_state(shape=shape)
    nf4.refused(r"l\.weight has 1536 bytes; 4-bit codes of its shape")


def test_a_state_with_another_block_size_than_the_scales(nf4):
    nf4.change_state(blocksize=32)
    nf4.refused(r"l\.weight\.absmax has shape \[48\]; \[96\] is needed")
