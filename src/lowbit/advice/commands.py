"""The lines to run: one that makes the checkpoint, one that serves it. Both are what somebody would type."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Any

from lowbit.advice.engines import DOUBLE_QUANT, Support
from lowbit.advice.roofline import Load
from lowbit.schemes import find_scheme, is_gguf_name
from lowbit.settings import MEASURE, Settings

PLACEHOLDER = "MODEL"
# Types whose expected quality (`lowbit.advice.quality`) was measured without an importance matrix.
_WITHOUT_IMATRIX = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_0")


def quantize_settings(scheme: str, how: Support, fp8_cache: bool, longest: int | None = None) -> dict[str, Any]:
    """The keyword arguments of `lowbit.quantize` that make what was advised; only those that are not the default.

    longest  tokens that the model was made for; windows of calibration text must not be longer
    """
    settings = _what(scheme, how, fp8_cache)
    reads_text = bool({"method", "kv_cache", "imatrix"} & set(settings)) or _has_static_scales(scheme)
    if reads_text and longest is not None and longest < Settings().seqlen:
        settings["seqlen"] = longest
    return settings


def _has_static_scales(scheme: str) -> bool:
    activation = None if is_gguf_name(scheme) else find_scheme(scheme).activation
    return activation is not None and activation.needs_calibration


def _what(scheme: str, how: Support, fp8_cache: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"scheme": scheme}
    if is_gguf_name(scheme):
        if scheme not in _WITHOUT_IMATRIX:
            settings["imatrix"] = MEASURE
        return settings
    if how.method != "rtn":
        settings["method"] = how.method
    if how.format not in ("compressed-tensors", "bitsandbytes"):
        settings["format"] = how.format
    if scheme in DOUBLE_QUANT:
        settings["double_quant"] = True
    if fp8_cache:
        settings["kv_cache"] = "fp8"
    return settings


def output_name(model: str | None, scheme: str, fp8_cache: bool = False) -> str:
    """Where the quantized model would go, below the current folder: "Llama-3.1-8B-W4A16", "….gguf"."""
    stem = PLACEHOLDER.lower() if model is None else PurePath(model.removeprefix("demo:")).name.removesuffix(".gguf")
    return f"{stem}-{scheme}{'-fp8-cache' if fp8_cache else ''}{'.gguf' if is_gguf_name(scheme) else ''}"


def quantize_line(model: str | None, output: str, settings: dict[str, Any]) -> str:
    """ "lowbit quantize MODEL -o OUT --scheme …" of those settings."""
    words = ["lowbit", "quantize", model or PLACEHOLDER, "-o", output]
    for name, value in settings.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def serve_line(engine: str, output: str, load: Load, fp8_cache: bool, finetune: bool = False) -> str:
    """The line that loads what was written into the engine."""
    out = shlex.quote(output)
    if finetune:
        return (
            f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{output}')\"  # peft"
        )
    lines = {
        "vllm": f"vllm serve {out} --max-model-len {load.context}",
        "sglang": f"python -m sglang.launch_server --model-path {out} --context-length {load.context}"
        + (" --kv-cache-dtype fp8_e4m3" if fp8_cache else ""),
        "tensorrt-llm": f"trtllm-serve {out} --max_seq_len {load.context}",
        "llama.cpp": f"llama-server -m {out} -c {load.context * load.batch} -np {load.batch}",
        "transformers": f"transformers chat {out}",
    }
    return lines[engine]
