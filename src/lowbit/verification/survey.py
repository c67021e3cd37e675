"""One pass over every stored weight, in slabs of rows; the rules on values use its results.

    every code      |w − ŵ| ≤ |w − v| for every other value v of the grid   (only where codes were rounded to nearest)
    every tensor    ‖W − Ŵ‖ / ‖W‖ ≤ a bound by bits: far above what any rounding costs, far below what a wrong
                    layout, a wrong scale or foreign weights do (two unrelated tensors are √2 apart)

The format's `Layout` reads codes and scales; the grid, or its kernel, rounds and decodes. Where the grid would choose
another code, a tolerant comparison decides: the stored code must be as near to the weight, except for a tie that
float32 resolves either way, since other writers multiply by reciprocals. Linears are spread over threads, each with one
slab; pages are released on the way, so memory is one slab per thread.

Raw words that are checked too, in compressed-tensors and ModelOpt:

    L.weight_packed int32   b-bit codes + 2^(b−1), dense: element i of a row occupies bits i·b .. i·b + b − 1 of the
                            row's little-endian bit stream; bits past the last element are zero
    L.weight_zero_point int32   the same, down the columns
    L.weight_shape int64 [2]    [N, K]
    L.weight_global_scale, L.weight_scale_2 float32   divisor or multiplier of the group scales; finite and above 0
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import row_slabs
from lowbit.errors import CheckpointError
from lowbit.numerics.precision import squared_error_in_double
from lowbit.numerics.scalar_grids import CodebookGrid, IntGrid, MinifloatGrid
from lowbit.tensors import Grid, GroupParams, QuantizedTensor
from lowbit.verification.checksums import error_bound
from lowbit.verification.result import PLAIN

if TYPE_CHECKING:
    from lowbit.verification.subject import Subject

SLAB_WEIGHTS = 1 << 20
_SLAB_WORDS = 1 << 18
# Larger tensors release their pages after every slab, smaller ones after the last.
_RELEASE_ABOVE = 1 << 24
LARGEST_RELATIVE_ERROR = {2: 1.0, 3: 0.85, 4: 0.7, 5: 0.5, 6: 0.35, 7: 0.25, 8: 0.15}
# w / scale in float32 against a writer that multiplied by the reciprocal, in units of a step
_TOLERANCE = 2.0**-17

_SCALE_LEAVES = ("weight_scale", "scales", "weight_scale_inv", "SCB", "weight.absmax", "scale")
_SECOND_LEVEL = ("weight_global_scale", "weight_scale_2")
_CODE_LEAVES = ("weight_packed", "qweight", "weight", "W_q")

Progress = Callable[[str, int, int], None]


@dataclass
class Survey:
    """Problems by rule, and the relative error of every decoded tensor (with a source)."""

    scales: list[str] = field(default_factory=list)
    zero_points: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    nearest: list[str] = field(default_factory=list)
    relative: list[str] = field(default_factory=list)
    finite: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    relative_errors: dict[str, float] = field(default_factory=dict)
    decoded: int = 0
    compared: int = 0

    def compare(self, linear: str, error: float, weight: float, bound: float, said: str = "") -> None:
        """Record Σ (w − ŵ)² and Σ w² of a whole linear."""
        self.compared += 1
        relative = (error / weight) ** 0.5 if weight else error
        self.relative_errors[linear] = relative
        if not relative <= bound:
            self.relative.append(
                f"{linear}.weight: relative error {relative:.3g} of the weights; at most {bound}{said}"
            )

    def add(self, other: Survey) -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            if isinstance(mine, list):
                mine.extend(theirs)
        self.relative_errors |= other.relative_errors
        self.decoded += other.decoded
        self.compared += other.compared


def take_survey(subject: Subject, progress: Progress | None = None) -> Survey:
    """Decode every quantized linear and read every other tensor; tensors of a wrong layout are left to other rules."""
    linears = {name: list(subject.expected_of(name)) for name in subject.schemes if subject.unsound(name) is None}
    quantized = {name for linear in subject.schemes for name in subject.expected_of(linear)}
    plain = [name for name in subject.expected if name not in quantized and subject.is_sound(name)]
    jobs: list[tuple[Callable[[Subject, str], Survey], str, list[str]]] = []
    jobs += [(_survey_linear, linear, names) for linear, names in linears.items()]
    jobs += [(_survey_plain, name, [name]) for name in plain]
    sizes = [sum(subject.checkpoint.tensors[name].nbytes for name in names) for _, _, names in jobs]
    survey, done, total = Survey(), 0, sum(sizes)
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(os.cpu_count() or 1, "lowbit-verify", torch.set_num_threads, (1,))
    try:
        pending = [pool.submit(function, subject, name) for function, name, _ in jobs]
        for future, (_, name, _), size in zip(pending, jobs, sizes, strict=True):
            survey.add(future.result())
            done += size
            if progress is not None:
                progress(name, done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
    return survey


def _survey_linear(subject: Subject, linear: str) -> Survey:
    survey = Survey()
    original = _original(subject, linear, survey)
    if not _check_raw(subject, linear, survey):
        return survey
    layout, shape = subject.layout, subject.architecture.linears[linear].shape
    owned = layout.owned(linear)
    releases_early = sum(subject.stored.tensors[name].nbytes for name in owned) > _RELEASE_ABOVE
    judge = _Judge(subject, linear, survey)
    try:
        for start, stop in row_slabs(shape, SLAB_WEIGHTS, layout.row_multiple(linear, shape)):
            rows = None if original is None else original(start, stop)
            judge.look_at(start, layout.read(linear, shape, start, stop), rows)
            if stop == shape[0] or releases_early:
                for name in owned:
                    subject.stored.release(name)
                if original is not None and subject.original is not None:
                    subject.original.release(f"{linear}.weight")
    except CheckpointError as error:  # found by decoding only: an impossible zero point, a missing group
        survey.codes.append(str(error))
        return survey
    survey.decoded += 1
    if judge.compared:
        bound = error_bound(LARGEST_RELATIVE_ERROR[judge.bits], subject.errors_left.get(f"{linear}.weight"))
        said = f" at {judge.bits} bits"
        survey.compare(linear, judge.squared_error, judge.squared_weight, bound, said)
    return survey


def _original(subject: Subject, linear: str, survey: Survey) -> Callable[[int, int], Tensor] | None:
    """A reader of rows start..stop of the source's weight [N, K]; None without a source, or without a tensor that fits,
    which is a problem."""
    source, name = subject.original, f"{linear}.weight"
    if source is None:
        return None
    if name not in source.tensors:
        survey.relative.append(f"{name}: the source has no such tensor")
        return None
    role = subject.architecture.linears[linear]
    transposed = role.transposed and name not in source.schemes
    found = tuple(source.tensors[name].shape)
    if found != (role.shape[::-1] if transposed else role.shape):
        survey.relative.append(f"{name}: the source's has shape {list(found)}, not {role.shape}")
        return None
    if transposed:
        return lambda start, stop: source.read(name)[:, start:stop].t().contiguous()
    rotation = subject.layout.rotation(linear, role.shape[1]) if linear in subject.schemes else None
    if rotation is not None:
        return lambda start, stop: rotation.columns(source.read(name, start, stop).float())
    return lambda start, stop: source.read(name, start, stop)


class _Judge:
    """Checks the slabs of one linear and reports the first problem of each kind."""

    def __init__(self, subject: Subject, linear: str, survey: Survey):
        self.linear, self.survey, self.nearest = linear, survey, subject.nearest
        self.bits = subject.schemes[linear].weight.bits
        self.may_be_negative = subject.schemes[linear].may_sign_scales
        self.scale_name = _first_of(subject, linear, _SCALE_LEAVES)
        self.code_name = _first_of(subject, linear, _CODE_LEAVES)
        info = subject.stored.tensors.get(self.code_name)
        self.codes_can_stray = info is not None and info.dtype == torch.int8
        self.squared_error = self.squared_weight = 0.0
        self.compared = False
        self.reported: set[int] = set()

    def look_at(self, start: int, quantized: QuantizedTensor, original: Tensor | None) -> None:
        """Check a slab that begins at row `start`; original [rows, K] as the source stores it."""
        params, group = quantized.grouped()
        self._check_codes(start, quantized)
        self._check_scales(start, quantized, params, group, original)
        if original is not None:
            self._compare(start, quantized, params, group, original)

    def _check_codes(self, start: int, quantized: QuantizedTensor) -> None:
        """Report NaN, and codes wider than their bits."""
        codes, grid = quantized.codes, quantized.grid
        if isinstance(grid, IntGrid):
            low, high = grid.qmin, grid.qmax
            if self.codes_can_stray and (int(codes.min()) < low or int(codes.max()) > high):
                row, column = _first((codes < low) | (codes > high))
                self._say(self.survey.codes, f"{self.code_name}[{start + row}, {column}] is "
                          f"{codes[row, column].item()}; {grid.bits}-bit codes are {low}..{high}")  # fmt: skip
        elif isinstance(grid, MinifloatGrid) and grid.format.nan_codes:
            nan = (codes & (grid.format.sign_bit - 1)) == grid.format.nan_codes[0]
            if bool(nan.any()):
                row, column = _first(nan)
                self._say(self.survey.codes, f"{self.code_name}[{start + row}, {column}] is NaN")

    def _check_scales(
        self, start: int, quantized: QuantizedTensor, params: GroupParams, group: int, original: Tensor | None
    ) -> None:
        scale = quantized.params().scale
        wrong = ~torch.isfinite(scale) | ((scale < 0) & (not self.may_be_negative))
        if bool(wrong.any()):
            row, index = _first(wrong)
            needed = "a finite number is needed" if self.may_be_negative else "a finite number above 0 is needed"
            self._say(self.survey.scales, f"{self.scale_name}: group {index} of row {start + row} has scale "
                      f"{scale[row, index].item()}; {needed}")  # fmt: skip
        if bool((scale == 0).any()):
            ones = GroupParams(torch.ones_like(params.scale), params.zero_point)
            values = quantized.grid.decode(quantized.codes, ones, group)
            per_column = _spread(params.scale, group, values.shape[1])
            used = (per_column == 0) & ((values != 0) | (original != 0 if original is not None else False))
            if bool(used.any()):
                row, column = _first(used)
                self._say(self.survey.scales, f"{self.scale_name}: the scale of row {start + row}, column {column} is "
                          f"0, but its weights are not")  # fmt: skip

    def _compare(
        self, start: int, quantized: QuantizedTensor, params: GroupParams, group: int, original: Tensor
    ) -> None:
        self.compared = True
        grid, codes = quantized.grid, quantized.codes
        if quantized.table is None:
            error, weight = _squared_error(original, codes, group, params, grid)
        else:
            error, weight, _ = squared_error_in_double(original, quantized.decode())
        self.squared_error += error
        self.squared_weight += weight
        if self.nearest:
            nearest = grid.round(original, params, group)
            if not _same_bytes(nearest, codes):
                self._compare_tolerantly(start, quantized, params, group, nearest, original.to(torch.float32))

    def _compare_tolerantly(
        self, start: int, quantized: QuantizedTensor, params: GroupParams, group: int, nearest: Tensor, original: Tensor
    ) -> None:
        """The stored codes must be as near as the nearest ones, but for a tie that float32 resolves either way."""
        decoded = quantized.grid.decode(quantized.codes, params, group)
        best = quantized.grid.decode(nearest, params, group)
        scale = _spread(params.scale, group, original.shape[1])
        slack = (original.abs() + scale).mul_(4 * _TOLERANCE)
        wrong = (decoded - original).abs() > (best - original).abs() + slack
        if bool(wrong.any()):
            row, column = _first(wrong)
            found, wanted, step = (
                values.expand_as(decoded)[row, column].item() for values in (decoded, original, scale)
            )
            self._say(self.survey.nearest, f"{self.linear}.weight[{start + row}, {column}] decodes to {found:.6g}; "
                      f"another code is nearer to the source's {wanted:.6g} (scale {step:.6g})")  # fmt: skip

    def _say(self, topic: list[str], problem: str) -> None:
        if id(topic) not in self.reported:
            self.reported.add(id(topic))
            topic.append(problem)


def _first_of(subject: Subject, linear: str, leaves: tuple[str, ...]) -> str:
    names = [f"{linear}.{leaf}" for leaf in leaves]
    return next((name for name in names if name in subject.stored.tensors), names[0])


def _squared_error(w: Tensor, codes: Tensor, group: int, params: GroupParams, grid: Grid) -> tuple[float, float]:
    """(Σ (w − decoded)², Σ w²), by the kernel where one knows the grid."""
    if isinstance(grid, IntGrid | MinifloatGrid | CodebookGrid):
        fmt = None if isinstance(grid, IntGrid) else grid.format
        sums = kernels.squared_error(w, codes, group, params.scale, params.zero_point, fmt)[:2]
        if math.isfinite(sum(sums)) or not bool(torch.isfinite(w).all()):
            return sums
        return squared_error_in_double(w, grid.decode(codes, params, group))[:2]
    w = w.to(torch.float32)
    error = grid.decode(codes, params, group) - w
    return error.square_().sum().item(), w.square().sum().item()


def _spread(values: Tensor, group: int, columns: int) -> Tensor:
    """[rows, G] -> [rows, K]: every column's scale; [rows, 1] stays, it broadcasts."""
    if values.shape[1] in (1, columns):
        return values
    return values.repeat_interleave(group, dim=1)[:, :columns]


