"""Files that are incomplete, tensors that are not what config.json says, values that cannot be right."""

import json
import math

import pytest
import torch
from breaking import ATTENTION, BLOCK, assert_breaks, edit_config, edit_tensors

import lowbit

O_PROJ = f"{ATTENTION}.o_proj"
NORM = f"{BLOCK}.input_layernorm.weight"


def set_flat(name, index, value):
    def edit(tensors):
        tensors[name].view(-1)[index] = value

    return edit


def test_truncated_file(broken):
    folder = broken()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    verification = assert_breaks(folder, "files", "model.safetensors")
    assert "scales" in verification.unchecked


def sharded(broken):
    folder = broken(shard_size=1_000_000)
    if not (folder / "model.safetensors.index.json").exists():  # small enough for one file: cut it in two
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for shard, inside in shards.items():
            save_file({name: tensors[name] for name in inside}, folder / shard)
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: shard for shard, inside in shards.items() for name in inside},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_missing_shard(broken):
    folder = sharded(broken)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert_breaks(folder, "files", "model-00002-of-00002.safetensors")


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_index_naming_an_absent_tensor(broken):
    folder = sharded(broken)
    edit_index(folder, lambda index: index["weight_map"].update(ghost="model-00001-of-00002.safetensors"))
    assert_breaks(folder, "files", "ghost")


def test_index_with_a_wrong_total_size(broken):
    folder = sharded(broken)
    edit_index(folder, lambda index: index["metadata"].update(total_size=7))
    assert_breaks(folder, "sizes", "total_size", "7")


def test_weight_file_that_belongs_to_another_model(broken):
    folder = broken()
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert_breaks(folder, "files", "consolidated.safetensors")


def test_missing_tokenizer(broken):
    folder = broken()
    (folder / "tokenizer.json").unlink()
    assert_breaks(folder, "tokenizer", "tokenizer.json")


def test_tokenizer_that_does_not_load(broken):
    folder = broken()
    (folder / "tokenizer.json").write_text("{}")
    assert_breaks(folder, "tokenizer", "tokenizer.json")


def test_generation_config_that_does_not_parse(broken):
    folder = broken()
    (folder / "generation_config.json").write_text("{")
    assert_breaks(folder, "generation-config", "generation_config.json")


def test_generation_config_that_is_a_list(broken):
    folder = broken()
    (folder / "generation_config.json").write_text("[]")
    assert_breaks(folder, "generation-config", "a JSON object is needed")


def test_tokens_beyond_the_embedding(broken):
    folder = broken()
    stated = json.loads((folder / "tokenizer.json").read_text())
    added = {"id": 5000, "content": "<|new|>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = [*stated["added_tokens"], added]
    vocabulary = stated["model"]["vocab"] | {
        f"word{number}": number for number in range(len(stated["model"]["vocab"]), 5000)
    }
    stated |= {"added_tokens": more, "model": stated["model"] | {"vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    assert_breaks(folder, "token-ids", "rows")


def test_lost_generation_config(broken, source):
    folder = broken()
    (folder / "generation_config.json").unlink()
    assert_breaks(folder, "generation-config", "absent", source=source)


def test_nothing_is_said_of_a_source_that_is_not_known(broken):
    folder = broken()
    (folder / "generation_config.json").unlink()
    [check] = [each for each in lowbit.verify(folder).checks if each.rule == "generation-config"]
    assert check.detail == "no generation_config.json"


def test_lost_chat_template(broken, source):
    folder = broken()
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert_breaks(folder, "chat-template", source=source)


@pytest.mark.parametrize("name", [f"{O_PROJ}.weight_scale", f"{O_PROJ}.weight_shape", NORM])
def test_missing_tensor(broken, name):
    folder = broken()
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert_breaks(folder, "tensors", name)


def test_wrong_dtype(broken):
    folder = broken()
    name = f"{O_PROJ}.weight_packed"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int64)}))
    assert_breaks(folder, "tensors", name, "int64")


def test_wrong_shape(broken):
    folder = broken()
    name = f"{O_PROJ}.weight_scale"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    assert_breaks(folder, "tensors", name, "[127, 1]")
    assert_breaks(folder, "sizes", name)


