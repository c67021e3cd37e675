"""Copy the files beside the weights into an output: tokenizer, generation config, templates, licence, custom code."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowbit.checkpoint.companions import find_companions


def copy_companions(folder: Path, work: Path) -> None:
    """Copy what `find_companions` names, sub-folders included, as plain files."""
    for path in find_companions(folder):
        (work / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / path, work / path)
