"""The public calls that run several stages: `quantize`, `convert`, `dry_run`, `inspect`."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowbit.calibrate.store import tell_of_blocks
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.adapter import adapter_files
from lowbit.checkpoint.base import HTML_NAME, Checkpoint, OpenOptions, report_path
from lowbit.checkpoint.companions import has_tokenizer
from lowbit.checkpoint.opening import find_gguf
from lowbit.errors import ArchitectureError, UsageError, VerificationError
from lowbit.export.atomic import refuse_existing_files
from lowbit.files.claim import claimed, refuse_claimed
from lowbit.files.system import check_disk, refuse_sources
from lowbit.formats.gguf.raw import RawCheckpoint, open_raw_gguf
from lowbit.knobs import Facts
from lowbit.measure import Meter
from lowbit.methods import RTN, parse_method
from lowbit.pipeline import Written, calibrate, write_checkpoint
from lowbit.plan.conversion import prepare_conversion
from lowbit.plan.plan import Prepared, Progress, Request, output_format, prepare
from lowbit.registry import load
from lowbit.report import schema
from lowbit.reporting import build_report, extremes_of, write_report
from lowbit.rounding.extremes import tells_of_loss
from lowbit.settings import RunOptions, Settings, make_settings, refuse_unread
from lowbit.text import parse_mixture
from lowbit.verification import verify

if TYPE_CHECKING:
    from lowbit.architecture.in_memory import ModelInMemory
    from lowbit.text import GivenText

_log = logging.getLogger("lowbit")


@dataclass(frozen=True, repr=False)
class Quantized:
    """A finished checkpoint and its report.

    path      folder or GGUF file (of a split one the first part). Of a run in place without an output: a temporary
              folder, which is removed with this object
    in_place  the model in memory that got the rounded weights; None where there is none
    """

    path: Path
    report: schema.Report
    in_place: Any = None

    @cached_property
    def model(self) -> Any:
        """A plain transformers model with the rounded weights: the one in memory if it got them, else loaded from
        `path` (in float32, on the CPU) when first asked for."""
        return load("lowbit.architecture.loading:load")(self.path)[0] if self.in_place is None else self.in_place

    def __repr__(self) -> str:
        settings, totals = self.report.settings, self.report.totals
        verified = self.report.verification
        said = "not verified" if verified is None else f"{'loads in' if verified.ok else 'fails'} {verified.engine}"
        place = " and in place" if self.in_place is not None else ""
        return (
            f"Quantized('{self.path}'{place}: {settings.scheme} by {settings.method}, "
            f"{totals.decoder_bits_per_weight:.2f} bits per weight, {totals.bytes_out / 1e6:.1f} MB, {said})"
        )


def quantize(
    model: Any,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    in_place: bool | None = None,
    recipe: Any = None,
    options: OpenOptions | None = None,
    run: RunOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Quantize `model` into `output`, verify what was written and report on it.

    model      a folder, a .gguf file, a Hugging Face id, demo:smollm2, or a transformers model in memory
    output     a folder, or NAME.gguf for llama.cpp; None: a model in memory is quantized in place
    tokenizer  of a model in memory, or its processor; None: that of the folder or id which the model was loaded from
    in_place   copy the rounded weights, decoded, into the model in memory, which stays a plain transformers model;
               None: if there is no output
    recipe     settings from a YAML file or a mapping; llm-compressor's recipes and modifiers are read too
    options    trust in the source, its revision, and an adapter to merge
    settings   the fields of `lowbit.settings.Settings`: scheme, method, group_size, ignore, overrides, range …
               `calib` may be data in memory too: texts, conversations, a dataset, a DataLoader, token ids
               (`lowbit.text.given`)
    run        device, memory bound and resuming, for methods that run a text through the model; None: the CPU, and the
               device of a model that is on a GPU
    progress   called with (name, bytes done, bytes in all)

    After a LowbitError `output` does not exist, or is still the earlier one, and a model in memory is as it was.
    """
    (given, text), meter = _text_in_memory(settings), Meter()
    if isinstance(model, str | Path):
        if tokenizer is not None or in_place:
            raise UsageError(f"{'in_place' if in_place else 'tokenizer'} is for a model in memory, and {model} is none",
                             "leave it out: a folder has its own tokenizer, and is not changed")  # fmt: skip
        if output is None:
            raise UsageError("no output was named", "give quantize(model, output): a folder, or NAME.gguf")
        chosen = make_settings(recipe, **given)
        request = Request(model, chosen, options or OpenOptions(), threads, progress, text=text)
        prepared = _prepared(request, Path(output), overwrite, run)
        return write_prepared(prepared, Path(output), overwrite, progress, meter, run)
    if output is None and in_place is False:
        raise UsageError("neither an output nor the model may be written to", "name an output, or leave in_place out")
    chosen = make_settings(recipe, **given)
    if run is None and getattr(getattr(model, "device", None), "type", "cpu") != "cpu":
        run = RunOptions(device=str(model.device))
    source = _opened_in_memory(model, tokenizer, options, chosen, output)
    try:
        request = Request(source, chosen, options or OpenOptions(), threads, progress, text=text)
        return _quantize_in_memory(request, output, in_place is not False and (output is None or in_place is True),
                                   overwrite, run)  # fmt: skip
    finally:
        source.remove()


