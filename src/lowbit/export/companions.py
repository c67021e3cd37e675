"""What goes along with the weights as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowbit.checkpoint.base import REPORT_NAME


def copy_companions(folder: Path, work: Path) -> None:
    """Tokenizer, generation config, chat template, licence and custom code: all small files that are not weights."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in _REWRITTEN and path.suffix.lower() in _COMPANIONS:
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, work / path.name)
        elif path.is_file() and path.name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(path, work / path.name)


_COMPANIONS = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".vocab", ".spm"}
# Written anew, or of an earlier quantization, which would contradict config.json.
_REWRITTEN = {
    "config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", REPORT_NAME,
}  # fmt: skip
