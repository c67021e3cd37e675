"""The package is light to import, and data flows in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lowbit

ROOT = Path(lowbit.__file__).parent

# The order of the flow. A stage may import from the stages before it, from the shared currency and from itself.
CURRENCY = {
    "errors",
    "hardware",
    "kernels",
    "measure",
    "methods",
    "numerics",
    "schemes",
    "settings",
    "tensors",
    "text",
    "workers",
}
STAGES = [
    "checkpoint",
    "architecture",
    "calibrate",
    "transform",
    "rounding",
    "export",
    "plan",
    "gguf_plan",
    "verification",
    "evaluation",
    "report",
]
# What runs several stages.
ABOVE = {
    "advice",
    "estimation",
    "diagnosis",
    "pipeline",
    "gguf_pipeline",
    "blockwise",
    "conversion",
    "neighbours",
    "comparison",
    "reporting",
    "imatrix_api",
    "api",
    "cli",
}


def imported_parts(path: Path) -> set[str]:
    """First components below lowbit of everything that a module imports, at any depth."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("lowbit.")}
    known = CURRENCY | set(STAGES) | ABOVE
    return parts & known


def modules_of(part: str) -> list[Path]:
    single = ROOT / f"{part}.py"
    return [single] if single.exists() else sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("stage", STAGES)
def test_stage_imports_only_from_its_left(stage):
    allowed = CURRENCY | set(STAGES[: STAGES.index(stage) + 1])
    for path in modules_of(stage):
        assert imported_parts(path) <= allowed, path


@pytest.mark.parametrize("part", sorted(CURRENCY))
def test_currency_imports_no_stage(part):
    for path in modules_of(part):
        assert imported_parts(path) <= CURRENCY, path


def test_verification_knows_nothing_of_how_files_are_written():
    writing = {"export", "rounding", "plan", "gguf_plan", "pipeline", "gguf_pipeline", "api"}
    for path in modules_of("verification"):
        assert not imported_parts(path) & writing, path


def test_every_module_belongs_to_a_stage():
    names = {path.stem if path.is_file() else path.name for path in ROOT.iterdir()}
    entries = {"__init__", "__main__", "__pycache__", "py", "data"}
    assert names - entries <= CURRENCY | set(STAGES) | ABOVE | {"py.typed"}


def run_python(code: str) -> tuple[str, float]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, time.perf_counter() - began


@pytest.mark.parametrize("code", ["import lowbit", "import lowbit.cli.main"])
def test_import_is_quick_and_leaves_torch_out(code):
    bare = min(run_python("pass")[1] for _ in range(3))
    heavy = "torch transformers numpy safetensors gguf"
    script = f"{code}; import sys; print(*(m for m in {heavy.split()!r} if m in sys.modules))"
    runs = [run_python(script) for _ in range(3)]
    assert runs[0][0].strip() == ""
    assert min(seconds for _, seconds in runs) - bare < 0.3


def test_help_is_quick():
    bare = min(run_python("pass")[1] for _ in range(3))
    script = "import sys; sys.argv = ['lowbit', '--help']; from lowbit.cli.main import run; run()"
    runs = [run_python(script) for _ in range(3)]
    assert "quantize" in runs[0][0]
    assert min(seconds for _, seconds in runs) - bare < 0.3


def test_public_calls_exist():
    for name in lowbit.__all__:
        assert getattr(lowbit, name)
