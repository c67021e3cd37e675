"""Rules on FP8 blocks: native FP8 folders (DeepSeek's weight_scale_inv), and the same blocks in other formats.

vLLM 0.32 fp8.py and utils/fp8_utils.py, SGLang 0.5 fp8.py, transformers 5 FineGrainedFP8Config, TensorRT-LLM's
model_config.py.
"""

from __future__ import annotations

from lowbit.tensors import Granularity
from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject

_TENSORRT_BLOCK = [128, 128]


def check_config(subject: Subject) -> Finding:
    """activation_scheme is stated; weight_block_size, where given, has two sizes, and activations are then dynamic."""
    stated, problems = subject.quantization, []
    activation, block = stated.get("activation_scheme"), stated.get("weight_block_size")
    if activation not in ("dynamic", "static"):
        problems.append(f"activation_scheme is {activation!r}; 'dynamic' or 'static' is needed")
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            problems.append(f"weight_block_size is {block!r}; [rows, columns] is needed")
        if activation == "static":
            problems.append("weight_block_size with activation_scheme 'static'; blocks take dynamic activations only")
    return Finding(problems, f"{activation} activations, blocks {block}" if block else f"{activation} activations")


def check_tensorrt_blocks(subject: Subject) -> Finding:
    """Blocks are 128 × 128, or activations static: the FP8 folders that TensorRT-LLM takes."""
    stated = subject.quantization
    block = stated.get("weight_block_size")
    if block is None and stated.get("activation_scheme") == "static":
        return Finding([], "static activations")
    problem = f"weight_block_size is {block!r}; TensorRT-LLM takes {_TENSORRT_BLOCK}"
    return Finding([] if block == _TENSORRT_BLOCK else [problem], "128 × 128")


def check_blocks(subject: Subject) -> Finding:
    """In a fused set, no block straddles two members: all but the last have whole blocks of rows."""
    problems = []
    for fused, members in subject.architecture.fused_sets.items():
        for member in members[:-1]:
            scheme = subject.schemes.get(member)
            rows = subject.architecture.linears[member].shape[0]
            if scheme is not None and scheme.weight.granularity is Granularity.BLOCK:
                block = scheme.weight.group_size or 1
                if rows % block:
                    problems.append(f"{fused}: {member} has {rows} rows, not a multiple of its block of {block}")
    return Finding(problems, f"{len(subject.architecture.fused_sets)} fused sets are cut between blocks")
