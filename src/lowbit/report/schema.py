"""`lowbit-report.json`: what was done to each tensor, with which data and seed, and what it cost.

The file lies beside the quantized weights. Quantizing writes it, verifying and evaluating add to it, `render_html`
shows it. Its shape is the models below; `SCHEMA` is raised whenever that shape changes, additions included, so nobody
reads a field as something else or drops one on the way through.

    relative_error = ‖W − Ŵ‖² / ‖W‖²          max_error = max |W − Ŵ|

Ratios and shares are fractions (0.913, not 91.3), sizes are bytes, times are seconds.

A report of schema 4 is read too, as one of schema 5 without what came later: histograms, samples, neighbours, the
command.

Refused, as CheckpointError on reading and as pydantic's ValidationError on making one: an unknown field, a missing
one, a number that is negative where it counts something, NaN or inf anywhere, a tensor that was left alone without a
reason, a verification that is `ok` although a check failed. A report of another schema version is named as such.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from lowbit.checkpoint.base import REPORT_NAME as REPORT_NAME
from lowbit.errors import CheckpointError, OutputError
from lowbit.report.diagnosis import Diagnosis

SCHEMA = 5
# Read as well: everything that has been added since has a default.
EARLIER = (4,)
# A model of 100 000 tensors writes about 40 MB. More than this is not a report, and is not read into memory.
LARGEST_FILE = 256 * 2**20

Count = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Part):
    """What was read. `model` is what the user typed; `notes` say what one should know of it ("stored as Q4_1") and of
    the plan as a whole ("90 of 211 tensors … Q4_K became Q5_0").

    kind  safetensors, gguf, pickle, or the quant_method of a folder that was quantized already
    """

    model: str
    kind: str
    architecture: str
    notes: tuple[str, ...] = ()
    bytes: Count
    sha256_of_headers: str | None = None


class OutputFile(_Part):
    name: str
    bytes: Count


class Output(_Part):
    """What was written. `dtype` is that of the tensors which were left alone, and of the scales."""

    format: str
    files: tuple[OutputFile, ...]
    bytes: Count
    dtype: str


class InputRecord(_Part):
    """What one distinct input looked like on the calibration text (`lowbit.calibrate.summary`).

    low, step   code c of a channel stands for a mean of x² of 2^(low + step · c)
    codes       uint8 [K], base64
    """

    name: str
    block: Count | None
    tokens: Count
    low: float
    step: NonNegative
    codes: str


class Calibration(_Part):
    """The text that statistics were measured on. None in `Settings` where the method needs no data.

    notes  "the text has 8 000 tokens: 15 windows of 512, not the 128 asked for"
    inputs      of a few evenly spaced blocks, as the quantized model saw the text; empty where nothing was measured
    vocabulary  which tokens the text has: a bit for each, least significant first, zlib, base64
    """

    name: str
    sha256: str | None = None
    samples: Count
    sequence_length: Count
    tokens: Count
    notes: tuple[str, ...] = ()
    inputs: tuple[InputRecord, ...] = ()
    vocabulary: str | None = None


class Settings(_Part):
    """What the user asked for, defaults filled in. `overrides` are "RE=SCHEME", in the order they apply.

    method_overrides  "RE=METHOD", in the order they apply
    options  of the method, by their names in `lowbit.settings.Settings`, those that the user changed
    imatrix  of GGUF files: where the importance came from that errors were weighed with; pure: no mix of types
    """

    scheme: str
    method: str
    range: str
    percentile: NonNegative | None = None
    group_size: int | None = None
    ignore: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    shard_size: Count | None = None
    seed: int
    method_overrides: tuple[str, ...] = ()
    options: dict[str, float | int | str | bool] = {}
    kv_cache: str | None = None
    imatrix: str | None = None
    pure: bool = False
    calibration: Calibration | None = None


class Totals(_Part):
    """The model as a whole.

    weights                   parameters of the model
    quantized_weights         of those, how many are stored on a grid
    decoder_bits_per_weight   stored bits per weight of the transformer blocks' linears, scales included
    file_bits_per_weight      8 * bytes_out / weights
    peak_memory_bytes         of the process; None where it could not be measured
    seconds_by_work           of calibration: forward passes with statistics, transforms, rounding …
    """

    weights: Count
    quantized_weights: Count
    decoder_bits_per_weight: NonNegative
    file_bits_per_weight: NonNegative
    bytes_in: Count
    bytes_out: Count
    seconds: NonNegative
    peak_memory_bytes: Count | None = None
    seconds_by_work: dict[str, NonNegative] = {}


BINS = 63  # odd, so that 0 lies in the middle of one
Counts = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{168}$")]  # 63 numbers of 2 bytes in base64


class Histogram(_Part):
    """How the values of one tensor are distributed, on an evenly spaced subsample of its rows.

    reach    BINS equal bins span −reach … +reach; the first and the last hold what lies beyond, too
    rows, values   of the subsample
    source   little-endian uint16 [BINS], round(65535 · count / largest), in base64
    decoded  the same of what the stored codes stand for; None where the tensor was left alone
    largest  the count that 65535 stands for
    """

    reach: NonNegative
    rows: Count
    values: Count
    largest: Count
    source: Counts
    decoded: Counts | None = None


class TensorEntry(_Part):
    """One tensor of the model: quantized (`scheme`), or left alone (`reason`); always exactly one of them.

    role             q_proj … down_proj, embedding, norm, lm_head
    block            index of the transformer block; None outside of them
    shape            [N, K] for a linear
    bytes            stored, with scales and zero points
    relative_error   None where it was not measured, and for tensors left alone
    method           how its codes were chosen, where a text was run for it: "gptq", "rtn" …
    layer_error      tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) over the text: the error of the linear's output
    nearest_error    what that would be with round to nearest
    tokens           of the text that the linear was measured on
    repacked         True where the source's own codes were kept, bit for bit (`lowbit convert`)
    notes            what was changed on the way: "group size 64: 128 does not divide 576"
    reads            name of its input, which it may share with others: model.layers.3.attention_input
    histogram        None where none was taken: of models with very many tensors, those of least error have none
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
    tokens: Count | None = None
    repacked: bool = False
    reason: str | None = None
    notes: tuple[str, ...] = ()
    reads: str | None = None
    histogram: Histogram | None = None

    @model_validator(mode="after")
    def _quantized_or_explained(self) -> TensorEntry:
        if (self.scheme is None) == (self.reason is None):
            raise ValueError("a tensor has either a scheme or a reason for being left alone")
        return self


