"""bitsandbytes folders, read: the `Layout` of Linear4bit (NF4, FP4) and Linear8bitLt (LLM.int8()) weights.

The layouts are pictured in write.py; this file reads them from the files and config.json alone.
What the exporter does not write is read too: other block sizes, 4-bit codes packed into elements wider than a byte
(`bnb_4bit_quant_storage`), and blocks that cross rows, where the block does not divide in_features. Such a weight is
given one scale per column (groups of 1), which decodes to the same bits.

Weights decode as bitsandbytes' kernels decode them, with their codebooks: a stored quant_map that is another table is
refused. So are: a quant_state that is not the JSON that bitsandbytes writes or does not fit the packed bytes; a weight
of another kind than config.json says; a weight without its scales.

INT8: W = codes · (SCB / 127). bitsandbytes itself multiplies codes · SCB · (1/127), two roundings to our one, so the
last bit of a float32 can differ.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.checkpoint.base import Checkpoint
from lowbit.checkpoint.quantized import Expected, Layout, matrix_shape
from lowbit.errors import CheckpointError
from lowbit.kernels.tables import CODEBOOKS, values
from lowbit.numerics import grid_for
from lowbit.numerics.scales import NESTED_BLOCK, decode_scales, dynamic_map
from lowbit.patterns import Pattern, PatternError, up_to_a_dot
from lowbit.schemes import SCHEMES, Scheme
from lowbit.tensors import Granularity, NestedScale, QuantizedTensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("float32", "float16", "bfloat16")
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_STATE = "quant_state.bitsandbytes__"
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
_MAX_STATE_BYTES = 4096
_4BIT_LEAVES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_HINT = "the files and config.json do not belong together, or the checkpoint is damaged"


@dataclass(frozen=True)
class _State:
    """A parsed quant_state. offset is None where scales are plain floats."""

    number: str
    block: int
    shape: tuple[int, int]
    offset: float | None

    @property
    def scales(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block)

    @property
    def crosses_rows(self) -> bool:
        return self.shape[1] % self.block != 0


def _stated_threshold(quantization: dict[str, Any]) -> float:
    """|x| from which LLM.int8() multiplies a column in 16 bits; 0: none."""
    stated = quantization.get("llm_int8_threshold", Layout.int8_threshold)
    if type(stated) not in (int, float) or not 0 <= stated < math.inf:
        raise CheckpointError(
            f"config.json: quantization_config.llm_int8_threshold is {stated!r}; a number of at least 0 is needed",
            "6.0 is bitsandbytes' own",
        )
    return float(stated)


class BitsAndBytesLayout(Layout):
    LEAVES = ("weight", "SCB", "weight_format", *(f"weight.{leaf}" for leaf in _4BIT_LEAVES),
              *(f"weight.{_STATE}{name}" for name in CODEBOOKS))  # fmt: skip

    def __init__(self, stored: Checkpoint, quantization: dict[str, Any]):
        super().__init__(stored)
        self.number = _stated_number(quantization)
        self.int8_threshold = _stated_threshold(quantization)
        self.skip = _skip_patterns(quantization)
        self.states: dict[str, _State] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        for name in stored.tensors:
            linear = self._linear_of(name)
            if linear is not None and linear not in self.shapes:
                self.shapes[linear] = self._open(linear)
        self._note_nesting(quantization)

    def linears(self) -> dict[str, tuple[int, int]]:
        return dict(self.shapes)

    def scheme_of(self, linear: str) -> Scheme | None:
        # As `should_convert_module` of transformers 5: the beginning of the name up to a dot, or its end.
        if any(pattern.match(linear) or linear.endswith(entry) for entry, pattern in self.skip):
            return None
        if self.number == "int8":
            return SCHEMES["INT8"]
        scheme, state = SCHEMES[self.number.upper()], self.states.get(linear)
        if state is None:
            return scheme
        group_size = 1 if state.crosses_rows else state.block
        scale_format = "model" if state.offset is None or state.crosses_rows else "nested"
        return replace(scheme, weight=replace(scheme.weight, group_size=group_size, scale_format=scale_format))

    def expected(self, linear: str, shape: tuple[int, int]) -> dict[str, Expected]:
        weight = f"{linear}.weight"
        if self.number == "int8":
            expected = {weight: Expected((torch.int8,), shape), f"{linear}.SCB": Expected((torch.float32,), shape[:1])}
            if f"{linear}.weight_format" in self.stored.tensors:
                expected[f"{linear}.weight_format"] = Expected((torch.uint8,), ())
            return expected
        state = self.states[linear]
        elements = -(-_bytes_of(shape) // self.stored.tensors[weight].dtype.itemsize)
        absmax = torch.float32 if state.offset is None else torch.uint8
        expected = {
            weight: Expected(_STORAGES, (elements, 1)),
            f"{weight}.absmax": Expected((absmax,), (state.scales,)),
            f"{weight}.quant_map": Expected((torch.float32,), (16,)),
        }
        if state.offset is not None:
            expected[f"{weight}.nested_absmax"] = Expected((torch.float32,), (-(-state.scales // NESTED_BLOCK),))
            expected[f"{weight}.nested_quant_map"] = Expected((torch.float32,), (256,))
        return expected

    def row_multiple(self, linear: str, shape: tuple[int, int]) -> int:
        """Blocks of nested scales are read whole."""
        state = self.states.get(linear)
        if state is None or state.offset is None or state.crosses_rows:
            return 1
        return NESTED_BLOCK // math.gcd(NESTED_BLOCK, shape[1] // state.block)

    def scale_dtype(self, linear: str) -> torch.dtype:
        return torch.float32

    def read(self, linear: str, shape: tuple[int, int], start: int, stop: int) -> QuantizedTensor:
        if self.number == "int8":
            scale = self.stored.read(f"{linear}.SCB", start, stop)[:, None] / 127.0
            codes = self.stored.read(f"{linear}.weight", start, stop)
            grid = grid_for(SCHEMES["INT8"].weight, "float32_over_127")
            return QuantizedTensor(codes, scale, grid, Granularity.CHANNEL, shape[1])
        state, columns = self.states[linear], shape[1]
        scheme = self.quantized_scheme(linear)
        codes = self._codes(linear, start * columns, stop * columns).reshape(stop - start, columns)
        scale, nested = self._scale(linear, state, start * columns, stop * columns)
        scale = scale.reshape(stop - start, -1)
        grid = grid_for(scheme.weight, "float32")
        group_size = scheme.weight.columns_per_scale(columns)
        return QuantizedTensor(codes, scale, grid, Granularity.GROUP, group_size, nested=nested)

    def _codes(self, linear: str, first: int, last: int) -> Tensor:
        """Codes first..last of the flattened weight, uint8; the even one of a byte is in its high nibble."""
        name = f"{linear}.weight"
        size = self.stored.tensors[name].dtype.itemsize
        first_byte, last_byte = first // 2, -(-last // 2)
        first_element = first_byte // size
        elements = self.stored.read(name, first_element, -(-last_byte // size))
        skipped = first_byte - first_element * size
        packed = elements.reshape(-1).view(torch.uint8)[skipped : skipped + last_byte - first_byte]
        swapped = (packed << 4) | (packed >> 4)
        return kernels.unpack_nibbles(swapped[None])[0, first % 2 : first % 2 + last - first]

    def _scale(self, linear: str, state: _State, first: int, last: int) -> tuple[Tensor, NestedScale | None]:
        """Scales of the blocks of elements first..last of the flat weight; of every element where blocks cross rows."""
        name = f"{linear}.weight.absmax"
        begin, end = first // state.block, -(-last // state.block)
        nested = None
        if state.offset is None:
            scale = self.stored.read(name, begin, end)
        else:
            begin -= begin % NESTED_BLOCK  # only where blocks cross rows; elsewhere `row_multiple` sees to it
            absmax = self.stored.read(f"{linear}.weight.nested_absmax", begin // NESTED_BLOCK, -(-end // NESTED_BLOCK))
            groups = 1 if state.crosses_rows else state.shape[1] // state.block
            nested = NestedScale(
                self.stored.read(name, begin, end).reshape(-1, groups), absmax, state.offset, NESTED_BLOCK
            )
            scale = decode_scales(nested).reshape(-1)
        if not state.crosses_rows:
            return scale, nested
        skipped = first - begin * state.block
        return scale.repeat_interleave(state.block)[skipped : skipped + last - first], None

    def _linear_of(self, name: str) -> str | None:
        """The linear that a stored tensor shows to be quantized."""
        if name.endswith(".SCB"):
            return name.removesuffix(".SCB")
        linear, weight, leaf = name.rpartition(".weight.")
        if weight and (leaf in _4BIT_LEAVES or leaf.startswith(_STATE)):
            return linear
        if name.endswith(".weight") and self.stored.tensors[name].dtype in (torch.int8, torch.uint8):
            return name.removesuffix(".weight")
        return None

    def _open(self, linear: str) -> tuple[int, int]:
        """The logical shape of a quantized linear, its quant_state parsed; CheckpointError for one that has none."""
        tensors, weight = self.stored.tensors, f"{linear}.weight"
        if weight not in tensors:
            part = self.owned(linear)
            raise CheckpointError(f"{self.stored.source}: {weight} is absent, but {part[0]} is there", _HINT)
        info = tensors[weight]
        kinds = [f"{weight}.{_STATE}{name}" for name in CODEBOOKS] + [f"{linear}.SCB"]
        kinds = [name for name in kinds if name in tensors]
        if not kinds:
            missing = f"{linear}.SCB" if self.number == "int8" else f"{weight}.{_STATE}{self.number}"
            raise CheckpointError(f"{info.file}: {weight} is {info.stored}, but {missing} is absent", _HINT)
        if len(kinds) > 1:
            raise CheckpointError(f"{info.file}: {weight} is of two kinds: there are {' and '.join(kinds)}", _HINT)
        has_8bit = kinds[0] == f"{linear}.SCB"
        found = "int8" if has_8bit else kinds[0].rpartition("__")[2]
        if found != self.number:
            raise CheckpointError(
                f"{info.file}: {weight} is quantized to {found}; config.json says {self.number}", _HINT
            )
        if has_8bit:
            self._check_row_format(linear)
            return matrix_shape(info, _HINT)
        state = self.states[linear] = self._parse_state(kinds[0], found)
        self._check_size(weight, state)
        self._check_tables(weight, state)
        return state.shape

    def _check_row_format(self, linear: str) -> None:
        name = f"{linear}.weight_format"
        info = self.stored.tensors.get(name)
        if info is None or info.dtype != torch.uint8 or info.shape != ():
            return  # `QuantizedCheckpoint` reports it by `expected`
        found = int(self.stored.read(name).item())
        if found != 0:
            raise CheckpointError(
                f"{info.file}: {name} is {found}; only 0, row by row, can be read",
                "save the model again with bitsandbytes 0.45 or newer",
            )

    def _check_size(self, weight: str, state: _State) -> None:
        info, size = self.stored.tensors[weight], self.stored.tensors[weight].dtype.itemsize
        if info.dtype not in _STORAGES:
            raise CheckpointError(f"{info.file}: {weight} is {info.stored}; bytes or floats are needed", _HINT)
        if info.nbytes != -(-_bytes_of(state.shape) // size) * size:
            raise CheckpointError(
                f"{info.file}: {weight} has {info.nbytes} bytes; 4-bit codes of its shape {list(state.shape)} need "
                f"{_bytes_of(state.shape)}",
                _HINT,
            )

    def _parse_state(self, name: str, number: str) -> _State:
        info = self.stored.tensors[name]
        if info.dtype != torch.uint8 or len(info.shape) != 1 or info.nbytes > _MAX_STATE_BYTES:
            raise CheckpointError(
                f"{info.file}: {name} is {info.stored} {list(info.shape)}; at most {_MAX_STATE_BYTES} uint8 are needed",
                _HINT,
            )
        try:
            state = json.loads(bytes(self.stored.read(name).tolist()).decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{info.file}: {name} is not JSON ({error})", _HINT) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{info.file}: {name} holds a {type(state).__name__}; an object is needed", _HINT)

        def refuse(key: str, needed: str) -> CheckpointError:
            return CheckpointError(f"{info.file}: {name}: {key} is {state.get(key)!r}; {needed} is needed", _HINT)

        unknown = sorted(state.keys() - _STATE_KEYS)
        if unknown:
            raise refuse(unknown[0], "no such key")
        if state.get("quant_type") != number:
            raise refuse("quant_type", number)
        if type(state.get("blocksize")) is not int or state["blocksize"] not in BLOCK_SIZES:
            raise refuse("blocksize", f"one of {', '.join(map(str, BLOCK_SIZES))}")
        if state.get("dtype") not in _DTYPES:
            raise refuse("dtype", " or ".join(_DTYPES))
        shape = state.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise refuse("shape", "[out_features, in_features]")
        return _State(number, state["blocksize"], (shape[0], shape[1]), _offset_of(state, refuse))

    def _check_tables(self, weight: str, state: _State) -> None:
        """The stored tables are bitsandbytes' own, which its kernels decode with whatever is stored."""
        tables = {"quant_map": values(CODEBOOKS[state.number])}
        if state.offset is not None:
            tables["nested_quant_map"] = dynamic_map()
        for leaf, known in tables.items():
            info = self.stored.tensors.get(f"{weight}.{leaf}")
            if info is None or info.dtype != torch.float32 or info.shape != known.shape:
                continue  # `QuantizedCheckpoint` reports it by `expected`
            if not torch.allclose(self.stored.read(info.name), known, rtol=0, atol=1e-6):
                raise CheckpointError(
                    f"{info.file}: {info.name} is not bitsandbytes' table of that name",
                    "lowbit decodes NF4 and FP4 as bitsandbytes' kernels do; get the checkpoint in one of these",
                )

    def _note_nesting(self, quantization: dict[str, Any]) -> None:
        stated = bool(quantization.get("bnb_4bit_use_double_quant"))
        differing = [linear for linear, state in self.states.items() if (state.offset is not None) != stated]
        if differing:
            self.notes.append(
                f"config.json says bnb_4bit_use_double_quant is {str(stated).lower()}; the files say the opposite for "
                f"{len(differing)} of {len(self.states)} weights, such as {differing[0]}, and count"
            )


