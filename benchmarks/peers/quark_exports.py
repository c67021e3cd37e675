"""Models that amd-quark exports, decoded by it and by lowbit: equal to the bit, or the script says where not.

    python benchmarks/peers/quark_exports.py FOLDER [KIND …]

Needs amd-quark (0.13) and transformers; a tiny random Llama is exported into FOLDER once for every kind.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from quark.torch import ModelQuantizer, export_safetensors, import_model_from_safetensors  # type: ignore[import]
from quark.torch.export.nn.modules.qparamslinear import QParamsLinear  # type: ignore[import]
from quark.torch.quantization.config import config as specs  # type: ignore[import]
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint

KINDS = {
    "int4_group": {"weight": specs.Int4PerGroupSpec(ch_axis=-1, group_size=32)},
    "uint4_group": {"weight": specs.Uint4PerGroupSpec(ch_axis=-1, group_size=32)},
    "int4_channel": {"weight": specs.Int4PerChannelSpec(ch_axis=0)},
    "uint4_channel": {"weight": specs.Uint4PerChannelSpec(ch_axis=0, is_dynamic=False)},
    "int4_tensor": {"weight": specs.Int4PerTensorSpec()},
    "int8_tensor": {"weight": specs.Int8PerTensorSpec(), "input_tensors": specs.Int8PerTensorSpec()},
    "int8_channel": {"weight": specs.Int8PerChannelSpec(ch_axis=0)},
    "uint8_channel": {"weight": specs.Uint8PerChannelSpec(ch_axis=0, symmetric=False)},
    "int8_group": {"weight": specs.Int8PerGroupSpec(ch_axis=-1, group_size=32)},
    "uint8_group": {"weight": specs.Uint8PerGroupSpec(ch_axis=-1, group_size=32)},
    "fp8_tensor": {
        "weight": specs.FP8E4M3PerTensorSpec(is_dynamic=False),
        "input_tensors": specs.FP8E4M3PerTensorSpec(is_dynamic=False),
    },
    "fp8_channel": {
        "weight": specs.FP8E4M3PerChannelSpec(ch_axis=0, is_dynamic=False),
        "input_tensors": specs.FP8E4M3PerChannelSpec(ch_axis=1, is_dynamic=True),
    },
    "mxfp4": {
        "weight": specs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False),
        "input_tensors": specs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=True),
    },
}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96, max_position_embeddings=64, dtype="bfloat16",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def exported(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Export a model into `folder`; the weights as amd-quark decodes them from there, by module."""
    stated = {name: spec.to_quantization_spec() for name, spec in KINDS[kind].items()}
    quantizer = ModelQuantizer(specs.QConfig(global_quant_config=specs.QLayerConfig(**stated), exclude=["lm_head"]))
    windows = [torch.randint(0, 96, (16,)) for _ in range(2)]
    model = quantizer.quantize_model(tiny_model(), torch.utils.data.DataLoader(windows, batch_size=1))
    model = quantizer.freeze(model)
    shutil.rmtree(folder, ignore_errors=True)
    with torch.no_grad():
        export_safetensors(model, folder)
    back = import_model_from_safetensors(tiny_model(), str(folder), device="cpu")
    linears = {name: module for name, module in back.named_modules() if isinstance(module, QParamsLinear)}
    return {name: module.weight_quantizer(module.weight.data).float() for name, module in linears.items()}


def main(target: str, *kinds: str) -> None:
    differ = []
    for kind in kinds or KINDS:
        theirs = exported(kind, Path(target) / kind)
        ours = open_checkpoint(Path(target) / kind)
        assert isinstance(ours, Checkpoint)
        equal = len(ours.schemes) == len(theirs) and all(
            torch.equal(ours.read(f"{name}.weight"), weight) for name, weight in theirs.items()
        )
        print(kind, len(theirs), "linears", "equal" if equal else "DIFFER", flush=True)
        differ += [] if equal else [kind]
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
