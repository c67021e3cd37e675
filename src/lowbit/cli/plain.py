"""What is printed of names that others chose: no terminal takes an order from them.

Names of tensors, folders and files, and the words of error messages, may hold escape sequences, line feeds, and marks
that turn the direction of writing. They are shown as what they are: \\x1b, \\n, \\u202e.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

_KEPT = "\n\t"
# Line and paragraph separators, besides controls (Cc), formats (Cf: directions, joiners), surrogates and private marks.
_SHOWN_AS_CODES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def plain(text: str, kept: str = _KEPT) -> str:
    """The text with every character that a terminal might obey as its code; `kept` stay as they are."""
    if text.isprintable():
        return text
    return "".join(char if char in kept or not _obeyed(char) else _code(char) for char in text)


def one_line(text: str) -> str:
    """The same in one line, for words that stand in a table or a message."""
    return plain(text, kept="")


def plain_table(table: Any) -> Any:
    """A rich table, its title, caption and cells plain; in columns that do not wrap, of names, each in one line."""
    table.title, table.caption = (_plain_cell(each) for each in (table.title, table.caption))
    for column in table.columns:
        column.header = _plain_cell(column.header)
        column._cells = [_plain_cell(cell, one_line if column.no_wrap else plain) for cell in column._cells]
    return table


def _plain_cell(cell: Any, shown: Callable[[str], str] = plain) -> Any:
    return shown(cell) if isinstance(cell, str) else cell


def _obeyed(char: str) -> bool:
    return unicodedata.category(char) in _SHOWN_AS_CODES


def _code(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
