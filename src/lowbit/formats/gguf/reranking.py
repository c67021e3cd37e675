"""Rerankers that answer whether a document fits a query (Qwen 3 Reranker) → what llama.cpp ranks by.

The score is softmax over the logits of two words behind the prompt. llama.cpp keeps the two rows of the output apart:

    cls.output.weight [2, width]       rows of "yes" and "no" of the output matrix
    {arch}.classifier.output_labels    ["yes", "no"]
    {arch}.pooling_type                rank
    tokenizer.chat_template.rerank     the prompt, with {query} and {document}

Such a model is known by its name only: config.json is that of the language model. Names are the folder's,
`_name_or_path` of config.json and the first heading of README.md. Refused: a tokenizer without the two words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf.constants import MODEL_TENSOR, GGUFValueType, PoolingType
from torch import Tensor

from lowbit.checkpoint.base import read_json_object
from lowbit.checkpoint.companions import leads_out
from lowbit.errors import CheckpointError
from lowbit.formats.gguf.keys import KeyValues

_ARCHS = ("qwen3",)
_NAME = re.compile(r"qwen3-reranker", re.IGNORECASE)
_WORDS = ("yes", "no")
_MOST_CHARACTERS = 1_000_000
# As the model's card has it.
_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_NOTE = 'a reranker: cls.output.weight holds the output\'s rows of "yes" and "no"; llama-server ranks with --reranking'


def ranking_of_folder(
    folder: Path, config: dict[str, Any], arch: str, rows: int, output: Callable[[int], Tensor]
) -> tuple[KeyValues, dict[MODEL_TENSOR, Tensor], list[str]]:
    """(key-values, {cls.output: float32 [2, width]}, notes) of a reranker; nothing of other models.

    rows    of the output matrix
    output  token → its row, [1, width]
    """
    names = (folder.resolve().name, str(config.get("_name_or_path", "")), _heading(folder))
    if arch not in _ARCHS or not any(_NAME.search(name) for name in names):
        return {}, {}, []
    model = read_json_object(folder / "tokenizer.json").get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = [vocabulary.get(word) for word in _WORDS] if isinstance(vocabulary, dict) else []
    tokens = [token for token in found if type(token) is int and 0 <= token < rows]
    if len(tokens) != len(_WORDS):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: there are no tokens 'yes' and 'no', by which a reranker answers",
            "copy the tokenizer of the published model",
        )
    values: KeyValues = {
        f"{arch}.pooling_type": (PoolingType.RANK, GGUFValueType.UINT32),
        f"{arch}.classifier.output_labels": (list(_WORDS), GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.chat_templates": (["rerank"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.chat_template.rerank": (_PROMPT, GGUFValueType.STRING),
    }
    return values, {MODEL_TENSOR.CLS_OUT: torch.cat([output(token).float() for token in tokens])}, [_NOTE]


def _heading(folder: Path) -> str:
    """The first heading of README.md."""
    path = folder / "README.md"
    if not path.is_file() or leads_out(path, folder) is not None:
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = re.search(r"^# (.*)$", file.read(_MOST_CHARACTERS), re.MULTILINE)
    return found[1] if found else ""
