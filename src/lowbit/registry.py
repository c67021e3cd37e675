"""The tables of formats and engines. A new format is a folder in `formats/` and a row here; a new engine is a file in
`engines/` and a row. Rows name code as "module:attribute", which `load` imports on first use: this module imports none.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    """One row.

    name           the value of `--format`; for read-only formats, the quant_method of config.json
    engine         the engine whose rules verification applies to what was written
    read           "module:class" of the `Layout` that reads such folders
    write          "module" or "module:object", an `export.Exporter`; None for read-only formats
    plan           "module:function" that opens a model and plans its output
    refine         "module:function" that plans the refinement of a finished model
    rules          "module:RULES", verification rules of this format
    suffix         file name suffix of single-file formats; None for folders
    open           single files: "module:function" that opens one under Hugging Face names
    inspect        single files: "module:class" of the subject of verification
    header         single files: "module:function" that reads the header alone
    fused_experts  True where gpt-oss's experts of a block are one tensor
    kv_cache       KV-cache schemes whose scales the format stores
    signed_scales  True where what reads the format multiplies codes by scales of either sign
    transforms     True if it can state rotations that an engine applies as the model runs
    nearest        schemes that `convert` rounds unrepresentable codes to: (up to 4 bits, more than 4); None: refused
    beside         (file, suffix of tensor names) of tools that describe the format elsewhere than in config.json's
                   quantization_config; config.json itself where the tensors say all
    """

    name: str
    engine: str = "vllm"
    read: str | None = None
    write: str | None = None
    plan: str = "lowbit.plan.folder:prepare_folder"
    refine: str = "lowbit.plan.refining:keep_folder"
    rules: str | None = None
    suffix: str | None = None
    open: str | None = None
    inspect: str | None = None
    header: str | None = None
    fused_experts: bool = False
    kv_cache: tuple[str, ...] = ()
    signed_scales: bool = False
    transforms: bool = False
    nearest: tuple[str, str] | None = None
    beside: tuple[str, str] | None = None


# The first engine that loads a kind of model (folder, GGUF file) is its default.
ENGINES: dict[str, str] = {
    "vllm": "lowbit.engines.vllm:ENGINE",
    "sglang": "lowbit.engines.sglang:ENGINE",
    "tensorrt-llm": "lowbit.engines.tensorrt_llm:ENGINE",
    "lmdeploy": "lowbit.engines.lmdeploy:ENGINE",
    "tgi": "lowbit.engines.tgi:ENGINE",
    "llama.cpp": "lowbit.engines.llama_cpp:ENGINE",
    "transformers": "lowbit.engines.transformers:ENGINE",
}

_F = "lowbit.formats"
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "compressed-tensors", read=f"{_F}.compressed_tensors.read:CompressedTensorsLayout",
            write=f"{_F}.compressed_tensors.write", rules=f"{_F}.compressed_tensors.rules:RULES",
            kv_cache=("fp8", "fp8_per_head"), signed_scales=True, transforms=True, nearest=("W4A16_ASYM", "W8A16"),
        ),
        Format(
            "gptq", read=f"{_F}.gptq.read:GptqLayout", write=f"{_F}.gptq.write:GPTQ_V1", rules=f"{_F}.gptq.rules:RULES",
            signed_scales=True, nearest=("W4A16", "W8A16"), beside=("quantize_config.json", ".qweight"),
        ),
        Format("gptq_v2", write=f"{_F}.gptq.write:GPTQ_V2", signed_scales=True, nearest=("W4A16", "W8A16")),
        Format(
            "awq", read=f"{_F}.awq.read:AwqLayout", write=f"{_F}.awq.write", rules=f"{_F}.awq.rules:RULES",
            nearest=("W4A16_ASYM", "W4A16_ASYM"), beside=("quant_config.json", ".qweight"),
        ),
        Format(
            "bitsandbytes", "transformers", read=f"{_F}.bitsandbytes.read:BitsAndBytesLayout",
            write=f"{_F}.bitsandbytes.write", rules=f"{_F}.bitsandbytes.rules:RULES", nearest=("NF4", "INT8"),
        ),
        Format(
            "modelopt", read=f"{_F}.modelopt.read:ModelOptLayout", write=f"{_F}.modelopt.write",
            rules=f"{_F}.modelopt.rules:RULES", kv_cache=("fp8", "nvfp4"), nearest=("NVFP4A16", "FP8_DYNAMIC"),
            beside=("hf_quant_config.json", ".weight_scale"),
        ),
        Format(
            "mxfp4", read=f"{_F}.mxfp4.read:Mxfp4Layout", write=f"{_F}.mxfp4.write", fused_experts=True,
            nearest=("MXFP4A16", "MXFP4A16"),
        ),
        Format(
            "bitnet", "transformers", read=f"{_F}.bitnet.read:BitNetLayout", write=f"{_F}.bitnet.write",
            rules=f"{_F}.bitnet.rules:RULES",
        ),
        Format(
            "codebook", "transformers", read=f"{_F}.codebook.read:CodebookLayout", write=f"{_F}.codebook.write",
            rules=f"{_F}.codebook.rules:RULES",
        ),
        Format("float", "transformers", write=f"{_F}.float.write", fused_experts=True, signed_scales=True),
        Format(
            "gguf", "llama.cpp", plan=f"{_F}.gguf.plan:prepare_gguf", refine=f"{_F}.gguf.refining:keep_file",
            rules=f"{_F}.gguf.rules:RULES", suffix=".gguf",
            open=f"{_F}.gguf.read:open_gguf", inspect=f"{_F}.gguf.subject:GGUFSubject",
            header=f"{_F}.gguf.header:read_header",
        ),
        Format("fp8", read=f"{_F}.fp8.read:Fp8Layout", rules=f"{_F}.fp8.rules:RULES"),
        Format("auto-round", read=f"{_F}.auto_round.read:open_auto_round"),
        Format("fbgemm_fp8", read=f"{_F}.fbgemm_fp8.read:open_fbgemm_fp8"),
        Format("torchao", read=f"{_F}.torchao.read:TorchAoLayout"),
        Format("quark", read=f"{_F}.quark.read:QuarkLayout"),
        Format("hqq", read=f"{_F}.hqq.read:HqqLayout", beside=("config.json", ".W_q")),
    )
}  # fmt: skip


def folder_formats() -> tuple[str, ...]:
    """Formats that lowbit writes as a folder."""
    return tuple(row.name for row in FORMATS.values() if row.write is not None)


def written_formats() -> tuple[str, ...]:
    """All values of `--format`."""
    return (*folder_formats(), *(row.name for row in FORMATS.values() if row.suffix is not None))


def load(place: str) -> Any:
    """The module, or the object in it, that a row names: "module" or "module:object"."""
    module, _, attribute = place.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
