"""The command line that writes the checkpoint; `Engine.serve_line` gives the one that serves it."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from lowbit.engines.engine import DOUBLE_QUANT, Support
from lowbit.knobs import Facts, command_line
from lowbit.schemes import is_gguf_name
from lowbit.settings import MEASURE, Settings, facts_of, make_settings

PLACEHOLDER = "MODEL"
# Types whose expected quality (`lowbit.advice.quality`) was measured without an importance matrix.
_WITHOUT_IMATRIX = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_0")


def quantize_settings(scheme: str, how: Support, fp8_cache: bool, longest: int | None = None) -> dict[str, Any]:
    """The keyword arguments of `lowbit.quantize` for an option, without defaults.

    longest  context of the model in tokens, the limit of calibration windows
    """
    settings = _what(scheme, how, fp8_cache)
    facts = facts_of(make_settings(None, **settings), Facts(gguf=is_gguf_name(scheme)))
    reads_text = facts.reads_text or facts.measures
    if reads_text and longest is not None and longest < Settings().seqlen:
        settings["seqlen"] = longest
    return settings


def _what(scheme: str, how: Support, fp8_cache: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"scheme": scheme}
    if is_gguf_name(scheme):
        if scheme not in _WITHOUT_IMATRIX:
            settings["imatrix"] = MEASURE
        return settings
    if how.method != "rtn":
        settings["method"] = how.method
    if how.group_size is not None:
        settings["group_size"] = how.group_size
    if how.format not in ("compressed-tensors", "bitsandbytes"):
        settings["format"] = how.format
    if scheme in DOUBLE_QUANT:
        settings["double_quant"] = True
    if fp8_cache:
        settings["kv_cache"] = "fp8"
    return settings


def output_name(model: str | None, scheme: str, fp8_cache: bool = False) -> str:
    """Name of the output in the current folder: "Llama-3.1-8B-W4A16", "….gguf"."""
    stem = PLACEHOLDER.lower() if model is None else PurePath(model.removeprefix("demo:")).name.removesuffix(".gguf")
    return f"{stem}-{scheme}{'-fp8-cache' if fp8_cache else ''}{'.gguf' if is_gguf_name(scheme) else ''}"


def quantize_line(model: str | None, output: str, settings: dict[str, Any]) -> str:
    """ "lowbit quantize MODEL -o OUT --scheme …" of those settings."""
    return command_line("quantize", model or PLACEHOLDER, output, settings)
