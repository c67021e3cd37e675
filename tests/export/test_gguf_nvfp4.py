"""NVFP4 in GGUF files: the scale of a whole matrix beside its blocks, written, repacked, read, calibrated, verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from checkpoint.checkpoint_files import tiny_tensors, write_tiny_gguf
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError
from lowbit.export import Piece
from lowbit.formats.gguf.raw import RawCheckpoint, open_raw_gguf
from lowbit.formats.gguf.weight_scales import applies_scale
from lowbit.formats.gguf.write import GGUFWriter, StoredBlocks
from lowbit.verification import verify
from models import SHORT_TEXT, make_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32}  # fmt: skip
EXPERTS = SIZES | {"num_local_experts": 3}


def scaled_model(folder: Path, factor: float, architecture: str = "llama", **changes) -> Path:
    """A tiny model in float32 whose matrices of blocks are multiplied by a factor."""
    make_model(folder, architecture, dtype=torch.float32, **(SIZES | changes))
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if ".layers." in name and weight.dim() > 1:
            tensors[name] = weight * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return scaled_model(tmp_path_factory.mktemp("nvfp4") / "model", 1 / 64)


@pytest.fixture(scope="module")
def scaled(model, tmp_path_factory) -> Path:
    """Its GGUF file in NVFP4."""
    return lowbit.quantize(model, tmp_path_factory.mktemp("scaled") / "x.gguf", scheme="NVFP4").path


def relative_errors(original: Path, quantized: Path) -> dict[str, float]:
    ours, theirs = open_checkpoint(quantized), open_checkpoint(original)
    return {name: ((ours.read(name) - theirs.read(name)).norm() / theirs.read(name).norm()).item()
            for name in ours.tensors if ".layers." in name and len(ours.tensors[name].shape) > 1}  # fmt: skip


def tensors_in(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    raw = open_raw_gguf(path)
    return {tensor.name: (tensor.type_name, tensor.shape, bytes(raw.bytes(tensor))) for tensor in raw.tensors}


def test_the_relative_error_is_the_same_at_every_magnitude(tmp_path):
    """From weights of standard deviation 4 down to 1e-8; at powers of two the codes are the same, bit for bit."""
    found, files = {}, {}
    for power in (6, 0, -7, -22):
        source = scaled_model(tmp_path / f"m{power}", 2.0**power)
        path = lowbit.quantize(source, tmp_path / f"{power}.gguf", scheme="NVFP4").path
        found[power], files[power] = relative_errors(source, path), tensors_in(path)
    for power, errors in found.items():
        assert all(0.05 < error < 0.1 for error in errors.values())
        assert errors == pytest.approx(found[0], rel=1e-5)
        for name, (kind, _, content) in files[power].items():
            if kind == "NVFP4":
                assert content == files[0][name][2]
                (one,), (other,) = (
                    np.frombuffer(files[of][name.replace("weight", "scale")][2], "<f4") for of in (power, 0)
                )
                assert one == other * 2.0**power
    thousandth = scaled_model(tmp_path / "thousandth", 1e-3)
    path = lowbit.quantize(thousandth, tmp_path / "thousandth.gguf", scheme="NVFP4").path
    assert relative_errors(thousandth, path) == pytest.approx(found[0], rel=0.05)


def test_every_expert_has_a_scale_of_its_own(tmp_path):
    source = scaled_model(tmp_path / "model", 1.0, "mixtral", **EXPERTS)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "experts.1." in name:
            tensors[name] = tensors[name] * 2.0**-12
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    path = lowbit.quantize(source, tmp_path / "x.gguf", scheme="NVFP4").path
    kind, shape, content = tensors_in(path)["blk.0.ffn_up_exps.scale"]
    assert (kind, shape) == ("F32", (3,))
    scales = np.frombuffer(content, "<f4")
    assert scales[1] * 2**11 <= scales[0] <= scales[1] * 2**13
    assert max(relative_errors(source, path).values()) < 0.1
    assert verify(path, source=open_checkpoint(source)).ok


def packed_by_hand(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes of ggml blocks from uint8 [N, K / 2], even columns in the low nibbles, and E4M3 bytes [N, K / 16]."""
    rows = len(codes)
    each = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1, 4, 16)
    nibbles = (each[..., :8] | each[..., 8:] << 4).reshape(rows, -1, 32)
    return np.concatenate([scales.reshape(rows, -1, 4), nibbles], axis=-1).reshape(rows, -1)


