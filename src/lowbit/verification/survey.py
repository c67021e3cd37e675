"""One pass over every stored weight, in slabs of rows; the rules on values read what it found.

    within range    |w − ŵ| ≤ half the distance to the neighbouring code, on either side
    beyond it       ŵ is the end code                                 (both only where codes were rounded to nearest)
    every tensor    ‖W − Ŵ‖ / ‖W‖ ≤ a bound by bits: far above what any rounding costs, far below what a wrong
                    layout, a wrong scale or foreign weights do (two unrelated tensors are √2 apart)

Unpacking, rounding and decoding are the kernels', which tests hold against definitions and other people's packers.
Where a kernel would have chosen another code, the slow and tolerant comparison above decides, in float32, since other
writers multiply by reciprocals. Linears are spread over threads, each of which holds one slab; pages are released as
the pass goes, so memory stays that of a slab per thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.rows import row_slabs
from lowbit.numerics.minifloat_formats import FORMATS, value_of
from lowbit.verification.layout import StoredLinear

if TYPE_CHECKING:
    from lowbit.verification.subject import Subject

SLAB_WEIGHTS = 1 << 20
# Tensors above this many bytes give their pages back after every slab, smaller ones after the last.
_RELEASE_ABOVE = 1 << 24
LARGEST_RELATIVE_ERROR = {2: 1.0, 3: 0.85, 4: 0.7, 5: 0.5, 6: 0.35, 7: 0.25, 8: 0.15}
# w / scale in float32 against a writer that multiplied by the reciprocal, in units of a step
_TOLERANCE = 2.0**-17

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

    def add(self, other: Survey) -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            if isinstance(mine, list):
                mine.extend(theirs)
        self.relative_errors |= other.relative_errors
        self.decoded += other.decoded
        self.compared += other.compared


def take_survey(subject: Subject, progress: Progress | None = None) -> Survey:
    """Decode every quantized linear and read every other tensor; tensors of a wrong layout are left to other rules."""
    linears = {name: subject.expected_names(name) for name in subject.groups}
    quantized = {name for names in linears.values() for name in names}
    jobs: list[tuple[Callable[[Subject, str], Survey], str, list[str]]] = []
    jobs += [(_survey_linear, linear, names) for linear, names in linears.items()]
    jobs += [(_survey_plain, name, [name]) for name in subject.expected if name not in quantized]
    jobs = [job for job in jobs if all(subject.is_sound(name) for name in job[2])]
    total = sum(subject.checkpoint.tensors[name].nbytes for _, _, names in jobs for name in names)
    survey, done = Survey(), 0
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(os.cpu_count() or 1, "lowbit-verify", torch.set_num_threads, (1,))
    try:
        pending = [(pool.submit(function, subject, name), name, names) for function, name, names in jobs]
        for future, name, names in pending:
            survey.add(future.result())
            done += sum(subject.checkpoint.tensors[stored].nbytes for stored in names)
            if progress is not None:
                progress(name, done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
    return survey


def _survey_linear(subject: Subject, linear: str) -> Survey:
    survey = Survey()
    shape = subject.architecture.linears[linear].shape
    stored = StoredLinear(subject.checkpoint, linear, shape, subject.groups[linear])
    weight = f"{linear}.weight"
    source = subject.source if subject.source is not None and weight in subject.source.tensors else None
    if subject.source is not None and source is None:
        survey.relative.append(f"{weight}: the source has no such tensor")
    if source is not None and tuple(source.tensors[weight].shape) != shape:
        survey.relative.append(f"{weight}: the source's has shape {list(source.tensors[weight].shape)}, not {shape}")
        source = None
    _check_shape_tensor(stored, survey)
    divisor = stored.divisor()
    if not 0 < divisor < float("inf"):
        survey.scales.append(f"{linear}.weight_global_scale is {divisor}; a finite number above 0 is needed")
        return survey
    zero_points, dirty = stored.zero_points()
    if dirty:
        survey.zero_points.append(f"{linear}.weight_zero_point: bits past the last row are set")
    judge = _Judge(stored, survey, subject.nearest)
    for start, stop in row_slabs(shape, SLAB_WEIGHTS):
        scale = stored.stored_scale(start, stop) / divisor
        zero_point = None if zero_points is None else zero_points[start:stop]
        original = None if source is None else source.read(weight, start, stop)
        judge.look_at(start, stop, scale, zero_point, original)
        if stop == shape[0] or 2 * shape[0] * shape[1] > _RELEASE_ABOVE:
            stored.release()
            if source is not None:
                source.release(weight)
    judge.conclude()
    return survey


def _check_shape_tensor(stored: StoredLinear, survey: Survey) -> None:
    name = f"{stored.linear}.weight_shape"
    if name in stored.checkpoint.tensors:
        found = stored.checkpoint.read(name).tolist()
        if found != list(stored.shape):
            survey.codes.append(f"{name} says {found}; the weight is {list(stored.shape)}")


class _Judge:
    """Looks at the slabs of one linear; the first problem of each kind is reported."""

    def __init__(self, stored: StoredLinear, survey: Survey, nearest: bool):
        self.stored, self.survey, self.nearest = stored, survey, nearest
        self.linear, self.spec = stored.linear, stored.spec
        self.squared_error = self.squared_weight = 0.0
        self.compared = False
        self.reported: set[int] = set()

    def look_at(self, start: int, stop: int, scale: Tensor, zero_point: Tensor | None, original: Tensor | None) -> None:
        """A slab: scale float32 and zero_point int32 [rows, G], original as the source stores it [rows, K]."""
        codes, dirty = self.stored.codes(start, stop)
        if dirty:
            self._say(self.survey.codes, f"{self.stored.code_name}: bits past the last column are set (rows {start}..)")
        self._check_codes(codes, start)
        self._check_scales(start, codes, scale, zero_point, original)
        if original is not None:
            self._compare(start, codes, scale, zero_point, original)

    def conclude(self) -> None:
        self.survey.decoded += 1
        if not self.compared:
            return
        self.survey.compared += 1
        bound = LARGEST_RELATIVE_ERROR[self.spec.bits]
        error = (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else self.squared_error
        self.survey.relative_errors[self.linear] = error
        if not error <= bound:
            self.survey.relative.append(
                f"{self.linear}.weight: relative error {error:.3g} of the decoded weights; at most {bound} at "
                f"{self.spec.bits} bits"
            )

    def _check_codes(self, codes: Tensor, start: int) -> None:
        """Report NaN, and codes wider than their bits."""
        name = self.stored.code_name
        if self.spec.number == "int":
            low, high = _int_range(self.spec.bits)
            if not self.stored.is_packed and (int(codes.min()) < low or int(codes.max()) > high):
                row, column = _first((codes < low) | (codes > high))
                self._say(self.survey.codes, f"{name}[{start + row}, {column}] is {codes[row, column].item()}; "
                          f"{self.spec.bits}-bit codes are {low}..{high}")  # fmt: skip
            return
        fmt = FORMATS[self.spec.number]
        if fmt.nan_codes:
            nan = (codes & (fmt.sign_bit - 1)) == fmt.nan_codes[0]
            if bool(nan.any()):
                row, column = _first(nan)
                self._say(self.survey.codes, f"{name}[{start + row}, {column}] is NaN")

    def _values(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """What the codes stand for before the scale, float32 [rows, K]."""
        if self.spec.number != "int":
            return _look_up(_value_table(self.spec.number), codes)
        values = codes.to(torch.float32)
        return values if zero_point is None else values - self.stored.spread(zero_point)

    def _check_scales(self, start: int, codes: Tensor, scale: Tensor, zero_point: Tensor | None, original) -> None:
        name = f"{self.linear}.weight_scale"
        wrong = ~torch.isfinite(scale) | (scale < 0)
        if bool(wrong.any()):
            row, group = _first(wrong)
            self._say(self.survey.scales, f"{name}: group {group} of row {start + row} has scale "
                      f"{scale[row, group].item()}; a finite number above 0 is needed")  # fmt: skip
        if bool((scale == 0).any()):
            values = self._values(codes, zero_point)
            per_column = self.stored.spread(scale)
            used = (per_column == 0) & ((values != 0) | (original != 0 if original is not None else False))
            if bool(used.any()):
                row, column = _first(used)
                self._say(self.survey.scales, f"{name}: the scale of row {start + row}, column {column} is 0, but its "
                          f"weights are not")  # fmt: skip

    def _compare(self, start: int, codes: Tensor, scale: Tensor, zero_point: Tensor | None, original: Tensor) -> None:
        self.compared = True
        is_int = self.spec.number == "int"
        fmt = None if is_int else FORMATS[self.spec.number]
        group = self.stored.columns_per_scale
        error, weight, _ = kernels.squared_error(original, codes, group, scale, zero_point, fmt)
        self.squared_error += error
        self.squared_weight += weight
        if not self.nearest:
            return
        if fmt is None:
            expected = kernels.round_int(original, group, scale, zero_point, *_int_range(self.spec.bits))
        else:
            expected = kernels.round_minifloat(original, group, scale, fmt)
        if not _same_bytes(expected, codes):
            self._compare_tolerantly(start, codes, scale, zero_point, original.to(torch.float32))

    def _compare_tolerantly(self, start: int, codes: Tensor, scale: Tensor, zero_point, original: Tensor) -> None:
        scale = self.stored.spread(scale)
        wanted = original / torch.where(scale > 0, scale, 1.0)
        if self.spec.number == "int":
            spread = None if zero_point is None else self.stored.spread(zero_point)
            wrong = self._is_far(codes, wanted if spread is None else wanted + spread)
        else:
            wrong = self._is_outside(codes, wanted)
        if wrong is not None:
            row, column = wrong
            decoded = (self._values(codes, zero_point) * scale)[row, column].item()
            step = scale.expand_as(codes)[row, column].item()
            self._say(self.survey.nearest, f"{self.linear}.weight[{start + row}, {column}] decodes to {decoded:.6g}; "
                      f"another code is nearer to the source's {original[row, column].item():.6g} "
                      f"(scale {step:.6g})")  # fmt: skip

    def _is_far(self, codes: Tensor, wanted: Tensor) -> tuple[int, int] | None:
        """The first integer code more than half a step from the wanted one, clamped to the range."""
        low, high = _int_range(self.spec.bits)
        distance = wanted.clamp(low, high).sub_(codes).abs_()
        slack = 0.5 + _TOLERANCE * 4 * high
        return None if distance.max().item() <= slack else _first(~(distance <= slack))

    def _is_outside(self, codes: Tensor, wanted: Tensor) -> tuple[int, int] | None:
        """The first minifloat code whose interval does not hold the wanted value."""
        sign_bit = FORMATS[self.spec.number].sign_bit
        low, high = _midpoints(self.spec.number)
        magnitude = torch.where((codes & sign_bit) != 0, -wanted, wanted)
        slack = magnitude.abs().add_(1.0).mul_(_TOLERANCE)
        index = codes & (sign_bit - 1)
        outside = (magnitude > _look_up(high, index) + slack) | (magnitude < _look_up(low, index) - slack)
        return _first(outside) if bool(outside.any()) else None

    def _say(self, topic: list[str], problem: str) -> None:
        if id(topic) not in self.reported:
            self.reported.add(id(topic))
            topic.append(problem)


def _survey_plain(subject: Subject, name: str) -> Survey:
    """A tensor that is not quantized: finite, and the source's own values in the stored dtype."""
    survey = Survey()
    checkpoint, source = subject.checkpoint, subject.source
    info = checkpoint.tensors[name]
    if source is not None and (name not in source.tensors or source.tensors[name].shape != info.shape):
        survey.copied.append(f"{name}: the source has no such tensor of shape {list(info.shape)}")
        source = None
    for start, stop in row_slabs(info.shape, SLAB_WEIGHTS):
        values = checkpoint.read(name, start, stop)
        if not bool(torch.isfinite(values).all()):
            survey.finite.append(f"{name} holds NaN or inf (rows {start}..{stop})")
            break
        if source is not None and not torch.equal(values, source.read(name, start, stop).to(values.dtype)):
            survey.copied.append(f"{name} differs from the source (rows {start}..{stop})")
            break
        if info.nbytes > _RELEASE_ABOVE:
            checkpoint.release(name)
            if source is not None:
                source.release(name)
    checkpoint.release(name)
    if source is not None:
        source.release(name)
    return survey


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equality of two contiguous tensors of one-byte codes, eight at a time where they divide."""
    if a.numel() % 8 == 0 and a.storage_offset() % 8 == 0 and b.storage_offset() % 8 == 0:
        a, b = a.reshape(-1).view(torch.int64), b.reshape(-1).view(torch.int64)
    return torch.equal(a, b)


def _int_range(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1).to(torch.int32)).reshape(index.shape)


def _first(mask: Tensor) -> tuple[int, int]:
    """(row, column) of the first set element."""
    return divmod(int(mask.reshape(-1).to(torch.uint8).argmax()), mask.shape[1])


@lru_cache
def _value_table(number: str) -> Tensor:
    fmt = FORMATS[number]
    return torch.tensor([value_of(fmt, code) for code in range(1 << fmt.bits)], dtype=torch.float32)


@lru_cache
def _midpoints(number: str) -> tuple[Tensor, Tensor]:
    """Per magnitude code: the interval that rounds to it; open towards the largest, since encoding saturates."""
    fmt = FORMATS[number]
    values = torch.tensor([value_of(fmt, code) for code in range(fmt.finite_magnitudes)], dtype=torch.float32)
    between = (values[1:] + values[:-1]) / 2
    low = torch.cat([-between[:1], between, torch.full((fmt.sign_bit - len(values),), torch.inf)])
    high = torch.cat([between, torch.full((1 + fmt.sign_bit - len(values),), torch.inf)])
    return low, high
