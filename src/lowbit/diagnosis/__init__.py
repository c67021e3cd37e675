"""Where is the damage of a quantized model? Contributions to its KLD, broken tensors, calibration, and what to do."""

from lowbit.diagnosis.result import Contribution, Diagnosis, Finding, Flip, Suggestion
from lowbit.diagnosis.run import diagnose
from lowbit.diagnosis.table import diagnosis_text

__all__ = ["Contribution", "Diagnosis", "Finding", "Flip", "Suggestion", "diagnose", "diagnosis_text"]
