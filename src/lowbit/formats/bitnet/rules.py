"""Rules on BitNet folders: transformers 5.23 (quantizer_bitnet.py, integrations/bitnet.py)."""

from __future__ import annotations

import torch

from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject

_MAX_SCALE = 1e4  # of a weight; and its reciprocal


def check_config(subject: Subject) -> Finding:
    """A class and a mode that transformers knows, and files hold codes."""
    stated, problems = subject.quantization, []
    kind, mode = stated.get("linear_class", "bitlinear"), stated.get("quantization_mode", "offline")
    if kind not in ("bitlinear", "autobitlinear"):
        problems.append(f"linear_class is {kind!r}; bitlinear or autobitlinear is needed")
    if mode not in ("online", "offline"):
        problems.append(f"quantization_mode is {mode!r}; online or offline is needed")
    return Finding(problems, f"{kind}, {mode}")


def check_rows(subject: Subject) -> Finding:
    """Four rows fill a byte: transformers looks for a quarter of out_features."""
    problems = []
    for name in subject.schemes:
        rows = subject.architecture.linears[name].shape[0]
        info = subject.stored.tensors.get(f"{name}.weight")
        if rows % 4:
            problems.append(f"{name} has {rows} rows; four fill a byte")
        elif info is None or info.dtype != torch.uint8 or info.shape[0] * 4 != rows:
            found = "absent" if info is None else f"{info.stored} {list(info.shape)}"
            problems.append(f"{name}.weight is {found}; uint8 [{rows // 4}, in_features] is needed")
    return Finding(problems, f"{len(subject.schemes)} linears of a quarter of their rows")


def check_scales(subject: Subject) -> Finding:
    """Every scale is one positive number of the size of a weight, or of a reciprocal."""
    problems = []
    for name in subject.schemes:
        info = subject.stored.tensors.get(f"{name}.weight_scale")
        if info is None or info.shape not in ((1,), ()):
            problems.append(f"{name}.weight_scale is {'absent' if info is None else list(info.shape)}; [1] is needed")
            continue
        scale = subject.stored.read(f"{name}.weight_scale").float().item()
        if not 1 / _MAX_SCALE <= scale <= _MAX_SCALE:
            problems.append(f"{name}.weight_scale is {scale}")
    return Finding(problems, f"{len(subject.schemes)} scales")


RULES: tuple[Rule, ...] = (
    Rule("bitnet-config", "config", ("bitnet",), "a known linear_class and mode", check_config,
         "BitNetQuantConfig.__init__ (transformers)"),
    Rule("bitnet-rows", "format", ("bitnet",), "four rows of every linear in a byte", check_rows,
         "AutoBitLinear, BitNetDeserialize.convert (transformers)"),
    Rule("bitnet-scales", "format", ("bitnet",), "one positive scale for a matrix", check_scales,
         "AutoBitLinear.forward, BitLinear.post_quant_process (transformers)"),
)  # fmt: skip
