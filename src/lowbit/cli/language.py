"""The language of --help: `LOWBIT_LANG=zh` for Chinese, `en` or nothing for English; anything else is refused.

English texts stand where options are declared. chinese.toml has the Chinese of each, by the English text; it is read
when somebody asks for help in Chinese. What commands print besides their help is English.
"""

from __future__ import annotations

import copy
import os
import re
import tomllib
import unicodedata
from functools import cache
from importlib import resources
from typing import Any

from lowbit.errors import UsageError
from lowbit.knobs import HasRows, Row, is_given

VARIABLE = "LOWBIT_LANG"
LANGUAGES = ("en", "zh")


def language() -> str:
    """ "en" or "zh". Raises UsageError for any other value of the variable."""
    wanted = os.environ.get(VARIABLE) or "en"
    if wanted not in LANGUAGES:
        raise UsageError(f"{VARIABLE}={wanted!r} is not a language of the help", f"set it to {' or '.join(LANGUAGES)}, "
                         "or unset it for English")  # fmt: skip
    return wanted


@cache
def catalogue() -> dict[str, dict[str, str]]:
    """chinese.toml: section → English text → Chinese text."""
    return tomllib.loads(resources.files("lowbit.cli").joinpath("chinese.toml").read_text(encoding="utf-8"))


@cache
def translations() -> dict[str, str]:
    """Every text that --help may show → its Chinese; the helps of settings are composed as `Row.help` composes them."""
    sections = catalogue()
    rows = [row for table in tables() for row in table.rows().values()]
    return (
        {row.help: _help_of_row(row) for row in rows if row.knob.help in sections["settings"]}
        | sections["headings"] | sections["commands"] | sections["options"]
    )  # fmt: skip


def tables() -> tuple[type[HasRows], ...]:
    """Every table of options."""
    from lowbit.settings import RunOptions, Settings
    from lowbit.train.options import Course, LoRA

    return Settings, RunOptions, Course, LoRA


def _help_of_row(row: Row) -> str:
    sections = catalogue()
    sentence = sections["settings"][row.knob.help] + (f"：{'、'.join(row.choices)}" if row.choices else "")
    default = row.knob.absent if row.default is None else row.default
    shown = f"[默认：{sections['defaults'].get(str(default), default)}]" if is_given(default) else ""
    return f"{sentence}{'' if sentence.endswith('…') else '。'}{'可重复。' if row.kind in (dict, tuple) else ''}{shown}"


def chinese(text: str | None) -> str:
    """The Chinese of a text of --help; a text without one stays English."""
    return translations().get(text or "", text or "")


def help_in_chinese(command: Any, ctx: Any) -> str:
    """What --help prints: as in English, with wide characters counted as two columns."""
    lines = _Lines(ctx.make_formatter().width)
    params = [_translated(param) for param in command.get_params(ctx)]
    command = _translated(command)
    command.get_params = lambda ctx: params
    if hasattr(command, "commands"):
        command.commands = {name: _translated(each) for name, each in command.commands.items()}
    command.format_help(ctx, lines)
    return "".join(lines.written).rstrip("\n")


def _translated(command_or_param: Any) -> Any:
    copied = copy.copy(command_or_param)
    copied.help = chinese(copied.help)
    return copied


class _Lines:
    """The part of click's HelpFormatter that commands use. Click's own counts a Chinese character as one column."""

    def __init__(self, width: int):
        self.width = width
        self.written: list[str] = []
        self.indent = 0

    def write(self, text: str) -> None:
        self.written.append(text)

    def write_paragraph(self) -> None:
        if self.written:
            self.write("\n")

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self._write_wrapped(args, f"{chinese('Usage')}：{prog} ", 4)

    def write_text(self, text: str) -> None:
        self._write_wrapped(text, " " * self.indent, self.indent)

    def write_dl(self, rows: list[tuple[str, str]], col_max: int = 30) -> None:
        column = self.indent + 2 + min(max(columns(first) for first, _ in rows), col_max)
        for first, second in rows:
            start = " " * self.indent + first
            if columns(start) + 2 > column:
                self.write(start + "\n")
                start = ""
            self._write_wrapped(_marks(second), start + " " * (column - columns(start)), column)

    def section(self, name: str) -> _Lines:
        self.write_paragraph()
        self.write(f"{chinese(name)}：\n")
        return self

    def indentation(self) -> _Lines:
        return self

    def __enter__(self) -> None:
        self.indent += 2

    def __exit__(self, *_: object) -> None:
        self.indent -= 2

    def _write_wrapped(self, text: str, start: str, indent: int) -> None:
        lines = wrapped(text, self.width, columns(start), indent)
        self.write(start + f"\n{' ' * indent}".join(lines) + "\n")


def _marks(text: str) -> str:
    """What typer appends to a help: [default: 40; x>=1], [required]."""
    text = text.replace("[required]", "[必填]").replace("[default: ", "[默认：").replace("; x", "；x")
    return re.sub(r"  ?\[", "[", text)


def columns(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


# Chinese characters and words, with their brackets and punctuation: a line is broken between two of them.
_PIECE = re.compile(
    r"\s+|[（“[]*(?:[\u2e80-\u2fff\u3400-\u9fff]|[^\s\u2e80-\u9fff\uff00-\uffef[]+)[，。：；、）”\]]*|."
)


def wrapped(text: str, width: int, first: int, indent: int) -> list[str]:
    """Lines of at most `width` columns, where the first starts at column `first` and the others at `indent`."""
    lines, line, column = [], "", first
    for piece in _PIECE.findall(" ".join(text.split())):
        if line and column + columns(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line, column, piece = "", indent, piece.lstrip()
        line, column = line + piece, column + columns(piece)
    return [*lines, line.rstrip()]
