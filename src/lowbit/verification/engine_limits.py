"""Rules on what vLLM's kernels take, once config.json and files agree.

`_scheme_problem` follows `_get_scheme_from_parts` of vLLM's compressed_tensors.py (0.32): which combination of weight,
activation and storage format has a scheme at all. What depends on the card (FP8 needs compute capability 8.9, NVFP4
activations 10.0) is not refused here: the same files run elsewhere.
"""

from __future__ import annotations

import torch

from lowbit.architecture import Linear
from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

# Of the kernels for 4- and 8-bit integer weights (Marlin, Machete); wider support exists on some devices only.
KERNEL_GROUP_SIZES = (32, 64, 128)
_TENSOR_PARALLEL = (1, 2, 4, 8)
# Linears that engines split by rows though nothing is fused with them.
_SPLIT_BY_ROWS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "q_b_proj",
    "kv_b_proj",
)


def check_engine_limits(subject: Subject) -> Finding:
    """A kernel exists for every group: bits, group size, activations, format and shapes."""
    problems = []
    for group in subject.parsed.groups:
        problem = _scheme_problem(group)
        if problem:
            problems.append(f"config_groups.{group.name}: {problem}")
    problems += _fp8_over_int4_problems(subject)
    return Finding(problems, f"a kernel exists for {', '.join(g.scheme.name for g in subject.parsed.groups)}")


def _scheme_problem(group: Group) -> str | None:
    weight, activation, stored = group.scheme.weight, group.scheme.activation, group.format
    if weight.number == "e2m1" and weight.two_level:
        fits = activation is None or (activation.number == "e2m1" and activation.scale_format == "e4m3")
        if weight.group_size != 16 or not fits:
            return "NVFP4 needs groups of 16, and NVFP4 activations or none"
        return None
    if weight.scale_format == "e8m0":
        return None if weight.group_size == 32 else f"MX formats have groups of 32, not {weight.group_size}"
    if weight.number == "e4m3":
        return _fp8_problem(group)
    if stored == "pack-quantized":
        return _packed_problem(group)
    return _int_problem(group)


def _fp8_problem(group: Group) -> str | None:
    weight, activation = group.scheme.weight, group.scheme.activation
    if weight.granularity is Granularity.GROUP:
        return "FP8 weights take scales per tensor, row or block, not per group"
    if weight.granularity is Granularity.BLOCK and weight.group_size != 128:
        return f"FP8 blocks are 128 × 128, not {weight.group_size}"
    if activation is None or activation.dynamic is True:
        return None
    if activation.number != "e4m3" or activation.per != "tensor" or not activation.symmetric:
        return "static FP8 activations take one symmetric scale per tensor"
    return "FP8 blocks take dynamic activations only" if weight.granularity is Granularity.BLOCK else None


def _packed_problem(group: Group) -> str | None:
    weight, activation = group.scheme.weight, group.scheme.activation
    if weight.granularity not in (Granularity.GROUP, Granularity.CHANNEL):
        return f"pack-quantized takes scales per group or row, not per {weight.granularity.value}"
    if activation is not None:
        fp8 = activation.number == "e4m3" and activation.per == "token" and activation.dynamic is True
        if not (fp8 and weight.bits == 4 and weight.group_size == 128 and weight.symmetric):
            return "of packed codes only 4-bit symmetric ones in groups of 128 take activations (FP8 per token)"
        return None
    if weight.group_size is not None and weight.group_size not in KERNEL_GROUP_SIZES:
        return f"group size {weight.group_size}; kernels take {', '.join(map(str, KERNEL_GROUP_SIZES))} or one per row"
    return None


def _int_problem(group: Group) -> str | None:
    """int-quantized: 8 bits with a scale per tensor or row, or 4 bits with one per group or row; int8 activations."""
    weight, activation = group.scheme.weight, group.scheme.activation
    if not weight.symmetric:
        return "unpacked integer weights must be symmetric"
    if activation is None:
        return "int-quantized needs input_activations; weight-only integers are stored as pack-quantized"
    if activation.number != "int" or activation.bits != 8:
        return (f"int-quantized takes 8-bit integer activations, not {activation.number}; with FP8 activations 4-bit "
                f"integers are stored as pack-quantized")  # fmt: skip
    if weight.bits == 8 and weight.granularity in (Granularity.TENSOR, Granularity.CHANNEL):
        fits = (activation.per, activation.dynamic) in (("token", True), ("tensor", False))
        return None if fits else "8-bit activations are per token and dynamic, or per tensor and static"
    if weight.bits == 4 and weight.granularity in (Granularity.GROUP, Granularity.CHANNEL):
        fits = (activation.per, activation.dynamic) == ("token", True)
        return None if fits else "over 4-bit weights, 8-bit activations are per token and dynamic"
    return f"no kernel for {weight.bits}-bit integers with a scale per {weight.granularity.value} and 8-bit activations"


