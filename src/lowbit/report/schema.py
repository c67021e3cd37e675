"""`lowbit-report.json`: the treatment of each tensor, the data and seed used, and the cost.

The file lies beside the quantized weights. Quantizing writes it, verifying and evaluating add to it, `render_html`
shows it. It consists of the records below and those of the stages: `Evaluation`, `Verification`, `Diagnosis`. `SCHEMA`
increases with every change, additions included, so that no reader misreads or drops a field.

    relative_error = ‖W − Ŵ‖² / ‖W‖²          max_error = max |W − Ŵ|

Ratios and shares are fractions (0.913, not 91.3), sizes are bytes, times are seconds.

Reports of schema 4 to 9 are read too, as reports of schema 10: 4 lacks histograms, samples, neighbours and the command;
4 and 5 told settings in fields of their own, which become what was given (`_given_before_6`); checksums came with 7,
the adapter with 8, tasks and speeds with 9; none has the cost of the cache and next steps.

Refused, as CheckpointError on reading and as pydantic's ValidationError on making one: an unknown field, a missing
one, a number that is negative where it counts something, NaN or inf anywhere, a tensor that was left alone without a
reason, a verification that is `ok` although a check failed. A report of another schema version is named as such.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, Field, ValidationError, model_validator
from pydantic_core import from_json

from lowbit.benchmark.result import Bench
from lowbit.calibrate.summary import InputSummary
from lowbit.checkpoint.base import REPORT_NAME as REPORT_NAME
from lowbit.errors import CheckpointError, OutputError
from lowbit.evaluation.cache_result import CacheEvaluation
from lowbit.evaluation.result import Evaluation
from lowbit.files.regular import open_regular
from lowbit.files.rename import rename_new
from lowbit.records import Count, NonNegative, Record, Share
from lowbit.report.diagnosis import Diagnosis, Suggestion
from lowbit.rounding.histogram import WeightHistogram
from lowbit.tasks.result import TaskResult
from lowbit.verification.result import Verification

SCHEMA = 10
EARLIER = (4, 5, 6, 7, 8, 9)  # also read: later fields have defaults, and settings are moved
LARGEST_FILE = 256 * 2**20  # larger files are refused; a model of 100 000 tensors writes about 40 MB


class ReportSource(Record):
    """The source. `model` is as typed by the user; `notes` are on the source ("stored as Q4_1") and on the whole plan
    ("90 of 211 tensors … Q4_K became Q5_0").

    kind            safetensors, gguf, pickle, or the quant_method of a folder that was quantized already
    adapter         that was merged into the model, as typed by the user
    adapter_sha256  of the content of its files
    """

    model: str
    kind: str
    architecture: str
    notes: tuple[str, ...] = ()
    bytes: Count
    sha256_of_headers: str | None = None
    adapter: str | None = None
    adapter_sha256: str | None = None


class OutputFile(Record):
    """A file of the output. name: relative to its folder; hashes: SHA-256 of each MiB, one after the other, base64"""

    name: str
    bytes: Count
    hashes: str | None = None


class Output(Record):
    """The output. `files` hold weights, `beside` the rest; `dtype` is that of unquantized tensors and of scales."""

    format: str
    files: tuple[OutputFile, ...]
    beside: tuple[OutputFile, ...] = ()
    bytes: Count
    dtype: str


class Calibration(Record):
    """The calibration text; None in `ReportSettings` if the method needs no data.

    notes  "the text has 8 000 tokens: 15 windows of 512, not the 128 asked for"
    inputs      of a few evenly spaced blocks, in the quantized model; empty if not measured
    vocabulary  the tokens of the text: one bit per token, least significant first, zlib, base64
    """

    name: str
    sha256: str | None = None
    samples: Count
    sequence_length: Count
    tokens: Count
    notes: tuple[str, ...] = ()
    inputs: tuple[InputSummary, ...] = ()
    vocabulary: str | None = None


class ReportSettings(Record):
    """The user's settings.

    scheme, method, range   of the plan, with defaults and "auto" resolved; range "none" of k-means, which has none
    given        every given setting, by its name in `lowbit.settings.Settings`
    """

    scheme: str
    method: str
    range: str
    given: dict[str, bool | int | float | str | tuple[str, ...] | dict[str, str]] = Field(default={})
    calibration: Calibration | None = None


class Account(Record):
    """What became of the bytes of the source: of tensors that are quantized, kept in 16 bits for a reason, or copied
    because no parameter of the model has their name."""

    what: Literal["quantized", "kept", "copied"]
    tensors: Count
    weights: Count
    bytes_in: Count
    bytes_out: Count


class Totals(Record):
    """The model as a whole.

    weights                   parameters of the model
    quantized_weights         of those, how many are stored on a grid
    decoder_bits_per_weight   stored bits per weight of the transformer blocks' linears, scales included
    file_bits_per_weight      8 * bytes_out / weights
    peak_memory_bytes         of the process; None if it could not be measured
    seconds_by_work           of calibration: forward passes with statistics, transforms, rounding …
    accounts                  every byte of the source, by what became of it
    decoder_quantized         share of the weights of the decoder blocks' matrices that are quantized
    """

    weights: Count
    quantized_weights: Count
    decoder_bits_per_weight: NonNegative
    file_bits_per_weight: NonNegative
    bytes_in: Count
    bytes_out: Count
    seconds: NonNegative
    peak_memory_bytes: Count | None = None
    seconds_by_work: dict[str, NonNegative] = Field(default={})
    accounts: tuple[Account, ...] = ()
    decoder_quantized: NonNegative | None = None


class TensorEntry(Record):
    """One tensor of the model: quantized (`scheme`), or left alone (`reason`); always exactly one of them.

    role             q_proj … down_proj, embedding, norm, lm_head
    block            index of the transformer block; None outside of them
    shape            [N, K] for a linear
    bytes            stored, with scales and zero points
    relative_error   None if it was not measured, and for tensors left alone
    method           how its codes were chosen, where a text was run for it: "gptq", "rtn" …
    layer_error      tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) over the text: the error of the linear's output
    nearest_error    what that would be with round to nearest
    start_error      what that was before `lowbit refine`
    tokens           of the text that the linear was measured on
    repacked         True if the source's own codes were kept, bit for bit (`lowbit convert`)
    notes            what was changed on the way: "group size 64: 128 does not divide 576"
    reads            name of its input, which it may share with others: model.layers.3.attention_input
    histogram        None if none was taken: of models with very many tensors, those of least error have none
    """

    name: str
    role: str
    block: Count | None = None
    shape: tuple[Count, ...]
    scheme: str | None = None
    bits_per_weight: NonNegative
    bytes: Count
    relative_error: NonNegative | None = None
    max_error: NonNegative | None = None
    method: str | None = None
    layer_error: NonNegative | None = None
    nearest_error: NonNegative | None = None
    start_error: NonNegative | None = None
    tokens: Count | None = None
    repacked: bool = False
    reason: str | None = None
    notes: tuple[str, ...] = ()
    reads: str | None = None
    histogram: WeightHistogram | None = None

    @model_validator(mode="after")
    def _quantized_or_explained(self) -> TensorEntry:
        if (self.scheme is None) == (self.reason is None):
            raise ValueError("a tensor has either a scheme or a reason for being left alone")
        return self


class TransformEntry(Record):
    """What a transform did at one place.

    point    the norm or linear whose output was rewritten
    error_before, error_after   of rounding the linears behind it to nearest, relative; None if nothing was measured
    detail   the parameters chosen, or why nothing was done
    """

    point: str
    what: str
    error_before: NonNegative | None = None
    error_after: NonNegative | None = None
    applied: bool
    detail: str = ""


class Distillation(Record):
    """What was learned of the rounded model from the unquantized one. Relative errors of tensors are those of their
    rounding, before it.

    parameters      scales, entries of norms and biases that could change
    windows, held_out   of the calibration text: trained on; kept to judge by
    kld_start, kld_end  mean KL on the held-out windows, nats per token; equal where nothing was kept
    steps           taken; best_step: the one whose result was kept
    rate            relative change of a parameter in a step, at the start
    """

    parameters: Count
    windows: Count
    held_out: Count
    kld_start: NonNegative
    kld_end: NonNegative
    steps: Count
    best_step: Count
    rate: NonNegative


class Neighbour(Record):
    """Another scheme for the same source: what its files weigh and, where it was measured beside this one, its quality.

    origin     "plan": planned to the byte, not made; "compare": made, and compared by `lowbit compare`; "beside": made,
               measured in the same way, and its report lies in the same folder
    label      what it is called in the chart
    bytes      of the weight files
    kld_mean   nats per token on the text and protocol of this report's headline evaluation; None of a plan
    expected_loss  percent, published for a model of 8 billion weights (`lowbit.advice.quality`); None without a figure
    """

    origin: Literal["plan", "compare", "beside"]
    label: str
    scheme: str
    bytes: Count
    bits_per_weight: NonNegative
    kld_mean: float | None = None
    kld_se: NonNegative | None = None
    same_top1: Share | None = None
    expected_loss: NonNegative | None = None


class CacheCost(Record):
    """One type of KV cache. bits  of a value, scales included; bytes  of one sequence, at each context"""

    type: str
    bits: NonNegative
    bytes: tuple[Count, ...]


class CacheCosts(Record):
    """What the KV cache of one sequence takes, from the model's shape: nothing is measured.

    engine    whose types these are; contexts  in tokens
    bounded   layers that keep a window only, of all `layers`
    """

    engine: str
    contexts: tuple[Count, ...]
    rows: tuple[CacheCost, ...]
    layers: Count
    bounded: Count


class Refinement(Record):
    """What `lowbit refine` started from, and what that was worth on text that nothing was calibrated on.

    file     the quantized model
    before   its divergence from the reference
    after    that of this output, on the same windows
    """

    file: str
    before: Evaluation
    after: Evaluation


class ServeLine(Record):
    """The command that serves what was written."""

    engine: str
    command: str


class Report(Record):
    """The whole file. Frozen: add to it with `report.model_copy(update={"verification": …})`.

    command     the command line that makes it again
    neighbours  other schemes for the same source
    kv_cache    what KV-cache types cost this output in quality (`lowbit evaluate --kv-cache`)
    cache_costs what they take in bytes; None of a model without such a cache
    next_steps  commands that follow from the rest
    refinement  of an output of `lowbit refine`
    """

    schema_version: Literal[10] = Field(default=SCHEMA, alias="schema")
    lowbit: str
    created: AwareDatetime
    source: ReportSource
    output: Output
    settings: ReportSettings
    versions: dict[str, str]
    totals: Totals
    tensors: tuple[TensorEntry, ...]
    transforms: tuple[TransformEntry, ...] = ()
    distillation: Distillation | None = None
    verification: Verification | None = None
    evaluation: tuple[Evaluation, ...] = ()
    kv_cache: tuple[CacheEvaluation, ...] = ()
    diagnosis: Diagnosis | None = None
    bench: tuple[Bench, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    serve: tuple[ServeLine, ...] = ()
    command: str | None = None
    neighbours: tuple[Neighbour, ...] = ()
    refinement: Refinement | None = None
    cache_costs: CacheCosts | None = None
    next_steps: tuple[Suggestion, ...] = ()


def load(path: Path | str) -> Report:
    """Read a report from a file, or from the checkpoint folder that holds one.

    Raises CheckpointError for anything that is not a report of this schema version, or of one of `EARLIER`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT_NAME
    text = _of_this_schema(path, _read_bounded(path))
    try:
        return Report.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is not a lowbit report: {_first_problem(error)}",
            "write it again with lowbit quantize, or undo the edit",
        ) from None


