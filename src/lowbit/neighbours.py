"""What the same source would weigh in other schemes: planned to the byte from headers, nothing is read or written.

They stand in the report's chart of size against quality as marks on the axis of size; `lowbit compare` gives them a
quality once somebody has made them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowbit.checkpoint.gguf_raw import RawGGUF
from lowbit.errors import LowbitError
from lowbit.plan import make_plan
from lowbit.report import schema
from lowbit.settings import Settings

if TYPE_CHECKING:
    from lowbit.gguf_pipeline import PreparedGGUF
    from lowbit.gguf_plan import GGUFPlan
    from lowbit.pipeline import Prepared
    from lowbit.plan import Plan

# From few bits to many. Those that round activations too weigh the same as the ones here.
FOLDER_SCHEMES = ("W2A16", "W3A16", "W4A16", "NVFP4A16", "FP8_DYNAMIC", "W8A16")
GGUF_SCHEMES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
SHOWN_EACH_SIDE = 2
# Planning takes a few milliseconds per thousand tensors and scheme; models of very many experts go without.
MOST_TENSORS = 10_000


def planned_neighbours(prepared: Prepared | PreparedGGUF) -> tuple[schema.Neighbour, ...]:
    """The schemes next in size on both sides, in the format of this run, smallest first; none for huge models."""
    plan = prepared.plan
    if len(plan.tensors) > MOST_TENSORS:
        return ()
    names = GGUF_SCHEMES if plan.format == "gguf" else FOLDER_SCHEMES
    found = [made for name in names if name != plan.scheme_name and (made := _planned(prepared, name)) is not None]
    found = [made for made in found if made.bytes != plan.file_bytes]
    smaller = sorted((made for made in found if made.bytes < plan.file_bytes), key=lambda made: made.bytes)
    larger = sorted((made for made in found if made.bytes > plan.file_bytes), key=lambda made: made.bytes)
    return (*smaller[-SHOWN_EACH_SIDE:], *larger[:SHOWN_EACH_SIDE])


def _planned(prepared: Any, name: str) -> schema.Neighbour | None:
    """None where the format, or the model's shapes, do not go with the scheme."""
    kept = prepared.plan.settings
    settings = Settings(scheme=name, format=prepared.plan.format, ignore=kept.ignore, shard_size=kept.shard_size)
    try:
        plan = _gguf_plan(prepared, settings) if settings.format == "gguf" else _folder_plan(prepared, settings)
    except LowbitError:
        return None
    bits = plan.bits_per_weight(decoder_only=True)
    return schema.Neighbour(origin="plan", label=name, scheme=name, bytes=plan.file_bytes, bits_per_weight=bits)


def _folder_plan(prepared: Prepared, settings: Settings) -> Plan:
    plan = prepared.plan
    return make_plan(prepared.checkpoint, plan.architecture, settings, plan.dtype)


def _gguf_plan(prepared: PreparedGGUF, settings: Settings) -> GGUFPlan:
    """Key-values are those of this run's file, which differ by no byte in size."""
    from lowbit.export.gguf_model import describe_gguf
    from lowbit.gguf_plan import plan_from_gguf, plan_from_model

    if isinstance(prepared.checkpoint, RawGGUF):
        return plan_from_gguf(prepared.checkpoint, settings, None)
    assert prepared.architecture is not None, "only GGUF files are planned without one"
    mapped = describe_gguf(prepared.checkpoint, prepared.architecture)
    plan = plan_from_model(prepared.checkpoint, mapped, {}, settings, None)
    return replace(plan, key_values=prepared.plan.key_values)
