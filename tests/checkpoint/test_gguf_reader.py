"""Reading GGUF files: values against transformers' own loader, layouts, slices, every type that can be decoded."""

from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import TINY, tiny_tensors, write_tiny_gguf
from gguf import GGMLQuantizationType as Kind

from lowbit.checkpoint import open_checkpoint, open_gguf
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.formats.gguf.table import ROWS

# What `checkpoint_files` can write and transformers can read.
ARCHITECTURES = ("gemma3", "llama", "qwen2", "qwen3")


def _llama_rows_as_gguf(weight, heads):
    """llama.cpp's own permutation of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _transformers_state_dict(checkpoint, path):
    """What transformers reads from the file. It is given our config: its own ignores Qwen 3's head size."""
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    return model.state_dict()


@pytest.mark.interop
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_tensors_equal_what_transformers_loads(tmp_path, architecture, tied):
    """The types of a Q4_1 file: linears Q4_1, embedding Q8_0, norms F32."""
    linears = [name for name, values in tiny_tensors(architecture, tied).items() if values.ndim == 2]
    types = dict.fromkeys(linears, Kind.Q4_1) | {"token_embd.weight": Kind.Q8_0}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture, tied=tied, types=types)
    checkpoint = open_gguf(path)
    expected = _transformers_state_dict(checkpoint, path)
    if tied:
        expected.pop("lm_head.weight")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(checkpoint.read(name).float(), values), name
    assert checkpoint.config()["tie_word_embeddings"] is tied


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rebuilt_config_makes_a_model_that_takes_every_tensor(tmp_path, architecture):
    """`assign` into the class that config.json names: no key missing, none left over, every shape right."""
    import transformers

    checkpoint = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", architecture))
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    class_name = checkpoint.config()["architectures"][0]
    assert class_name.lower().startswith(architecture)
    model = getattr(transformers, class_name)(config)
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors}, strict=True)
    assert config.head_dim == TINY["head_dim"]
    assert config.vocab_size == TINY["vocab"]


# What llama.cpp's loader takes though the package does not list it.
_UNLISTED = {
    "lfm2moe": {gguf.MODEL_TENSOR.OUTPUT},
    "gemma4": {gguf.MODEL_TENSOR.FFN_GATE_EXP, gguf.MODEL_TENSOR.FFN_UP_EXP},
}
# Names that the converter changes before it asks the package: without experts, the shared MLP is the MLP.
_RENAMED = {"model.layers.{bid}.shared_mlp.output_linear"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model_type}-{row.arch}")
def test_the_names_agree_with_the_gguf_package(row):
    """Where the package knows a Hugging Face name; and no tensor that it does not list for the architecture."""
    kind = next((kind for kind, spelling in gguf.MODEL_ARCH_NAMES.items() if spelling == row.arch), None)
    if kind is None:
        pytest.skip("the gguf package is older than this architecture")
    names = gguf.get_tensor_name_map(kind, 4)
    known = 0
    modules = Counter(module for module, _ in row.places.values())
    for (tensor, _), (module, _) in row.places.items():
        if modules[module] > 1:  # split; the package has names for the parts only, or for a tensor of older files
            continue
        stacked = module.replace(".{expert}", "").format(bid=3)
        theirs = names.get_name(stacked) or names.get_name(stacked.replace("language_model.", ""))
        assert theirs in (None, gguf.TENSOR_NAMES[tensor].format(bid=3)) or module in _RENAMED, module
        known += theirs is not None
        assert tensor in {*gguf.MODEL_TENSORS[kind], *_UNLISTED.get(row.arch, ())}, tensor
    assert known > len(row.places) / 2