def _opened_in_memory(
    model: Any, tokenizer: Any, options: OpenOptions | None, settings: Settings, output: str | Path | None
) -> ModelInMemory:
    """A model in memory; UsageError where a GGUF file is to be made of it, and there is no tokenizer to put into it."""
    source: ModelInMemory = load("lowbit.architecture.in_memory:model_in_memory")(model, tokenizer, options)
    gguf = settings.writes_gguf(None if output is None else Path(output))
    if gguf and not settings.mmproj and not settings.no_tokenizer and not has_tokenizer(source.folder):
        source.remove()
        raise UsageError("a GGUF file holds the tokenizer, and none was given",
                         "give tokenizer=, or no_tokenizer=True for a file that takes token ids alone")  # fmt: skip
    return source


def _quantize_in_memory(
    request: Request, output: str | Path | None, in_place: bool, overwrite: bool, run: RunOptions | None
) -> Quantized:
    """Write the output, or a temporary one, and then copy its weights into the model if that is asked for."""
    assert not isinstance(request.model, str | Path)
    meter = Meter()
    temporary = None if output is not None else Path(tempfile.mkdtemp(prefix="lowbit-quantized-"))
    try:
        suffix = output_format(request.settings).suffix or ""
        place = Path(output or "") if temporary is None else temporary / f"model{suffix}"
        prepared = _prepared(request, place, overwrite, run)
        done = write_prepared(prepared, place, overwrite, request.progress, meter, run)
        if in_place:
            model = cast("ModelInMemory", request.model).model
            load("lowbit.architecture.in_memory:put_back")(model, open_checkpoint(done.path), request.options)
            if done.report.output.format != "gguf" and request.settings.base_scheme().activation is not None:
                _log.warning("the model in memory has the rounded weights; its activations stay as they are: engines "
                             "quantize them, and `lowbit.evaluate` does")  # fmt: skip
            done = replace(done, in_place=model)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(done, shutil.rmtree, temporary, ignore_errors=True)
    return done


def _prepared(request: Request, output: Path, overwrite: bool, run: RunOptions | None) -> Prepared:
    """Refuse what can be refused at once, and plan."""
    chosen = request.settings
    refuse_unread(chosen, run, Facts(gguf=chosen.writes_gguf(output), in_order=request.text is not None))
    refuse_other_name(output, chosen)
    refuse_claimed(output)  # before an importance matrix is measured
    if isinstance(request.model, str | Path):
        refuse_sources([output], [Path(request.model)])
    if output_format(chosen, output).suffix is not None:
        beside = [report_path(output), report_path(output, HTML_NAME)]
        beside += [output.with_name("Modelfile")] if chosen.modelfile else []
        refuse_existing_files(output, [output, *beside], overwrite)
    return prepare(request, output)


