"""Ways to change a checkpoint folder, and what a verification says of it then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.verification import Verification, verify

BLOCK = "model.layers.0"
ATTENTION = f"{BLOCK}.self_attn"


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the quantization_config of config.json."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def split_groups(quantization: dict[str, Any], targets: list[str], **weights: Any) -> None:
    """Give some targets a group of their own, before the general one, with other weight arguments."""
    general = quantization["config_groups"]["group_0"]
    own = {**general, "targets": targets, "weights": {**general["weights"], **weights}}
    quantization["config_groups"] = {"own": own, "group_0": general}


def failures(folder: Path, **options: Any) -> dict[str, str]:
    """Rule → detail of what fails."""
    return {check.rule: check.detail for check in verify(folder, **options).failed}


def assert_breaks(folder: Path, rule: str, *named: str, **options: Any) -> Verification:
    """The rule fails, and its detail names what it is about."""
    verification = verify(folder, **options)
    assert not verification.ok
    details = {check.rule: check.detail for check in verification.failed}
    assert rule in details, details
    for name in named:
        assert name in details[rule], details[rule]
    return verification