@pytest.mark.parametrize("kind", [None, Kind.Q8_0, Kind.F16])
def test_any_slice_of_q_and_k_is_in_hugging_face_order(tmp_path, kind):
    tensors = tiny_tensors("llama")
    original = {}
    for short, heads in (("q", TINY["heads"]), ("k", TINY["kv_heads"])):
        name = f"blk.1.attn_{short}.weight"
        values = np.round(tensors[name] * 16) / 16
        values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind) if kind else values
        original[short] = torch.from_numpy(values.astype(np.float32))
        tensors[name] = np.ascontiguousarray(_llama_rows_as_gguf(values, heads)).astype(np.float32)
    types = {f"blk.1.attn_{short}.weight": kind for short in original} if kind else None
    checkpoint = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors, types=types))
    for short, values in original.items():
        name = f"model.layers.1.self_attn.{short}_proj.weight"
        for start, stop in ((0, None), (0, 16), (16, 32), (3, 29), (7, 8), (5, 5)):
            assert torch.equal(checkpoint.read(name, start, stop).float(), values[start:stop]), (short, start, stop)


def _decodable_kinds():
    return [kind for kind in gguf.GGML_QUANT_SIZES if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", _decodable_kinds(), ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_decodes_can_be_read_by_rows(tmp_path, kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = TINY["width"], 2 * 256
    stored = np.random.default_rng(0).integers(0, 60, (rows, columns // block * block_bytes), dtype=np.uint8)
    expected = gguf.quants.dequantize(stored, kind)
    path = _write_one_raw(tmp_path, stored, kind)
    checkpoint = open_gguf(path)
    info = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    assert (info.shape, info.stored, info.nbytes) == ((rows, columns), kind.name, stored.nbytes)
    for start, stop in ((0, rows), (5, 23)):
        read = checkpoint.read(info.name, start, stop)
        assert read.dtype == info.dtype
        np.testing.assert_array_equal(read.float().numpy(), expected[start:stop].astype(np.float32))


def _write_one_raw(tmp_path, stored, kind):
    """A tiny model whose blk.0.ffn_down is `stored`, bytes of ggml type `kind`."""
    tensors = tiny_tensors("llama")
    del tensors["blk.0.ffn_down.weight"]

    def add_raw(writer):
        writer.add_tensor("blk.0.ffn_down.weight", stored, raw_dtype=kind)

    return write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors, extra=add_raw)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_floats_keep_their_dtype(tmp_path, kind):
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    name = "blk.0.ffn_up.weight"
    path = write_tiny_gguf(tmp_path / "tiny.gguf", types={name: kind})
    checkpoint = open_gguf(path)
    read = checkpoint.read("model.layers.0.mlp.up_proj.weight", 3, 9)
    assert read.dtype == checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert torch.equal(read, torch.from_numpy(tiny_tensors("llama")[name])[3:9].to(dtype))


def test_a_quantized_vector_is_sliced_after_decoding(tmp_path):
    checkpoint = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", types={"output_norm.weight": Kind.Q8_0}))
    whole = checkpoint.read("model.norm.weight")
    assert torch.allclose(whole, torch.from_numpy(tiny_tensors("llama")["output_norm.weight"]), atol=0.02)
    assert torch.equal(checkpoint.read("model.norm.weight", 5, 41), whole[5:41])


def test_gemma_norms_come_back_without_the_one(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "gemma3", types={"output_norm.weight": Kind.BF16})
    checkpoint = open_gguf(path)
    stored = torch.from_numpy(tiny_tensors("gemma3")["output_norm.weight"]).bfloat16()
    assert checkpoint.tensors["model.norm.weight"].dtype == torch.float32
    assert torch.equal(checkpoint.read("model.norm.weight"), stored.float() - 1)
    assert torch.equal(checkpoint.read("model.norm.weight", 3, 5), stored[3:5].float() - 1)


def _rewrite_type(path, tensor, number):
    """Overwrite the ggml type in a tensor's row of the header."""
    content = bytearray(path.read_bytes())
    row = content.index(tensor.encode()) + len(tensor)
    position = row + 4 + 8 * int.from_bytes(content[row : row + 4], "little")
    content[position : position + 4] = number.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(("number", "found"), [(500, "ggml type 500"), (Kind.Q8_1, "stored as Q8_1")])
def test_a_type_that_cannot_be_decoded_is_refused_only_when_it_is_read(tmp_path, number, found):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    _rewrite_type(path, "blk.0.attn_output.weight", number)
    checkpoint = open_gguf(path)
    checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(CheckpointError, match=found) as caught:
        checkpoint.read("model.layers.0.self_attn.o_proj.weight")
    assert str(path) in str(caught.value)
    assert "blk.0.attn_output.weight" in str(caught.value)


def test_other_architectures_are_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, "rwkv7", tensors={"token_embd.weight": np.zeros((8, 64), np.float32)})
    with pytest.raises(ArchitectureError, match="'rwkv7'"):
        open_gguf(path)


def test_experts_where_the_architecture_has_none_are_refused(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "qwen3", extra=lambda writer: writer.add_expert_count(8))
    with pytest.raises(ArchitectureError, match="qwen3 with 8 experts"):
        open_gguf(path)


def test_experts_that_are_not_there_are_missed(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", extra=lambda writer: writer.add_expert_count(8))
    with pytest.raises(ArchitectureError, match="no place in MixtralForCausalLM"):
        open_gguf(path)


def test_a_tensor_without_a_place_is_refused(tmp_path):
    tensors = tiny_tensors("llama") | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors)
    with pytest.raises(ArchitectureError, match=r"'blk\.0\.attn_sinks\.weight' has no place in LlamaForCausalLM"):
        open_gguf(path)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = tiny_tensors("llama")
    del tensors["blk.1.ffn_up.weight"]
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"'blk\.1\.ffn_up\.weight' is missing"):
        open_gguf(path)


