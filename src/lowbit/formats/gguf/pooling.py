"""How one embedding of a text is made of those of its tokens: what sentence-transformers keeps beside a model → GGUF.

    modules.json                            [{"type": "…Transformer"}, {"type": "…Pooling", "path": "1_Pooling"}, …]
    1_Pooling/config.json                   {arch}.pooling_type: mean, first token (cls) or last token
    2_Dense/{config.json,model.safetensors} dense_2.weight, dense_3.weight [out, in], where llama.cpp has them for the
                                            architecture; {arch}.dense_2_feat_in, dense_2_feat_out

Normalization is up to who asks llama.cpp for an embedding; it normalizes by default.

Refused: another pooling, a dense layer that llama.cpp does not compute, a module whose files are missing or damaged.

Rerankers that answer whether a document fits a query (Qwen 3 Reranker) → what llama.cpp ranks by.

The score is softmax over the logits of two words behind the prompt. llama.cpp keeps the two rows of the output apart:

    cls.output.weight [2, width]       rows of "yes" and "no" of the output matrix
    {arch}.classifier.output_labels    ["yes", "no"]
    {arch}.pooling_type                rank
    tokenizer.chat_template.rerank     the prompt, with {query} and {document}

Such a model is known by its name only: config.json is that of the language model. Names are the folder's,
`_name_or_path` of config.json and the first heading of README.md. Refused: a tokenizer without the two words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS, GGUFValueType, PoolingType
from torch import Tensor

from lowbit.checkpoint.base import read_json_object
from lowbit.checkpoint.companions import leads_out
from lowbit.checkpoint.safetensors import open_safetensors
from lowbit.errors import ArchitectureError, CheckpointError
from lowbit.files.regular import read_regular
from lowbit.formats.gguf.keys import KeyValues

T = MODEL_TENSOR
_POOLINGS = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST}
# Spellings of older versions: one flag for each kind.
_FLAGS = {
    "mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens", "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}  # fmt: skip
_DENSE = (T.DENSE_2_OUT, T.DENSE_3_OUT)
_IDENTITY = "Identity"


def pooling_of_folder(folder: Path, arch: str, width: int) -> tuple[KeyValues, dict[MODEL_TENSOR, Tensor]]:
    """(key-values, float32 dense layers) of a model's folder; nothing where it has no modules.json.

    width  of the model's hidden states
    """
    values: KeyValues = {}
    dense: list[tuple[Path, Tensor]] = []
    for kind, path in _modules(folder):
        if kind == "Pooling":
            values[f"{arch}.pooling_type"] = (_pooling(path), GGUFValueType.UINT32)
        elif kind == "Dense":
            dense.append((path, _dense_layer(path)))
    if dense and not (_has_dense_layers(arch) and len(dense) == len(_DENSE)):
        raise ArchitectureError(
            f"{dense[0][0]}: {len(dense)} dense layers behind the pooling, as llama.cpp does not compute {arch} models",
            "to use the embeddings in front of them, delete them from modules.json of a copy of the model",
        )
    tensors = {}
    for number, (kind, (path, weight)) in enumerate(zip(_DENSE, dense, strict=False), start=2):
        if (weight.shape[1] if number == 2 else weight.shape[0]) != width:
            raise CheckpointError(f"{path}: linear.weight {list(weight.shape)} does not fit a model of width {width}")
        values[f"{arch}.dense_{number}_feat_in"] = (weight.shape[1], GGUFValueType.UINT32)
        values[f"{arch}.dense_{number}_feat_out"] = (weight.shape[0], GGUFValueType.UINT32)
        tensors[kind] = weight
    return values, tensors


def _has_dense_layers(arch: str) -> bool:
    kind = next(kind for kind in MODEL_ARCH if MODEL_ARCH_NAMES[kind] == arch)
    return set(_DENSE) <= set(MODEL_TENSORS[kind])


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """(class, folder) of every step, in order."""
    path = folder / "modules.json"
    if not path.is_file() or leads_out(path, folder) is not None:
        return []
    try:
        modules: Any = json.loads(read_regular(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path}: a list of modules is needed")
    found = []
    for module in modules:
        kind, inside = str(module.get("type")).rpartition(".")[2], folder / str(module.get("path") or "")
        if leads_out(inside, folder) is not None:
            raise CheckpointError(f"{path}: the module at {str(module['path'])[:80]!r} is not in the folder")
        found.append((kind, inside))
    return found


def _pooling(path: Path) -> PoolingType:
    config = read_json_object(path / "config.json")
    kinds = [kind for kind, flag in _FLAGS.items() if config.get(flag) is True] or [config.get("pooling_mode")]
    if len(kinds) != 1 or kinds[0] not in _POOLINGS:
        listed = ", ".join(str(kind)[:40] for kind in kinds)
        raise ArchitectureError(
            f"{path}: pooling by {listed}; llama.cpp takes the mean of the tokens, the first or the last one",
            "llama.cpp cannot run this variant of the model",
        )
    return _POOLINGS[kinds[0]]


def _dense_layer(path: Path) -> Tensor:
    """The weight of a dense layer, float32 [out, in]; llama.cpp has neither bias nor activation."""
    config = read_json_object(path / "config.json")
    activation = str(config.get("activation_function", _IDENTITY)).rpartition(".")[2]
    if config.get("bias", True) or activation != _IDENTITY:
        raise ArchitectureError(
            f"{path}: a dense layer with a bias or with {activation[:40]} behind it, where llama.cpp has neither",
            "llama.cpp cannot run this variant of the model",
        )
    checkpoint = open_safetensors(path)
    try:
        if "linear.weight" not in checkpoint.tensors or len(checkpoint.tensors["linear.weight"].shape) != 2:
            raise CheckpointError(f"{path}: there is no linear.weight of two dimensions")
        return checkpoint.read("linear.weight").to(torch.float32, copy=True)
    finally:
        checkpoint.close()


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
