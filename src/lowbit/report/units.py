"""Numbers as people read them: sizes, times, values with their standard error, errors in decibels.

dB = 10 · log10(relative error)        −20 dB is 1 %, −30 dB is 0.1 %
"""

from __future__ import annotations

import math

NBSP = "\u00a0"
MINUS = "\u2212"
TIMES = "\u00d7"
DASH = "\u2013"


def number(value: float, digits: int) -> str:
    """Fixed decimals, thousands separated, a real minus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def size(count: int) -> str:
    """Bytes in decimal units, as disks, hubs and the command line count: 112.4 MB."""
    if count < 1000:
        return f"{count}{NBSP}B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:,.1f}{NBSP}{unit}"


def quantity(count: int) -> str:
    """Weights and tokens in short scale: 134.5 M."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**4, "K")):
        if count >= limit:
            divisor = 1000 if unit == "K" else limit
            return f"{count / divisor:,.1f}{NBSP}{unit}"
    return f"{count:,}"


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 3 min 12 s, 5 h 07 min."""
    if seconds < 9.95:
        return f"{seconds:.1f}{NBSP}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits; scientific below 1e-4 so that columns stay narrow."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return number(value, decimals)


def with_error(value: float, standard_error: float | None, scale: float = 1.0) -> tuple[str, str | None]:
    """A value and its standard error, both cut at the error's second digit: ("0.0412", "0.0013")."""
    value *= scale
    if not standard_error:
        return significant(value, 4), None
    standard_error *= scale
    decimals = min(8, max(0, 1 - math.floor(math.log10(standard_error))))
    return number(value, decimals), number(standard_error, decimals)


def plus_minus(value: float | None, standard_error: float | None = None, scale: float = 1.0, unit: str = "") -> str:
    """A value with its standard error in one text: "0.0412 ± 0.0013"; a dash for what was not measured."""
    if value is None:
        return DASH
    shown, error = with_error(value, standard_error, scale)
    return f"{shown} ±{NBSP}{error}{unit}" if error else f"{shown}{unit}"


def decibel(relative_error: float) -> float:
    """10 · log10(relative error); −inf for an exact tensor."""
    return 10 * math.log10(relative_error) if relative_error > 0 else -math.inf


def decibel_text(relative_error: float) -> str:
    return number(decibel(relative_error), 1) if relative_error > 0 else "exact"


def percent(share: float, digits: int = 1) -> str:
    return f"{number(100 * share, digits)}{NBSP}%"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def shape_text(shape: tuple[int, ...]) -> str:
    return f"{NBSP}{TIMES}{NBSP}".join(str(side) for side in shape) or "scalar"
