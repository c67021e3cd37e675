"""--help in Chinese: an entry for every command, panel and option, none that is stale, the same names and figures."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import typer

from commands import GUARD, start
from lowbit.cli import language
from lowbit.cli.main import app
from lowbit.errors import UsageError
from lowbit.knobs import PANELS

PROGRAM: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = PROGRAM.commands
ROWS = [row for table in language.tables() for row in table.rows().values()]
OF_ROWS = {row.help for row in ROWS}
PARAMS = [(name, param) for name, command in [("", PROGRAM), *COMMANDS.items()] for param in command.params]
# What --help shows → section of the catalogue.
SHOWN = {
    **{row.knob.help: "settings" for row in ROWS},
    **{param.help: "options" for _, param in PARAMS if param.help not in OF_ROWS},
    **{command.help: "commands" for command in [PROGRAM, *COMMANDS.values()]},
    **dict.fromkeys(("Usage", "Arguments", "Options", "Commands", *PANELS), "headings"),
    "Show this message and exit.": "options",
}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# In every language the same: options, numbers, NAMES and names with digits, dots or underscores.
NAMES = re.compile(r"(?<![\w.-])(?:--[a-z-]+|[A-Z]+[A-Z0-9_]+|\d[\d.]*|[a-z]+(?:[0-9_]|\.\w)[\w.]*)(?!\w)")


def test_every_text_of_the_help_has_an_entry():
    missing = [(section, text) for text, section in SHOWN.items() if text not in language.catalogue()[section]]
    assert not missing, "add them to src/lowbit/cli/chinese.toml"


def test_no_entry_is_stale():
    defaults = {row.knob.absent for row in ROWS}
    stale = [
        (section, text)
        for section, entries in language.catalogue().items()
        for text in entries
        if (text not in defaults if section == "defaults" else SHOWN.get(text) != section)
    ]
    assert not stale, "remove them from src/lowbit/cli/chinese.toml, or mend them"


def test_defaults_in_words_have_an_entry():
    in_words = {row.knob.absent for row in ROWS if re.search(r"[a-z]", row.knob.absent or "")}
    assert in_words - {"fast"} == set(language.catalogue()["defaults"])


@pytest.mark.parametrize("section", language.catalogue())
def test_entries_have_the_names_and_figures_of_the_english(section):
    for english, chinese in language.catalogue()[section].items():
        same = ("GGUF", chinese.replace("、", ", ").replace("。", "."))
        assert CHINESE.search(chinese) or english in same, english
        assert names_of(english) <= names_of(chinese), english
        assert english.endswith(".") == chinese.endswith("。") or "[default" in english, english


def names_of(text: str) -> set[str]:
    return {name.rstrip(".") for name in NAMES.findall(re.sub(r"[^\x00-\x7f]", " ", text))}


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, wanted: str | None, width: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    if wanted is None:
        monkeypatch.delenv("LOWBIT_LANG", raising=False)
    else:
        monkeypatch.setenv("LOWBIT_LANG", wanted)
    described = COMMANDS[command] if command else PROGRAM
    return described.get_help(described.make_context(command or "lowbit", [], resilient_parsing=True))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_chinese_throughout_and_fits_the_terminal(monkeypatch, command):
    text = help_of(command, monkeypatch, "zh")
    assert max(language.columns(line) for line in text.splitlines()) <= 80
    assert not re.search(r"^[A-Z][a-z, ]+:$|default:|required|Usage", text, flags=re.M)
    shown = "".join(text.split())
    for param in (COMMANDS[command] if command else PROGRAM).params:
        assert param.opts[0] in text or param.param_type_name == "argument"
        chinese = language._marks(language.chinese(param.help)).partition("[默认")[0]
        assert "".join(chinese.split()) in shown, param.name


def test_quantize_in_chinese_reads_as_it_should(monkeypatch):
    text = help_of("quantize", monkeypatch, "zh")
    assert text.startswith("用法：")
    assert "  量化模型，校验写出的文件，并报告精度损失。" in text
    assert "缩放因子与文件：\n  --range RANGE " in text
    assert "校准窗口数。[默认：128]" in text
    assert "名称匹配的线性层保持 16 bit。可重复。" in text
    assert text.index("输出内容：") < text.index("校准：") < text.index("安全与信任：")


@pytest.mark.parametrize("wanted", [None, "", "en"])
def test_help_is_english_without_the_variable(monkeypatch, wanted):
    text = help_of("quantize", monkeypatch, wanted)
    assert text.startswith("Usage:")
    assert not CHINESE.search(text)


@pytest.mark.parametrize("wanted", ["fr", "ZH", "zh_CN.UTF-8", "\x1b[31m"])
def test_another_language_is_refused_by_name(monkeypatch, wanted):
    monkeypatch.setenv("LOWBIT_LANG", wanted)
    with pytest.raises(UsageError, match="LOWBIT_LANG=") as refused:
        language.language()
    assert repr(wanted) in str(refused.value)
    assert refused.value.hint == "set it to en or zh, or unset it for English"


def test_every_command_refuses_another_language(lowbit, tiny_llama):
    outcome = lowbit("inspect", tiny_llama, LOWBIT_LANG="fr")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: LOWBIT_LANG='fr' is not a language of the help\n\nhint: ")


def test_what_a_command_prints_does_not_change(lowbit, tiny_llama):
    assert lowbit("inspect", tiny_llama, LOWBIT_LANG="zh").stdout == lowbit("inspect", tiny_llama).stdout


def test_english_help_does_not_read_the_catalogue():
    code = (
        "import sys; sys.argv = ['lowbit', 'quantize', '--help']\n"
        "from lowbit.cli import main, language\n"
        "try: main.run()\n"
        "except SystemExit: pass\n"
        "print('READ', language.catalogue.cache_info().currsize)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("READ 0\n")


@pytest.mark.parametrize("wanted", ["zh", "en"])
def test_a_terminal_that_cannot_show_the_help_is_told_so(wanted):
    """English too: its help has an ellipsis."""
    asked = start("quantize", "--help", LOWBIT_LANG=wanted, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    stderr = asked.communicate(timeout=GUARD)[1]
    assert asked.returncode == 1
    assert stderr.startswith("error: standard output is latin-1, which cannot show ")
    assert stderr.endswith("hint: use a UTF-8 locale, or set PYTHONIOENCODING=utf-8\n")


@pytest.mark.parametrize("width", [20, 50, 79])
def test_lines_break_between_characters_and_not_before_punctuation(width):
    text = "校准文本：文件、目录、c4，或 hub:OWNER/NAME 的（一部分）。[默认：随包文本]" * 3
    lines = language.wrapped(text, width, 7, 4)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(language.columns(line) <= width - 4 for line in lines[1:])
    assert language.columns(lines[0]) <= width - 7
    assert not any(line[0] in "，。：、）]" or line[-1] in "（[" for line in lines)
    assert len(lines) > 1
