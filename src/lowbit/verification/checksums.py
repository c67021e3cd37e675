"""Are the files those that lowbit wrote, to the bit? By the SHA-256 of each MiB that the report keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.checkpoint.base import read_json_object, report_path
from lowbit.errors import CheckpointError
from lowbit.files.hashes import CHUNK, DIGEST, file_digests, from_text
from lowbit.methods import RTN
from lowbit.verification.result import Finding

_LEARNED = 1.2  # the report states the error of rounding, before distillation or training


def kept_checksums(output: Path, part: str = "files") -> dict[str, tuple[int, bytes]]:
    """File name → (bytes, digests of its chunks), as the report beside an output keeps them; empty without a report.

    part  "files" for those with weights, "beside" for config, tokenizer and the like
    """
    report = report_path(output)
    if not report.is_file():
        return {}
    try:
        stated: Any = read_json_object(report)["output"].get(part)
        return {file["name"]: (file["bytes"], from_text(file["hashes"])) for file in stated or () if file.get("hashes")}
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError):
        return {}


def stated_errors(output: Path) -> dict[str, float]:
    """Tensor → ‖W − Ŵ‖² / ‖W‖² by the report beside an output, of calibrated ones; empty without a report."""
    report = report_path(output)
    try:
        entries: Any = read_json_object(report)["tensors"] if report.is_file() else ()
        found = {entry["name"]: float(entry["relative_error"]) for entry in entries
                 if entry.get("relative_error") and entry.get("method") not in (None, RTN.name)}  # fmt: skip
        return {name: error for name, error in found.items() if 0 <= error < math.inf}
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError):
        return {}


def error_bound(by_bits: float, left: float | None) -> float:
    """The largest ‖W − Ŵ‖ / ‖W‖ allowed: that of the bits, or what rounding left and learning may have added."""
    return by_bits if left is None else max(by_bits, _LEARNED * math.sqrt(left))


def check_checksums(
    folder: Path, kept: dict[str, tuple[int, bytes]], holders: Callable[[str, int, int], list[str]]
) -> Finding:
    """Compare the files of a folder with their checksums.

    holders  (file name, first byte, last byte) → names of the tensors that have bytes there
    """
    problems = []
    for name, (size, digests) in kept.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes; {size} were written")
        else:
            found = file_digests(path)
            for index in range(len(digests) // DIGEST):
                part = slice(index * DIGEST, (index + 1) * DIGEST)
                if found[part] != digests[part]:
                    first, last = index * CHUNK, min(size, (index + 1) * CHUNK)
                    named = holders(name, first, last) or ["the header"]
                    more = f" and {len(named) - 2} more" if len(named) > 2 else ""
                    problems.append(f"{name}: bytes {first} to {last} are not those that were written "
                                    f"({', '.join(named[:2])}{more})")  # fmt: skip
    return Finding(problems, f"{len(kept)} file{'s' * (len(kept) != 1)} as written, to the bit")


def changed_beside(folder: Path) -> list[str]:
    """Files beside the weights that are not as lowbit wrote them: someone's right, and worth a word."""
    kept = kept_checksums(folder, "beside")
    return [name for name, (size, digests) in kept.items() if not _is_as_written(folder / name, size, digests)]


def _is_as_written(path: Path, size: int, digests: bytes) -> bool:
    return path.is_file() and path.stat().st_size == size and file_digests(path) == digests
