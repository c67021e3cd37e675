"""Other schemes for the source of a report: planned to the byte, or measured, where their reports lie beside it.

A planned neighbour has the loss that was published for its scheme at 8 billion weights, where there is a figure.
"""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint.base import report_path
from lowbit.errors import LowbitError
from lowbit.evaluation.result import Evaluation
from lowbit.plan.plan import Prepared
from lowbit.registry import load
from lowbit.report import schema
from lowbit.report.summary import headline_evaluation
from lowbit.settings import Settings

# From few bits to many: in folders, in GGUF files. Schemes with quantized activations have the same sizes.
NEIGHBOURS = (
    ("W2A16", "W3A16", "W4A16", "NVFP4A16", "FP8_DYNAMIC", "W8A16"),
    ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"),
)
SHOWN_EACH_SIDE = 2
# Planning takes milliseconds per thousand tensors and scheme; models with more tensors get no neighbours.
MOST_TENSORS = 10_000
_EXPECTED = "lowbit.advice.quality:expected"  # which stands to the right of the report
# Reports beside the output are looked at up to so many, and so large ones.
_BESIDE, _BESIDE_BYTES = 64, 64 * 2**20


def planned_neighbours(prepared: Prepared) -> tuple[schema.Neighbour, ...]:
    """The next smaller and next larger schemes in the format of this run, smallest first, with their exact sizes as
    planned from headers; empty for models of very many tensors.

    The report's chart of size against quality marks them on the axis of size; `lowbit compare` adds the quality of
    those that exist.
    """
    plan, kept = prepared.plan, prepared.plan.settings
    if len(plan.tensors) > MOST_TENSORS:
        return ()
    others = []
    for name in NEIGHBOURS[plan.format.suffix is not None]:
        if name == plan.scheme_name:
            continue
        settings = Settings(scheme=name, format=plan.format.name, shard_size=kept.shard_size, ignore=kept.ignore)
        try:
            other = prepared.plan_again(settings)
        except LowbitError:  # the scheme does not fit the format, or the model's shapes
            continue
        bits, expected = other.bits_per_weight(decoder_only=True), load(_EXPECTED)(name)
        others.append(
            schema.Neighbour(origin="plan", label=name, scheme=name, bytes=other.file_bytes, bits_per_weight=bits,
                             expected_loss=None if expected is None else expected.loss)
        )  # fmt: skip
    others.sort(key=lambda other: other.bytes)
    smaller = [other for other in others if other.bytes < plan.file_bytes]
    larger = [other for other in others if other.bytes > plan.file_bytes]
    return (*smaller[-SHOWN_EACH_SIDE:], *larger[:SHOWN_EACH_SIDE])


def neighbours_beside(output: Path, report: schema.Report) -> tuple[schema.Neighbour, ...]:
    """Outputs of the same source whose reports lie in the same folder and which were measured in the same way: with the
    text, reference, protocol, windows and dtype of this report's headline evaluation."""
    own = headline_evaluation(report)
    if own is None or own.kld_mean is None:
        return ()
    mine = report_path(output).absolute()
    folder = output.absolute().parent
    places = [report_path(folder / path.parent.name) for path in folder.glob(f"*/{schema.REPORT_NAME}")]
    places += list(folder.glob(f"*.{schema.REPORT_NAME}"))
    found = []
    for place in sorted(set(places) - {mine})[:_BESIDE]:
        try:
            if place.stat().st_size > _BESIDE_BYTES:
                continue
            other = schema.load(place)
        except (LowbitError, OSError):  # nothing of ours, or of another version: no neighbour
            continue
        run = headline_evaluation(other)
        if run is None or run.kld_mean is None or _conditions(run) != _conditions(own):
            continue
        name = (
            place.parent.name if place.name == schema.REPORT_NAME else place.name.removesuffix(f".{schema.REPORT_NAME}")
        )
        found.append(schema.Neighbour(
            origin="beside", label=name, scheme=other.settings.scheme, bytes=other.totals.bytes_out,
            bits_per_weight=other.totals.decoder_bits_per_weight, kld_mean=run.kld_mean, kld_se=run.kld_se,
            same_top1=run.same_top1,
        ))  # fmt: skip
    return tuple(found)


def _conditions(run: Evaluation) -> tuple[object, ...]:
    """What must be the same for two evaluations to be compared."""
    return run.reference_sha256, run.text.sha256, run.protocol, run.windows, run.window_tokens, run.bos, run.dtype


def with_neighbours_beside(report: schema.Report, output: Path) -> tuple[schema.Neighbour, ...]:
    """Those that `lowbit compare` measured, those whose reports lie beside, and the planned ones of other schemes."""
    kept = [each for each in report.neighbours if each.origin != "beside"]
    compared = {(each.scheme, each.bytes) for each in kept if each.origin == "compare"}
    beside = [each for each in neighbours_beside(output, report) if (each.scheme, each.bytes) not in compared]
    measured = {each.scheme for each in beside}
    return (*beside, *(each for each in kept if each.origin == "compare" or each.scheme not in measured))
