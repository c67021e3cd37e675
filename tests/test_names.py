"""Each class of the package has a name of its own, so that an import or a message says which one is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import lowbit

ROOT = Path(lowbit.__file__).parent


def test_no_class_name_stands_twice():
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