def dump(report: Report, path: Path | str) -> None:
    """Write a report: UTF-8, two spaces of indent, keys in the order of the models, whole or not at all."""
    document = report.model_dump(mode="json", by_alias=True)
    write_text(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path | str, replaces: bool = True) -> None:
    """Write beside `path`, then rename: a run that dies leaves the old file or the new one. OutputError otherwise.

    replaces  False: what appeared under the name since it was looked at is kept, and the text lies beside it
    """
    path = Path(path)
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "choose a folder that exists") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp makes files that only their owner can read
        if replaces:
            os.replace(beside, path)
        else:
            rename_new(Path(beside), path)
    except FileExistsError:
        raise OutputError(f"{path} appeared while it was made, and was kept; what was made is {beside}",
                          "give that another name") from None  # fmt: skip
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}", "free some space or choose another") from None
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _read_bounded(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", f"lowbit quantize writes {REPORT_NAME} beside the weights"
        ) from None
    if len(text) > LARGEST_FILE:
        raise CheckpointError(
            f"{path} is larger than {LARGEST_FILE} bytes, which no lowbit report is",
            f"lowbit quantize writes {REPORT_NAME} beside the weights",
        )
    return text


def _of_this_schema(path: Path, text: bytes) -> bytes:
    """The JSON, with the schema number raised where an earlier one is read."""
    try:
        document = from_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "it may be truncated; write it again") from None
    if not isinstance(document, dict) or "schema" not in document:
        raise CheckpointError(
            f"{path} is not a lowbit report: it has no schema version",
            f"lowbit quantize writes {REPORT_NAME} beside the weights",
        )
    version = document["schema"]
    if type(version) is not int or version not in (SCHEMA, *EARLIER):
        raise CheckpointError(
            f"{path} has report schema {json.dumps(version)[:40]}; this lowbit reads {SCHEMA}, "
            f"{', '.join(map(str, reversed(EARLIER)))}",
            "use the lowbit that wrote it, or write it again with this one",
        )
    if version == SCHEMA:
        return text
    settings, output = document.get("settings"), document.get("output")
    if version < 6 and isinstance(settings, dict) and isinstance(output, dict):
        document["settings"] = _given_before_6(settings, output.get("format"))
    return json.dumps(document | {"schema": SCHEMA}).encode()


