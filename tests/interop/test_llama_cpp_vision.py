"""The real llama.cpp sees: an image through the mmproj file gives the log-probabilities of transformers' model.

The image has the size that the tower wants, so that nobody resizes it. What remains: llama.cpp looks GELU up in a
float16 table and computes the projector's by its tanh form.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from vision_models import CASES, SPECIAL, make_vision

pytest.importorskip("xllamacpp")

SIDE = {"gemma3": 56, "smolvlm": 64, "mistral3": 112, "qwen2_5_vl": 112, "qwen3_vl": 128}
QWEN_PATCH = {"qwen2_5_vl": 14, "qwen3_vl": 16}
FORCED = 67  # a letter: what is sampled; the log-probabilities are those before the bias


def png(pixels: np.ndarray) -> bytes:
    """uint8 [h, w, 3] → the file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def image(case: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE[case], SIDE[case], 3), dtype=np.uint8)


def text_folder(folder: Path, target: Path) -> Path:
    """The language model alone: what config.json's text_config says, under its names."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "gemma3" or config["model_type"] in QWEN_PATCH:  # has a row of its own
        return folder
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (target / name).write_bytes((folder / name).read_bytes())
    text = config["text_config"] | {"dtype": "bfloat16", "tie_word_embeddings": config["tie_word_embeddings"]}
    (target / "config.json").write_text(json.dumps(text))
    tensors = {name.replace("model.text_model.", "model.").replace("language_model.model.", "model."): value
               for name, value in load_file(folder / "model.safetensors").items()
               if not any(part in name for part in ("vision", "connector", "projector"))}  # fmt: skip
    save_file({name.removeprefix("language_model."): t for name, t in tensors.items()}, target / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return target


def answers(text: Path, mmproj: Path, images: list[np.ndarray]) -> list[dict[int, float]]:
    """Token → log-probability of the first token of each answer."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(text), str(mmproj)
    params.n_ctx, params.warmup, params.verbosity = 512, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = []
    for pixels in images:
        uri = "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What?"}]
        answer = server.handle_chat_completions({
            "messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0, "logprobs": True,
            "top_logprobs": 384, "logit_bias": {str(FORCED): 100},
        })  # fmt: skip
        first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({entry["id"]: entry["logprob"] for entry in first})
    return found


def patches(values: torch.Tensor, side: int) -> torch.Tensor:
    """float32 [3, H, W] → [patches, 3 · 2 · side²], as Qwen's processor cuts them: those that are merged in a row."""
    rows, columns = (size // side // 2 for size in values.shape[1:])
    twice = values.repeat(2, 1, 1, 1).reshape(2, 3, rows, 2, side, columns, 2, side)
    return twice.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(4 * rows * columns, -1)


def reference(folder: Path, case: str, pixels: np.ndarray) -> torch.Tensor:
    """Log-probabilities of transformers' model after the prompt that llama.cpp makes; float64 [V]."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    processor, token, inputs = CASES[case][2], 300, dict[str, Any]()
    values = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    values -= torch.tensor(processor["image_mean"]).view(3, 1, 1)
    values /= torch.tensor(processor["image_std"]).view(3, 1, 1)
    before, after, inputs["pixel_values"] = "", "", values[None]
    if case == "gemma3":
        before, seen, after = "<start_of_image>", [token] * 4, "<end_of_image>"
    elif case == "smolvlm":  # one tile, and the whole image
        around, whole, blank = SPECIAL[case].values()
        tile = [around, *encode("<row_1_col_1>").ids, *[token] * 4]
        seen, inputs["pixel_values"] = (
            [*tile, blank, around, whole, *[token] * 4, around],
            torch.stack([values] * 2)[None],
        )
    elif case in QWEN_PATCH:
        start, stop = SPECIAL[case].values()
        seen = [start, *[token] * 16, stop]
        inputs |= {"pixel_values": patches(values, QWEN_PATCH[case]), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    else:
        row = [*[token] * 4, SPECIAL[case]["[IMG_BREAK]"]]
        seen, after = (row * 4)[:-1], "[IMG_END]"
        inputs["image_sizes"] = torch.tensor([pixels.shape[:2]])
    ids = torch.tensor([[*encode("<s>user: " + before).ids, *seen, *encode(after + "What?</s>").ids]])
    if case == "gemma3":
        inputs["token_type_ids"] = (ids == token).long()
    if case in QWEN_PATCH:
        inputs["mm_token_type_ids"] = (ids == token).int()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids, **inputs).logits[0, -1].double(), -1)


@pytest.mark.parametrize("case", SIDE)
def test_what_llama_cpp_sees_is_what_transformers_sees(tmp_path, case):
    folder = make_vision(tmp_path / "hf", case)
    processor = folder / "preprocessor_config.json"
    if case == "smolvlm":  # one tile
        processor.write_text(json.dumps(json.loads(processor.read_text()) | {"size": {"longest_edge": 64}}))
    text = lowbit.quantize(text_folder(folder, tmp_path / "text"), tmp_path / "text.gguf", scheme="F32").path
    mmproj = lowbit.quantize(folder, tmp_path / "mmproj.gguf", mmproj=True, scheme="F16").path
    images = [image(case, seed) for seed in range(2)]
    seen = answers(text, mmproj, images)
    expected = [reference(folder, case, pixels) for pixels in images]
    for found, wanted in zip(seen, expected, strict=True):
        assert len(found) == 384
        assert max(abs(value - wanted[token].item()) for token, value in found.items()) < 3e-3
    apart = max(abs(value - expected[1][token].item()) for token, value in seen[0].items())
    assert apart > 0.03  # the images matter
    rounded = lowbit.quantize(folder, tmp_path / "q8_0.gguf", mmproj=True, scheme="Q8_0").path
    (found,) = answers(text, rounded, images[:1])
    far = max(abs(value - expected[0][token].item()) for token, value in found.items())
    assert 1e-4 < far < 0.1
