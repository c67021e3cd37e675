"""llama.cpp's rules for the file of a vision tower, each broken in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import Keys

import lowbit
from vision_models import make_vision


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("mmproj")
    folder = make_vision(base / "hf", "smolvlm")
    return lowbit.quantize(folder, base / "whole.gguf", mmproj=True, scheme="F32").path


def rewritten(whole: Path, path: Path, without: str = "", values: dict[str, Any] | None = None) -> Path:
    """The file without one tensor or key, or with other values; by the gguf package's writer."""
    reader, writer = gguf.GGUFReader(whole), gguf.GGUFWriter(path, "clip")
    for name, kept in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", without):
            items = kept.types[1] if len(kept.types) > 1 else None
            writer.add_key_value(name, (values or {}).get(name, kept.contents()), kept.types[0], items)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BROKEN: dict[str, tuple[str, str, dict[str, Any]]] = {  # rule → what it says, what is left out, what is changed
    "mmproj-keys": (Keys.ClipVision.IMAGE_MEAN, Keys.ClipVision.IMAGE_MEAN, {}),
    "mmproj-tensors": ("mm.model.fc.weight is missing", "mm.model.fc.weight", {}),
    "mmproj-shapes": ("v.patch_embd.weight is [32, 3, 16, 16]", "", {Keys.ClipVision.PATCH_SIZE: 8}),
}


def test_a_file_as_written_breaks_no_rule(whole, tmp_path):
    assert lowbit.verify(rewritten(whole, tmp_path / "same.gguf")).ok


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_file_is_named(whole, tmp_path, rule):
    said, without, values = BROKEN[rule]
    checked = lowbit.verify(rewritten(whole, tmp_path / "broken.gguf", without, values))
    failed = {check.rule: check.detail for check in checked.checks if not check.passed}
    assert list(failed) == [rule]
    assert said in failed[rule]
