"""The diagnosis in the report beside the weights."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint.base import report_path
from lowbit.diagnosis.result import Diagnosis
from lowbit.report import schema
from lowbit.reporting import write_report


def add_diagnosis(output: Path, diagnosis: Diagnosis) -> schema.Report:
    """Put a diagnosis into a report and its page, in place of an earlier one."""
    report = schema.load(report_path(output)).model_copy(update={"diagnosis": diagnosis})
    write_report(report, output)
    return report
