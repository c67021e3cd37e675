"""The table of ggml types against the gguf package, and docs/ggml-types.md against the table."""

import re
from pathlib import Path

import gguf
import pytest

from lowbit.errors import UsageError
from lowbit.numerics.ggml import TYPES, find_type

DOCUMENT = Path(__file__).parents[2] / "docs" / "ggml-types.md"
# Types of activations and intermediate sums, and plain integers and doubles: no weight is encoded to these.
NOT_FOR_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
NEWER = {"Q2_0"}  # than the gguf package
FIELD_BYTES = {"half": 2, "float": 4, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4}


def test_numbers_and_sizes_are_those_of_the_gguf_package():
    for name, kind in TYPES.items():
        if name in NEWER:
            continue
        number = gguf.GGMLQuantizationType[name]
        assert kind.number == number
        assert (kind.weights, kind.size) == gguf.GGML_QUANT_SIZES[number]
        assert kind.weights % kind.group == 0
        assert kind.row_bytes(kind.weights * 3) == 3 * kind.size


def test_no_type_of_the_gguf_package_is_missing():
    assert {kind.name for kind in gguf.GGMLQuantizationType} - NOT_FOR_WEIGHTS == set(TYPES) - NEWER


def _documented():
    rows = re.findall(r"^\| ([A-Z]+[\w]*) \| (\d.*) \|$", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in rows}


def test_every_type_is_documented_and_no_other():
    assert list(_documented()) == list(TYPES)


def test_the_document_says_what_the_table_says():
    for name, (number, bits, weights, size, group, layout, formula) in _documented().items():
        kind = TYPES[name]
        assert (int(number), int(weights), int(size), int(group)) == (kind.number, kind.weights, kind.size, kind.group)
        assert float(bits) == kind.bits_per_weight
        assert formula == kind.formula
        fields = re.findall(r"(\w+) \w+(?:\[(\d+)\])?", layout)
        assert sum(FIELD_BYTES[field] * int(count or 1) for field, count in fields) == kind.size


def test_types_are_found_in_any_case_and_wrong_names_are_answered():
    assert find_type("q4_k") is TYPES["Q4_K"]
    with pytest.raises(UsageError) as caught:
        find_type("Q4K")
    assert "Q4_K" in caught.value.hint