def _given_before_6(settings: dict[str, Any], format: object) -> dict[str, Any]:
    """Settings of schema 4 and 5, with what was given in one place; fields that those did not have stay, to be refused.

    What they did not tell (double_quant, output types, a range search that "auto" did not choose) stays unknown.
    """
    kept = {name: settings[name] for name in settings if name not in _FIELDS_BEFORE_6}
    given = {name: settings[name] for name in ("scheme", "group_size", "kv_cache", "imatrix", "ignore")
             if settings.get(name)}  # fmt: skip
    given |= {name: settings[name] for name, default in (("method", "rtn"), ("seed", 0), ("pure", False))
              if settings.get(name, default) != default}  # fmt: skip
    if format not in ("compressed-tensors", "gguf"):
        given["format"] = format
    if settings.get("percentile") is not None:
        given |= {"range": "percentile", "percentile": settings["percentile"]}
    if settings.get("shard_size") not in (None, 5_000_000_000):
        given["shard_size"] = settings["shard_size"]
    for name in ("overrides", "method_overrides"):
        pairs = [text.rpartition("=") for text in settings.get(name) or ()]
        given |= {name: {pattern: value for pattern, _, value in pairs}} if pairs else {}
    given |= settings.get("options") or {}
    text = settings.get("calibration")
    if isinstance(text, dict):
        if not str(text.get("name")).startswith("packaged "):
            given["calib"] = text.get("name")
        sizes = (("samples", text.get("samples"), 128), ("seqlen", text.get("sequence_length"), 512))
        given |= {name: size for name, size, default in sizes if size not in (0, None, default)}
    return kept | {"given": given}


_FIELDS_BEFORE_6 = (
    "percentile", "group_size", "ignore", "overrides", "shard_size", "seed", "method_overrides", "options", "kv_cache",
    "imatrix", "pure",
)  # fmt: skip


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    where = ".".join(str(step) for step in problems[0]["loc"]) or "the whole"
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {problems[0]['msg']}{others}"
