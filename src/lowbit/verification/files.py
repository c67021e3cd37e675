"""Rules on the files themselves: complete, readable, and nothing beside them that a loader would trip over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit.checkpoint.rows import read_json_object
from lowbit.checkpoint.safetensors import INDEX
from lowbit.errors import CheckpointError
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def check_files(subject: Subject) -> Finding:
    """Every shard is there, whole, and agrees with the index; no other weight file would be loaded with them."""
    checkpoint = subject.stored
    problems = list(checkpoint.notes)
    files = sorted({info.file.name for info in checkpoint.tensors.values()})
    return Finding(problems, f"{len(checkpoint.tensors)} tensors in {len(files)} file{'s' * (len(files) != 1)}")


def check_sizes(subject: Subject) -> Finding:
    """The files hold exactly the bytes that config.json and the architecture call for; the index agrees."""
    checkpoint, problems = subject.checkpoint, []
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    if (subject.folder / INDEX).exists():
        metadata = read_json_object(subject.folder / INDEX).get("metadata") or {}
        claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
        if claimed is not None and claimed != stored:
            problems.append(f"{INDEX} claims a total_size of {claimed} bytes; the tensors have {stored}")
    needed = 0
    for name, expected in subject.expected.items():
        info = checkpoint.tensors.get(name)
        itemsize = info.dtype.itemsize if info is not None else expected.dtypes[0].itemsize
        elements = 1
        for size in expected.shape:
            elements *= size
        needed += elements * itemsize
        if info is not None and info.nbytes != elements * itemsize:
            problems.append(f"{name} has {info.nbytes} bytes; {elements * itemsize} were predicted")
    extra = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in subject.expected)
    if stored - extra != needed:
        problems.append(f"the tensors have {stored - extra} bytes; {needed} were predicted from config.json")
    bits = _bits_per_weight(subject)
    return Finding(problems, f"{stored} bytes of tensors, as predicted; {bits:.3f} bits per weight in the decoder")


def _bits_per_weight(subject: Subject) -> float:
    """Stored bits ÷ weights, of the linears of the decoder blocks, scales and zero points included."""
    weights = stored = 0
    for name in subject.stored_linears:
        linear = subject.architecture.linears[name]
        if linear.block is None:
            continue
        weights += linear.shape[0] * linear.shape[1]
        names = list(subject.expected_of(name)) if name in subject.schemes else [f"{name}.weight"]
        stored += sum(subject.checkpoint.tensors[n].nbytes for n in names if n in subject.checkpoint.tensors)
    return 8 * stored / weights if weights else 0.0


def check_tokenizer(subject: Subject) -> Finding:
    """A tokenizer is there and loads."""
    folder, problems = subject.folder, []
    present = [name for name in _TOKENIZERS if (folder / name).is_file()]
    if not present:
        problems.append(f"there is no tokenizer ({', '.join(_TOKENIZERS)})")
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            problems.append(f"tokenizer.json does not load: {error}")
    problems += _unparsable(folder, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return Finding(problems, f"{', '.join(present)} loads")


def check_generation_config(subject: Subject) -> Finding:
    """generation_config.json parses, and is there if the source has one."""
    folder, name = subject.folder, "generation_config.json"
    problems = _unparsable(folder, name)
    there = (folder / name).is_file()
    if not there and subject.source is not None and (subject.source.folder / name).is_file():
        problems.append(f"{name} is absent, and the source has one")
    return Finding(problems, f"{name} parses" if there else f"no {name}, nor had the source")


def check_chat_template(subject: Subject) -> Finding:
    """A model that was made to chat still has its template."""
    here = _has_chat_template(subject.folder)
    if not here and subject.source is not None and _has_chat_template(subject.source.folder):
        return Finding(["there is no chat template, and the source has one"], "")
    return Finding([], "a chat template is there" if here else "no chat template, nor had the source")


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _CHAT_TEMPLATES) or (folder / "chat_templates").is_dir():
        return True
    return bool(_read(folder / "tokenizer_config.json").get("chat_template"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _unparsable(folder: Path, *names: str) -> list[str]:
    problems = []
    for name in names:
        if (folder / name).is_file():
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                problems.append(f"{name} is not valid JSON ({error})")
    return problems
