"""The field's map names everything that the registries have, so that a new row is put on the map."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit.methods import ROUNDINGS, TRANSFORMS
from lowbit.schemes import SCHEMES
from test_docs import check_example

MAP = (Path(__file__).parents[1] / "docs" / "map.md").read_text(encoding="utf-8")
TESTS = Path(__file__).parent
ROWS = [
    line for line in MAP.split("## Numbers")[1].split("\n") if line.startswith("| ") and ("✓" in line or "◐" in line)
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_on_the_map(scheme):
    assert f"`{scheme}`" in MAP


@pytest.mark.parametrize("method", [*TRANSFORMS, *ROUNDINGS])
def test_every_method_is_on_the_map(method):
    assert any(method in line for line in MAP.split("\n") if "--method" in line or f"lowbit {method}" in line)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_region_that_is_ticked_names_the_tests_that_hold_it(row):
    named = re.findall(r"`([a-z_/]*test_[a-z0-9_]+\.py)`", row)
    assert named
    assert [path for path in named if not (TESTS / path).is_file()] == []


# Whole commands; others are named without what they are run on.
WHOLE = sorted(line for line in set(re.findall(r"`(lowbit [a-z][^`]*)`", MAP)) if " -o " in line or "demo:" in line)


@pytest.mark.parametrize("command", WHOLE)
def test_commands_of_the_map_exist_with_their_options(command):
    check_example(command)
