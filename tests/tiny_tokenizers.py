"""Tiny tokenizers of every kind that GGUF files have, trained on the spot, as Hugging Face folders; and hard texts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lowbit.formats.gguf.pre_tokenizers import BY_NAME
from lowbit.formats.gguf.write_pre_tokenizers import HARD_TEXT

TEXTS = [
    *[line for line in HARD_TEXT.split("\n") if line],
    HARD_TEXT,
    "",
    "a",
    "\n\n\n",
    "<|im_start|>user\nWhat is 12345 + 678?<|im_end|>\n<|im_start|>assistant\n",
    "a<think>b  c</think> d",
    "café naïve 你好 🙂 \x00\x7f\ufeff",
]
# Names of pre-tokenizers.
BYTE_LEVEL = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "stablelm2", "qwen35", "gpt-4o", "kimi-k2", "tekken",
              "deepseek-v3", "deepseek-coder", "falcon", "bloom", "jais-2", "seed-coder")  # fmt: skip
SENTENCEPIECE = ("llama2", "metaspace", "gemma")

_CONTROL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
_USER_DEFINED = ("<think>", "</think>")
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def _corpus() -> list[str]:
    import lowbit

    text = (Path(lowbit.__file__).parent / "data" / "evaluation.txt").read_text(encoding="utf-8")[:60_000]
    return [text, HARD_TEXT]


@cache
def _byte_level(name: str) -> str:
    """tokenizer.json, trained with the pre-tokenizer of that name."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    row = BY_NAME[name]
    steps = row.to_json()
    empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
             "normalizer": {"type": "NFC"} if row.nfc else None, "pre_tokenizer": steps,
             "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
             "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": row.ignore_merges}}  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(empty))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer.to_str()


@cache
def _sentencepiece(kind: str) -> str:
    """tokenizer.json with byte fallback; merges are all splits of every token, as files of SentencePiece have them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=tokens, limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator([_corpus()[0]], trainer)
    parsed = json.loads(tokenizer.to_str())
    vocabulary = parsed["model"]["vocab"]
    if kind != "gemma4":  # which keeps the merges it was trained to, by rank
        made = dict.fromkeys("".join(merge) for merge in parsed["model"]["merges"])
        splits = [(text[:cut], text[cut:]) for text in made for cut in range(1, len(text))]
        parsed["model"]["merges"] = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    parsed["added_tokens"] = []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    parsed["normalizer"] = {"llama2": {"type": "Sequence", "normalizers": [prepend, replace]}, "metaspace": None,
                            "gemma": replace, "gemma4": replace}[kind]  # fmt: skip
    merged = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    parsed["pre_tokenizer"] = {
        "llama2": None,
        "metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
        "gemma": merged,
        "gemma4": merged,
    }[kind]
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
             {"type": "Fuse"}]  # fmt: skip
    parsed["decoder"] = {"type": "Sequence", "decoders": steps + ([strip] if kind in ("llama2", "metaspace") else [])}
    return json.dumps(parsed)


def parsed_tokenizer(kind: str, bos: bool = False) -> dict[str, Any]:
    """tokenizer.json of one kind, with special and added tokens; with BOS before every text where asked."""
    parsed = json.loads(_byte_level(kind) if kind in BY_NAME else _sentencepiece(kind))
    vocabulary = parsed["model"]["vocab"]
    for text in (*_CONTROL, *_USER_DEFINED):
        token_id = vocabulary.setdefault(text, len(vocabulary))
        parsed["added_tokens"].append(
            {"id": token_id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": text in _CONTROL}
        )  # fmt: skip
    parsed["added_tokens"].sort(key=lambda token: token["id"])
    if bos:
        start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        parsed["post_processor"] = {
            "type": "TemplateProcessing", "single": [start, text],
            "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocabulary["<s>"]], "tokens": ["<s>"]}},
        }  # fmt: skip
    return parsed


def write_tokenizer_folder(folder: Path, parsed: dict[str, Any], **settings) -> Path:
    """tokenizer.json and tokenizer_config.json; `settings` beside or instead of the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(parsed, ensure_ascii=False), encoding="utf-8")
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
             "unk_token": "<unk>", "chat_template": CHAT}  # fmt: skip
    config = {key: value for key, value in (usual | settings).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_kind(folder: Path, kind: str, bos: bool = False, **settings) -> Path:
    """The folder of a kind."""
    return write_tokenizer_folder(folder, parsed_tokenizer(kind, bos), **settings)


def as_metadata(key_values: dict[str, tuple]) -> dict[str, Any]:
    """Key-values as our reader gives them back."""
    import numpy as np
    from gguf.constants import GGUFValueType

    numbers = {GGUFValueType.INT32: np.int32, GGUFValueType.FLOAT32: np.float32}
    return {
        key: np.array(value, numbers[items]) if items in numbers else value
        for key, (value, _, items) in key_values.items()
    }