@pytest.mark.parametrize(("format", "packed"), [("compressed-tensors", "weight_packed"), ("modelopt", "weight")])
def test_a_folder_keeps_its_codes_and_its_scale(model, tmp_path, format, packed):
    folder = lowbit.quantize(model, tmp_path / "folder", scheme="NVFP4A16", format=format).path
    done = lowbit.quantize(folder, tmp_path / "x.gguf", scheme="NVFP4")
    stored, found = load_file(folder / "model.safetensors"), tensors_in(done.path)
    for theirs, ours in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):  # whose rows keep their order
        linear = f"model.layers.1.{theirs}"
        scales = stored[f"{linear}.weight_scale"].view(torch.uint8).numpy()
        by_hand = packed_by_hand(stored[f"{linear}.{packed}"].numpy(), scales)
        assert found[f"blk.1.{ours}.weight"][2] == by_hand.tobytes()
        divisor, factor = stored.get(f"{linear}.weight_global_scale"), stored.get(f"{linear}.weight_scale_2")
        whole = factor if divisor is None else 1 / divisor
        assert np.frombuffer(found[f"blk.1.{ours}.scale"][2], "<f4") == whole.reshape(-1).numpy()
    before, after = open_checkpoint(folder), open_checkpoint(done.path)
    for name in before.schemes:  # also q and k, in llama.cpp's order of rows
        torch.testing.assert_close(after.read(name), before.read(name), rtol=1e-6, atol=0)
    assert sum(kind == "NVFP4" for kind, _, _ in found.values()) == len(before.schemes)
    assert all(entry.repacked for entry in done.report.tensors if entry.scheme == "NVFP4")
    assert {found[name][0] for name in ("token_embd.weight", "output.weight")} == {"F16"}  # as in the folder
    assert done.report.verification.ok


def test_a_file_with_scales_goes_back_to_a_folder_and_holds_against_its_source(model, scaled, tmp_path):
    folder = lowbit.convert(scaled, tmp_path / "folder", format="float").path
    decoded, back = open_checkpoint(scaled), open_checkpoint(folder)
    for name in back.tensors:
        torch.testing.assert_close(back.read(name).float(), decoded.read(name).float(), rtol=2**-8, atol=0)
    assert verify(scaled, source=open_checkpoint(model)).ok
    raw = open_raw_gguf(scaled)
    tensor = next(t for t in raw.tensors if t.name == "blk.0.ffn_down.weight")
    (scale,) = raw.scales(tensor).tolist()
    assert torch.equal(decoded.read("model.layers.0.mlp.down_proj.weight"), raw.decode(tensor) * scale)


def test_a_file_with_scales_is_quantized_again(scaled, tmp_path):
    """To the same type: copied with its scales. To another: of the scaled weights, without scales."""
    same = lowbit.quantize(scaled, tmp_path / "same.gguf", scheme="NVFP4").path
    assert {name: entry for name, entry in tensors_in(same).items() if name.startswith("blk.")} == {
        name: entry for name, entry in tensors_in(scaled).items() if name.startswith("blk.")
    }
    other = lowbit.quantize(scaled, tmp_path / "other.gguf", scheme="Q8_0").path
    assert not [name for name in tensors_in(other) if name.endswith(".scale")]
    before, after = open_checkpoint(scaled), open_checkpoint(other)
    for name in before.tensors:
        error = (after.read(name) - before.read(name)).norm() / before.read(name).norm()
        assert error < 0.01, name
    source = RawCheckpoint(open_raw_gguf(scaled), str(scaled))
    assert verify(other, source=source).ok
    assert verify(same, source=source).ok


@pytest.mark.parametrize("scheme", ["F32", "Q8_0"])
def test_a_gguf_file_becomes_nvfp4_with_scales_that_it_did_not_have(model, tmp_path, scheme):
    """Which are no tensors without a source: their weights are compared with them."""
    source = lowbit.quantize(model, tmp_path / "source.gguf", scheme=scheme).path
    done = lowbit.convert(source, tmp_path / "x.gguf", format="gguf", scheme="NVFP4")
    assert done.report.verification.ok
    assert len([name for name in tensors_in(done.path) if name.endswith(".scale")]) == 14
    assert max(relative_errors(source, done.path).values()) < 0.1


def test_a_file_with_scales_is_calibrated(scaled, tmp_path):
    """An importance matrix, and GPTQ: into NVFP4 again, whose scales come from the calibrated weights."""
    lowbit.imatrix(scaled, tmp_path / "i.gguf", calib=SHORT_TEXT, samples=2, seqlen=64)
    by_matrix = lowbit.quantize(scaled, tmp_path / "q4.gguf", scheme="Q4_K", imatrix=str(tmp_path / "i.gguf")).path
    assert max(relative_errors(scaled, by_matrix).values()) < 0.15
    settings = {
        "scheme": "Q4_0",
        "method": "gptq",
        "calib": SHORT_TEXT,
        "samples": 8,
        "seqlen": 64,
        "stream_correction": 0,
    }  # which would move weights far in so small a model
    done = lowbit.quantize(scaled, tmp_path / "gptq.gguf", **settings)
    assert done.report.verification.ok
    assert max(relative_errors(scaled, done.path).values()) < 0.25


def test_gptq_chooses_nvfp4_codes_for_the_scale_that_it_stores(model, tmp_path):
    settings = {"method": "gptq", "calib": SHORT_TEXT, "samples": 8, "seqlen": 64, "stream_correction": 0}
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="NVFP4", **settings)
    assert done.report.verification.ok
    errors = relative_errors(model, done.path)
    assert all(0.05 < error < 0.2 for error in errors.values())
    for entry in done.report.tensors:
        if entry.layer_error is not None:
            assert entry.layer_error < entry.nearest_error


