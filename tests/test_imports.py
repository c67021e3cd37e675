"""Data flows in one direction: one ordered list of all packages and modules; each imports only from its left."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import lowbit

ROOT = Path(lowbit.__file__).parent

# From left to right. What lies to the right is reached by name, through the rows of `registry` and `methods`.
LAYERS = [
    # leaves, and the currency that stages hand on
    "version", "errors", "workers", "files", "patterns", "spellings", "records", "measure", "registry", "hardware",
    "tensors", "schemes", "methods", "kernels", "numerics", "knobs", "foreign_recipes", "settings", "text",
    # the flow
    "checkpoint", "architecture", "rounding", "transform", "calibrate", "kv", "distillation", "export", "plan",
    "verification", "formats", "engines", "pipeline", "evaluation", "benchmark", "tasks", "report", "reporting",
    "refinement", "api",
    # beside the flow
    "train", "estimation", "allocation", "advice", "comparison", "blind", "diagnosis", "transformers",
    # entries
    "cli", "__main__",
]  # fmt: skip
# The public calls, loaded when they are first used: lazily, and for type checkers.
ENTRY = "__init__"


@cache
def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """First components below lowbit of everything that a module imports, at any depth, for type checkers too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "lowbit":
            names |= {f"lowbit.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"
    return {name.split(".")[1] for name in names if name.startswith("lowbit.")} & set(LAYERS)


def test_every_package_and_module_has_its_place():
    found = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__pycache__", "data", ENTRY} == set(LAYERS)
    assert len(set(LAYERS)) == len(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_from_its_left(layer):
    """So no two packages import each other, either."""
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for path in modules():
        if layer_of(path) == layer:
            assert imported_layers(path) <= allowed, path


def test_a_format_is_a_folder_that_knows_no_other_format():
    for path in modules():
        parts = path.relative_to(ROOT).parts
        if parts[0] != "formats" or len(parts) < 3:
            continue
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        others = {name for name in names if name and name.startswith("lowbit.formats.")}
        assert all(name.split(".")[2] == parts[1] for name in others), path


def test_rules_of_a_format_know_nothing_of_how_it_is_written():
    """So that they cannot repeat the writer's mistakes. Verification stands left of all writers but the containers."""
    for path in modules():
        parts = path.relative_to(ROOT).parts
        if parts[0] == "verification" or parts[-1] in ("rules.py", "subject.py"):
            text = path.read_text()
            for written in (".write", "lowbit.export", "lowbit.plan", "lowbit.pipeline", "lowbit.rounding"):
                assert f"from lowbit.formats.{parts[1]}{written}" not in text, path
                assert f"from {written} import" not in text, path
                assert f"from {written}." not in text, path


def test_public_calls_exist():
    for name in lowbit.__all__:
        assert getattr(lowbit, name)