class TransformEntry(_Part):
    """What a transform did at one place.

    point    the norm or linear whose output was rewritten
    error_before, error_after   of rounding the linears behind it to nearest, relative; None where nothing was measured
    detail   the parameters chosen, or why nothing was done
    """

    point: str
    what: str
    error_before: NonNegative | None = None
    error_after: NonNegative | None = None
    applied: bool
    detail: str = ""


class Check(_Part):
    """One rule of the engine's loader, applied to what was written."""

    rule: str
    passed: bool
    detail: str = ""


class Verification(_Part):
    """Would this engine load it. `ok` is true exactly when every check passed."""

    ok: bool
    engine: str
    checks: tuple[Check, ...]

    @model_validator(mode="after")
    def _ok_means_all_passed(self) -> Verification:
        if self.ok != all(check.passed for check in self.checks):
            raise ValueError("ok contradicts the checks")
        return self


class EvaluationText(_Part):
    name: str
    sha256: str
    tokens: Count


class Continuation(_Part):
    """How one model goes on from where two part: the first token that differs, and what follows it.

    token_probability  what the reference gave this token there
    ended              True where the model stopped by itself instead
    """

    token: str
    rest: str
    tokens: Count
    token_probability: Share
    ended: bool = False


class GeneratedSample(_Part):
    """What reference and quantized model say after the same prompt, always taking the most probable token.

    chat    True where the prompt went through the chat template
    shared, shared_tokens   what both say before they part
    reference, quantized    from there on; both None where they never part
    """

    prompt: str
    chat: bool
    shared: str
    shared_tokens: Count
    reference: Continuation | None = None
    quantized: Continuation | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> GeneratedSample:
        if (self.reference is None) != (self.quantized is None):
            raise ValueError("either both models go on, or none does")
        return self


