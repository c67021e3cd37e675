"""LoRA adapters for tests, laid out as PEFT's save_pretrained lays them out, and their sum in a few lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 8,
    "target_modules": ["q_proj"], "lora_dropout": 0.05, "bias": "none", "fan_in_fan_out": False, "use_dora": False,
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True,
    "inference_mode": True, "peft_version": "0.21.2", "target_parameters": None, "qalora_group_size": 16,
}  # fmt: skip


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a small model or adapter, in float64."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: tensor.double() for name, tensor in load_file(path).items()}
    return found


def linears_of(folder: Path, *leaves: str) -> dict[str, tuple[int, int]]:
    """Module → (rows, columns) of the matrices of a model's decoder whose module ends so, as they are stored."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in tensors_of(folder).items()
        if name.removesuffix(".weight").endswith(leaves) and tensor.dim() == 2 and "layers." in name
    }


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter of these tensors, whose names lack the prefix of PEFT."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def matrices(shapes: dict[str, tuple[int, int]], rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of modules with [N, K] weights."""
    torch.manual_seed(seed)
    found = {}
    for module, (rows, columns) in shapes.items():
        found[f"{module}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
        found[f"{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    return found


def make_adapter(folder: Path, base: Path, *leaves: str, rank: int = 4, seed: int = 0, **config: Any) -> Path:
    """An adapter of the matrices of `base` whose modules end so."""
    chosen = linears_of(base, *(leaves or ("q_proj", "v_proj")))
    assert chosen
    return write_adapter(folder, matrices(chosen, rank, seed), **{"r": rank} | config)


def summed(
    weight: torch.Tensor, tensors: dict[str, torch.Tensor], module: str, alpha: float = 8, rslora: bool = False
) -> torch.Tensor:
    """W + s·B·A in float64; with DoRA, rows of the norms that it learned."""
    a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    total = weight.double() + alpha / (math.sqrt(len(a)) if rslora else len(a)) * b @ a
    magnitude = tensors.get(f"{module}.lora_magnitude_vector")
    return total if magnitude is None else total * (magnitude.double() / total.norm(dim=1))[:, None]
