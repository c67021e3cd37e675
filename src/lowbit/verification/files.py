"""Rules on files and config.json, whatever the format.

The files are complete and readable, and nothing beside them trips a loader; config.json says which format it is,
parses, and is of a model that is known.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from lowbit.architecture.inspection import embedding_rows
from lowbit.checkpoint.base import TensorInfo, read_json_object
from lowbit.checkpoint.companions import CHAT_TEMPLATES, TOKENIZERS, beyond_embedding, load_tokenizer_file
from lowbit.checkpoint.quantized import FLOATS
from lowbit.checkpoint.safetensors import INDEX
from lowbit.errors import CheckpointError
from lowbit.verification.checksums import changed_beside, check_checksums
from lowbit.verification.result import PLAIN, Finding
from lowbit.verification.subject import Subject

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def check_files(subject: Subject) -> Finding:
    """Every shard is there, whole, and agrees with the index; no other weight file would be loaded with them."""
    files = {info.file.name for info in subject.stored.tensors.values()}
    count = f"{len(files)} file{'s' * (len(files) != 1)}"
    return Finding(list(subject.stored.notes), f"{len(subject.stored.tensors)} tensors in {count}")


def check_written_bytes(subject: Subject) -> Finding:
    """The weight files are, to the bit, those that lowbit wrote; files beside them that changed are named."""
    found = check_checksums(subject.folder, subject.checksums, subject.stored.holders)
    changed = changed_beside(subject.folder)
    return replace(found, summary=f"{found.summary}; changed since: {', '.join(changed)}") if changed else found


def check_sizes(subject: Subject) -> Finding:
    """The files hold exactly the bytes that config.json and the architecture need; the index agrees."""
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
        nbytes = math.prod(expected.shape) * itemsize
        needed += nbytes
        if info is not None and info.nbytes != nbytes:
            problems.append(f"{name} has {info.nbytes} bytes; {nbytes} were predicted")
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
    """A tokenizer is there; tokenizer.json loads, other files are not opened."""
    folder, problems = subject.folder, []
    present = [name for name in TOKENIZERS if (folder / name).is_file()]
    if not present:
        problems.append(f"there is no tokenizer ({', '.join(TOKENIZERS)})")
    try:
        load_tokenizer_file(folder)
    except CheckpointError as error:
        problems.append(str(error))
    problems += _unparsable(folder, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    loads = "tokenizer.json" in present
    return Finding(problems, "tokenizer.json loads" if loads else f"{', '.join(present)} is there, not opened")


def check_token_ids(subject: Subject) -> Finding:
    """Every token of the tokenizer has a row in the embedding; those that stand for pictures and sounds need none."""
    rows = embedding_rows(subject.checkpoint.tensors)
    if rows is None:
        return Finding([], "no embedding is known to this rule")
    problem = beyond_embedding(subject.folder, rows)
    return Finding([] if problem is None else [problem], f"all below {rows}, the rows of the embedding")


def check_generation_config(subject: Subject) -> Finding:
    """generation_config.json is a JSON object, and is there if the source has one."""
    folder, name = subject.folder, "generation_config.json"
    problems = _unparsable(folder, name)
    there = (folder / name).is_file()
    if not there and subject.source is not None and (subject.source.folder / name).is_file():
        problems.append(f"{name} is absent, and the source has one")
    return Finding(problems, f"{name} parses" if there else f"no {name}{_nor_the_source(subject)}")


def check_chat_template(subject: Subject) -> Finding:
    """A model that was made to chat still has its template."""
    here = _has_chat_template(subject.folder)
    if not here and subject.source is not None and _has_chat_template(subject.source.folder):
        return Finding(["there is no chat template, and the source has one"], "")
    return Finding([], "a chat template is there" if here else f"no chat template{_nor_the_source(subject)}")


def _nor_the_source(subject: Subject) -> str:
    """Behind what an output lacks and its source, if it is known, lacks too."""
    return "" if subject.source is None else ", nor had the source"


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in CHAT_TEMPLATES) or (folder / "chat_templates").is_dir():
        return True
    path = folder / "tokenizer_config.json"
    try:
        return path.is_file() and bool(read_json_object(path).get("chat_template"))
    except CheckpointError:
        return False


def _unparsable(folder: Path, *names: str) -> list[str]:
    problems = []
    for name in names:
        if (folder / name).exists():
            try:
                read_json_object(folder / name)
            except CheckpointError as error:
                problems.append(str(error))
    return problems


def check_format_known(subject: Subject) -> Finding:
    """config.json names a format that is known, and the files are laid out as that format lays them out."""
    stated = subject.format
    found: dict[tuple[str, ...], str] = {}
    for name, info in subject.stored.tensors.items():
        possible = _laid_out_as(name, info, subject.stored.tensors)
        if possible:
            found.setdefault(possible, name)
    for possible, name in found.items():
        if stated == PLAIN:
            return Finding(
                [f"config.json has no quantization_config, but {name} is laid out as {' or '.join(possible)}"], ""
            )
        if stated not in possible:
            return Finding([f"config.json says {stated}, but {name} is laid out as {' or '.join(possible)}"], "")
    if stated == PLAIN:
        return Finding([], "not quantized: a plain folder of floats")
    if not found:
        return Finding([f"config.json says {stated}, but the files hold no quantized weight"], "")
    return Finding([], stated)


def _laid_out_as(name: str, info: TensorInfo, tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    """The formats in which a tensor of this name, dtype and shape occurs; () if it occurs in all."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "qweight":
        scales = tensors.get(f"{owner}.scales")
        packs_rows = scales is not None and info.shape[-1:] != scales.shape[-1:]  # eight rows in a word: [K, N/8]
        kind = "awq" if packs_rows and f"{owner}.g_idx" not in tensors else "gptq"
        return (kind, "auto-round")
    if leaf in ("SCB", "absmax", "quant_map") or leaf.startswith("bitsandbytes__"):
        return ("bitsandbytes",)
    named = {
        "weight_packed": ("compressed-tensors",), "weight_global_scale": ("compressed-tensors",),
        "weight_scale_2": ("modelopt", "quark"), "pre_quant_scale": ("modelopt",), "weight_scale_inv": ("fp8",),
        "W_q": ("hqq",), "_weight_qdata": ("torchao",),
    }.get(leaf)  # fmt: skip
    if named is not None:
        return named
    if leaf.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return ("mxfp4",)
    if leaf == "weight" and info.dtype == torch.int32:
        return ("codebook", "quark")
    if leaf == "weight" and f"{owner}.weight_scale" in tensors:
        if info.dtype == torch.uint8 and tensors[f"{owner}.weight_scale"].shape in ((1,), ()):
            return ("bitnet", "quark")
        if info.dtype in _FP8:
            return ("compressed-tensors", "modelopt", "fp8", "fbgemm_fp8", "quark")
        if info.dtype == torch.int8:  # a scale per row is [N, 1] in compressed-tensors, [N] in ModelOpt
            dimensions = len(tensors[f"{owner}.weight_scale"].shape)
            kinds = (("modelopt",), ("compressed-tensors", "modelopt"), ("compressed-tensors",))[min(dimensions, 2)]
            return (*kinds, "quark")
        return ("modelopt", "quark") if info.dtype not in FLOATS else ()
    return ()


