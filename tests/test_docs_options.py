"""What cli.md and recipes.md say of settings is what docs/make_options.py writes from the table of options."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lowbit.settings import Settings

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """docs/make_options.py, as a module."""
    spec = importlib.util.spec_from_file_location("make_options", DOCS / "make_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_cli_md_are_those_of_the_table(maker):
    options = maker.settings_of_commands()
    assert options["quantize"] >= {row.flag for row in Settings.rows().values()}
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert maker.with_options(text, options) == text, "run python docs/make_options.py"


def test_table_of_recipes_md_is_the_table(maker):
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert maker.with_settings(text) == text, "run python docs/make_options.py"


def test_a_row_that_is_absent_or_stale_is_written_anew(maker):
    options = maker.settings_of_commands()
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    broken = text.replace("| `--damping` N |", "| `--damping` D | old |").replace("| `--seed` N |", "| `--sed` N |")
    mended = maker.with_options(broken, options)
    assert "| `--seed` N |" in mended
    assert "| old |" not in mended
