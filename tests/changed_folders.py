"""Changes of a quantized folder, for tests of its reader and of its rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def change_folder(folder: Path, tensors: Callable[[dict[str, Tensor]], object] | None = None, **config: Any) -> Path:
    """The folder, its tensors changed in place by a function and its quantization_config by keys, without a report."""
    (folder / "lowbit-report.json").unlink(missing_ok=True)
    if tensors is not None:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    stated["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(stated))
    return folder
