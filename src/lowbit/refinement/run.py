"""`refine`: open both models, compare them, run the text, patch a copy, judge it, and keep it only if it is better.

    open file and reference → same model? same basis?        pair, basis
    the file on held-out text                                 before
    block by block, from the file's codes                     calibrate.loop
    scales, norms and biases, end to end, if asked for        distillation.stage
    a copy of the file with new codes, scales and vectors     plan.refining
    verify; the copy on the same held-out text                after
    before ≤ after: refused, nothing is written

The file is the student of a distillation, the reference its teacher. Codes, types, names and sizes stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.calibrate.store import joined_results, tell_of_blocks
from lowbit.calibrate.task import CalibrationTask, StartModel
from lowbit.calibrate.tensors import OverlaidCheckpoint, Replacement
from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.opening import find_gguf
from lowbit.errors import NoGainError, UsageError, VerificationError
from lowbit.evaluation import Evaluation, evaluate
from lowbit.files.claim import claimed, refuse_claimed
from lowbit.files.hashes import file_digests
from lowbit.files.system import check_disk, refuse_sources
from lowbit.knobs import Facts
from lowbit.measure import Meter
from lowbit.pipeline import Written, run_method
from lowbit.plan.plan import CalibrationText, Making, Prepared, Progress
from lowbit.plan.refining import Kept
from lowbit.refinement.basis import in_basis
from lowbit.refinement.pair import TwoModels, open_pair
from lowbit.registry import FORMATS, load
from lowbit.report import schema
from lowbit.reporting import build_report, write_report
from lowbit.settings import READ_BY_REFINE, RunOptions, Settings, make_settings, refuse_unread
from lowbit.verification import Verification, verify


@dataclass(frozen=True)
class Refined:
    """A refined model (of a split GGUF the first part) and its report, which has both figures."""

    path: Path
    report: schema.Report

    @property
    def before(self) -> Evaluation:
        assert self.report.refinement is not None
        return self.report.refinement.before

    @property
    def after(self) -> Evaluation:
        assert self.report.refinement is not None
        return self.report.refinement.after


@dataclass(frozen=True)
class HeldOut:
    """The text that decides: None for the packaged evaluation text, and how much of it."""

    text: str | Path | None = None
    windows: int = 24
    window_tokens: int = 512

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not the defaults, for the command of the report."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}


@dataclass(frozen=True)
class Planned:
    """A refinement before anything ran. prepared: its checkpoint is the reference, in the basis of the file"""

    pair: TwoModels
    kept: Kept
    prepared: Prepared
    held_out: HeldOut

    @property
    def start(self) -> StartModel:
        return StartModel(self.pair.file, self.kept.codes, self.kept.files)


def dry_refine(
    file: str | Path, *, reference: str | Path, distill: bool = False, text: str | Path | None = None,
    windows: int = 24, window_tokens: int = 512, options: OpenOptions | None = None, run: RunOptions | None = None,
    **settings: Any,
) -> Prepared:  # fmt: skip
    """The plan of a refinement: which tensors are refined and which keep their bytes, and why."""
    held_out = HeldOut(text, windows, window_tokens)
    return _planned(file, reference, distill, held_out, options or OpenOptions(), run, settings).prepared


def refine(
    file: str | Path,
    output: str | Path,
    *,
    reference: str | Path,
    distill: bool = False,
    text: str | Path | None = None,
    windows: int = 24,
    window_tokens: int = 512,
    options: OpenOptions | None = None,
    run: RunOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Refined:
    """Make a finished quantized model nearer to its reference: the same names, types, shapes and bytes of size.

    file       a GGUF file, or a folder in a format that lowbit writes
    output     NAME.gguf, or a folder
    reference  the 16-bit model that the file was made of
    distill    then learn its scales, norms and biases from the reference, end to end (docs/distill.md)
    text       held-out text that decides, as of `evaluate`: the packaged evaluation text by default; windows of
               window_tokens tokens
    options    of the reference
    settings   of `lowbit.settings.Settings`, `READ_BY_REFINE`: calib, samples, seqlen, sweeps …
    run        device, memory bound and resuming

    Raises NoGainError, with both figures, where the result is no nearer on the held-out text; nothing is then written.
    """
    meter, output, run = Meter(), Path(output), run or RunOptions()
    refuse_claimed(output)
    refuse_sources([output], [Path(file), Path(reference)])
    held_out = HeldOut(text, windows, window_tokens)
    asked = _planned(file, reference, distill, held_out, options or OpenOptions(), run, settings)
    prepared, kept = asked.prepared, asked.kept
    plan = kept.plan
    _refuse_other_name(output, plan.format.suffix, file)
    judge = _judge(asked, reference, run)
    with claimed(output) as claim:
        plan.refuse_existing(output, overwrite)
        check_disk(output, 2 * plan.file_bytes, plan.largest_file)
        before = judge(str(file), _share(progress, 0, 10))
        inherited = {check.rule for check in verify(plan.origin, engine=plan.engine).broken}
        task = CalibrationTask(
            checkpoint=prepared.checkpoint, architecture=asked.pair.architecture, targets=kept.targets,
            dtypes={name: tensor.plain_dtype for name, tensor in kept.vectors.items()}, settings=plan.settings,
            options=prepared.options, run=run, progress=_share(progress, 10, 50 if distill else 90), start=asked.start,
        )  # fmt: skip
        try:
            # The file has embedding and head rounded already.
            done, distilled = run_method(task, output, lambda _file: {}, _share(progress, 50, 90))
            text_read = CalibrationText.of(done.windows)
            prepared = replace(prepared, calibrated=done, distilled=distilled, calibration=text_read)
            report = None
            with plan.workplace(output, overwrite, claim) as work:
                written = _patched(prepared, asked, work, output)
                model = plan.model_in(work, output)
                verification = _verified(model, output, asked, prepared, inherited)
                after = judge(str(model), _share(progress, 90, 100)).model_copy(update={"model": str(output)})
                _refuse_no_gain(before, after, file)
                report = build_report(prepared, written, plan.opened_at(output), verification, meter)
                found = schema.Refinement(file=str(file), before=before, after=after)
                report = report.model_copy(update={"refinement": found, "evaluation": (after,)})
                write_report(report, plan.report_at(work, output))
        except NoGainError:
            done.store.remove()  # type: ignore[possibly-undefined]
            raise
        except BaseException as error:
            tell_of_blocks(claim.folder, error)
            raise
        done.store.remove()
    asked.pair.close()
    return Refined(plan.opened_at(output), report)


def _planned(
    file: str | Path, reference: str | Path, distill: bool, held_out: HeldOut, options: OpenOptions,
    run: RunOptions | None, given: dict[str, Any],
) -> Planned:  # fmt: skip
    """Open and compare both models; reads samples of weights."""
    others = [name for name, value in given.items() if name not in READ_BY_REFINE and value is not None]
    if others:
        raise UsageError(f"{others[0]} is not read by a refinement, which keeps format and types of the file",
                         f"it reads {', '.join(READ_BY_REFINE)}")  # fmt: skip
    if held_out.windows < 1:
        raise UsageError(f"{held_out.windows} held-out windows", "at least one is needed to see a gain")
    settings: Settings = make_settings(None, method=f"refine{'+distill' if distill else ''}", **given)
    gguf = find_gguf(file, options) is not None
    refuse_unread(settings, run, Facts(gguf=gguf))
    _refuse_one_text(settings, held_out)
    pair = open_pair(file, reference, options)
    kept: Kept = load(FORMATS["gguf" if gguf else "compressed-tensors"].refine)(
        pair.file, pair.reference, pair.architecture, settings
    )
    if not kept.targets:
        whys = sorted({note for tensor in kept.plan.quantized for note in tensor.notes})
        raise UsageError(f"nothing of {file} can be refined: {'; '.join(whys[:3]) or 'it has no quantized linear'}",
                         "lowbit refine --dry-run lists every tensor with its reason")  # fmt: skip
    changed, notes = in_basis(pair, kept.targets)
    kept = replace(kept, plan=replace(kept.plan, notes=(*kept.plan.notes, *notes)))

    def plan_again(_: Settings) -> Any:
        raise UsageError("a refinement has no neighbours: it keeps the types of its file")

    prepared = Prepared(changed, kept.plan, 1, plan_again, options, str(reference), start=str(file),
                        held_out=held_out.given)  # fmt: skip
    return Planned(pair, kept, prepared, held_out)


def _refuse_one_text(settings: Settings, held_out: HeldOut) -> None:
    """UsageError where the gain would be judged on the text that it was made with."""
    if settings.calib is None or held_out.text is None or settings.calib == "self":
        return
    same = str(settings.calib) == str(held_out.text)
    if same or (
        Path(settings.calib).is_file() and Path(held_out.text).is_file()
        and file_digests(Path(settings.calib)) == file_digests(Path(held_out.text))
    ):  # fmt: skip
        raise UsageError(f"{held_out.text} is the calibration text too, so it could not show a gain",
                         "give another --text, or leave it out for the packaged evaluation text")  # fmt: skip


def _refuse_other_name(output: Path, suffix: str | None, file: str | Path) -> None:
    if suffix is not None and output.suffix != suffix:
        raise UsageError(f"{output}: {file} is one {suffix[1:].upper()} file", f"name it -o {output}{suffix}")
    if suffix is None and output.suffix == ".gguf":
        raise UsageError(f"{output}: {file} is a folder, and a refinement keeps its format", "name a folder with -o")


def _share(progress: Progress | None, begin: int, end: int) -> Progress | None:
    """Progress of a part of the run, in percent of the whole."""
    if progress is None:
        return None
    return lambda name, done, total: progress(name, begin * total + (end - begin) * done, 100 * total)


def _judge(asked: Planned, reference: str | Path, run: RunOptions) -> Callable[[str, Progress | None], Evaluation]:
    """path → its divergence from the reference, which is on this machine by now: a revision names it no longer."""
    held_out, own = asked.held_out, asked.pair.reference
    options = replace(asked.prepared.options, revision=None)
    place = own.folder if own.kind != "gguf" else next(iter(own.tensors.values())).file

    def judge(path: str, progress: Progress | None) -> Evaluation:
        told = None if progress is None else partial(progress, "held-out text")
        (found,) = evaluate(
            path, place, held_out.text, windows=held_out.windows, window_tokens=held_out.window_tokens,
            activations="none", device=run.device, max_memory=run.max_memory, options=options,
            progress=told,
        )  # fmt: skip
        return found.model_copy(update={"reference": str(reference)})

    return judge


def _patched(prepared: Prepared, asked: Planned, work: Path, output: Path) -> Written:
    """A copy of the file with the refined codes and scales, and the learned vectors, in it."""
    assert prepared.calibrated is not None
    plan, store = asked.kept.plan, prepared.calibrated.store
    files = plan.copied(work, output)
    for name in sorted(store.rewritten()):
        vector = asked.kept.vectors[name]
        learned = vector.source.read(prepared.calibrated.checkpoint, 0, vector.rows)
        files.write(plan.vector_piece(vector, learned.to(vector.plain_dtype)))
    results, found = {}, store.results()
    for tensor in plan.tensors:
        if tensor.making is not Making.calibrated:
            continue
        rows = tensor.rows // tensor.experts
        for expert in range(tensor.experts):
            target = asked.kept.targets[tensor.source.names[expert].removesuffix(".weight")]
            first = expert * rows
            refined = tensor.source.read_calibrated(store, target, first, first + rows)
            for piece in plan.pack(tensor, refined, first):
                files.write(piece)
        results[tensor.name] = joined_results([found[name] for name in tensor.source.names])
    files.close()
    beside = sorted({path for path in work.rglob("*") if path.is_file()} - set(files.files))
    digests = files.digests | {str(path.relative_to(work)): file_digests(path) for path in beside}
    return Written(files.files, results, beside=beside, digests=digests)


def _verified(model: Path, output: Path, asked: Planned, prepared: Prepared, inherited: set[str]) -> Verification:
    """Verify the copy, its unrefined tensors against the file and what was learned; what the file broke already is
    reported and stays."""
    assert prepared.calibrated is not None
    file, done = asked.pair.file, prepared.calibrated
    learned = {name: Replacement(partial(done.checkpoint.read, name), asked.kept.vectors[name].plain_dtype)
               for name in done.store.rewritten()}  # fmt: skip
    verification = verify(
        model, source=OverlaidCheckpoint(file, learned) if learned else file, engine=asked.kept.plan.engine,
        options=asked.prepared.options, nearest=False,
    )  # fmt: skip
    for failed in (check for check in verification.broken if check.rule not in inherited):
        raise VerificationError(
            f"{output}: the output breaks the rule {failed.rule!r}: {failed.detail}",
            "this is a bug of lowbit, or a damaged disk; please report it. The output was removed",
        )
    return verification


def _refuse_no_gain(before: Evaluation, after: Evaluation, file: str | Path) -> None:
    if before.kld_mean is None or after.kld_mean is None:
        raise AssertionError("a reference was given, so there is a divergence")
    if not after.kld_mean < before.kld_mean:
        raise NoGainError(
            f"{file} gained nothing: {before.kld_mean:.5f} nats per token from its reference on held-out text before, "
            f"{after.kld_mean:.5f} after; nothing was written",
            "give more calibration text (--samples, --calib) of the kind the model is for",
        )
