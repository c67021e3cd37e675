"""Rules on bitsandbytes folders: transformers 5 (quantizer_bnb_4bit.py, quantizer_bnb_8bit.py), SGLang 0.5."""

from __future__ import annotations

import json
from typing import Any

import torch

from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 4096


def check_config(subject: Subject) -> Finding:
    """Exactly one of load_in_4bit and load_in_8bit; NF4 or FP4; SGLang: codes in bytes."""
    stated, problems = subject.quantization, []
    four, eight = (bool(stated.get(f"load_in_{bits}bit") or stated.get(f"_load_in_{bits}bit")) for bits in (4, 8))
    if four == eight:
        problems.append(f"load_in_4bit is {four} and load_in_8bit is {eight}; exactly one must be true")
    number = str(stated.get("bnb_4bit_quant_type", "fp4"))
    if four and number not in ("nf4", "fp4"):
        problems.append(f"bnb_4bit_quant_type is {number!r}; nf4 or fp4 is needed")
    storage = str(stated.get("bnb_4bit_quant_storage", "uint8"))
    if subject.engine == "sglang" and four and storage != "uint8":
        problems.append(f"bnb_4bit_quant_storage is {storage!r}; SGLang takes uint8")
    return Finding(problems, "int8" if eight else number)


def check_states(subject: Subject) -> Finding:
    """The quant_state of every 4-bit weight fits its shape, config.json and the tensors beside it."""
    nested = bool(subject.quantization.get("bnb_4bit_use_double_quant"))
    number = str(subject.quantization.get("bnb_4bit_quant_type", "fp4"))
    problems, count = [], 0
    for name in subject.schemes:
        found = [leaf for leaf in ("nf4", "fp4") if f"{name}.{_STATE}{leaf}" in subject.stored.tensors]
        if not found:
            continue  # int8
        count += 1
        shape = subject.architecture.linears[name].shape
        state, where = _read(subject, f"{name}.{_STATE}{found[0]}"), f"{name}.{_STATE}{found[0]}"
        if state is None:
            problems.append(f"{where} is not the JSON of a quant_state")
            continue
        has_nested = "nested_offset" in state
        wrong = {
            f"quant_type is {state.get('quant_type')!r}; config.json says {number}": state.get("quant_type") != number,
            f"shape is {state.get('shape')}; the weight is {list(shape)}": state.get("shape") != list(shape),
            f"blocksize is {state.get('blocksize')!r}": state.get("blocksize") not in BLOCK_SIZES,
            f"double quantization is {has_nested}; config.json says {nested}": has_nested != nested,
        }
        problems += [f"{where}: {said}" for said, is_so in wrong.items() if is_so]
    return Finding(problems, f"{count} fit their weights" if count else "int8 weights have none")


def _read(subject: Subject, name: str) -> dict[str, Any] | None:
    info = subject.stored.tensors[name]
    if info.dtype != torch.uint8 or info.nbytes > _MAX_STATE_BYTES:
        return None
    try:
        state = json.loads(bytes(subject.stored.read(name).reshape(-1).tolist()).decode())
    except (ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


RULES: tuple[Rule, ...] = (
    Rule("bitsandbytes-config", "config", ("bitsandbytes",), "one of 4 and 8 bits, a known codebook", check_config,
         "BitsAndBytesConfig (transformers); BitsAndBytesConfig of bitsandbytes.py (SGLang)"),
    Rule("bitsandbytes-states", "format", ("bitsandbytes",), "every quant_state fits its weight and config.json",
         check_states, "QuantState.from_dict (bitsandbytes 0.50)"),
)  # fmt: skip