def check_quantization_config(subject: Subject) -> Finding:
    """quantization_config parses strictly, and the quantized tensors can be opened by it."""
    layout = subject.layout
    if subject.format != "compressed-tensors":
        count = len(layout.linears())
        said = "; ".join(layout.notes)
        return Finding([], f"{subject.format}: {count} quantized weights" + (f" ({said})" if said else ""))
    groups = subject.parsed.groups
    if not groups:
        return Finding(["quantization_config.config_groups quantizes no weights"], "")
    return Finding([], ", ".join(f"{group.name}: {group.scheme.name}, {group.format}" for group in groups))


def check_architecture(subject: Subject) -> Finding:
    """The model can be built from config.json, and every linear of its decoder is known."""
    architecture = subject.architecture
    return Finding([], f"{architecture.class_name}, {len(architecture.blocks)} decoder blocks, "
                       f"{len(architecture.linears)} linears")  # fmt: skip


def check_loader(subject: Subject) -> Finding:
    """The engine has a loader for the format."""
    reason = subject.loading.no_loader.get(subject.format)
    if subject.config.get("model_type") != "gpt_oss":
        reason = reason or subject.loading.gpt_oss_only.get(subject.format)
    return Finding([] if reason is None else [reason], f"{subject.engine} loads {subject.format}")
