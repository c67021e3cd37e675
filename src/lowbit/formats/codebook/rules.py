"""Rules on codebook folders: what lowbit.load and transformers with `import lowbit.transformers` rely on."""

from __future__ import annotations

import torch

from lowbit.schemes import WeightSpec
from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject


def check_tables(subject: Subject) -> Finding:
    """Values of k-means rise, so that no code stands for less than the one before."""
    problems, count = [], 0
    for name, spec in _specs(subject):
        if spec.number != "kmeans" or f"{name}.table" not in subject.stored.tensors:
            continue
        count += 1
        table = subject.stored.read(f"{name}.table").float()
        falls = (table.unflatten(1, (-1, 1 << spec.bits)).diff(dim=2) < 0).flatten(1).any(dim=1)
        if bool(falls.any()):
            problems.append(f"{name}.table: the values of row {int(falls.nonzero()[0])} do not rise")
    return Finding(problems, f"{count} tables rise" if count else "logarithmic codes have none")


def check_outliers(subject: Subject) -> Finding:
    """Columns of outliers rise and lie within the weight: each is one weight, and is placed once."""
    problems, kept = [], 0
    for name, spec in _specs(subject):
        info = subject.stored.tensors.get(f"{name}.outlier_columns")
        if not spec.outliers or info is None:
            continue
        columns = subject.architecture.linears[name].shape[1]
        chosen = subject.stored.read(f"{name}.outlier_columns").to(torch.int64)
        kept += chosen.numel()
        if not bool((chosen.diff(dim=1) > 0).all() and (chosen < columns).all()):
            problems.append(f"{name}.outlier_columns do not rise within 0 .. {columns - 1}")
    return Finding(problems, f"{kept} weights in 16 bits" if kept else "none")


def _specs(subject: Subject) -> list[tuple[str, WeightSpec]]:
    return [(name, scheme.weight) for name, scheme in subject.schemes.items()]


RULES: tuple[Rule, ...] = (
    Rule("codebook-tables", "values", ("codebook",), "values of k-means rise", check_tables,
         "write.py of lowbit's codebook format"),
    Rule("codebook-outliers", "values", ("codebook",), "columns of outliers rise within the weight", check_outliers,
         "unpacked (lowbit.formats.codebook.read)"),
)  # fmt: skip
