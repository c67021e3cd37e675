"""Which scheme for which machine: `lowbit.advise`, and the tables that it rests on."""

from lowbit.advice.advise import advise
from lowbit.advice.result import Advice, Option

__all__ = ["Advice", "Option", "advise"]
