"""Every `lowbit …` line of the documents is run, and every Python block: what people paste works.

Lines run inside this process, in one folder, with a tiny random model in place of the models that documents name
(`STANDS_FOR`) and with little text (`SMALLER`). A line that reads what another line writes (`smollm2-W4A16`) gets it:
the command that makes it, in the same document or else in any, is run first. A line that stands in several documents
is run once. The default suite runs a third of the lines, half of the Python, and all of README.md and the quick starts;
`make docs` runs all.
What is not run is in `ONLY_PARSED` or `FOREIGN`, with the reason; tests/test_docs.py holds all lines
against the options that exist.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from lora import make_adapter
from lowbit.cli.main import app
from lowbit.cli.options import of_table
from lowbit.errors import LowbitError
from lowbit.foreign_recipes import KEYWORDS
from lowbit.knobs import Facts
from lowbit.settings import Settings, facts_of, make_settings
from models import SHORT_TEXT, make_model
from test_docs import COMMANDS, DOCUMENTS, ROOT, blocks, examples_of

# Words of a command line → what stands there when it is run; "{model}" is the tiny model's folder.
STANDS_FOR = {
    "demo:smollm2": "{model}",
    "MODEL": "{model}",
    "SCHEME": "W4A16",
    "RANGE": "mse",
    "c4.txt": "my-text.txt",
    "TEXT": SHORT_TEXT,
    "wikitext.txt": "my-text.txt",
    "open_platypus": "{rows}",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "{model}",
    "meta-llama/Llama-3.2-1B-Instruct": "{model}",
    "mistralai/Mistral-7B-Instruct-v0.3": "{model}",
}
# Options added at the end of a command, where the last one given counts: less text, less time.
SMALLER = {
    "quantize": "--samples 4 --seqlen 32",  # where it reads a text
    "imatrix": "--samples 4 --seqlen 32",
    "allocate": "--samples 2 --seqlen 32",
    "refine": "--samples 12 --seqlen 48 --expert-tokens 8 --windows 2 --window-tokens 32",
    "finetune": "--windows 4 --window-tokens 32",
    "evaluate": "--windows 2 --window-tokens 32 --samples 1",
    "compare": "--windows 2 --window-tokens 32 --samples 0",
    "diagnose": "--windows 2 --window-tokens 32 --budget 2",
    "generate": "--max-tokens 4",
    "demo": "--windows 1 --model {model}",
    "bench": "--context 8 --batch 1 --tokens 256 --repeats 1",
    "evaluate --tasks": "--task-items 2",
    "evaluate --kv-cache": "--windows 1",
    "compare --blind": "--max-tokens 4 --overwrite",
}
# The option of a command's text, where the line has none: the packaged text takes a second to tokenize.
SHORT = {
    "quantize": "--calib", "imatrix": "--calib", "allocate": "--calib", "refine": "--calib", "finetune": "--data",
    "evaluate": "--text", "compare": "--text", "diagnose": "--text",
}  # fmt: skip
WITHOUT_TEXT = ("evaluate --tasks", "compare --blind")
# More options at the end, for lines with a word.
SMALLER_WITH = {"sign-sgd": "--iterations 2"}
# Lines that begin so are parsed, not run.
ONLY_PARSED: dict[str, str] = {
    "lowbit bench OUT --engine vllm": "the suite has no vLLM",
    'lowbit generate smollm2-W4A16 -p "The sky is blue because" --raw --max-tokens 8 --kv-cache': "heads of 32 values",
    "lowbit quantize MODEL -o OUT --scheme W4A4_GROUP --group-size 64 --method hadamard": "its text is the reader's",
    "lowbit bench OUT --url": "nothing is served",
    "lowbit evaluate OUT --tasks all --url": "nothing is served",
    "lowbit compare demo:smollm2 smollm2-W4A16 --blind --judge": "nothing is served",
    "lowbit refine peer.gguf": "llama.cpp's encoder makes the file",
    "lowbit evaluate refined.gguf --reference MODEL --text TEXT": "as above",
    "lowbit evaluate OUT --tasks mmlu": "the items of lm-eval lie on the Hub",
}
# Packages that Python blocks may import beside what the suite has; blocks with them are compiled, not run.
FOREIGN = {"peft": "the suite has no PEFT, and bitsandbytes would train on a GPU"}


@dataclass
class Bench:
    """The folder that lines run in, and what was run there."""

    folder: Path
    model: Path
    done: dict[str, str] = field(default_factory=dict)

    def run(self, line: str, document: Path) -> str:
        """Runs a line once, after those that make what it reads; its output."""
        if line not in self.done:
            self.done[line] = ""  # a line that reads its own output does not wait for itself
            for word in shlex.split(line, comments=True)[2:]:
                maker = maker_of(word, document)
                if maker is not None and not (self.folder / word).exists() and maker != line:
                    self.run(maker, document)
            self.done[line] = self._invoke(line)
        return self.done[line]

    def _invoke(self, line: str) -> str:
        words = [self._filled(STANDS_FOR.get(word, word)) for word in words_of(line)]
        if "--help" not in words:
            if words[0] != "quantize" or reads_text(words):
                kind = next((name for flag in ("--tasks", "--kv-cache", "--blind") if flag in words
                             and (name := f"{words[0]} {flag}") in SMALLER), words[0])  # fmt: skip
                words += self._filled(SMALLER.get(kind, "")).split()
                if words[0] in SHORT and SHORT[words[0]] not in words and kind not in WITHOUT_TEXT:
                    words += [SHORT[words[0]], SHORT_TEXT]
            words += [more for word, options in SMALLER_WITH.items() if word in words for more in options.split()]
        output = output_of(line)
        making = ("quantize", "convert", "refine", "finetune", "imatrix", "allocate")
        if words[0] in making and output and (self.folder / output).exists():
            words.append("--overwrite")
        result = CliRunner().invoke(app, words)
        assert not isinstance(result.exception, LowbitError), f"{line}\n{result.exception}\n{result.exception.hint}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert output is None or (self.folder / output).exists(), f"{line}: {output} was not written"
        return result.stdout

    def _filled(self, word: str) -> str:
        return word.replace("{model}", str(self.model)).replace("{rows}", str(self.folder / "my-rows.jsonl"))

    def filled_python(self, text: str) -> str:
        """A block of Python in which quoted names are what stands for them."""
        for word, instead in STANDS_FOR.items():
            text = text.replace(f'"{word}"', repr(self._filled(instead)))
        return text


def reads_text(words: list[str]) -> bool:
    """True where a text is run through the model: then numbers of windows and tokens are read."""
    params = COMMANDS["quantize"].make_context("quantize", words[1:]).params
    table = of_table(Settings)
    settings = make_settings(params["recipe"], **table.value({row.name: params[row.name] for row in table.options}))
    facts = facts_of(settings, Facts(gguf=settings.writes_gguf(params["output"])))
    return facts.reads_text or facts.measures


def words_of(line: str) -> list[str]:
    """The words behind `lowbit`, without pipes and redirections."""
    return shlex.split(re.split(r" [|>] ", line)[0], comments=True)[1:]


def output_of(line: str) -> str | None:
    """What a line writes: the word behind -o, unless it is a dry run or an estimate."""
    words = words_of(line)
    if "-o" not in words or "--dry-run" in words or words[0] == "estimate":
        return None
    return words[words.index("-o") + 1]


# The blocks of docs/zh are those of the English pages: tests/test_docs_chinese.py.
WRITTEN_FIRST = [path for path in DOCUMENTS if ROOT / "docs" / "zh" not in path.parents]
LINES = [(path, line) for path in WRITTEN_FIRST for line in examples_of(path)]
MAKERS: dict[Path | None, dict[str, str]] = {}
for path, line in LINES:
    output = output_of(line)
    if output is not None:
        MAKERS.setdefault(path, {}).setdefault(output, line)
        MAKERS.setdefault(None, {}).setdefault(output, line)


def maker_of(name: str, document: Path) -> str | None:
    """The line that writes `name`: of the same document, or else the first of any."""
    return MAKERS.get(document, {}).get(name) or MAKERS[None].get(name)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("documents")
    model = make_model(folder / "tiny", "llama", tie_word_embeddings=True, max_position_embeddings=4096,
                       num_hidden_layers=1)  # fmt: skip
    (folder / "my-text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    rows = [{"instruction": f"What is {each} times {each}?", "output": f"It is {each * each}."} for each in range(256)]
    (folder / "my-rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    make_adapter(folder / "ADAPTER", model)
    recipe = blocks(ROOT / "docs" / "recipes.md", "yaml")[0]
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    rules = next(text for text in blocks(ROOT / "docs" / "gguf-file-types.md", "text") if "REGEX = TYPE" in text)
    (folder / "rules.txt").write_text(rules, encoding="utf-8")
    return Bench(folder, model)


@pytest.fixture(autouse=True)
def in_the_folder(bench, monkeypatch):
    monkeypatch.chdir(bench.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")


def cases() -> list[Any]:
    seen: set[str] = set()
    found = []
    for path, line in LINES:
        if line not in seen and not any(line.startswith(start) for start in ONLY_PARSED):
            seen.add(line)
            found.append(pytest.param(path, line, id=f"{path.relative_to(ROOT)}: {line}"))
    return found


@pytest.mark.sampled(6, keep=("README", "quickstart"))
@pytest.mark.parametrize(("path", "line"), cases())
def test_line_runs(bench, path, line):
    bench.run(line, path)


def test_lines_that_are_only_parsed_are_still_there():
    for start in ONLY_PARSED:
        assert any(line.startswith(start) for _, line in LINES), f"no document has {start!r} any more"


PYTHON = [
    pytest.param(path, text, id=f"{path.relative_to(ROOT)}: {index}")
    for path in WRITTEN_FIRST
    for index, text in enumerate(blocks(path, "python"))
]


@pytest.mark.sampled(2, keep=("README", "quickstart"))
@pytest.mark.parametrize(("path", "text"), PYTHON)
def test_python_block_runs(bench, path, text, tmp_path, monkeypatch):
    """In a folder of its own, with links to what command lines make of what it reads."""
    compile(text, str(path), "exec")
    if any(re.search(rf"^(from|import) {package}\b", text, flags=re.M) for package in FOREIGN):
        return
    for word in set(re.findall(r'"([^"\s]+)"', text)):
        maker = maker_of(word, path)
        if maker is not None and not re.search(rf'(quantize|convert)\(\s*"[^"]*",\s*"{re.escape(word)}"', text):
            bench.run(maker, path)
            (tmp_path / word).symlink_to(bench.folder / word)
    (tmp_path / "my-text.txt").symlink_to(bench.folder / "my-text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", datasets_of(bench.folder / "my-rows.jsonl"))
    exec(compile(bench.filled_python(text), str(path), "exec"), {"__name__": "document"})


class Rows(list[Any]):
    """Of `datasets.Dataset`, what documents use."""

    def shuffle(self, seed: int) -> Rows:
        return Rows(random.Random(seed).sample(self, len(self)))

    def select(self, indices: Iterable[int]) -> Rows:
        return Rows(self[index] for index in indices)


def datasets_of(path: Path) -> ModuleType:
    """The package `datasets`, which the suite does not have, with one local dataset."""
    module = ModuleType("datasets")
    rows = Rows(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    module.load_dataset = lambda name, split: rows  # type: ignore[attr-defined]
    return module


SNIPPETS = blocks(ROOT / "docs" / "migrating.md", "py")


@pytest.mark.parametrize("text", SNIPPETS)
def test_snippets_of_other_tools_are_python(text):
    compile(text, "docs/migrating.md", "exec")


def test_every_keyword_of_other_tools_is_in_the_document():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8"), flags=re.M
    )
    plain = {key: text.replace("!r}", "}").replace("{{", "{").replace("}}", "}") for key, text in KEYWORDS.items()}
    assert dict(rows) == plain


GOALS = {2: "balanced", 3: "memory", 4: "quality"}
SERVERS = "vLLM|TensorRT-LLM|LMDeploy|TGI"
ROWS = re.findall(rf"^\| (?:{SERVERS}) \|.*$", (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8"), flags=re.M)


@pytest.mark.parametrize("row", ROWS)
def test_table_of_choosing_is_what_advise_says(row):
    import lowbit

    cells = [cell.strip() for cell in row.strip("|").split("|")]
    for card in cells[1].split(", "):
        for column, goal in GOALS.items():
            best = lowbit.advise(hardware=card, engine=cells[0].lower(), goal=goal).best
            assert best.scheme == re.findall(r"`(\w+)`|(16 bits)", cells[column])[0][best.scheme == "16 bits"], (
                f"{card}, {goal}"
            )
