"""Chat templates come with a model, and are programs: bounds on their steps and on their memory.

transformers runs them in a sandbox that keeps them from files and from Python's insides, and not from `range(10**5)`
inside of another. Every line of a template's compiled code counts as a step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lowbit.errors import CheckpointError

try:
    import resource
except ImportError:  # Windows: steps are counted, memory is not
    resource = None

STEPS = 2_000_000  # of one conversation: a template of 200 lines takes a few hundred a message
MEMORY = 1 << 20  # KiB that a conversation may add to the peak of the process
_OF_A_MODEL = "give plain text, or a model with a template that ends"
_TEMPLATE = "<template>"  # the file name that Jinja gives to compiled templates


@contextmanager
def bounded_template(
    source: str, template: str = "its chat template", of: str = "one conversation", hint: str = _OF_A_MODEL
) -> Iterator[None]:
    """CheckpointError where a template that is rendered inside takes too many steps or too much memory."""
    steps, peak = 0, _peak()

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > STEPS or _peak() - peak > MEMORY:
            what = f"{STEPS:,} steps" if steps > STEPS else f"{MEMORY >> 10} MiB"
            raise CheckpointError(f"{source}: {template} takes more than {what} for {of}", hint)
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == _TEMPLATE else None

    earlier = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(earlier)


def _peak() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
