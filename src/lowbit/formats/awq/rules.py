"""Rules on AWQ folders, of AutoAWQ's GEMM layout: vLLM 0.32 auto_awq.py, SGLang 0.5 awq.py, transformers 5."""

from __future__ import annotations

from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject

_KEYS = {"bits": "w_bit", "group_size": "q_group_size", "zero_point": "zero_point"}  # key → its older name


def check_keys(subject: Subject) -> Finding:
    """bits, group_size and zero_point are there; SGLang reads the older spellings with its slow kernels only."""
    problems = []
    for key, older in _KEYS.items():
        if key not in subject.quantization and older not in subject.quantization:
            problems.append(f"quantization_config has no {key}, which {subject.engine} needs")
    bits = subject.quantization.get("bits", subject.quantization.get("w_bit"))
    if bits is not None and bits != 4:
        problems.append(f"quantization_config.bits is {bits!r}; the GEMM layout has 4")
    zero_point = subject.quantization.get("zero_point")
    if "zero_point" in subject.quantization and type(zero_point) is not bool:
        problems.append(f"quantization_config.zero_point is {zero_point!r}; true or false is needed")
    return Finding(problems, ", ".join(f"{key} {subject.quantization.get(key)}" for key in _KEYS))


def check_version(subject: Subject) -> Finding:
    """version is gemm, the layout that every loader takes for granted."""
    stated = str(subject.quantization.get("version") or subject.quantization.get("format") or "gemm").lower()
    return Finding([] if stated == "gemm" else [f"quantization_config.version is {stated!r}; gemm is needed"], stated)


def check_zeros(subject: Subject) -> Finding:
    """Every linear ships its zero points: engines allocate qzeros, symmetric or not."""
    problems = [
        f"{name}.qzeros is absent" for name in subject.schemes if f"{name}.qzeros" not in subject.stored.tensors
    ]
    return Finding(problems, f"those of {len(subject.schemes)} linears are there")


def check_shapes(subject: Subject) -> Finding:
    """Eight rows fill a word, and groups divide the columns."""
    problems = []
    for name, scheme in subject.schemes.items():
        rows, columns = subject.architecture.linears[name].shape
        group = scheme.weight.group_size
        if rows % 8:
            problems.append(f"{name} has {rows} rows; eight fill a 32-bit word")
        elif group is not None and columns % group:
            problems.append(f"{name} has {columns} columns; groups of {group} do not divide them")
    return Finding(problems, "whole words and groups")


RULES: tuple[Rule, ...] = (
    Rule("awq-version", "config", ("awq",), "version is gemm", check_version,
         "_convert_awq_to_standard_format of auto_awq.py (vLLM); AwqConfig.post_init (transformers)"),
    Rule("awq-shapes", "format", ("awq",), "eight rows fill a word, groups divide columns", check_shapes,
         "create_weights of AutoAWQLinearMethod (vLLM): input % group_size, output % pack_factor"),
)  # fmt: skip

# Of vLLM and SGLang.
SERVER_RULES: tuple[Rule, ...] = (
    Rule("awq-keys", "config", ("awq",), "bits, group_size and zero_point are stated, 4 bits", check_keys,
         "from_config of auto_awq.py (vLLM), of AWQConfig (SGLang)"),
    Rule("awq-zeros", "format", ("awq",), "every linear ships its zero points", check_zeros,
         "create_weights of auto_awq.py (vLLM)"),
)  # fmt: skip
