"""Models that ModelOpt exports itself, held against what lowbit writes and reads: names, dtypes, shapes, logits.

    python benchmarks/peers/modelopt_exports.py FOLDER [ALGORITHM …]

Needs nvidia-modelopt (0.47, with omegaconf, antlr4-python3-runtime 4.9 and pulp); no GPU. A random Llama of one block
is written into FOLDER; ModelOpt calibrates and exports it once for every algorithm, with an FP8 KV cache, and lowbit
quantizes it to the same.

    tensors  names, dtypes and shapes that are in one folder alone
    config   keys of hf_quant_config.json's `quantization` that differ
    logits   ‖theirs − ours‖ / ‖theirs‖, of ModelOpt's model with rounded weights, after its export has given fused
             linears one scale, and of its export as lowbit loads it, both in float32; not of NVFP4, whose rounding in
             ModelOpt needs a GPU
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]
import torch
from make_random_llama import main as make_model  # type: ignore[import-not-found]
from modelopt.torch.export import export_hf_checkpoint  # type: ignore[import-not-found]
from modelopt.torch.export.unified_export_hf import (  # type: ignore[import-not-found]
    requantize_resmooth_fused_llm_layers,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit

# Algorithm → (ModelOpt's preset, our scheme, our method).
ALGORITHMS = {
    "FP8": ("FP8_DEFAULT_CFG", "FP8", "rtn"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_DYNAMIC", "rtn"),
    "W8A8_SQ_PER_CHANNEL": ("INT8_SMOOTHQUANT_CFG", "W8A8_STATIC", "smoothquant"),
    "W4A16_AWQ": ("INT4_AWQ_CFG", "W4A16", "awq"),
    "W4A8_AWQ": ("W4A8_AWQ_BETA_CFG", "W4AFP8_STATIC", "awq"),
    "NVFP4": ("NVFP4_DEFAULT_CFG", "NVFP4", "rtn"),
}
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def exported(preset: str, source: Path, folder: Path, ids: torch.Tensor) -> torch.Tensor | None:
    """ModelOpt's export of the model; the logits of its model with the weights alone rounded, float32, or None."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = copy.deepcopy(getattr(mtq, preset))
    config = mtq.utils.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = mtq.quantize(model, config, lambda each: each(ids))
    with torch.inference_mode():
        requantize_resmooth_fused_llm_layers(model)
    weights_alone = copy.deepcopy(model).float()
    for name, module in weights_alone.named_modules():
        if name.endswith(("input_quantizer", "_bmm_quantizer")):
            module.disable()  # the scale of an input is applied all the same
    with torch.inference_mode():
        logits = None if preset.startswith("NVFP4") else weights_alone(ids).logits
        export_hf_checkpoint(model, export_dir=folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return logits


def shapes(folder: Path) -> Shapes:
    found: Shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def stated(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hf_quant_config.json").read_text())["quantization"]


def compare(algorithm: str, source: Path, folder: Path, ids: torch.Tensor) -> None:
    preset, scheme, method = ALGORITHMS[algorithm]
    theirs, ours = folder / f"{algorithm}-modelopt", folder / f"{algorithm}-lowbit"
    for path in (theirs, ours):
        shutil.rmtree(path, ignore_errors=True)
    logits = exported(preset, source, theirs, ids)
    lowbit.quantize(source, ours, scheme=scheme, method=method, format="modelopt", kv_cache="fp8", samples=8, seqlen=32)
    left, right = shapes(theirs), shapes(ours)
    apart = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    keys = sorted(key for key in stated(theirs).keys() | stated(ours).keys()
                  if stated(theirs).get(key) != stated(ours).get(key))  # fmt: skip
    model, _ = lowbit.load(theirs)
    error = 0.0
    if logits is not None:
        with torch.inference_mode():
            error = float((model(ids).logits - logits).norm() / logits.norm())
    print(
        f"{algorithm}: {len(left)} tensors, logits {'not compared' if logits is None else f'{error:.1e}'}", flush=True
    )
    for name in apart:
        print(f"    tensor {name}: ModelOpt {left.get(name)}, lowbit {right.get(name)}")
    for key in keys:
        print(f"    config {key}: ModelOpt {stated(theirs).get(key)}, lowbit {stated(ours).get(key)}")


def main(target: str, *algorithms: str) -> None:
    folder = Path(target)
    source = folder / "source"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sys.argv = ["make", str(source), "--blocks", "1", "--hidden", "256", "--intermediate", "512", "--heads", "4",
                    "--kv-heads", "2", "--vocab", "320"]  # fmt: skip
        make_model()
    ids = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    for name in algorithms or ALGORITHMS:
        compare(name, source, folder, ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