def _survey_plain(subject: Subject, name: str) -> Survey:
    """A tensor that is not quantized: finite, and the source's own values in the stored dtype."""
    survey = Survey()
    checkpoint, source = subject.checkpoint, subject.original
    info = checkpoint.tensors[name]
    original = _in_the_files_orientation(subject, name)
    if source is not None and (original is None or original[0] != tuple(info.shape)):
        survey.copied.append(f"{name}: the source has no such tensor of shape {list(info.shape)}")
        source = None
    # A folder of floats may hold what quantization made of the weights, decoded: then they are near, not equal.
    linear = name.removesuffix(".weight")
    rounded = subject.format == PLAIN and linear in subject.architecture.linears and name.endswith(".weight")
    error = weight = 0.0
    for start, stop in row_slabs(info.shape, SLAB_WEIGHTS):
        values = checkpoint.read(name, start, stop)
        if not bool(torch.isfinite(values).all()):
            survey.finite.append(f"{name} holds NaN or inf (rows {start}..{stop})")
            break
        given = None if source is None or original is None else original[1](start, stop)
        if given is not None and rounded:
            error += (values.float() - given.float()).square_().sum().item()
            weight += given.float().square().sum().item()
        elif given is not None and not torch.equal(values, given.to(values.dtype)):
            survey.copied.append(f"{name} differs from the source (rows {start}..{stop})")
            break
        if info.nbytes > _RELEASE_ABOVE:
            checkpoint.release(name)
            if source is not None:
                source.release(name)
    checkpoint.release(name)
    if source is not None:
        source.release(name)
        if rounded:
            bound = error_bound(LARGEST_RELATIVE_ERROR[2], subject.errors_left.get(f"{linear}.weight"))
            survey.compare(linear, error, weight, bound)
    return survey


