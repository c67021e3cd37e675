"""All weights are right and the model computes something else: config.json and key-values against the source's."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from breaking import failures

import lowbit
from lowbit.formats.gguf.raw import open_raw_gguf
from models import SHORT_TEXT, make_model

RULE, GGUF_RULE = "same-computation", "gguf-key-values"
ROPE = {"rope_theta": 777.0, "rope_type": "default"}
CHANGED: dict[str, Any] = {
    "rope_parameters": ROPE, "rope_theta": 777.0, "rms_norm_eps": 1e-3, "hidden_act": "gelu", "sliding_window": 7,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "num_attention_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "logit_scale": 3.0, "tie_word_embeddings": True,
}  # fmt: skip


def restate(folder: Path, **changed: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "rope_theta" in changed or "rope_scaling" in changed:  # the spelling of before transformers 5
        del config["rope_parameters"]
    path.write_text(json.dumps(config | changed))
    return folder


@pytest.mark.parametrize("key", CHANGED)
def test_a_changed_key_of_config_json_is_named_with_both_values(broken, original, key):
    found = failures(restate(broken("W8A16"), **{key: CHANGED[key]}), reference=original)[RULE]
    assert key.replace("rope_theta", "rope_parameters.rope_theta").replace("rope_scaling", "rope_parameters") in found
    assert "the source's is" in found


def test_the_experts_of_a_token(good, models, tmp_path):
    folder = Path(shutil.copytree(good("W8A16", "qwen3_moe"), tmp_path / "broken"))
    found = failures(restate(folder, num_experts_per_tok=1), reference=models("qwen3_moe"))
    assert found == {RULE: "config.json: num_experts_per_tok is 1, the source's is 2"}


def test_a_key_of_the_text_model(tmp_path):
    model = make_model(tmp_path / "model", "qwen2_5_vl")
    out = lowbit.quantize(model, tmp_path / "out", scheme="W8A16", group_size=32).path
    assert RULE not in failures(out, reference=model)
    text = json.loads((out / "config.json").read_text())["text_config"]
    found = failures(restate(out, text_config=text | {"rms_norm_eps": 0.5}), reference=model)
    assert found == {RULE: f"config.json: text_config.rms_norm_eps is 0.5, the source's is {text['rms_norm_eps']}"}


@pytest.mark.parametrize(
    "changed",
    [
        {"transformers_version": "4.0", "use_cache": False, "_name_or_path": "x", "attention_dropout": 0.5},
        {"rope_theta": 10000.0},
        {"dtype": "bfloat16", "torch_dtype": "bfloat16", "unsloth_version": "1"},
    ],
)
def test_what_does_not_compute_or_is_spelled_otherwise_passes(broken, original, changed):
    assert failures(restate(broken("W8A16"), **changed), reference=original) == {}


def test_a_head_that_was_untied_for_a_different_tensor_passes(models, tmp_path):
    """The output states what holds of it; see `architecture.inspection`."""
    model = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    restate(model, tie_word_embeddings=True)
    out = lowbit.quantize(model, tmp_path / "out", scheme="W8A16", group_size=32).path
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert failures(out, reference=model) == {}


def patched(path: Path, key: str, value: float) -> Path:
    """The file with another number for a key-value of float32 or uint32."""
    raw = open_raw_gguf(path)
    stored, data = bytes(raw.key_value_bytes(key)), bytearray(path.read_bytes())
    raw.close()
    at = data.find(stored) + len(stored) - 4
    data[at : at + 4] = struct.pack("<I" if isinstance(value, int) else "<f", value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.freq_base", 777.0), ("attention.layer_norm_rms_epsilon", 0.5), ("attention.head_count", 2),
     ("rope.dimension_count", 16), ("context_length", 64)],
)  # fmt: skip
def test_a_changed_key_value_is_named_with_both_values(original, tmp_path, key, value):
    path = lowbit.quantize(original, tmp_path / "out.gguf", scheme="Q8_0").path
    again = lowbit.quantize(path, tmp_path / "again.gguf", scheme="Q8_0").path
    for reference in (original, again):
        assert failures(path, reference=reference) == {}
    assert failures(again, reference=original) == {}
    patched(path, f"llama.{key}", value)
    for reference in (original, again):
        assert failures(path, reference=reference)[GGUF_RULE].startswith(f"llama.{key} is {value}, by the source ")


def test_a_folder_made_of_a_gguf_file_and_the_model_of_that_file_state_the_same(original, tmp_path):
    path = lowbit.quantize(original, tmp_path / "x.gguf", scheme="BF16").path
    out = lowbit.quantize(path, tmp_path / "out", scheme="W8A16", group_size=32).path
    assert RULE not in failures(out, reference=original)
    assert RULE not in failures(out, reference=path)


@pytest.mark.parametrize("method", ["hadamard", "smoothquant", "awq"])
def test_weights_that_a_transform_rewrote_are_not_compared(models, tmp_path, method):
    """They are not the source's; its computation still is, and is compared."""
    scheme = "W8A8" if method == "smoothquant" else "W4A16"
    lowbit.quantize(models("llama"), tmp_path / "out", scheme=scheme, method=method, calib=SHORT_TEXT, samples=2,
                    seqlen=32, **({} if scheme == "W8A8" else {"group_size": 32}))  # fmt: skip
    found = lowbit.verify(tmp_path / "out", reference=models("llama"))
    assert found.ok
    for rule in ("relative-error", "unquantized"):
        assert found.unchecked[rule] == f"{method} rewrote weights, which are not the source's any more"
    restate(tmp_path / "out", rms_norm_eps=0.5)
    assert set(failures(tmp_path / "out", reference=models("llama"))) == {RULE}
