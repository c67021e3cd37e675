"""The implementation of the kernels in this process.

Chosen on first use: LOWBIT_FORCE_ISA if it is set, else the best instruction set of the compiled core, else, if the
core was not built, the torch reference, with a line on stderr.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from lowbit.errors import UsageError

if TYPE_CHECKING:
    import torch

    from lowbit.kernels._core import Isa

REFERENCE = "reference"
ENVIRONMENT_VARIABLE = "LOWBIT_FORCE_ISA"

# The `Isa` of the compiled core, None for the reference, or this string before the first use.
_UNDECIDED = "undecided"
_chosen: Isa | str | None = _UNDECIDED


def isa() -> str:
    """The implementation on the CPU: "avx512", "avx2", "baseline", "neon" or "reference"."""
    core = _decide()
    return REFERENCE if core is None else core.name


def available_isas() -> list[str]:
    """Every name that can be forced on this machine, best first; the last is "reference"."""
    core = _import_core()
    return [*(core.available_isas() if isinstance(core, ModuleType) else []), REFERENCE]


def compiled(device: torch.device) -> Isa | None:
    """The compiled kernels to use for tensors on `device`, or None for the torch reference."""
    return _decide() if device.type == "cpu" else None


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set, in all threads of the process, until the block ends."""
    global _chosen
    before = _chosen
    _chosen = _named(name)
    try:
        yield
    finally:
        _chosen = before


def _decide() -> Isa | None:
    global _chosen
    if isinstance(_chosen, str):
        forced = os.environ.get(ENVIRONMENT_VARIABLE)
        _chosen = _named(forced) if forced else _best()
    return _chosen


def _best() -> Isa | None:
    core = _import_core()
    if isinstance(core, ModuleType):
        return core.Isa(core.available_isas()[0])
    was_built = not isinstance(core, ModuleNotFoundError)
    why = f"the compiled kernels cannot be loaded ({core})" if was_built else "there are no compiled kernels here"
    print(f"lowbit: {why}; using the torch reference, which is slower", file=sys.stderr)
    return None


def _named(name: str) -> Isa | None:
    available = available_isas()
    if name not in available:
        raise UsageError(
            f"instruction set {name!r} is not available here",
            f"set {ENVIRONMENT_VARIABLE} to one of {', '.join(available)}, or unset it",
        )
    core = _import_core()
    return core.Isa(name) if name != REFERENCE and isinstance(core, ModuleType) else None


def _import_core() -> ModuleType | ImportError:
    """The extension module, or why it cannot be imported: ModuleNotFoundError if it was not built."""
    try:
        return importlib.import_module("lowbit.kernels._core")
    except ImportError as error:
        return error
