"""Diagnosis of a quantized model: contributions to its KLD, broken tensors, calibration, and suggestions."""

from lowbit.diagnosis.run import diagnose
from lowbit.diagnosis.table import diagnosis_text
from lowbit.report.diagnosis import Contribution, Diagnosis, DiagnosisFinding, Flip, Suggestion

__all__ = ["Contribution", "Diagnosis", "DiagnosisFinding", "Flip", "Suggestion", "diagnose", "diagnosis_text"]
