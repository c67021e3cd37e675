"""The field's map names everything that the registries have, so that a new row is put on the map."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.methods import ROUNDINGS, TRANSFORMS
from lowbit.schemes import SCHEMES

MAP = (Path(__file__).parents[1] / "docs" / "map.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_on_the_map(scheme):
    assert f"`{scheme}`" in MAP


@pytest.mark.parametrize("method", [*TRANSFORMS, *ROUNDINGS])
def test_every_method_is_on_the_map(method):
    assert any(method in line for line in MAP.split("\n") if "--method" in line or f"lowbit {method}" in line)
