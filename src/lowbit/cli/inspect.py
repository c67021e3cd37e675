"""`lowbit inspect PATH`: what is in a checkpoint, without reading its weights."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import of_trust


def inspect(
    path: Annotated[str, typer.Argument(help="Folder, .gguf file, Hugging Face id, or demo:smollm2.")],
    options: Annotated[Any, of_trust("allow_pickle")],
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, metadata included.")] = False,
) -> None:
    """List tensors, types, bits per weight and metadata of any supported checkpoint."""
    import lowbit
    from lowbit.cli.console import print_json, print_table

    checkpoint = lowbit.inspect(path, options)
    if json:
        print_json(_as_json(checkpoint))
    else:
        print_table(_table(checkpoint))
        for note in checkpoint.notes:
            echo(f"note: {note}")


def _bits_per_weight(info: Any) -> float | None:
    weights = math.prod(info.shape)
    return 8 * info.nbytes / weights if weights else None


def _as_json(checkpoint: Any) -> dict[str, Any]:
    from lowbit.cli.console import dtype_name

    return {
        "source": checkpoint.source,
        "kind": checkpoint.kind,
        "notes": list(checkpoint.notes),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "metadata": {key: _plain(value) for key, value in checkpoint.metadata.items()},
        "tensors": [
            {
                "name": info.name,
                "shape": list(info.shape),
                "stored": info.stored,
                "dtype": dtype_name(info.dtype),
                "bytes": info.nbytes,
                "bits_per_weight": _bits_per_weight(info),
                "file": info.file.name,
            }
            for info in checkpoint.tensors.values()
        ],
    }


def _plain(value: Any) -> Any:
    """JSON values of metadata; a long list (a vocabulary) is replaced by its length."""
    if isinstance(value, (list, tuple)) and len(value) > 64:
        return f"list of {len(value)}"
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def _table(checkpoint: Any) -> Any:
    from lowbit.cli.console import name_table
    from lowbit.measure import human_bytes

    total = sum(info.nbytes for info in checkpoint.tensors.values())
    title = f"{checkpoint.source}: {checkpoint.kind}, {len(checkpoint.tensors)} tensors, {human_bytes(total)}"
    table = name_table(title, ("shape", "stored"), ("bits/weight", "bytes"))
    for info in checkpoint.tensors.values():
        bits = _bits_per_weight(info)
        table.add_row(info.name, "×".join(map(str, info.shape)), info.stored, "" if bits is None else f"{bits:.3f}",
                      f"{info.nbytes:,}")  # fmt: skip
    return table
