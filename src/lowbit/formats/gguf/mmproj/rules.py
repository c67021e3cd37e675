"""The rules of llama.cpp (tools/mtmd) for the file of a vision tower: does its loader take it?

Whether values are right is checked by the rules that all GGUF files share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import Keys

from lowbit.formats.gguf.mmproj.row import Tower
from lowbit.formats.gguf.mmproj.table import TOWERS
from lowbit.verification.result import MMPROJ, Finding, Rule

if TYPE_CHECKING:
    from lowbit.formats.gguf.subject import GGUFSubject

V = Keys.ClipVision
_COUNTS = (V.IMAGE_SIZE, V.PATCH_SIZE, V.EMBEDDING_LENGTH, V.FEED_FORWARD_LENGTH, V.BLOCK_COUNT, V.PROJECTION_DIM,
           V.Attention.HEAD_COUNT)  # fmt: skip


def check_keys(subject: GGUFSubject) -> Finding:
    """The projector is one that llama.cpp knows, and every number that its loader asks for is there."""
    metadata, problems = subject.raw.metadata, []
    projector = metadata.get(Keys.Clip.PROJECTOR_TYPE)
    if not _towers(projector):
        problems.append(f"{Keys.Clip.PROJECTOR_TYPE} is {str(projector)[:80]!r}, whose tensors lowbit does not know")
    if metadata.get(Keys.Clip.HAS_VISION_ENCODER) is not True:
        problems.append(f"{Keys.Clip.HAS_VISION_ENCODER} is not true")
    problems += [f"{key} is {str(metadata.get(key))[:80]}; a positive number is needed"
                 for key in _COUNTS if _count(metadata, key) < 1]  # fmt: skip
    if not isinstance(metadata.get(V.Attention.LAYERNORM_EPS), float):
        problems.append(f"{V.Attention.LAYERNORM_EPS} is missing, or no number")
    for key in (V.IMAGE_MEAN, V.IMAGE_STD):
        numbers = metadata.get(key)
        if not isinstance(numbers, np.ndarray | list) or len(numbers) < 3:
            problems.append(f"{key} has no three numbers")
    return Finding(problems, f"{projector}, {_count(metadata, V.BLOCK_COUNT)} blocks")


def check_tensors(subject: GGUFSubject) -> Finding:
    """Every tensor that the loader asks for is there, in every block."""
    names = {tensor.name for tensor in subject.raw.tensors}
    blocks = min(_count(subject.raw.metadata, V.BLOCK_COUNT), len(names))
    towers = _towers(subject.raw.metadata.get(Keys.Clip.PROJECTOR_TYPE))
    if not towers:
        return Finding([], "nothing to compare with: the projector is not known")
    missing = min((sorted(tower.needed(blocks, {}) - names) for tower in towers), key=len)
    return Finding([f"{name} is missing" for name in missing], f"{len(names)} tensors, in {blocks} blocks")


def check_shapes(subject: GGUFSubject) -> Finding:
    """Patches, rows of the blocks and the projector's output are as wide as the key-values say."""
    metadata, problems = subject.raw.metadata, []
    width, patch = _count(metadata, V.EMBEDDING_LENGTH), _count(metadata, V.PATCH_SIZE)
    for tensor in subject.raw.tensors:
        stem = tensor.name.rpartition(".")[0]
        if tensor.name.startswith("v.patch_embd.weight") and tensor.shape != (width, 3, patch, patch):
            problems.append(f"{tensor.name} is {list(tensor.shape)}; [{width}, 3, {patch}, {patch}] is needed")
        reads_hidden = stem.endswith((".attn_q", ".attn_k", ".attn_v", ".attn_qkv", ".ln1", ".ln2"))
        if (
            stem.startswith("v.blk.")
            and reads_hidden
            and tensor.name.endswith("weight")
            and tensor.shape[-1:] != (width,)
        ):
            problems.append(f"{tensor.name}: rows of {tensor.shape[-1:]}, {V.EMBEDDING_LENGTH} is {width}")
    return Finding(problems, f"patches of {patch} × {patch}, rows of {width}")


def _towers(projector: Any) -> list[Tower]:
    return [tower for tower in TOWERS if tower.projector == projector]


def _count(metadata: dict[str, Any], key: str) -> int:
    value = metadata.get(key)
    return value if type(value) is int else 0


_LOADER = "clip_model_loader of tools/mtmd/clip.cpp"
RULES: tuple[Rule, ...] = (
    Rule("mmproj-keys", "model", (MMPROJ,), "the projector is known and the tower's sizes are stated", check_keys,
         f"{_LOADER}: load_hparams"),
    Rule("mmproj-tensors", "format", (MMPROJ,), "the tower's tensors are there, in every block", check_tensors,
         f"{_LOADER}: load_tensors"),
    Rule("mmproj-shapes", "format", (MMPROJ,), "patches and rows are as wide as stated", check_shapes,
         "clip_graph::build_inp and build_vit of tools/mtmd/clip.cpp"),
)  # fmt: skip