def test_missing_layers_are_noticed(tmp_path):
    tensors = {name: values for name, values in tiny_tensors("llama").items() if not name.startswith("blk.1")}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors)
    with pytest.raises(CheckpointError, match="block_count is 2, but tensors of 1 layers"):
        open_gguf(path)


def test_biases_are_permuted_and_show_in_the_config(tmp_path):
    tensors = tiny_tensors("llama")
    bias = np.arange(64, dtype=np.float32)
    for layer in range(2):
        tensors[f"blk.{layer}.attn_q.bias"] = np.ascontiguousarray(_llama_rows_as_gguf(bias, 4))
        tensors[f"blk.{layer}.attn_k.bias"] = tensors[f"blk.{layer}.attn_v.bias"] = bias[:32].copy()
        tensors[f"blk.{layer}.attn_output.bias"] = bias.copy()
    checkpoint = open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors))
    assert torch.equal(checkpoint.read("model.layers.1.self_attn.q_proj.bias"), torch.from_numpy(bias))
    assert torch.equal(checkpoint.read("model.layers.1.self_attn.q_proj.bias", 3, 40), torch.from_numpy(bias[3:40]))
    assert checkpoint.config()["attention_bias"] is True


def test_biases_without_a_place_are_refused(tmp_path):
    tensors = tiny_tensors("llama") | {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors)
    with pytest.raises(ArchitectureError, match="biases on ATTN_Q"):
        open_gguf(path)


def _split(tmp_path, parts=2):
    tensors = tiny_tensors("llama")
    names = list(tensors)
    for part in range(parts):
        path = tmp_path / f"tiny-{part + 1:05d}-of-{parts:05d}.gguf"

        def add_split(writer, part=part):
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(names))

        write_tiny_gguf(path, tensors={name: tensors[name] for name in names[part::parts]}, extra=add_split)
    return tmp_path / f"tiny-00001-of-{parts:05d}.gguf"


def test_split_files_read_as_one_whichever_is_named(tmp_path):
    whole = open_gguf(write_tiny_gguf(tmp_path / "whole.gguf"))
    first = _split(tmp_path)
    for named in (first, first.with_name("tiny-00002-of-00002.gguf")):
        checkpoint = open_gguf(named)
        assert checkpoint.tensors.keys() == whole.tensors.keys()
        for name in whole.tensors:
            assert torch.equal(checkpoint.read(name), whole.read(name))
    (tmp_path / "whole.gguf").unlink()
    assert len(open_checkpoint(tmp_path).tensors) == len(whole.tensors)
    assert checkpoint.config()["num_hidden_layers"] == 2


