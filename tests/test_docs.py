"""What the documents say is what the code does: commands, options, links, recipes, figures and folders."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from lowbit.cli.main import app
from lowbit.errors import LowbitError
from lowbit.export import default_format, find_exporter
from lowbit.schemes import SCHEMES, find_scheme, is_gguf_name
from lowbit.settings import make_settings

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_of(command: str) -> list[Any]:
    return [param for param in COMMANDS[command].params if param.param_type_name == "option"]


def blocks(path: Path, language: str) -> list[str]:
    """Fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def cli_section(command: str) -> str:
    """The section of docs/cli.md about one command."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    found = re.search(rf"^## `lowbit {command}.*?(?=^## |\Z)", text, flags=re.M | re.S)
    assert found, f"docs/cli.md has no section for lowbit {command}"
    return found[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_command_line_document_and_no_other(command):
    rows = {
        flag: line
        for line in cli_section(command).splitlines()
        if line.startswith("| `-")
        for flag in re.findall(r"`(--?[\w-]+)", line.split("|")[1])
    }
    flags = {flag for option in options_of(command) for flag in (*option.opts, *option.secondary_opts)}
    assert set(rows) == flags
    for option in options_of(command):
        if option.default not in (None, False):
            assert f"`{option.default}`" in rows[option.opts[0]], f"{option.opts[0]}: default {option.default}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_options_have_help(command):
    assert COMMANDS[command].help
    for param in COMMANDS[command].params:
        assert param.help, f"lowbit {command}: {param.name}"


def examples_of(path: Path) -> list[str]:
    """Every `lowbit …` line of a document's shell blocks, continuation lines joined."""
    lines = [line for block in blocks(path, "sh") for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if line.startswith("lowbit ")]


def test_examples_use_commands_and_options_that_exist():
    for path in DOCUMENTS:
        for line in examples_of(path):
            try:
                check_example(line)
            except (AssertionError, KeyError, IndexError, LowbitError) as error:
                raise AssertionError(f"{path.relative_to(ROOT)}: {line}") from error


def check_example(line: str) -> None:
    words = shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True)[1:]
    if words[0].startswith("-"):
        assert words in (["--help"], ["--version"])
        return
    command = words.pop(0)
    assert command in COMMANDS
    known = {flag: option for option in options_of(command) for flag in (*option.opts, *option.secondary_opts)}
    arguments, given = [], set()
    while words:
        word, _, value = words.pop(0).partition("=")
        if not word.startswith("-"):
            arguments.append(word)
        elif word not in ("--help", "-h"):
            option = known[word]
            given.add(option.name)
            if not option.is_flag:
                value = value or words.pop(0)
            if word == "--scheme" and value != "SCHEME" and not is_gguf_name(value):
                find_scheme(value)
    wanted = [param for param in COMMANDS[command].params if param.param_type_name == "argument"]
    most = len(arguments) if any(param.nargs == -1 for param in wanted) else len(wanted)
    assert sum(param.required for param in wanted) <= len(arguments) <= most
    assert {option.name for option in options_of(command) if option.required} <= given


def test_relative_links_resolve():
    for path in DOCUMENTS:
        prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" in target or target.startswith("mailto:"):
                continue
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            assert linked.exists(), f"{path}: {target}"
            if anchor:
                assert anchor in anchors(linked), f"{path}: {target}"


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    return set(ordered_anchors(path))


