"""`Record`, the base of all results: a frozen pydantic model that refuses unknown fields, NaN and inf.

Each result (`Evaluation`, `Verification`, `Diagnosis`, `Report`) is defined once, for code and JSON alike. Modules that
need no result do not import this one, since pydantic is slow to import.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
