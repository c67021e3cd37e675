"""Open a model by its name: a folder, a .gguf file, `demo:…`, or a Hugging Face id. One that is open stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.checkpoint.base import Checkpoint, OpenOptions, first_part, is_gguf, split_name
from lowbit.checkpoint.companions import refuse_lone_adapter
from lowbit.checkpoint.hub import DEMO_PREFIX, demo_file, download, is_hub_id
from lowbit.checkpoint.stated import check_stated
from lowbit.errors import CheckpointError, UsageError
from lowbit.files.regular import refuse_irregular
from lowbit.registry import FORMATS, load

if TYPE_CHECKING:
    from lowbit.checkpoint.safetensors import SafetensorsCheckpoint


# What the user typed, or a model that is open already: one in memory.
ModelSource = str | Path | Checkpoint

_MERGE = "lowbit.architecture.merging:merge_adapter"  # needs the architecture: names of modules


def open_checkpoint(model: ModelSource, options: OpenOptions | None = None) -> Checkpoint:
    """Open MODEL: an existing path wins over an id of the same spelling. An adapter of the options is merged."""
    options = options or OpenOptions()
    if isinstance(model, str | Path):
        source, path = str(model), _found(model, options)
        opened = _open_folder(path, source, options) if path.is_dir() else _open_file(path, source)
    else:
        refuse_revision(model.source, options)
        opened = model
    return opened if options.adapter is None else load(_MERGE)(opened, options)


def find_gguf(model: ModelSource, options: OpenOptions | None = None) -> Path | None:
    """The GGUF file that `open_checkpoint` would read, of any architecture; None for other models, and where an adapter
    is merged."""
    options = options or OpenOptions()
    if options.adapter is not None or not isinstance(model, str | Path):
        return None
    source, path = str(model), _found(model, options)
    if not path.is_dir():
        return path if is_gguf(path) else None
    return None if _holds_safetensors(path) else _only_gguf(path, source)


def _found(model: str | Path, options: OpenOptions) -> Path:
    """The local file or folder; a hub id is downloaded."""
    source, path = str(model), first_part(Path(model).expanduser())
    if source.startswith(DEMO_PREFIX) or path.exists():
        refuse_revision(source, options)
    if source.startswith(DEMO_PREFIX):
        return demo_file(source)
    if path.exists():
        return path
    if isinstance(model, Path) or not is_hub_id(source):
        raise CheckpointError(
            f"{source}: there is no such file or folder, and it is no Hugging Face id (org/name) either",
            "give a model folder, a .gguf file, org/name, org/name:FILE.gguf or demo:smollm2",
        )
    return download(source, options)


def refuse_revision(source: str, options: OpenOptions) -> None:
    """UsageError for a revision of what is no Hugging Face id."""
    if options.revision is not None:
        raise UsageError(f"--revision {options.revision} is read only for a Hugging Face id, and {source} is none",
                         "leave it out")  # fmt: skip


def _holds_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists()


def _only_gguf(folder: Path, source: str) -> Path | None:
    """The first part of a folder's GGUF model; None where there is none. Vision projectors are no models."""
    models: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        if not path.name.startswith("mmproj"):
            models.setdefault(split_name(path), path)
    gguf = list(models.values())
    if len(gguf) > 1:
        raise UsageError(
            f"{source}: the folder holds {len(gguf)} GGUF models: {', '.join(path.name for path in gguf)}",
            f"name one, such as {gguf[0]}",
        )
    return gguf[0] if gguf else None


def open_safetensors(folder: str | Path) -> SafetensorsCheckpoint:
    """Open a folder of *.safetensors."""
    from lowbit.checkpoint import safetensors

    return safetensors.open_safetensors(folder)


def open_gguf(path: str | Path, source: str | None = None) -> Checkpoint:
    """Open a .gguf file; of a split one, any part. `source` is what the user typed, where that differs."""
    return load(FORMATS["gguf"].open or "")(path, source)


def _open_file(path: Path, source: str) -> Checkpoint:
    if is_gguf(path):
        return open_gguf(path, source)
    hint = "give a model folder or a .gguf file"
    if path.suffix == ".safetensors":
        hint = f"give the folder {path.parent}, which should hold config.json and the tokenizer too"
    raise UsageError(f"{source}: a single {path.suffix or 'unnamed'} file is no model", hint)


def _open_folder(folder: Path, source: str, options: OpenOptions) -> Checkpoint:
    refuse_lone_adapter(folder, source)
    if _holds_safetensors(folder):
        from lowbit.checkpoint.quantized import open_quantized
        from lowbit.checkpoint.safetensors import open_safetensors

        stored = open_safetensors(folder, source)
        check_stated(stored, options)
        return open_quantized(stored)
    gguf = _only_gguf(folder, source)
    if gguf is not None:
        return open_gguf(gguf, source)
    from lowbit.checkpoint.pickle import open_pickle, pickle_files

    refuse_irregular(folder)

    if pickle_files(folder):
        pickled = open_pickle(folder, options, source)
        check_stated(pickled, options)
        return pickled
    raise CheckpointError(
        f"{source}: the folder holds no weights (no *.safetensors, no *.gguf)",
        "give the folder that holds config.json and the weights",
    )
