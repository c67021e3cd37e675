"""The pictures of docs/methods are what docs/make_pictures.py draws now, and every picture of a page exists.

The quick ones are compared with the file on disk: the same words, and numbers within a pixel, since the last bit of a
sum may differ from machine to machine.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "methods").glob("*.md"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# Pictures that take under a second to draw.
QUICK = ["four-bit-values", "iq2-patterns", "nf4", "fp8-error", "rtn-range", "gptq", "awq", "smoothquant", "rotation"]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """docs/make_pictures.py, as a module."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


@pytest.mark.parametrize("name", QUICK)
def test_picture_is_what_the_script_draws(maker, name):
    drawn = maker.PICTURES[name]().text
    stored = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert NUMBER.sub("#", drawn) == NUMBER.sub("#", stored)
    assert [float(n) for n in NUMBER.findall(drawn)] == pytest.approx(
        [float(n) for n in NUMBER.findall(stored)], abs=1.0
    )


def test_every_picture_is_made_by_the_script_and_shown_on_a_page(maker):
    stored = {path.stem for path in (DOCS / "pictures").glob("*.svg")}
    shown = {name for page in PAGES for name in re.findall(r"pictures/([\w-]+)\.svg", page.read_text(encoding="utf-8"))}
    assert stored == set(maker.PICTURES) == shown


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda path: path.stem)
def test_picture_is_well_formed_has_a_title_and_loads_nothing(path):
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|@import|url\(|<script|nan", text)


def test_numbers_of_the_picture_of_four_bit_values_are_the_tables(maker):
    """Ticks of one line lie where its values are."""
    from lowbit.kernels.tables import NF4

    drawn = maker.PICTURES["four-bit-values"]().text
    at = [float(x) for x in re.findall(r'class="tick a" x1="([\d.]+)"', drawn)]
    assert at == pytest.approx([190 + (value + 1) / 2 * 490 for value in NF4.values], abs=0.06)
