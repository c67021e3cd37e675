"""Rules on values. They read what the survey, one pass over every weight, found."""

from __future__ import annotations

from lowbit.verification.result import Finding
from lowbit.verification.subject import Subject
from lowbit.verification.survey import LARGEST_RELATIVE_ERROR


def check_scales(subject: Subject) -> Finding:
    """No scale is NaN, infinite, negative, or zero where its weights are not."""
    return Finding(subject.survey.scales, f"those of {subject.survey.decoded} linears are finite and above 0")


def check_codes(subject: Subject) -> Finding:
    """Every code is within its grid's range and no number is NaN; padding bits are zero; weight_shape is right."""
    return Finding(subject.survey.codes, f"{subject.survey.decoded} linears decode")


def check_finite(subject: Subject) -> Finding:
    """Tensors that are not quantized hold neither NaN nor inf."""
    return Finding(subject.survey.finite, "no NaN, no inf")


def check_nearest(subject: Subject) -> Finding:
    """Every code is the nearest one to the source's weight, or the end code beyond the range of its scale."""
    return Finding(subject.survey.nearest, f"every code of {subject.survey.compared} linears is the nearest one")


def check_relative_error(subject: Subject) -> Finding:
    """Decoded weights are the source's, within a bound by bits; those of a folder of floats within the widest."""
    errors = subject.survey.relative_errors
    worst = max(errors, key=lambda name: errors[name], default="")
    bits = subject.schemes[worst].weight.bits if worst in subject.schemes else 2
    bound = LARGEST_RELATIVE_ERROR[bits]
    return Finding(subject.survey.relative, f"at most {errors.get(worst, 0.0):.4f} ({worst}; {bound} is allowed)")


def check_unquantized(subject: Subject) -> Finding:
    """Tensors that are not quantized equal the source's, in the dtype they are stored in."""
    return Finding(subject.survey.copied, "equal to the source")