def _fp8_over_int4_problems(subject: Subject) -> list[str]:
    """The kernel of FP8 activations over 4-bit integers (CUTLASS, Hopper) takes multiples of 128 and bfloat16."""
    problems = []
    for name, group in subject.groups.items():
        activation = group.scheme.activation
        if group.scheme.weight.number != "int" or activation is None or activation.number != "e4m3":
            continue
        rows, columns = subject.architecture.linears[name].shape
        if rows % 128 or columns % 128:
            problems.append(f"{name} is {rows} × {columns}; FP8 activations over integers need multiples of 128")
        if subject.dtype is not torch.bfloat16:
            problems.append(f"{name}: FP8 activations over integers need a bfloat16 model, not {subject.dtype}")
    return problems


def check_tensor_parallel(subject: Subject) -> Finding:
    """Which tensor-parallel sizes split every layer at whole groups. Only size 1 is required."""
    fits, notes, required = [], [], []
    for size in _TENSOR_PARALLEL:
        problem = next(filter(None, (_split_problem(subject, linear, size) for linear in subject.decoder)), None)
        if problem is None:
            fits.append(str(size))
        else:
            notes.append(f"{size} does not: {problem}")
            if size == 1:
                required.append(problem)
    return Finding(required, "; ".join([f"tensor parallel sizes that fit: {', '.join(fits) or 'none'}", *notes]))


def _split_problem(subject: Subject, linear: Linear, size: int) -> str | None:
    """Fused sets are split by rows (whole heads), the linears after them by columns (whole groups)."""
    rows, columns = linear.shape
    if linear.keep is not None or linear.name not in subject.stored_linears:
        return None
    scheme = subject.schemes.get(linear.name)
    by_rows = linear.fused is not None or linear.role in _SPLIT_BY_ROWS
    if by_rows:
        heads = _heads(subject, linear)
        if heads is not None and heads % size and not (linear.role != "q_proj" and size % heads == 0):
            return f"{linear.name}: {heads} heads over {size} ranks"
        rows = rows // min(size, heads) if heads is not None else rows / size
    else:
        columns = columns / size
    if rows != int(rows) or columns != int(columns):
        return f"{linear.name}: {list(linear.shape)} over {size} ranks"
    if scheme is None:
        return None
    return _part_problem(subject, linear.name, int(rows), int(columns), size, scheme, by_rows)


def _part_problem(
    subject: Subject, name: str, rows: int, columns: int, ranks: int, scheme: Scheme, by_rows: bool
) -> str | None:
    """What a rank's part of a quantized linear breaks."""
    weight, group = scheme.weight, subject.groups.get(name)
    size = weight.group_size
    packed = group is not None and group.format == "pack-quantized"
    if weight.granularity is Granularity.GROUP and size and columns % size:
        return f"{name}: {columns} columns a rank, groups of {size}"
    split = rows if by_rows else columns
    if weight.granularity is Granularity.BLOCK and size and ranks > 1 and split % size:
        return f"{name}: {split} {'rows' if by_rows else 'columns'} a rank, blocks of {size}"
    if subject.format in ("gptq", "awq") and (rows if by_rows else columns) * weight.bits % 32:
        return f"{name}: {rows} × {columns} a rank, {weight.bits} bits each, do not fill 32-bit words"
    if packed and not by_rows and columns * weight.bits % 32:
        return f"{name}: {columns} columns a rank of {weight.bits} bits do not fill 32-bit words"
    if packed and not weight.symmetric and by_rows and rows * weight.bits % 32:
        return f"{name}: zero points of {rows} rows a rank, {weight.bits} bits each, do not fill 32-bit words"
    return None


def _heads(subject: Subject, linear: Linear) -> int | None:
    """Attention heads that the rows of q, k or v are made of."""
    if linear.role not in ("q_proj", "k_proj", "v_proj"):
        return None
    text = subject.config.get("text_config")
    config = text if isinstance(text, dict) else subject.config
    queries = config.get("num_attention_heads")
    return queries if linear.role == "q_proj" else config.get("num_key_value_heads") or queries
