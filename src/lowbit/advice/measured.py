"""Speeds that `lowbit bench` measured on this machine, found in the reports of outputs nearby: advice shows them beside
its upper bounds, as "measured here".

Looked at: lowbit-report.json of each folder, and NAME.lowbit-report.json of each GGUF file, in the current folder. A
report counts if its source is the model asked about; a damaged one is passed over, since nobody asked for it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

from lowbit.benchmark.result import Bench, BenchRow
from lowbit.checkpoint.base import REPORT_NAME
from lowbit.errors import LowbitError
from lowbit.report import schema

_MOST = 200  # reports that are opened, the latest first


@dataclass(frozen=True)
class MeasuredSpeed:
    """A row of a `Bench` of an output. path  of the output"""

    scheme: str
    path: str
    bench: Bench
    row: BenchRow


def measured_here(model: str, engine: str, context: int, batch: int, folder: Path | None = None) -> list[MeasuredSpeed]:
    """Of each scheme that was measured in this engine, the row nearest to `context` tokens and `batch` sequences."""
    where = Path.cwd() if folder is None else folder
    found: dict[str, MeasuredSpeed] = {}
    for path in _reports(where):
        try:
            report = schema.load(path)
        except LowbitError:
            continue
        if report.source.model != model:
            continue
        for bench in report.bench:
            if bench.engine == engine and bench.rows and report.settings.scheme not in found:
                row = min(bench.rows, key=lambda row: (abs(row.batch - batch), abs(row.context - context)))
                name = bench.model if Path(bench.model).exists() else str(path)
                found[report.settings.scheme] = MeasuredSpeed(report.settings.scheme, name, bench, row)
    return list(found.values())


def _reports(folder: Path) -> list[Path]:
    places = [*folder.glob(f"*/{REPORT_NAME}"), *folder.glob(f"*.{REPORT_NAME}")]
    return heapq.nlargest(_MOST, places, key=lambda path: path.stat().st_mtime)
