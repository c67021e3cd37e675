"""Tiny embedding models, as sentence-transformers keeps them: a bare decoder, its pooling, dense layers behind it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models import SIZES, make_tokenizer

_TEXT = {key: value for key, value in SIZES.items() if key != "head_dim"}
_GEMMA = SIZES | {"use_bidirectional_attention": True, "sliding_window": 8, "query_pre_attn_scalar": 32,
                  "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
# name → (class, sizes, pooling, width of the first dense layer or 0, general.architecture)
EMBEDDING_CASES: dict[str, tuple[str, dict, str, int, str]] = {
    "qwen3": ("Qwen3Model", SIZES, "lasttoken", 0, "qwen3"),
    "qwen2": ("Qwen2Model", _TEXT, "lasttoken", 0, "qwen2"),
    "mistral": ("MistralModel", SIZES, "lasttoken", 0, "llama"),
    "llama": ("LlamaModel", SIZES, "mean", 0, "llama"),
    "llama_first_token": ("LlamaModel", SIZES, "cls", 0, "llama"),
    "gemma": ("Gemma3TextModel", _GEMMA, "mean", 0, "gemma-embedding"),
    "gemma_dense": ("Gemma3TextModel", _GEMMA, "mean", 256, "gemma-embedding"),
}


def make_embedding_model(folder: Path, case: str) -> Path:
    import transformers

    name, sizes, pooling, wide, _ = EMBEDDING_CASES[case]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes, pad_token_id=0)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() > 1 else 0.9, 0.06)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    modules = ["Transformer", "1_Pooling", *(("2_Dense", "3_Dense") if wide else ()), "Normalize"]
    rows = [{"idx": index, "path": path if "_" in path else "", "type": f"x.{path.rpartition('_')[2]}"}
            for index, path in enumerate(modules)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
    config = {flag: kind == pooling for kind, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    for path, shape in (("2_Dense", (wide, 128)), ("3_Dense", (128, wide))) if wide else ():
        (folder / path).mkdir()
        features = {"in_features": shape[1], "out_features": shape[0], "bias": False,
                    "activation_function": "torch.nn.modules.linear.Identity"}  # fmt: skip
        (folder / path / "config.json").write_text(json.dumps(features))
        save_file({"linear.weight": torch.randn(shape) / 8}, folder / path / "model.safetensors", {"format": "pt"})
    return folder


def expected_embedding(folder: Path, ids: list[int]) -> torch.Tensor:
    """float32 [width], of length 1: what sentence-transformers makes of the tokens."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        states = model(torch.tensor([ids])).last_hidden_state[0]
    config = json.loads((folder / "1_Pooling" / "config.json").read_text())
    if config["pooling_mode_mean_tokens"]:
        pooled = states.mean(0)
    else:
        pooled = states[0] if config["pooling_mode_cls_token"] else states[-1]
    for path in sorted(folder.glob("[23]_Dense")):
        pooled = load_file(path / "model.safetensors")["linear.weight"] @ pooled
    return pooled / pooled.norm()