def _in_the_files_orientation(
    subject: Subject, name: str
) -> tuple[tuple[int, ...], Callable[[int, int], Tensor]] | None:
    """(shape, reader of rows) of the source's tensor as a folder of floats has it, None where there is none. A linear
    that its class stores as [K, N] is [N, K] where the source is quantized."""
    source = subject.original
    if source is None or name not in source.tensors:
        return None
    shape = tuple(source.tensors[name].shape)
    linear = subject.architecture.linears.get(name.removesuffix(".weight"))
    if linear is not None and linear.transposed and name in source.schemes:
        return shape[::-1], lambda start, stop: source.read(name)[:, start:stop].t()
    return shape, lambda start, stop: source.read(name, start, stop)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equality of two contiguous tensors of one-byte codes, eight at a time where they divide."""
    if a.numel() % 8 == 0 and a.storage_offset() % 8 == 0 and b.storage_offset() % 8 == 0:
        a, b = a.reshape(-1).view(torch.int64), b.reshape(-1).view(torch.int64)
    return torch.equal(a, b)


def _first(mask: Tensor) -> tuple[int, int]:
    """(row, column) of the first set element."""
    return divmod(int(mask.reshape(-1).to(torch.uint8).argmax()), mask.shape[1])


def _check_raw(subject: Subject, linear: str, survey: Survey) -> bool:
    """Check the stored words of one linear; False where it cannot be decoded."""
    for leaf in _SECOND_LEVEL:
        name = f"{linear}.{leaf}"
        if name in subject.stored.tensors:
            values = subject.stored.read(name).float().reshape(-1)
            if not bool(((values > 0) & torch.isfinite(values)).all()):
                survey.scales.append(f"{name} is {values.tolist()}; a finite number above 0 is needed")
                return False
    if subject.format == "compressed-tensors":
        name, shape = f"{linear}.weight_shape", list(subject.architecture.linears[linear].shape)
        stated = subject.stored.read(name).tolist() if name in subject.stored.tensors else shape
        if stated != shape:
            survey.codes.append(f"{name} says {stated}; the weight is {shape}")
        _check_padding(subject, linear, survey)
    return True


def _check_padding(subject: Subject, linear: str, survey: Survey) -> None:
    """Only where a row, or a column of zero points, does not fill its words."""
    rows, columns = subject.architecture.linears[linear].shape
    bits, stored = subject.schemes[linear].weight.bits, subject.stored
    packed, zeros = f"{linear}.weight_packed", f"{linear}.weight_zero_point"
    if columns * bits % 32 and packed in stored.tensors and stored.tensors[packed].dtype == torch.int32:
        for start, stop in row_slabs(tuple(stored.tensors[packed].shape), _SLAB_WORDS):
            if padding_is_set(stored.read(packed, start, stop), columns * bits):
                survey.codes.append(f"{packed}: bits past the last column are set (rows {start}..)")
                break
    packed_zeros = zeros in stored.tensors and stored.tensors[zeros].dtype == torch.int32
    if packed_zeros and rows * bits % 32 and padding_is_set(stored.read(zeros).t(), rows * bits):
        survey.zero_points.append(f"{zeros}: bits past the last row are set")


def padding_is_set(words: Tensor, used_bits: int) -> bool:
    """True where a bit of int32 [rows, words] after the first `used_bits` of a row is set."""
    stream = words.contiguous().view(torch.uint8)
    whole, partial = divmod(used_bits, 8)
    if partial and bool((stream[:, whole] >> partial).any()):
        return True
    return bool(stream[:, whole + (partial > 0) :].any())