class Evaluation(_Part):
    """The quantized model against its source, over the same tokens. Without a reference only `ppl` is known.

    reference_from  who named the reference: the user, or the report beside the weights
    scheme          of the quantized linears; None for a plain checkpoint
    protocol        how the tokens were cut and scored, in words
    activations     "simulated": rounded as the engine would; "none": the weights' error alone
    ppl_ratio       ppl / ppl_reference, with the standard error of the paired difference
    kld_*           KL(reference ‖ quantized) per token, in nats
    same_top1       share of tokens where both prefer the same next token
    delta_p_*       change of the probability of the token that came
    bits_from       where bits_per_weight was read: the report, or the tensors' stored sizes
    reference_sha256   fingerprint of the reference: names, shapes and a sample of its weights
    samples         what both say to a few prompts; empty where that was not asked for
    """

    model: str
    reference: str | None
    reference_from: Literal["given", "report", "none"]
    scheme: str | None
    text: EvaluationText
    protocol: str
    windows: Count
    windows_asked: Count
    window_tokens: Count
    bos: bool
    scored_tokens: Count
    activations: Literal["none", "simulated"]
    dtype: str
    ppl: NonNegative
    ppl_se: NonNegative
    ppl_reference: NonNegative | None
    ppl_ratio: NonNegative | None
    ppl_ratio_se: NonNegative | None
    kld_mean: float | None
    kld_se: NonNegative | None
    kld_median: float | None
    kld_p99: float | None
    kld_p999: float | None
    kld_max: float | None
    same_top1: Share | None
    same_top1_se: NonNegative | None
    delta_p_mean: float | None
    delta_p_rms: NonNegative | None
    seconds: NonNegative
    peak_memory_bytes: Count | None
    file_bytes: Count
    bits_per_weight: NonNegative
    bits_from: Literal["report", "tensors"]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    reference_sha256: str | None = None
    samples: tuple[GeneratedSample, ...] = ()

    @property
    def label(self) -> str:
        """What a column of figures is called."""
        name = self.scheme or self.model
        return f"{name}, activations rounded" if self.activations == "simulated" else name


class Neighbour(_Part):
    """Another scheme for the same source: what its files weigh and, where it was measured beside this one, its quality.

    origin     "plan": planned to the byte, not made; "compare": made, and compared by `lowbit compare`
    label      what it is called in the chart
    bytes      of the weight files
    kld_mean   nats per token on the text and protocol of this report's headline evaluation; None of a plan
    """

    origin: Literal["plan", "compare"]
    label: str
    scheme: str
    bytes: Count
    bits_per_weight: NonNegative
    kld_mean: float | None = None
    kld_se: NonNegative | None = None
    same_top1: Share | None = None


class ServeLine(_Part):
    """The command that serves what was written."""

    engine: str
    command: str


class Report(_Part):
    """The whole file. Frozen: add to it with `report.model_copy(update={"verification": …})`.

    command     the command line that makes it again
    neighbours  other schemes for the same source
    """

    schema_version: Literal[5] = Field(default=SCHEMA, alias="schema")
    lowbit: str
    created: AwareDatetime
    source: Source
    output: Output
    settings: Settings
    versions: dict[str, str]
    totals: Totals
    tensors: tuple[TensorEntry, ...]
    transforms: tuple[TransformEntry, ...] = ()
    verification: Verification | None = None
    evaluation: tuple[Evaluation, ...] = ()
    diagnosis: Diagnosis | None = None
    serve: tuple[ServeLine, ...] = ()
    command: str | None = None
    neighbours: tuple[Neighbour, ...] = ()


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


def write_text(text: str, path: Path | str) -> None:
    """Write beside `path`, then rename: a run that dies leaves the old file or the new one. OutputError otherwise."""
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
        os.replace(beside, path)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}", "free some space or choose another") from None
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
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
            f"{path} has report schema {json.dumps(version)[:40]}; this lowbit reads {SCHEMA} and {EARLIER[0]}",
            "use the lowbit that wrote it, or write it again with this one",
        )
    return text if version == SCHEMA else json.dumps(document | {"schema": SCHEMA}).encode()


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    where = ".".join(str(step) for step in problems[0]["loc"]) or "the whole"
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {problems[0]['msg']}{others}"