def _bytes_of(shape: tuple[int, int]) -> int:
    """Bytes of the 4-bit codes of a weight."""
    return -(-shape[0] * shape[1] // 2)


def _offset_of(state: dict[str, Any], refuse: Any) -> float | None:
    """nested_offset of a double-quantized weight, None of another."""
    if "nested_offset" not in state and "nested_blocksize" not in state:
        return None
    if state.get("nested_blocksize") != NESTED_BLOCK or type(state["nested_blocksize"]) is not int:
        raise refuse("nested_blocksize", str(NESTED_BLOCK))
    if state.get("nested_dtype") != "float32":
        raise refuse("nested_dtype", "float32")
    offset = state.get("nested_offset")
    if not isinstance(offset, float | int) or isinstance(offset, bool) or not abs(offset) < 1e38:
        raise refuse("nested_offset", "a finite number")
    return torch.tensor(float(offset), dtype=torch.float32).item()


def _stated_number(quantization: dict[str, Any]) -> str:
    """ "nf4", "fp4" or "int8", as config.json has it."""
    flags = {}
    for bits in ("4bit", "8bit"):
        stated = quantization.get(f"load_in_{bits}", quantization.get(f"_load_in_{bits}", False))
        if type(stated) is not bool:
            raise _bad(f"load_in_{bits}", stated, "true or false")
        flags[bits] = stated
    if flags["4bit"] == flags["8bit"]:
        raise _bad("load_in_4bit", flags["4bit"], "one of load_in_4bit and load_in_8bit, and not both")
    if flags["8bit"]:
        if quantization.get("llm_int8_has_fp16_weight"):
            raise _bad("llm_int8_has_fp16_weight", True, "false: the weights are to be int8")
        return "int8"
    number = quantization.get("bnb_4bit_quant_type", "fp4")
    if not isinstance(number, str) or number not in CODEBOOKS:
        raise _bad("bnb_4bit_quant_type", number, " or ".join(CODEBOOKS))
    return number


def _skip_patterns(quantization: dict[str, Any]) -> list[tuple[str, Pattern]]:
    """Entries of llm_int8_skip_modules with the regex that transformers makes of each; by default the output head."""
    entries = quantization.get("llm_int8_skip_modules")
    if entries is None:
        entries = ["lm_head"]
    if not isinstance(entries, list) or not all(isinstance(entry, str) and len(entry) < 1000 for entry in entries):
        raise _bad("llm_int8_skip_modules", entries, "a list of module names")
    patterns = []
    for entry in entries:
        try:
            patterns.append((entry, up_to_a_dot(entry)))
        except PatternError as error:
            raise _bad("llm_int8_skip_modules", entry, f"a name or regular expression ({error})") from error
    return patterns


def _bad(where: str, found: Any, needed: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config.{where} is {found!r}; needed is {needed}",
        "quantize the model again, or correct config.json",
    )
