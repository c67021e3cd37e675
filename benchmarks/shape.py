"""The shape of the code: what one GPTQ run passes through, and how large the package is.

    python benchmarks/shape.py

Quantizes a two-block Llama of random weights (`tests/models.py`) with `lowbit quantize TINY -o OUT --scheme W4A16
--method gptq --samples 4 --seqlen 64` under `sys.setprofile` and prints

    functions   distinct Python functions of lowbit that were called, in all threads, comprehensions included and also
                counted apart (before Python 3.12 each is a function); files they lie in
    frames      of lowbit on the stack, from the command to the wrapper of GPTQ's kernel
    size        files and lines of src/lowbit; lines of the median function, docstring included
    probes      hasattr, getattr and isinstance that ask of a checkpoint what every `Checkpoint` answers

`--list` shows the functions by file, and the frames of the deepest call by name.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import statistics
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lowbit"
KERNEL = "feedback_int"
SENTENCE = "A river carries stones down from the hills and grinds them small. "


def profiled(work: Path) -> tuple[set[CodeType], list[str]]:
    """(functions of lowbit that a GPTQ run calls, the frames of its deepest kernel call, outermost first)."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    from models import make_model

    model, text = make_model(work / "model"), work / "text.txt"
    text.write_text(SENTENCE * 40)
    called: set[CodeType] = set()
    deepest: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        if code.co_flags & inspect.CO_NEWLOCALS:  # neither a module nor the body of a class
            called.add(code)
        if code.co_name == KERNEL:
            frames = stack_of(frame)
            if len(frames) > len(deepest):
                deepest[:] = frames

    arguments = ["lowbit", "quantize", str(model), "-o", str(work / "out"), "--scheme", "W4A16", "--method", "gptq",
                 "--samples", "4", "--seqlen", "64", "--calib", str(text)]  # fmt: skip
    before, sys.argv = sys.argv, arguments
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        from lowbit.cli.main import run

        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.argv = before
    assert (work / "out" / "lowbit-report.json").is_file(), "the run failed"
    return called, deepest


def stack_of(frame: FrameType | None) -> list[str]:
    """Frames of lowbit, outermost first, as "file:function"."""
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(str(PACKAGE)) and code.co_name != "<module>":
            found.append(f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


def sizes() -> tuple[int, int, float]:
    """(files, lines, lines of the median function) of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    lengths = [
        node.end_lineno - node.lineno + 1
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    return len(files), sum(text.count("\n") for text in texts), statistics.median(lengths)


def probes() -> list[str]:
    """Places that ask what class a checkpoint is, or whether it has what every `Checkpoint` has."""
    sys.path[:0] = [str(ROOT / "src")]
    from lowbit.checkpoint.base import Checkpoint

    members = {name for name in (*vars(Checkpoint), *Checkpoint.__annotations__) if not name.startswith("_")}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
                asked = ast.unparse(node.args[1])
                of_class = node.func.id == "isinstance" and asked.endswith("Checkpoint")
                if of_class or (node.func.id in ("hasattr", "getattr") and asked.strip("'") in members):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="functions by file, frames by name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        called, frames = profiled(Path(work))
    files = Counter(str(Path(code.co_filename).relative_to(PACKAGE)) for code in called)
    if options.list:
        for name, count in sorted(files.items()):
            inside = sorted(
                (code.co_firstlineno, code.co_qualname) for code in called if code.co_filename.endswith(name)
            )
            print(f"{name} ({count}): {', '.join(qualified for _, qualified in inside)}")
        print(*frames, sep="\n")
    count, lines, median = sizes()
    inner = sum(code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>") for code in called)
    print(f"GPTQ of a two-block Llama: {len(called)} functions ({inner} of them comprehensions) in {len(files)} files, "
          f"{len(frames)} frames")  # fmt: skip
    print(f"src/lowbit: {count} files, {lines} lines, median function {median:g} lines")
    asked = probes()
    print(*asked, f"probes: {len(asked)}", sep="\n")


if __name__ == "__main__":
    main()