def _text_in_memory(settings: dict[str, Any]) -> tuple[dict[str, Any], GivenText | None]:
    """(the settings with the name of calibration data in memory, that data or None)."""
    calib = settings.get("calib")
    if calib is None or isinstance(calib, str):
        return settings, None
    if isinstance(calib, Path):
        return settings | {"calib": str(calib)}, None
    text: GivenText = load("lowbit.text.given:GivenText")(calib)
    return settings | {"calib": text.name}, text


def convert(
    model: str | Path,
    output: str | Path,
    *,
    format: str,
    scheme: str | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Write a quantized model in another format: the same codes where the format holds them, else rounded again.

    format    one of `lowbit.registry.written_formats`; "float" writes the decoded weights
    scheme    for every quantized linear; None keeps its own, or the nearest that the format has

    The report lists which linears were repacked and which were rounded again, with the added error. After a LowbitError
    `output` does not exist.
    """
    meter, output = Meter(), Path(output)
    prepared = dry_convert(model, format=format, scheme=scheme, options=options, threads=threads, preview=False,
                           output=output, **settings)  # fmt: skip
    return write_prepared(prepared, output, overwrite, progress, meter)


def dry_convert(
    model: str | Path,
    *,
    format: str,
    scheme: str | None = None,
    options: OpenOptions | None = None,
    threads: int | None = None,
    preview: bool = True,
    output: Path | None = None,
    **settings: Any,
) -> Prepared:
    """The plan of a conversion: which linears are repacked, which are rounded again, and why."""
    chosen = make_settings(None, format=format, scheme=scheme, **settings)
    request = Request(model, chosen, options or OpenOptions(), threads, preview=preview)
    if output is not None:
        refuse_other_name(output, chosen)
    if output_format(chosen).suffix is None:
        return prepare_conversion(request, scheme_given=scheme is not None)
    refuse_unread(chosen)
    if scheme is None and not chosen.mmproj:
        raise UsageError("a GGUF file needs a type", "name one: --scheme Q8_0, Q4_K_M, BF16 …")
    return prepare(request)


# Rules that compare weights with the source's: they fail too where no number of the format is near.
_COMPARED = ("relative-error", "nearest-codes", "gguf-weights", "gguf-nearest-codes")


def write_prepared(
    prepared: Prepared,
    output: Path,
    overwrite: bool,
    progress: Progress | None,
    meter: Meter,
    run: RunOptions | None = None,
) -> Quantized:
    """Calibrate, write, verify, report; the output has a hidden name until it is complete."""
    plan = prepared.plan
    refuse_sources(plan.places(output), _sources(prepared))
    reports: list[schema.Report] = []

    def finish(work: Path, written: Written) -> None:
        # Weights that transforms rewrote cannot be compared with the source.
        rewritten = parse_method(plan.settings.method).transforms
        verification = verify(
            plan.model_in(work, output),
            source=None if rewritten else prepared.checkpoint,
            engine=plan.engine,
            options=prepared.options,
            # of a GGUF it takes ten times as long as rounding did, so `lowbit verify --reference` alone looks
            errors={
                name: result.relative_error
                for name, result in written.results.items()
                if result.linear is not None and result.linear.method != RTN.name
            },
            nearest=not (plan.settings.is_blockwise or plan.settings.method != "rtn" or prepared.made_by)
            and plan.format.name not in ("float", "gguf"),
        )
        # Limits of the engine are reported and the output stays; broken files are an error.
        inherited = plan.inherited_rules(prepared.checkpoint)
        for failed in (check for check in verification.broken if check.rule not in inherited):
            compared = failed.rule in _COMPARED
            if compared and plan.settings.range == "percentile":
                raise VerificationError(
                    f"{output}: --percentile {plan.settings.percentile:g} clips too much: {failed.detail}",
                    "raise it, or leave --range out; the output was removed",
                )
            lost = [note for note in extremes_of(prepared, written) if compared and tells_of_loss(note)]
            if lost:
                raise VerificationError(
                    f"{output}: {plan.scheme_name} of {plan.format.name} cannot hold the source's weights: {lost[0]}"
                    f"{f'; and {len(lost) - 1} more such tensors' if len(lost) > 1 else ''}",
                    f"{plan.keeping(lost[0].partition(':')[0])} keeps it in 16 bits; or repair it. The output was "
                    f"removed",
                )
            raise VerificationError(
                f"{output}: the output breaks the rule {failed.rule!r}: {failed.detail}",
                "this is a bug of lowbit, or a damaged disk; please report it. The output was removed",
            )
        report = build_report(prepared, written, plan.opened_at(output), verification, meter)
        write_report(report, plan.report_at(work, output))
        reports.append(report)

    with claimed(output) as claim:
        plan.refuse_existing(output, overwrite)
        check_disk(output, plan.settings.copies_on_disk * plan.file_bytes, plan.largest_file)
        try:
            prepared = calibrate(prepared, output, run, progress)
            write_checkpoint(prepared, output, progress, overwrite, finish, claim)
        except BaseException as error:
            tell_of_blocks(claim.folder, error)
            raise
        if prepared.calibrated is not None:
            prepared.calibrated.store.remove()
    return Quantized(plan.opened_at(output), reports[0])


def dry_run(
    model: Any,
    *,
    output: str | Path | None = None,
    tokenizer: Any = None,
    recipe: Any = None,
    options: OpenOptions | None = None,
    run: RunOptions | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Prepared:
    """The plan of a run, without reading a weight: every tensor, exact bytes, predicted peak memory.

    model, tokenizer, settings  as of `quantize`: a model and calibration data may be in memory
    output  nothing is written there; its name tells a GGUF file from a folder
    """
    given, text = _text_in_memory(settings)
    chosen, output = make_settings(recipe, **given), None if output is None else Path(output)
    refuse_unread(chosen, run, Facts(gguf=chosen.writes_gguf(output), in_order=text is not None))
    if not isinstance(model, str | Path):
        model = _opened_in_memory(model, tokenizer, options, chosen, output)
    elif tokenizer is not None:
        raise UsageError(f"tokenizer is for a model in memory, and {model} is none", "leave it out")
    return prepare(Request(model, chosen, options or OpenOptions(), threads, preview=True, text=text), output)


def _sources(prepared: Prepared) -> list[Path]:
    """Every file and folder that the run reads."""
    settings, checkpoint = prepared.plan.settings, prepared.checkpoint
    texts = [each.source for each in parse_mixture(settings.calib)]
    named = [prepared.source, *(name for name in (settings.imatrix, settings.tensor_type_file, *texts) if name)]
    files = {info.file for info in checkpoint.tensors.values()}
    return [*map(Path, named), *files, *adapter_files(prepared.options)]


def refuse_other_name(output: Path, settings: Settings) -> None:
    """UsageError where the name of a single-file output lacks the suffix of its format, or a folder has it."""
    format = output_format(settings, output)
    suffix = format.suffix
    if suffix is not None and output.suffix != suffix:
        raise UsageError(
            f"{output}: {settings.scheme} is written as one {suffix[1:].upper()} file", f"name it -o {output}{suffix}"
        )
    if suffix is None and output.suffix == ".gguf":
        raise UsageError(f"{output}: {format.name} is written as a folder, which engines would take for a GGUF file by "
                         "this name", "name a folder with -o, or give --format gguf and a type")  # fmt: skip


def inspect(path: str | Path, options: OpenOptions | None = None) -> Checkpoint:
    """Open any supported checkpoint: tensors, types, metadata and config, without reading a weight.

    A GGUF file whose architecture has no Hugging Face names here (an image model, say) appears under its own names.
    """
    try:
        return open_checkpoint(path, options)
    except ArchitectureError as error:
        file = find_gguf(path, options)
        if file is None:
            raise
        raw = RawCheckpoint(open_raw_gguf(file), str(path))
        raw.notes.append(f"under the file's own names, since {error}")
        return raw
