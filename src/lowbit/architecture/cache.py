"""A cache of discovered architectures: importing transformers and building a model on the meta device takes longer than
reading a billion weights.

    key = SHA-256(config.json, split_experts, own_names, versions of transformers and lowbit, source of the table and of
                  discovery)

The cache is in LOWBIT_CACHE (or the user's cache folder), beside the rebuilt GGUF folders. A file that cannot be read
or written costs time only. Models with their own code are never cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from lowbit.architecture.discover import discover
from lowbit.architecture.structure import Architecture, FusedTensor, Linear, Part, Placement
from lowbit.checkpoint.base import cache_root
from lowbit.version import __version__, version_of

# Files that the result depends on.
_SOURCES = ("families.py", "feeding.py", "roles.py", "structure.py", "building.py", "trace.py",
            "perturb.py", "conversions.py", "blocks.py", "disk_layout.py", "quantized_loading.py", "discover.py",
            "cache.py")  # fmt: skip


def discover_once(
    config: dict[str, Any], folder: str, trust_remote_code: bool = False, split_experts: bool = False,
    own_names: bool = False,
) -> Architecture:  # fmt: skip
    """`discover`, cached by config.json."""
    if trust_remote_code:
        return discover(config, folder, trust_remote_code, split_experts, own_names)
    path = _path(config, split_experts, own_names)
    architecture = _kept(path)
    if architecture is not None:
        return architecture
    architecture = _kept(_path(config, not split_experts, own_names))
    if architecture is None or architecture.files_fuse_experts:
        architecture = discover(config, folder, split_experts=split_experts, own_names=own_names)
        _keep(path, architecture)
    return architecture


def _path(config: dict[str, Any], split_experts: bool, own_names: bool) -> Path:
    return cache_root() / "architecture" / f"{_key(config, split_experts, own_names)}.json"


def _kept(path: Path) -> Architecture | None:
    try:
        state = path.stat()
        return _parsed(path, state.st_mtime_ns, state.st_ino)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@lru_cache(maxsize=2)
def _parsed(path: Path, changed: int, inode: int) -> Architecture:
    """The architecture in a file of this state: a command asks several times, and a large one takes a second."""
    return _from_json(json.loads(path.read_text(encoding="utf-8")))


def _key(config: dict[str, Any], split_experts: bool, own_names: bool) -> str:
    parts = [json.dumps({k: v for k, v in config.items() if k != "quantization_config"}, sort_keys=True, default=str)]
    parts += [str(split_experts), str(own_names), version_of("transformers"), __version__, *_sources()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _sources() -> list[str]:
    return [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _SOURCES]


def _from_json(kept: dict[str, Any]) -> Architecture:
    linears = {name: Linear(**{**row, "shape": tuple(row["shape"])}) for name, row in kept.pop("linears").items()}
    parameters = {name: tuple(shape) for name, shape in kept.pop("parameters").items()}
    layout = {
        name: Placement(
            tuple(row["shape"]),
            _parts(row),
            tuple(FusedTensor(each["name"], tuple(each["shape"]), _parts(each)) for each in row["fused"]),
        )
        for name, row in kept.pop("layout").items()
    }
    spellings = tuple((found, canonical) for found, canonical in kept.pop("spellings"))
    blocks, passed_over = tuple(kept.pop("blocks")), tuple(kept.pop("passed_over"))
    replaced, cut = tuple(kept.pop("replaced_experts")), tuple(kept.pop("cut_weights"))
    return Architecture(
        **kept, blocks=blocks, linears=linears, parameters=parameters, layout=layout, spellings=spellings,
        passed_over=passed_over, replaced_experts=replaced, cut_weights=cut,
    )  # fmt: skip


def _parts(row: dict[str, Any]) -> tuple[Part, ...]:
    return tuple(Part(**part) for part in row["parts"])


def _keep(path: Path, architecture: Architecture) -> None:
    """Write a temporary file, then rename: a reader sees a complete file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(architecture), file)
        os.replace(beside, path)
    except OSError:
        return
