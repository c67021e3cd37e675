"""Engines that load what lowbit writes: a file and a row of `lowbit.registry.ENGINES` each."""

from __future__ import annotations

from lowbit.engines.engine import Engine, Suits
from lowbit.errors import UsageError, did_you_mean
from lowbit.hardware import Device
from lowbit.registry import ENGINES, load

__all__ = ["Engine", "all_engines", "engine_for", "find_engine"]


def find_engine(name: str) -> Engine:
    """The engine called `name`, case-insensitively; UsageError suggests the nearest."""
    place = ENGINES.get(name.lower())
    if place is None:
        hint = did_you_mean(name.lower(), ENGINES, f"choose one of {', '.join(ENGINES)}", 2, 0.4)
        raise UsageError(f"there is no engine {name!r}", hint)
    return load(place)


def all_engines() -> tuple[Engine, ...]:
    """All engines, in the order of the table."""
    return tuple(load(place) for place in ENGINES.values())


def engine_for(device: Device, finetune: bool = False) -> Engine:
    """The default engine for a device."""
    desktop = device.consumer or device.kind in ("cpu", "metal")
    use: Suits = "training" if finetune else "desktops" if desktop else "servers"
    return next(engine for engine in all_engines() if engine.suits == use)
