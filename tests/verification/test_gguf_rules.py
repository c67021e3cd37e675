"""llama.cpp's rules: a good GGUF file passes all; each test breaks one thing and names the rule that sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType as V

from fuzzing import bounded_memory
from lowbit.errors import LowbitError, UsageError
from lowbit.export import Piece
from lowbit.formats.gguf.raw import RawCheckpoint, open_raw_gguf
from lowbit.formats.gguf.read import open_gguf
from lowbit.formats.gguf.rules import check_shapes
from lowbit.formats.gguf.subject import GGUFSubject
from lowbit.formats.gguf.write import GGUFWriter, StoredBlocks, packed_key_values
from lowbit.numerics import ggml
from lowbit.verification import verify

WIDTH, HIDDEN, VOCAB = 64, 96, 24
SHAPES = {
    "token_embd.weight": (VOCAB, WIDTH),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (WIDTH, WIDTH),
    "blk.0.attn_v.weight": (WIDTH, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.ffn_gate.weight": (HIDDEN, WIDTH),
    "blk.0.ffn_up.weight": (HIDDEN, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, HIDDEN),
    "output_norm.weight": (WIDTH,),
}


def key_values() -> dict[str, tuple[Any, ...]]:
    return {
        "general.architecture": ("llama", V.STRING),
        "general.quantization_version": (2, V.UINT32),
        "llama.block_count": (1, V.UINT32),
        "llama.context_length": (128, V.UINT32),
        "llama.embedding_length": (WIDTH, V.UINT32),
        "llama.feed_forward_length": (HIDDEN, V.UINT32),
        "llama.attention.head_count": (4, V.UINT32),
        "tokenizer.ggml.model": ("gpt2", V.STRING),
        "tokenizer.ggml.tokens": ([chr(97 + i) for i in range(VOCAB)], V.ARRAY, V.STRING),
        "tokenizer.ggml.token_type": ([1] * VOCAB, V.ARRAY, V.INT32),
        "tokenizer.ggml.merges": (["a b"], V.ARRAY, V.STRING),
        "tokenizer.ggml.eos_token_id": (2, V.UINT32),
    }


def weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def write(path: Path, tensors=None, values=None, type_name="Q8_0") -> Path:
    """A file of one llama block; matrices in `type_name`."""
    content = {}
    for name, weight in (tensors or weights()).items():
        kind = ggml.find_type(type_name if weight.dim() > 1 else "F32")
        blocks = ggml.encode(kind.name, weight.reshape(-1, weight.shape[-1]))
        content[name] = (StoredBlocks(name, tuple(weight.shape), kind.number, blocks.numel()), blocks)
    stored = [stored for stored, _ in content.values()]
    writer = GGUFWriter(path.parent, path.name, stored, packed_key_values(values or key_values()))
    for name, (_, blocks) in content.items():
        writer.write(Piece(name, blocks))
    writer.close()
    return path


def failed(path: Path, source=None) -> set[str]:
    return {check.rule for check in verify(path, source=source).failed}


def test_a_scale_that_the_graph_does_not_apply(tmp_path):
    """Llama's multiplies by the scale of an NVFP4 ffn_up, Qwen 2's does not; of other types it is none of ours."""
    tensors = weights()
    tensors |= {f"blk.0.ffn_{name}.weight": torch.ones(128, WIDTH) for name in ("gate", "up")}
    tensors |= {"blk.0.ffn_down.weight": torch.ones(WIDTH, 128), "blk.0.ffn_up.scale": torch.ones(1)}
    qwen = {key.replace("llama.", "qwen2."): value for key, value in key_values().items()}
    qwen["general.architecture"] = ("qwen2", V.STRING)
    assert "gguf-scales" not in failed(write(tmp_path / "llama.gguf", tensors, type_name="NVFP4"))
    assert "gguf-scales" in failed(write(tmp_path / "qwen2.gguf", tensors, qwen, type_name="NVFP4"))
    assert "gguf-scales" not in failed(write(tmp_path / "other.gguf", tensors, qwen, type_name="Q8_0"))


def test_a_good_file_passes(tmp_path):
    source = RawCheckpoint(open_raw_gguf(write(tmp_path / "source.gguf", type_name="F32")), "source.gguf")
    checked = verify(write(tmp_path / "x.gguf"), source=source)
    assert checked.ok
    assert {"gguf-finite", "gguf-weights"} <= {check.rule for check in checked.checks}
    assert verify(tmp_path / "x.gguf").unchecked.keys() == {
        "gguf-key-values", "gguf-weights", "gguf-checksums", "gguf-nearest-codes"
    }  # fmt: skip


def test_a_truncated_file(tmp_path):
    path = write(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    assert failed(path) == {"gguf-file"}


@pytest.mark.parametrize(
    ("key", "value"), [("general.architecture", ("lama", V.STRING)), ("llama.block_count", ("one", V.STRING))]
)
def test_an_unknown_architecture_or_a_missing_size(tmp_path, key, value):
    assert "gguf-architecture" in failed(write(tmp_path / "x.gguf", values=key_values() | {key: value}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("output_norm.weight"), "missing"),
        (lambda t: t.update({"blk.0.attn_z.weight": t["blk.0.attn_q.weight"]}), "unknown name"),
        (lambda t: t.update({"blk.5.attn_q.weight": t["blk.0.attn_q.weight"]}), "beyond the last block"),
    ],
)
def test_tensors_that_are_not_the_architectures(tmp_path, change, why):
    tensors = weights()
    change(tensors)
    assert failed(write(tmp_path / "x.gguf", tensors)) == {"gguf-tensors"}, why


def test_a_matrix_of_another_width(tmp_path):
    tensors = weights() | {"blk.0.ffn_up.weight": torch.randn(HIDDEN, 2 * WIDTH)}
    assert failed(write(tmp_path / "x.gguf", tensors)) == {"gguf-shapes"}


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("feed_forward_length", 2 * HIDDEN, {"ffn_gate", "ffn_up", "ffn_down"}),
        ("feed_forward_length", [HIDDEN + 1], {"ffn_gate", "ffn_up", "ffn_down"}),
        ("attention.head_count_kv", 2, {"attn_k", "attn_v"}),
        ("attention.key_length", 8, {"attn_q", "attn_k", "attn_v", "attn_output"}),
        ("attention.value_length", 32, {"attn_v", "attn_output"}),
        ("attention.head_count", 0, set()),  # nothing that a count could deny
    ],
)
def test_heads_and_mlps_that_the_key_values_deny(tmp_path, key, value, names):
    listed = (value, V.ARRAY, V.UINT32) if isinstance(value, list) else (value, V.UINT32)
    path = write(tmp_path / "x.gguf", values=key_values() | {f"llama.{key}": listed})
    problems = check_shapes(GGUFSubject(folder=path, engine="llama.cpp")).problems
    assert {problem.split(".")[2] for problem in problems} == names
    assert failed(path) == ({"gguf-shapes"} if names else set())


def test_quantized_blocks_without_a_version(tmp_path):
    values = {key: value for key, value in key_values().items() if key != "general.quantization_version"}
    assert failed(write(tmp_path / "x.gguf", values=values)) == {"gguf-types"}
    assert not failed(write(tmp_path / "y.gguf", values=values, type_name="F16"))


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer.ggml.model": ("words", V.STRING)},
        {"tokenizer.ggml.tokens": (["a", "b", "c"], V.ARRAY, V.STRING)},
        {"tokenizer.ggml.token_type": ([1, 1], V.ARRAY, V.INT32)},
        {"tokenizer.ggml.eos_token_id": (VOCAB, V.UINT32)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_tokenizer_that_does_not_fit(tmp_path, changed):
    assert failed(write(tmp_path / "x.gguf", values=key_values() | changed)) == {"gguf-tokenizer"}


def test_a_file_without_a_tokenizer_takes_token_ids_alone(tmp_path):
    values = {key: value for key, value in key_values().items() if not key.startswith("tokenizer.")}
    values |= {"tokenizer.ggml.model": ("none", V.STRING), "llama.vocab_size": (VOCAB, V.UINT32)}
    assert failed(write(tmp_path / "x.gguf", values=values)) == {"gguf-text"}


def test_a_tokenizer_without_merges(tmp_path):
    values = {key: value for key, value in key_values().items() if key != "tokenizer.ggml.merges"}
    assert failed(write(tmp_path / "x.gguf", values=values)) == {"gguf-tokenizer"}


def test_a_scale_that_is_nan(tmp_path):
    path = write(tmp_path / "x.gguf")
    raw = open_raw_gguf(path)
    tensor = next(t for t in raw.tensors if t.name == "blk.0.attn_v.weight")
    raw.close()
    data = np.fromfile(path, np.uint8)
    data[tensor.start : tensor.start + 2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    data.tofile(path)
    assert failed(path) == {"gguf-finite"}


def test_weights_of_another_model(tmp_path):
    source = RawCheckpoint(open_raw_gguf(write(tmp_path / "source.gguf", type_name="F32")), "source.gguf")
    tensors = weights()
    tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"].flip(0)  # rows in another order
    assert failed(write(tmp_path / "x.gguf", tensors), source) == {"gguf-weights"}


def test_the_wrong_engine_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="does not load"):
        verify(path, engine="vllm")
    with pytest.raises(UsageError, match="does not load"):
        verify(tmp_path / "folder", engine="llama.cpp")
    with pytest.raises(UsageError, match="no such file"):
        verify(tmp_path / "absent.gguf")


def test_a_name_that_makes_llama_cpp_look_up_absent_tokens(tmp_path):
    values = key_values() | {"general.name": ("Distilled-Phi3", V.STRING)}
    assert failed(write(tmp_path / "x.gguf", values=values)) == {"gguf-name"}
    assert failed(write(tmp_path / "y.gguf", values=key_values() | {"general.name": ("Phi 3", V.STRING)})) == set()


def test_values_below_what_a_type_holds_are_no_error(tmp_path):
    tensors = weights()
    tensors["blk.0.ffn_up.weight"] *= 1e-9
    tensors["blk.0.ffn_gate.weight"][0, 0] = 1e9
    raw = RawCheckpoint(open_raw_gguf(write(tmp_path / "source.gguf", tensors, type_name="F32")), "source.gguf")
    assert failed(write(tmp_path / "x.gguf", tensors), raw) == set()


def test_a_billion_blocks_are_counted_and_not_made(tmp_path):
    path = write(tmp_path / "x.gguf", values=key_values() | {"llama.block_count": (10**9, V.UINT32)})
    with bounded_memory(1 << 30):
        checks = {check.rule: check for check in verify(path).failed}
    assert "tensors are of blocks 0 to 0 (1), block_count is 1000000000" in checks["gguf-tensors"].detail


def test_a_billion_blocks_for_prediction_are_counted_and_not_made(tmp_path):
    values = key_values() | {
        "llama.block_count": (10**9, V.UINT32),
        "llama.nextn_predict_layers": (10**9 - 1, V.UINT32),
    }
    path = write(tmp_path / "x.gguf", values=values)
    with bounded_memory(1 << 30), pytest.raises(LowbitError):
        open_gguf(path)
