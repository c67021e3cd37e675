"""The table of options of a run: `RunOptions`, what does not change its output."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ValidationError

from lowbit import knobs
from lowbit.errors import UsageError
from lowbit.knobs import RUNNING, Knob, Size, Table, value_refused
from lowbit.spellings import meant_option


class RunOptions(Table):
    """Options of the run that do not change its output; UsageError for unknown or invalid ones."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            unknown = first["type"] == "extra_forbidden"
            said = f"there is no option {where} of a run" if unknown else value_refused(error)
            options = f"options: {', '.join(RunOptions.model_fields)}"
            raise UsageError(said, f"{meant_option(where, RunOptions.model_fields)} {options}".lstrip()) from error

    device: Annotated[
        str, Knob("Device for forward passes and rounding: cpu, cuda, cuda:1 …", RUNNING, knobs.READS_TEXT, "DEVICE")
    ] = "cpu"
    max_memory: Annotated[
        Size | None,
        Knob("Memory limit of calibration, such as 8GiB", RUNNING, knobs.MEMORY, "SIZE",
             "80 % of free memory", "calibration.md#memory"),
    ] = None  # fmt: skip
    resume: Annotated[
        bool,
        Knob("Continue a stopped run after its last finished block, or saved state", RUNNING, knobs.BLOCKWISE,
             see="calibration.md#stopping-and-going-on"),
    ] = False  # fmt: skip