def test_leftover_weight_beside_the_packed_one(broken):
    folder = broken()
    name = f"{O_PROJ}.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(128, 128, dtype=torch.bfloat16)}))
    assert_breaks(folder, "leftovers", name, "pack-quantized")


def test_tensor_of_no_module(broken):
    folder = broken()
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.7.mlp.gate.weight": torch.zeros(4)}))
    assert_breaks(folder, "leftovers", "model.layers.7.mlp.gate.weight")


def test_column_permutation(broken):
    folder = broken()
    name = f"{O_PROJ}.weight_g_idx"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(128, dtype=torch.int32)}))
    assert_breaks(folder, "activation-order", name)


def unquantize(tensors, linear):
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{linear}.{leaf}"]
    tensors[f"{linear}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)


def test_unquantized_linear_that_is_not_ignored(broken):
    folder = broken()
    edit_tensors(folder, lambda tensors: unquantize(tensors, O_PROJ))
    assert_breaks(folder, "coverage", O_PROJ)


def test_ignored_linear_that_is_quantized(broken):
    folder = broken()
    edit_config(folder, lambda quantization: quantization["ignore"].append(O_PROJ))
    assert_breaks(folder, "coverage", O_PROJ, "weight_packed")


def test_linear_that_is_neither_targeted_nor_ignored(broken):
    folder = broken()
    edit_tensors(folder, lambda tensors: unquantize(tensors, O_PROJ))
    pattern = r"re:.*\.(q|k|v|gate|up|down)_proj$|re:.*1.self_attn.o_proj"
    edit_config(folder, lambda q: q["config_groups"]["group_0"].update(targets=[pattern]))
    assert_breaks(folder, "coverage", O_PROJ)


def test_zero_points_in_a_symmetric_scheme(broken):
    folder = broken()
    name = f"{O_PROJ}.weight_zero_point"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(16, 1, dtype=torch.int32)}))
    assert_breaks(folder, "zero-points", name, "symmetric")


def test_missing_zero_points(broken):
    folder = broken("W4A16_ASYM")
    name = f"{O_PROJ}.weight_zero_point"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert_breaks(folder, "tensors", name)


@pytest.mark.parametrize(
    ("scheme", "value"),
    [
        *((scheme, value) for scheme in ("W4A16", "W8A8", "FP8_BLOCK") for value in (math.nan, math.inf)),
        ("W8A8", -0.5), ("FP8_BLOCK", -0.5), ("W8A16", -0.5), ("W4A16_ASYM", -0.5), ("NVFP4A16", -0.5), ("W4A8", -0.5),
    ],
)  # fmt: skip
def test_scale_that_is_no_number_or_has_no_sign_to_choose(broken, scheme, value):
    folder = broken(scheme)
    name = f"{O_PROJ}.weight_scale"
    edit_tensors(folder, set_flat(name, 0, value))
    assert_breaks(folder, "scales", name)


def test_power_of_two_scale_that_is_nan(broken):
    folder = broken("MXFP4A16")
    name = f"{O_PROJ}.weight_scale"
    edit_tensors(folder, set_flat(name, 5, 255))
    assert_breaks(folder, "scales", name, "row 1")


def test_global_scale_of_zero(broken):
    folder = broken("NVFP4A16")
    name = f"{O_PROJ}.weight_global_scale"
    edit_tensors(folder, set_flat(name, 0, 0.0))
    assert_breaks(folder, "scales", name)


def test_zero_scale_of_weights_that_are_not_zero(broken):
    folder = broken()
    name = f"{O_PROJ}.weight_scale"
    edit_tensors(folder, set_flat(name, 3, 0.0))
    assert_breaks(folder, "scales", name, "row 3")


def test_zero_scale_of_an_all_zero_row_is_fine(broken):
    folder = broken("W8A8")

    def edit(tensors):
        tensors[f"{O_PROJ}.weight"][3] = 0
        tensors[f"{O_PROJ}.weight_scale"][3] = 0

    edit_tensors(folder, edit)
    from lowbit.verification import verify

    assert verify(folder).ok


def test_nan_code(broken):
    folder = broken("FP8_DYNAMIC")
    name = f"{O_PROJ}.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(torch.uint8).view(-1).__setitem__(130, 0x7F))
    assert_breaks(folder, "codes", f"{name}[1, 2]", "NaN")