def ordered_anchors(path: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


RECIPES = blocks(ROOT / "docs" / "recipes.md", "yaml")


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_recipe_is_accepted(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    make_settings(path).base_scheme()


def tree_lines() -> list[str]:
    (tree,) = blocks(ROOT / "CONTRIBUTING.md", "text")
    return tree.splitlines()


def tree_entries() -> list[str]:
    """Paths of CONTRIBUTING's tree: two spaces a level, one or more names, their purpose; folders end in a slash."""
    entries: list[str] = []
    parents: list[str] = []
    for line in tree_lines():
        level = (len(line) - len(line.lstrip())) // 2
        words = line.replace(",", " ").split()
        names = list(takewhile(lambda word: word.endswith(("/", ".py")), words))
        assert names, line
        parents[level:] = [names[0]]
        entries += ["".join([*parents[:level], name]) for name in names]
    return entries


def test_entries_of_the_file_tree_exist():
    for entry in tree_entries():
        path = ROOT / entry
        assert path.is_dir() if entry.endswith("/") else path.is_file(), entry


def test_file_tree_names_every_package_and_fits_a_screen():
    package = ROOT / "src" / "lowbit"
    folders = {path.parent for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {f"{folder.relative_to(ROOT)}/" for folder in folders} <= set(tree_entries())
    assert len(tree_lines()) <= 50


@pytest.mark.parametrize("page", ["architecture.md", "follow-one-tensor.md"])
def test_what_a_page_says_of_the_code_is_there(page):
    """`calibrate/loop.py`, `calibrate` and **`Settings`** (`settings/table.py`): the file, and in it what is named."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    places = {path for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text) if "/" in path}
    missing = {path for path in places if not any((base / path).is_file() for base in (ROOT, ROOT / "src" / "lowbit"))}
    assert not missing
    listed = [(path, names) for path, names in re.findall(r"`([\w/]+\.py)`, ((?:`[\w.]+`(?: and |, )?)+)", text)]
    listed += [(path, names) for names, path in re.findall(r"\*\*((?:`\w+`(?:, )?)+)\*\* \(`([\w/]+\.py)`\)", text)]
    assert len(listed) > 10
    for path, names in listed:
        if ".py`" in names:  # a list of files
            continue
        code = (ROOT / "src" / "lowbit" / path).read_text(encoding="utf-8")
        for part in ".".join(re.findall(r"`([\w.]+)`", names)).split("."):
            assert re.search(rf"\b(def|class) {part}\b|^{part}\b", code, re.MULTILINE), f"{page}: {path} has no {part}"


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_is_in_the_tables_with_its_bits_per_weight(name):
    exporter = find_exporter(default_format(SCHEMES[name]))
    stored = exporter.stored_tensors("l", (4096, 4096), SCHEMES[name], torch.bfloat16)
    bits = 8 * sum(tensor.nbytes for tensor in stored) / 4096**2
    for document in ("README.md", "README.zh-CN.md", "docs/schemes.md"):
        rows = re.findall(rf"^\| `{name}` .*$", (ROOT / document).read_text(encoding="utf-8"), flags=re.M)
        assert len(rows) == 1, document
        assert f"| {bits:.3f} |" in rows[0], f"{document}: {bits:.3f}"


@pytest.mark.parametrize("language", ["sh", "text", "python"])
def test_chinese_readme_has_the_same_commands_and_figures(language):
    """Blocks of code are the same, but for comments in Python."""
    english, chinese = ([re.sub(r"  # .*", "", block) for block in blocks(readme, language)] for readme in READMES)
    assert english
    assert chinese == english


def test_chinese_readme_has_the_same_headings_and_links():
    texts = [re.sub(r"^```.*?^```$", "", readme.read_text(encoding="utf-8"), flags=re.M | re.S) for readme in READMES]
    english, chinese = ([line.split(" ")[0] for line in text.splitlines() if line.startswith("#")] for text in texts)
    assert chinese == english
    linked = [{target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "README" not in target} for text in texts]
    assert {in_chinese(target) for target in linked[0]} <= linked[1]


def in_chinese(target: str) -> str:
    """A link of README.md as README.zh-CN.md has it: to the Chinese page where there is one, and its own heading."""
    path, hash_, anchor = target.partition("#")
    english, chinese = ROOT / path, ROOT / path.replace("docs/", "docs/zh/", 1)
    if not path.startswith("docs/") or not chinese.is_file():
        return target
    translated = dict(zip(ordered_anchors(english), ordered_anchors(chinese), strict=True))
    return path.replace("docs/", "docs/zh/", 1) + (hash_ + translated[anchor] if anchor else "")
