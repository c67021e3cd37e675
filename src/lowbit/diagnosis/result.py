"""`Diagnosis` and its parts. They are parts of the report, which keeps them, and are defined there."""

from lowbit.report.diagnosis import (
    Contribution,
    Diagnosis,
    DiagnosisText,
    Finding,
    Flip,
    Level,
    Severity,
    Suggestion,
)

__all__ = ["Contribution", "Diagnosis", "DiagnosisText", "Finding", "Flip", "Level", "Severity", "Suggestion"]
