"""docs/advise.md and docs/hardware.md say what the tables of the code say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from advice_tables import TABLES
from typer.testing import CliRunner

from lowbit.cli.main import app

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_the_table_is_in_the_document(name):
    text = (DOCS / ("hardware.md" if name == "DEVICE_TABLE" else "advise.md")).read_text(encoding="utf-8")
    for line in TABLES[name]().splitlines():
        assert line in text.splitlines() or not line, line


def test_the_example_is_what_the_command_prints():
    """The first command of docs/advise.md, and the text below it, at 100 columns."""
    text = (DOCS / "advise.md").read_text(encoding="utf-8")
    command, shown = re.search(r"```sh\n(lowbit advise .*?)\n```\n\n```text\n(.*?)\n```", text, flags=re.S).groups()
    answer = CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    assert [line.rstrip() for line in answer.stdout.splitlines()] == [line.rstrip() for line in shown.splitlines()]
