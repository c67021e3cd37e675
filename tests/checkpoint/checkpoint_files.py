"""Checkpoint files for the tests, built byte by byte so that any field can lie."""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def safetensors_bytes(header, data=b"", length=None):
    """A safetensors file: `header` is a dict, or the raw bytes of one; `length` what it claims to be long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def open_quantized(folder, tensors, quantization, metadata=None):
    """The checkpoint of a folder with these tensors and quantization_config, which must have codes."""
    save_file(tensors, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.schemes
    return checkpoint


def safetensors_entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def gguf_string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_key_value(key, kind, value):
    """`value` is bytes, already encoded, or what `kind` needs."""
    return gguf_string(key) + struct.pack("<I", kind) + (value if isinstance(value, bytes) else _encode(kind, value))


def _encode(kind, value):
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(_encode(item_kind, item) for item in items)
    return struct.pack("<" + {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
                              U64: "Q", I64: "q", F64: "d"}[kind], value)  # fmt: skip


def gguf_tensor_row(name, dims, kind=0, offset=0):
    """`dims` as GGUF counts them, fastest first."""
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(key_values=(), rows=(), data=b"", version=3, counts=None, magic=b"GGUF", alignment=32):
    """A GGUF file; `counts` overrides (tensors, key-values)."""
    tensor_count, key_count = counts or (len(rows), len(key_values))
    head = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(key_values) + b"".join(rows)
    return head + b"\0" * (-len(head) % alignment) + data


TINY = {"layers": 2, "width": 64, "hidden": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 64}
QKV_BIAS = ("attn_q.bias", "attn_k.bias", "attn_v.bias")


def tiny_tensors(architecture, tied=False, seed=0):
    """GGUF name → float32 array of a two-layer model, shapes as torch sees them."""
    rng = np.random.default_rng(seed)
    q, kv = TINY["heads"] * TINY["head_dim"], TINY["kv_heads"] * TINY["head_dim"]
    width, hidden = TINY["width"], TINY["hidden"]
    block = {
        "attn_norm.weight": (width,), "ffn_norm.weight": (width,),
        "attn_q.weight": (q, width), "attn_k.weight": (kv, width), "attn_v.weight": (kv, width),
        "attn_output.weight": (width, q),
        "ffn_gate.weight": (hidden, width), "ffn_up.weight": (hidden, width), "ffn_down.weight": (width, hidden),
    }  # fmt: skip
    if architecture == "qwen2":
        block |= dict(zip(QKV_BIAS, ((q,), (kv,), (kv,)), strict=True))
    if architecture in ("qwen3", "gemma3"):
        block |= {"attn_q_norm.weight": (TINY["head_dim"],), "attn_k_norm.weight": (TINY["head_dim"],)}
    if architecture == "gemma3":
        block |= {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
    shapes = {"token_embd.weight": (TINY["vocab"], width), "output_norm.weight": (width,)}
    for layer in range(TINY["layers"]):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    if not tied:
        shapes["output.weight"] = (TINY["vocab"], width)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny_gguf(path, architecture="llama", tensors=None, types=None, extra=None, tied=False):
    """A whole small model; `types` maps name → ggml type, `extra` adds calls on the writer before it is written."""
    import gguf

    writer = gguf.GGUFWriter(Path(path), architecture)
    writer.add_block_count(TINY["layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(TINY["width"])
    writer.add_feed_forward_length(TINY["hidden"])
    writer.add_head_count(TINY["heads"])
    writer.add_head_count_kv(TINY["kv_heads"])
    writer.add_key_length(TINY["head_dim"])
    writer.add_rope_dimension_count(TINY["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(32)
    letters = [chr(ord("!") + i) for i in range(TINY["vocab"] - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["<s>", "</s>", *letters, "!!"])
    writer.add_token_types([3, 3] + [1] * (len(letters) + 1))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if extra is not None:
        extra(writer)
    for name, values in (tiny_tensors(architecture, tied) if tensors is None else tensors).items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