def test_code_out_of_range(broken):
    folder = broken("W4A8")
    name = f"{O_PROJ}.weight"
    edit_tensors(folder, set_flat(name, 0, 9))
    assert_breaks(folder, "codes", f"{name}[0, 0]", "9", "-8..7")


def test_weight_shape_that_lies(broken):
    folder = broken()
    name = f"{O_PROJ}.weight_shape"
    edit_tensors(folder, set_flat(name, 0, 64))
    assert_breaks(folder, "codes", name)


def test_padding_bits_that_are_set():
    from lowbit.verification.survey import padding_is_set

    assert not padding_is_set(torch.tensor([[0x00088888]], dtype=torch.int32), 20)
    assert padding_is_set(torch.tensor([[0x00188888]], dtype=torch.int32), 20)
    assert padding_is_set(torch.tensor([[0x01000000]], dtype=torch.int32), 20)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_rows_leave_their_padding_alone(bits):
    from lowbit import kernels
    from lowbit.verification.survey import padding_is_set

    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    for columns in (1, 7, 8, 31, 33, 100):
        codes = torch.randint(low, high, (3, columns), generator=generator, dtype=torch.int8)
        words = kernels.pack_dense(codes, bits)
        assert not padding_is_set(words, columns * bits)
        used = columns * bits % 32
        if used:
            words[1, -1] |= 1 << used if used < 31 else -(1 << 31)
            assert padding_is_set(words, columns * bits)


def test_nan_in_an_unquantized_tensor(broken):
    folder = broken()
    edit_tensors(folder, set_flat(NORM, 0, math.nan))
    assert_breaks(folder, "finite", NORM)


def test_unquantized_tensor_that_differs_from_the_source(broken, source):
    folder = broken()
    edit_tensors(folder, set_flat(NORM, 0, 3.0))
    assert_breaks(folder, "unquantized", NORM, source=source)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W3A16", "NVFP4A16", "MXFP4A16"])
def test_one_tampered_packed_code(broken, source, scheme):
    folder = broken(scheme)

    def edit(tensors):
        tensors[f"{O_PROJ}.weight_packed"].view(torch.uint8).view(-1)[0] ^= 0x03

    edit_tensors(folder, edit)
    assert_breaks(folder, "nearest-codes", f"{O_PROJ}.weight[0, 0]", source=source, nearest=True)


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "MXFP8"])
def test_one_tampered_byte_code(broken, source, scheme):
    folder = broken(scheme)

    def edit(tensors):
        tensors[f"{O_PROJ}.weight"].view(torch.uint8)[2, 5] ^= 0x01

    edit_tensors(folder, edit)
    assert_breaks(folder, "nearest-codes", f"{O_PROJ}.weight[2, 5]", source=source, nearest=True)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_weights_of_another_layer(broken, source, scheme):
    folder = broken(scheme)

    def edit(tensors):
        for name in [name for name in tensors if name.startswith(O_PROJ)]:
            tensors[name] = tensors[name.replace("o_proj", "q_proj")].clone()

    edit_tensors(folder, edit)
    assert_breaks(folder, "relative-error", f"{O_PROJ}.weight", source=source)


def test_error_feedback_may_leave_more_than_its_bits_allow(broken, source):
    """At 2 bits it moves weights further than 1.0 of their size; the report says how far, and no other tensor may."""
    from lowbit.verification import verify

    folder = broken("W4A16")

    def edit(tensors):
        for name in [name for name in tensors if name.startswith(O_PROJ)]:
            tensors[name] = tensors[name.replace("o_proj", "q_proj")].clone()

    edit_tensors(folder, edit)
    found = verify(folder, source=source, errors={f"{O_PROJ}.weight": 2.1})
    assert not [check for check in found.broken if check.rule == "relative-error"]
    assert_breaks(folder, "relative-error", f"{O_PROJ}.weight", source=source, errors={f"{O_PROJ}.weight": 1.0})


def test_source_of_another_shape(broken, tmp_path):
    from lowbit.checkpoint import open_safetensors
    from models import make_model

    other = make_model(tmp_path / "other", hidden_size=64)
    assert_breaks(broken(), "relative-error", f"{ATTENTION}.q_proj.weight", source=open_safetensors(other))
