"""docs/zh says what docs/ says: the same headings, blocks of code, figures, names and links, section by section.

A failure names the Chinese page that lags behind its English one. What may differ is the language: words, comments in
code, anchors, and numbers that one of the two writes as a word.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from itertools import pairwise, zip_longest
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
CHINESE = DOCS / "zh"
PAGES = sorted(path.relative_to(CHINESE).as_posix() for path in CHINESE.rglob("*.md"))
# English only: references that are mostly names and figures, and the pages about the project itself.
ENGLISH_ONLY = {
    "advice-matrix.md", "architecture.md", "benchmarks.md", "cli.md", "follow-one-tensor.md",
    "formats.md", "ggml-types.md", "gguf-architectures.md", "gguf-file-types.md", "gguf-vision.md", "hardware.md",
    "interop.md", "log.md", "map.md", "models.md", "recipes.md", "reliability.md",
}  # fmt: skip

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
HEADING = re.compile(r"^(#+) (.+)$", flags=re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(\d{1,3}(?:[ ,]\d{3})+|\d+(?:\.\d+)?)(?:th)?(?![A-Za-z0-9_])( ?(?:million|billion|万|亿))?"
)
TIMES = {"million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}
WORDS = {
    "once": 1, "one": 1, "two": 2, "both": 2, "twice": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8,
    "ten": 10, "twelve": 12, "twenty-four": 24, "forty-eight": 48, "hundred": 100, "april": 4, "june": 6,
}  # fmt: skip


def english(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def chinese(page: str) -> str:
    return (CHINESE / page).read_text(encoding="utf-8")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def sections(text: str) -> list[str]:
    """The prose of a page, from heading to heading."""
    text = prose(text)
    starts = [heading.start() for heading in HEADING.finditer(text)]
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


def figures(section: str) -> set[float]:
    """Numbers outside of code and of targets of links, as values."""
    text = LINK.sub("]", SPAN.sub(" ", section))
    text = re.sub(r"\[?arXiv[: ]\S+", " ", text)
    return {
        float(f"{float(re.sub(r'[ ,]', '', number)) * TIMES.get(unit.strip(), 1):.12g}")  # 8.03 × 10⁹ = 80.3 × 10⁸
        for number, unit in NUMBER.findall(text)
    }


def spans(section: str) -> set[str]:
    return {" ".join(span.split()) for span in SPAN.findall(section)}


def in_words(section: str) -> set[float]:
    return {float(value) for word, value in WORDS.items() if re.search(rf"\b{word}\b", section.lower())}


def tables(section: str) -> list[int]:
    """Rows of every table."""
    return [len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n?)+", section, flags=re.M)]


def lags(page: str, differences: list[str]) -> str:
    return "\n".join([f"docs/zh/{page} lags behind docs/{page}:", *differences])


def test_every_page_is_translated_or_known_as_english_only():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {f"zh/{page}" for page in PAGES}
    assert set(PAGES) <= pages, "a Chinese page without an English one of the same name"
    assert pages - set(PAGES) == ENGLISH_ONLY


@pytest.mark.parametrize("page", PAGES)
def test_headings_have_counterparts(page):
    pairs = zip_longest(
        HEADING.findall(prose(english(page))), HEADING.findall(prose(chinese(page))), fillvalue=("", "")
    )
    differences = [f"{there} {title!r} ≠ {here} {name!r}" for (there, title), (here, name) in pairs if there != here]
    assert not differences, lags(page, differences)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_code_are_the_same(page):
    there, here = (FENCE.findall(text) for text in (english(page), chinese(page)))
    pairs = [
        (f"{a[0]} {comparable(*a)}", f"{b[0]} {comparable(*b)}")
        for a, b in zip_longest(there, here, fillvalue=("nothing", ""))
    ]
    differences = [f"{a}\n≠\n{b}" for a, b in pairs if a != b]
    assert not differences, lags(page, differences)


def comparable(language: str, block: str) -> str:
    """A block without what is translated: comments of code, and words of formulas."""
    if language in ("sh", "python", "py"):
        return re.sub(r"[ \t]*(?:(?<=\s)|^)#.*", "", block, flags=re.M)
    if language == "":
        return f"{block.count(chr(10))} lines, {sorted(figures(block) | in_words(block))}"
    return block


EACH_SECTION: dict[str, Callable[[str, str], object]] = {
    "figures that the English does not have": lambda there, here: figures(here) - figures(there) - in_words(there),
    "figures that are missing": lambda there, here: figures(there) - figures(here),
    "code that the English does not have": lambda there, here: spans(here) - spans(there),
    "code that is missing": lambda there, here: spans(there) - spans(here),
    "rows of tables": lambda there, here: tables(there) != tables(here) and (tables(there), tables(here)),
}


@pytest.mark.parametrize("page", PAGES)
def test_sections_have_the_same_figures_code_and_tables(page):
    differences = []
    for there, here in zip(sections(english(page)), sections(chinese(page)), strict=False):  # headings: another test
        found = {what: differ(there, here) for what, differ in EACH_SECTION.items()}
        differences += [f"{here.splitlines()[0]}: {what}: {found[what]}" for what in found if found[what]]
    assert not differences, lags(page, differences)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_the_same_places_in_chinese_where_there_is_one(page):
    there = {target.partition("#")[0] for target in places(english(page), page)}
    here = {target.partition("#")[0] for target in places(chinese(page), f"zh/{page}")}
    wanted = {f"zh/{target}" if target in PAGES else target for target in there}
    assert here == wanted, lags(page, [f"missing {sorted(wanted - here)}, too many {sorted(here - wanted)}"])


@pytest.mark.parametrize("page", PAGES)
def test_links_to_anchors_have_one_in_chinese(page):
    """The same number of them to each page; that the anchors exist is held by tests/test_docs.py."""
    there, here = (
        sorted(target.partition("#")[0].removeprefix("zh/") for target in places(text, name) if "#" in target)
        for text, name in ((english(page), page), (chinese(page), f"zh/{page}"))
    )
    assert here == there, lags(page, [f"{here} ≠ {there}"])


def places(text: str, page: str) -> list[str]:
    """Where the links of a page lead: paths below docs/ with their anchors, and addresses as they are."""
    folder = posixpath.dirname(page)
    return [
        target if "://" in target else f"{page}{target}" if target.startswith("#")
        else posixpath.normpath(posixpath.join(folder, target))
        for target in LINK.findall(prose(text))
    ]  # fmt: skip


def test_terms_of_the_glossary_are_the_ones_used():
    """No page uses a word that the glossary has another word for."""
    other_words = re.compile("困惑率|校正集|标定|尺度因子|比例因子|量化因子|异常值|KL散度|解量化|去量化|假量化")
    found = [f"{page}: {word}" for page in PAGES for word in other_words.findall(chinese(page))]
    assert not found


@pytest.mark.parametrize("page", PAGES)
def test_chinese_is_set_as_chinese(page):
    """Full-width punctuation between characters, a space between characters and Latin words."""
    text = SPAN.sub("`x`", LINK.sub("]()", prose(chinese(page))))
    han = r"[\u4e00-\u9fff]"
    wrong = re.findall(rf".{{0,8}}(?:{han}[,;:?!]|[,;?!]{han}|{han}[A-Za-z0-9]|[A-Za-z0-9]{han}).{{0,8}}", text)
    assert not wrong, f"docs/zh/{page}: {wrong}"
