"""Write adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors, and lowbit's report.

    base_model.model.MODULE.lora_A.weight   float32 [r, K]
    base_model.model.MODULE.lora_B.weight   float32 [N, r]

MODULE is the name that transformers gives it, which need not be that of the base's files. `target_modules` are the last
parts of these names where they name no other linear, else the whole names. The report tells `--adapter` of lowbit
whether the base was changed (LoftQ); PEFT itself would start LoftQ again if its config said so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.checkpoint.base import REPORT_NAME
from lowbit.checkpoint.companions import ADAPTER, ADAPTER_WEIGHTS
from lowbit.export.atomic import atomic_folder
from lowbit.train.adapters import Adapters
from lowbit.version import __version__

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Described:
    """What the report of an adapter says.

    base   folder, file or id of the quantized base
    model  what the user named
    text   name and SHA-256 of the text
    notes  sentences on the training
    """

    base: str
    model: str
    scheme: str | None
    text: dict[str, Any]
    losses: dict[str, float]
    notes: tuple[str, ...]


def write_adapter(adapters: Adapters, output: Path, described: Described, tokenizer: Any, overwrite: bool) -> None:
    """A folder that appears complete or not at all."""
    with atomic_folder(output, overwrite) as work:
        tensors = {}
        for name, update in adapters.updates.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.A.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.B.detach().cpu().contiguous()
        save_file(tensors, work / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _write_json(work / ADAPTER, _config(adapters, described.base))
        tokenizer.save_pretrained(work)
        beside = sorted(path for path in work.rglob("*") if path.is_file())
        files = [{"name": path.relative_to(work).as_posix(), "bytes": path.stat().st_size} for path in beside]
        lora = adapters.lora
        report = {
            "lowbit_version": __version__, "kind": "adapter", "base": described.base, "model": described.model,
            "scheme": described.scheme, "text": described.text, "held_out": described.losses,
            "lora": {"rank": lora.rank, "alpha": lora.effective_alpha, "init": lora.init,
                     "changed_base": lora.init == "loftq"},
            "notes": list(described.notes), "output": {"files": files, "beside": []},
        }  # fmt: skip
        _write_json(work / REPORT_NAME, report)


def _config(adapters: Adapters, base: str) -> dict[str, Any]:
    lora, model = adapters.lora, adapters.model
    turned = [isinstance(model.get_submodule(name), Conv1D) for name in adapters.updates]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.effective_alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": _targets(adapters), "fan_in_fan_out": all(turned), "init_lora_weights": True,
        "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip


def _targets(adapters: Adapters) -> list[str]:
    """Last parts of names where they name these modules alone, else whole names."""
    leaves = {name.rpartition(".")[2] for name in adapters.updates}
    linears = {name for name, module in adapters.model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    named = {name for name in linears if name.rpartition(".")[2] in leaves}
    return sorted(leaves if named == adapters.updates.keys() else adapters.updates)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
