"""The site of docs/ builds without a warning, shows what it should, and its pages load nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("material", reason="needs the `docs` extra")

LOADS = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc="([^"]*)"|<link[^>]*\shref="([^"]*)"[^>]*>""")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_pages_and_styles_load_nothing_from_the_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = {source or target for source, target in LOADS.findall(page.read_text(encoding="utf-8"))}
        assert loaded
        assert not [address for address in loaded if "//" in address], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_every_document_is_a_page(site):
    for source in (ROOT / "docs").rglob("*.md"):
        assert (site / source.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), source.name
    for page in ("contributing", "changelog", "readme-zh-cn", "packaged-texts"):
        assert (site / f"{page}.html").is_file(), page


def test_chinese_pages_say_that_they_are_chinese(site):
    for page in [*(site / "zh").rglob("*.html"), site / "readme-zh-cn.html"]:
        assert '<html lang="zh-CN"' in page.read_text(encoding="utf-8"), page.name
    assert '<html lang="en"' in (site / "index.html").read_text(encoding="utf-8")


def test_scripts_of_the_documents_are_not_part_of_the_site(site):
    assert not list(site.rglob("*.py"))


def test_links_to_documents_outside_the_folder_are_links_to_their_pages(site):
    texts = (site / "calibration-text.html").read_text(encoding="utf-8")
    assert 'href="packaged-texts.html"' in texts
    chinese = (site / "readme-zh-cn.html").read_text(encoding="utf-8")
    assert 'href="zh/quickstart/index.html"' in chinese
    assert "docs/" not in "".join(re.findall(r'href="([^"]*)"', chinese))
