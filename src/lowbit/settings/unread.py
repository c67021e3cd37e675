"""Every setting is read or refused: which of the given ones a run would not read, by the `Reader` of its `Knob`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowbit.errors import UsageError
from lowbit.knobs import Facts, Row, Table
from lowbit.methods import parse_method
from lowbit.schemes import find_scheme
from lowbit.settings.run_options import RunOptions
from lowbit.settings.table import MEASURE, Settings


def refuse_unread(settings: Settings, run: RunOptions | None = None, facts: Facts | None = None) -> None:
    """UsageError for the first given setting that the run would not read.

    facts  of the run, beyond the settings; None: a quantization to the format they name
    """
    for table, name, row in _unread(settings, run or RunOptions(), facts):
        value = "" if row.kind in (bool, dict, tuple) else f" {table.given[name]}"
        reader = row.knob.reader
        raise UsageError(f"{row.flag}{value} is read only by {reader.who}", f"{reader.use}; leave it out otherwise")


def unread_flags(settings: Settings, facts: Facts | None = None) -> frozenset[str]:
    """Options of given settings that `refuse_unread` would refuse."""
    return frozenset(row.flag for _, _, row in _unread(settings, RunOptions(), facts))


def _unread(settings: Settings, run: RunOptions, facts: Facts | None) -> Iterator[tuple[Table, str, Row]]:
    known = facts_of(settings, facts or Facts(gguf=settings.writes_gguf()))
    for table in (settings, run):
        for name, row in type(table).rows().items():
            if name in table.given and not row.knob.reader.reads(known):
                yield table, name, row


def facts_of(settings: Settings, facts: Facts) -> Facts:
    """The facts of a run with these settings; `facts` holds those that do not follow from the settings."""
    gguf, converts = facts.gguf, facts.converts
    asked = () if converts else (settings.method, *settings.method_overrides.values())
    methods = [parse_method(name) for name in asked]
    blockwise = any(method.needs_text for method in methods)
    learns = bool(methods) and methods[0].learned is not None
    scheme = find_scheme(settings.scheme) if not gguf and facts.takes_scheme else None
    static = facts.static
    schemes = () if scheme is None else (scheme,) if converts else settings.schemes
    if schemes and not converts:
        static = any(each.activation is not None and each.activation.needs_calibration for each in schemes)
    reads_text = blockwise or static or (settings.kv_cache is not None and not gguf)
    return replace(
        facts,
        mmproj=gguf and settings.mmproj,
        blockwise=blockwise,
        roundings=frozenset(row.name for each in methods for row in (each.rounding, each.learned) if row is not None),
        learns=learns,
        distills=bool(methods) and methods[0].finish is not None,
        turns=bool(methods) and methods[0].learns_rotations,
        corrects=settings.correction != 0,
        static=static,
        reads_text=reads_text,
        writes_text=reads_text and settings.calib == "self",
        draws=learns
        or any(method.finish or method.learns_rotations for method in methods)
        or (reads_text and ((settings.calib is not None and not facts.in_order) or settings.hessian_groups > 0)),
        measures=gguf and not settings.mmproj and settings.imatrix == MEASURE,
        signs=any(each.may_sign_scales for each in schemes),
        nests=scheme is not None and scheme.weight.number in ("nf4", "fp4"),
        keeps_outliers=any(each.weight.number == "kmeans" for each in schemes),
        searches=not schemes or any(each.weight.searches_range for each in schemes),
        by_percentile=settings.range == "percentile",
        activations_by_percentile=settings.activation_range == "percentile",
    )
