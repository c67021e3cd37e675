"""Starting is light: what is imported before anything is asked for. How long that takes: benchmarks/startup.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each of these takes longer to import than the answer may take.
HEAVY = {"gguf", "huggingface_hub", "jinja2", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
# What a command line is made of: typer, the table of settings, and what they import.
LIGHT = {
    "annotated_doc", "annotated_types", "click", "lowbit", "markdown_it", "mdurl", "pydantic", "pydantic_core",
    "pygments", "rich", "shellingham", "typer", "typing_extensions", "typing_inspection",
}  # fmt: skip
HELP = """
import sys
sys.argv = ["lowbit", *{flags!r}]
from lowbit.cli.main import run
try:
    run()
except SystemExit:
    pass
"""


def imported_by(code: str) -> tuple[set[str], str]:
    """Packages outside the standard library that a fresh process has imported after `code`; and what it printed."""
    before = "import sys; started_with = set(sys.modules)"
    after = "print('\\nIMPORTED', *{name.partition('.')[0] for name in set(sys.modules) - started_with})"
    command = [sys.executable, "-c", "\n".join([before, code, after])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed, _, names = done.stdout.rpartition("IMPORTED")
    return {name for name in names.split() if not name.startswith("_")} - sys.stdlib_module_names, printed


def test_the_package_imports_nothing_but_itself():
    assert imported_by("import lowbit")[0] == {"lowbit"}


@pytest.mark.parametrize("flags", [None, ["--help"]], ids=["import", "--help"])
def test_the_command_imports_what_parses_it_and_nothing_else(flags):
    code = "import lowbit.cli.main" if flags is None else HELP.format(flags=flags)
    packages, printed = imported_by(code)
    assert packages <= LIGHT
    assert not packages & HEAVY
    if flags == ["--help"]:
        assert "quantize" in printed


@pytest.mark.parametrize("command", ["quantize", "advise", "verify"])
def test_the_help_of_a_command_does_without_torch(command):
    packages, printed = imported_by(HELP.format(flags=[command, "--help"]))
    assert not packages & (HEAVY - {"pydantic"})
    assert command in printed
