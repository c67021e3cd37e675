"""Any GGUF as a source: image models, types of forks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import lowbit
from checkpoint.checkpoint_files import write_tiny_gguf
from lowbit.errors import CheckpointError
from lowbit.formats.gguf.raw import RawCheckpoint, open_raw_gguf
from lowbit.formats.gguf.rules import INHERITED
from lowbit.verification import verify


def test_an_image_model_keeps_its_kernels_and_what_comfyui_needs(tmp_path):
    """As ComfyUI-GGUF writes them: no key-values of a language model, kernels of 3-D convolutions with 5 dimensions."""
    draw = np.random.default_rng(0)
    shapes = {
        "patch_embedding.weight": (64, 16, 1, 2, 2), "blocks.0.self_attn.q.weight": (64, 256),
        "time_embedding.0.weight": (64, 256), "blocks.0.modulation": (1, 6, 64), "head.head.bias": (64,),
    }  # fmt: skip
    tensors = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = lowbit.quantize(tmp_path / "wan.gguf", tmp_path / "x.gguf", scheme="Q4_K_M")
    raw = open_raw_gguf(done.path)
    assert {t.name: (t.shape, t.type_name) for t in raw.tensors} == {
        name: (shape, "Q4_K" if name == "blocks.0.self_attn.q.weight" else "F32") for name, shape in shapes.items()
    }
    for tensor in raw.tensors:
        if tensor.type_name == "F32":
            assert bytes(raw.bytes(tensor)) == tensors[tensor.name].tobytes()
    reasons = {entry.name: entry.reason for entry in done.report.tensors}
    assert reasons["patch_embedding.weight"] == "kernels of convolutions are never quantized"
    assert reasons["time_embedding.0.weight"] == "never quantized in wan"
    assert [info.name for info in lowbit.inspect(done.path).tensors.values()] == list(shapes)
    assert verify(done.path, source=RawCheckpoint(open_raw_gguf(tmp_path / "wan.gguf"), "wan.gguf")).failed == [
        check for check in verify(done.path).failed if check.rule in INHERITED
    ]


def test_a_type_of_a_fork_is_refused_before_the_work(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    row = content.index(b"blk.0.attn_output.weight") + len("blk.0.attn_output.weight")
    content[row + 20 : row + 24] = (144).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is stored as IQ4_KS \(number 144\), a type of ik_llama\.cpp"):
        lowbit.dry_run(path, scheme="Q8_0")
