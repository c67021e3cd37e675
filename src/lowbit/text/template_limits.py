"""Chat templates come with a model, and are programs: bounds on their steps and on their memory.

transformers runs them in a sandbox that keeps them from files and from Python's insides, and not from `range(10**5)`
inside of another. Every line of a template's compiled code counts as a step. A single one, 'x' * 10**10, may fill the
memory: while a template runs, the process may not grow by more than the bound.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
        with _bounded_address_space():
            yield
    except MemoryError:
        raise CheckpointError(f"{source}: {template} takes more than {MEMORY >> 10} MiB for {of}", hint) from None
    finally:
        sys.settrace(earlier)


@contextmanager
def _bounded_address_space() -> Iterator[None]:
    """MemoryError where the process grows by more than MEMORY; nothing where the system does not tell its size."""
    statm = Path("/proc/self/statm")
    if resource is None or not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(statm.read_text().split()[0]) * resource.getpagesize() + (MEMORY << 10)
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
