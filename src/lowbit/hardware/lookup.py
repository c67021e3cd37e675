"""From what a user types to a device."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from lowbit.errors import UsageError
from lowbit.hardware.device import Device
from lowbit.hardware.measured import this_machine, this_processor
from lowbit.hardware.table import ALIASES, DEVICES

_MEASURED: dict[str, Callable[[], Device]] = {"this": this_machine, "local": this_machine, "cpu": this_processor}
# Words that say nothing which the rest of the name does not.
_NOISE = ("nvidia", "geforce", "apple", "amd", "tensorcore", "gpu")


def find_device(name: str) -> Device:
    """The device called `name`, in any spelling: "H100", "rtx 4090", "NVIDIA A100 40GB", "M2 Max", "this", "cpu".

    "this" and "cpu" measure for a second or two. UsageError names the nearest rows of the table.
    """
    typed = plain(name)
    if typed in _MEASURED:
        return _MEASURED[typed]()
    known = {plain(row): row for row in DEVICES} | ALIASES
    row = known.get(typed) or known.get(typed.removeprefix("rtx"))
    if row is not None:
        return DEVICES[row]
    near = list(dict.fromkeys(known[found] for found in difflib.get_close_matches(typed, known, n=5, cutoff=0.5)))[:3]
    raise UsageError(
        f"there is no device {name!r} in the table",
        f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(DEVICES)}, this, cpu",
    )


def plain(name: str) -> str:
    """Letters and digits in lower case, without the maker's name: "NVIDIA H100 80GB" → "h10080gb"."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    for word in _NOISE:
        letters = letters.replace(word, "")
    return letters