def test_where_llama_cpp_applies_no_scale_another_type_of_as_many_bits_is_taken(tmp_path):
    source = scaled_model(tmp_path / "model", 1e-3, "qwen2")
    done = lowbit.quantize(source, tmp_path / "x.gguf", scheme="NVFP4")
    types = {name: kind for name, (kind, _, _) in tensors_in(done.path).items()}
    assert (types["blk.0.attn_q.weight"], types["blk.0.attn_q.scale"]) == ("NVFP4", "F32")
    assert (types["blk.0.ffn_up.weight"], types["token_embd.weight"]) == ("IQ4_NL", "IQ4_NL")
    assert "blk.0.ffn_up.scale" not in types
    assert max(relative_errors(source, done.path).values()) < 0.1
    assert any("without the scale of ffn_up, so NVFP4 became IQ4_NL" in note for note in done.report.source.notes)
    assert done.report.verification.ok
    asked = lowbit.quantize(source, tmp_path / "asked.gguf", scheme="Q8_0", overrides={"blk.0.ffn_up.weight": "NVFP4"})
    assert tensors_in(asked.path)["blk.0.ffn_up.weight"][0] == "NVFP4"


def test_a_weight_that_has_a_scale_of_its_own_gets_no_second_one(tmp_path):
    """BitNet files have the scale of a ternary matrix under the name that NVFP4's would have."""
    name = "blk.0.attn_q"
    tensors = tiny_tensors("llama") | {f"{name}.scale": np.array([0.25], np.float32)}
    source = write_tiny_gguf(tmp_path / "bitnet.gguf", "bitnet", tensors)
    done = lowbit.quantize(source, tmp_path / "x.gguf", scheme="NVFP4", pure=True)
    before, after = tensors_in(source), tensors_in(done.path)
    assert after[f"{name}.scale"] == before[f"{name}.scale"]
    assert after[f"{name}.weight"][0] == "IQ4_NL"
    assert any("a scale lies beside it, so NVFP4 became IQ4_NL" in note for note in done.report.source.notes)


def test_a_scale_that_llama_cpp_ignores_fails_a_rule(model, scaled, tmp_path):
    """The graph of Qwen 2 does not multiply by the scale of ffn_up: it would compute with unscaled weights."""
    assert not applies_scale("llama", "blk.0.ffn_up.weight", {"blk.0.ffn_up.bias"})
    assert not applies_scale("mamba", "blk.0.attn_q.weight", set())
    content = scaled.read_bytes().replace(b"llama", b"qwen2")
    path = tmp_path / "qwen2.gguf"
    path.write_bytes(content)
    failed = {check.rule: check.detail for check in verify(path).failed}
    assert (
        "blk.0.ffn_down.scale: llama.cpp computes qwen2 models without the scale of ffn_down" in failed["gguf-scales"]
    )
    assert "gguf-scales" not in {check.rule for check in verify(scaled).failed}


def test_a_scale_of_another_shape_is_refused(scaled, tmp_path):
    raw = open_raw_gguf(scaled)
    content = bytearray(scaled.read_bytes())
    row = content.index(b"blk.0.attn_q.scale") + len("blk.0.attn_q.scale")
    content[row + 4 : row + 12] = (0).to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert raw.weight_scales
    for use in (lambda: open_checkpoint(path).tensors, lambda: lowbit.dry_run(path, scheme="Q8_0")):
        with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.scale' is F32 \[0\]; 1 numbers are needed"):
            use()


def test_scales_of_activations_are_left_out_when_read_and_kept_beside_nvfp4(scaled, tmp_path):
    """llama.cpp's converter writes them, and nothing of llama.cpp computes with them."""
    raw = open_raw_gguf(scaled)
    keys = {key: bytes(raw.key_value_bytes(key))[8 + len(key.encode()) :] for key in raw.metadata}
    content = {t.name: (t.type_id, t.shape, raw.blocks(t, 0, max(1, t.shape[0] if len(t.shape) > 1 else 1)))
               for t in raw.tensors}  # fmt: skip
    one = torch.ones(1).view(torch.uint8)[None]
    content |= {name.replace(".scale", ".input_scale"): (0, (1,), one) for name in content if name.endswith(".scale")}
    stored = [StoredBlocks(name, shape, kind, rows.numel()) for name, (kind, shape, rows) in content.items()]
    writer = GGUFWriter(tmp_path, "x.gguf", stored, keys)
    for name, (_, _, rows) in content.items():
        writer.write(Piece(name, rows))
    writer.close()
    opened, plain = open_checkpoint(tmp_path / "x.gguf"), open_checkpoint(scaled)
    assert "left out (14 tensors): scales of activations, which llama.cpp does not use" in opened.notes
    for name in plain.tensors:
        assert torch.equal(opened.read(name), plain.read(name)), name
    kept = tensors_in(lowbit.quantize(tmp_path / "x.gguf", tmp_path / "same.gguf", scheme="NVFP4").path)
    assert sum(name.endswith(".input_scale") for name in kept) == 14
    gone = tensors_in(lowbit.quantize(tmp_path / "x.gguf", tmp_path / "other.gguf", scheme="Q8_0").path)
    assert not [name for name in gone if name.endswith("scale")]
