"""Rules on what config.json says, whatever the format: which one it is, whether it parses, which model it is of."""

from __future__ import annotations

import torch

from lowbit.checkpoint.base import TensorInfo
from lowbit.checkpoint.quantized import FLOATS
from lowbit.verification.result import PLAIN, Finding
from lowbit.verification.subject import Subject

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def check_format_known(subject: Subject) -> Finding:
    """config.json names a format that is known, and the files are laid out as that format lays them out."""
    stated = subject.format
    found: dict[tuple[str, ...], str] = {}
    for name, info in subject.stored.tensors.items():
        possible = laid_out_as(name, info, subject.stored.tensors)
        if possible:
            found.setdefault(possible, name)
    for possible, name in found.items():
        if stated == PLAIN:
            return Finding(
                [f"config.json has no quantization_config, but {name} is laid out as {_either(possible)}"], ""
            )
        if stated not in possible:
            return Finding([f"config.json says {stated}, but {name} is laid out as {_either(possible)}"], "")
    if stated == PLAIN:
        return Finding([], "not quantized: a plain folder of floats")
    if not found:
        return Finding([f"config.json says {stated}, but the files hold no quantized weight"], "")
    return Finding([], stated)


def laid_out_as(name: str, info: TensorInfo, tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    """The formats in which a tensor of this name, dtype and shape occurs; () for one that tells nothing."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "qweight":
        scales = tensors.get(f"{owner}.scales")
        packs_rows = scales is not None and info.shape[-1:] != scales.shape[-1:]  # eight rows in a word: [K, N/8]
        return ("awq",) if packs_rows and f"{owner}.g_idx" not in tensors else ("gptq",)
    if leaf in ("SCB", "absmax", "quant_map") or leaf.startswith("bitsandbytes__"):
        return ("bitsandbytes",)
    named = {
        "weight_packed": ("compressed-tensors",), "weight_global_scale": ("compressed-tensors",),
        "weight_scale_2": ("modelopt",), "weight_scale_inv": ("fp8",), "W_q": ("hqq",), "_weight_qdata": ("torchao",),
    }.get(leaf)  # fmt: skip
    if named is not None:
        return named
    if leaf.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return ("mxfp4",)
    if leaf == "weight" and f"{owner}.weight_scale" in tensors:
        if info.dtype in _FP8:
            return ("compressed-tensors", "modelopt", "fp8")
        return (
            ("compressed-tensors",) if info.dtype == torch.int8 else ("modelopt",) if info.dtype not in FLOATS else ()
        )
    return ()


def _either(formats: tuple[str, ...]) -> str:
    return " or ".join(formats)


def check_quantization_config(subject: Subject) -> Finding:
    """quantization_config parses strictly, and the quantized tensors can be opened by it."""
    layout = subject.layout
    if subject.format != "compressed-tensors":
        count = len(layout.linears())
        said = "; ".join(layout.notes)
        return Finding([], f"{subject.format}: {count} quantized weights" + (f" ({said})" if said else ""))
    groups = subject.parsed.groups
    if not groups:
        return Finding(["quantization_config.config_groups quantizes no weights"], "")
    return Finding([], ", ".join(f"{group.name}: {group.scheme.name}, {group.format}" for group in groups))


def check_architecture(subject: Subject) -> Finding:
    """The model can be built from config.json, and every linear of its decoder is known."""
    architecture = subject.architecture
    return Finding([], f"{architecture.class_name}, {len(architecture.blocks)} decoder blocks, "
                       f"{len(architecture.linears)} linears")  # fmt: skip