def test_a_missing_part_is_named(tmp_path):
    first = _split(tmp_path)
    first.with_name("tiny-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"part tiny-00002-of-00002\.gguf is missing"):
        open_gguf(first)


def test_swapped_parts_are_noticed(tmp_path):
    first = _split(tmp_path)
    second = first.with_name("tiny-00002-of-00002.gguf")
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(CheckpointError, match=r"split\.no is 1, but by its name it is 0"):
        open_gguf(first)


def test_a_part_that_states_another_number_of_tensors_is_noticed(tmp_path):
    """As a part of another model does, which nothing else tells: later parts hold no key-values of the model."""
    first = _split(tmp_path)
    second = first.with_name("tiny-00002-of-00002.gguf")
    data = bytearray(second.read_bytes())
    place = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    data[place] += 1
    second.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.gguf: split\.tensors\.count is \d+, the parts hold"):
        open_gguf(first)


def test_any_architecture_can_be_read_raw(tmp_path):
    stacked = np.arange(3 * 4 * 64, dtype=np.float32).reshape(3, 4, 64)
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", "mamba", tensors={"x": stacked, "y": stacked, "z": stacked[0, 0]},
        types={"y": Kind.Q8_0},
    )  # fmt: skip
    raw = open_raw_gguf(path)
    x, y, z = raw.tensors
    assert raw.metadata["general.architecture"] == "mamba"
    assert torch.equal(raw.decode(x), torch.from_numpy(stacked).reshape(12, 64))
    assert torch.equal(raw.decode(x, 5, 9), torch.from_numpy(stacked).reshape(12, 64)[5:9])
    stored = gguf.quants.quantize(stacked, Kind.Q8_0)
    assert bytes(raw.bytes(y)) == stored.tobytes()
    expected = torch.from_numpy(gguf.quants.dequantize(stored, Kind.Q8_0)).reshape(12, 64)
    assert torch.equal(raw.decode(y), expected)
    assert torch.equal(raw.decode(y, 3, 8), expected[3:8])
    assert torch.equal(raw.decode_rows(y, np.array([7, 0])), expected[[7, 0]])
    assert torch.equal(raw.decode(z), torch.from_numpy(stacked)[0, :1])
    with pytest.raises(IndexError, match="which has 12"):
        raw.decode(x, 3, 13)


def test_key_values_can_be_copied_verbatim(tmp_path):
    raw = open_raw_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"))
    kept = b"".join(bytes(raw.key_value_bytes(key)) for key in raw.metadata)
    content = (tmp_path / "tiny.gguf").read_bytes()
    assert content[24:].startswith(kept)


def test_raw_parts_of_a_split_are_one_list(tmp_path):
    raw = open_raw_gguf(_split(tmp_path, parts=3))
    assert len(raw.files) == len(raw.headers) == 3
    assert {tensor.name for tensor in raw.tensors} == tiny_tensors("llama").keys()
    for tensor in raw.tensors:
        found = raw.decode(tensor).reshape(tensor.shape)
        assert torch.equal(found, torch.from_numpy(tiny_tensors("llama")[tensor.name]))


@pytest.mark.parametrize(("key", "found"), [
    ("llama.attention.head_count", "one positive number"), ("llama.block_count", "block_count is"),
    ("llama.attention.key_length", "one positive number"), ("llama.attention.layer_norm_rms_epsilon", "one float32"),
])  # fmt: skip
def test_key_values_of_the_wrong_kind_are_named(tmp_path, key, found):
    def spoil(writer):
        writer.kv_data[0].pop(key)
        writer.add_array(key, [1, 2])

    with pytest.raises((ArchitectureError, CheckpointError), match=found) as caught:
        open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", extra=spoil))
    assert key.rpartition(".")[2] in str(caught.value)


def test_another_number_of_experts_is_noticed(tmp_path):
    tensors = tiny_tensors("llama")
    tensors = {name: values for name, values in tensors.items() if "ffn_" not in name or "ffn_norm" in name}
    for layer in range(2):
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = np.zeros((8, 64), np.float32)
        for part, shape in (("gate", (4, 96, 64)), ("up", (4, 96, 64)), ("down", (4, 64, 96))):
            tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = np.zeros(shape, np.float32)

    def add(writer):
        writer.add_expert_count(8)
        writer.add_expert_used_count(2)

    with pytest.raises(CheckpointError, match=r"\[4, 96, 64\], where the key-values count 8"):
        open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors, extra=add))
