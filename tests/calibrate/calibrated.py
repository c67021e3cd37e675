"""What tests of calibrated quantization share: a text, a way to run, and what a folder holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lowbit
from lowbit.report import schema
from models import SHORT_TEXT

TEXT = Path(SHORT_TEXT).read_text(encoding="utf-8")  # 6000 tokens of the tiny models


def write_text(folder: Path) -> Path:
    path = folder / "calibration.txt"
    path.write_text(TEXT)
    return path


def calibrated(model, out: Path, text: Path, method: str = "gptq", **settings) -> schema.Report:
    """Quantize with few short windows."""
    given = {"scheme": "W4A16", "group_size": 32} | settings
    if method != "hqq":  # which reads no text
        given = {"calib": str(text), "samples": 12, "seqlen": 48} | given
    if "gptq" in method:
        given = {"expert_tokens": 8} | given
    return lowbit.quantize(model, out, method=method, **given).report


def files_of(folder: Path) -> dict[str, str]:
    """Name → hash of every file but the report, which has times in it."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("lowbit-report.json", "report.html")
    }
