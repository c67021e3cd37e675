"""The rows of settings in cli.md and recipes.md, written from the table of options: `python docs/make_options.py`.

What is said of a setting stands once, in `lowbit.settings`. tests/test_docs_options.py holds the documents against it.
"""

from __future__ import annotations

import re
from pathlib import Path

from lowbit.knobs import GGUF_PANEL, Row, is_given
from lowbit.settings import RunOptions, Settings

DOCS = Path(__file__).parent
ROWS = {row.flag: row for table in (Settings, RunOptions) for row in table.rows().values()}


def meaning(row: Row) -> str:
    """The sentence, the choices, the default, and where more is said."""
    choices = f": {', '.join(f'`{each}`' for each in row.choices)}" if row.choices else ""
    text = f"{'GGUF: ' if row.knob.panel == GGUF_PANEL else ''}{row.knob.help}{choices}"
    text += "" if text.endswith("…") else "."
    text += " Repeatable; the first that matches counts." if row.kind is dict else ""
    text += " Repeatable." if row.kind is tuple else ""
    if row.default is None and row.knob.absent is not None:
        text += f" Default: {row.knob.absent}."
    elif is_given(row.default):
        text += f" Default `{row.default}`."
    return text + (f" [More]({row.knob.see})." if row.knob.see else "")


def value_of(row: Row) -> str:
    """What stands for the value in the first column."""
    return "" if row.kind is bool else f" {row.knob.metavar or 'N'}"


def with_options(text: str, options: dict[str, set[str]]) -> str:
    """cli.md with a row for every setting that a command takes; rows of its own options stay as they are.

    options  command → flags of settings
    """

    def section(match: re.Match[str]) -> str:
        flags = [flag for flag in ROWS if flag in options.get(match[1], set())]
        lines = [line for line in match[0].split("\n") if not any(line.startswith(f"| `{flag}`") for flag in flags)]
        table = lines.index("|---|---|") + 1
        after_output = table + lines[table].startswith("| `--output`")
        rows = [f"| `{flag}`{value_of(ROWS[flag])} | {meaning(ROWS[flag])} |" for flag in flags]
        return "\n".join(lines[:after_output] + rows + lines[after_output:])

    return re.sub(r"^## `lowbit (\w+)[^\n]*\n.*?(?=^## |\Z)", section, text, flags=re.M | re.S)


def with_settings(text: str) -> str:
    """recipes.md with the table of all settings."""
    rows = [
        f"| `{row.name}` | `{row.flag}` | {row.knob.reader.who} | {meaning(row)} |" for row in Settings.rows().values()
    ]
    head = "| setting | option | read by | meaning |\n|---|---|---|---|\n"
    return re.sub(r"\| setting \| option .*?(?=\n\n)", lambda _: head + "\n".join(rows), text, flags=re.S)


def settings_of_commands() -> dict[str, set[str]]:
    """Command → flags of the settings that it takes from the table."""
    import typer

    from lowbit.cli.main import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    helps = {flag: row.help for flag, row in ROWS.items()}
    return {name: {param.opts[0] for param in command.params if helps.get(param.opts[0]) == getattr(param, "help", "")}
            for name, command in commands.items()}  # fmt: skip


def main() -> None:
    for name, made in (("cli.md", lambda text: with_options(text, settings_of_commands())),
                       ("recipes.md", with_settings)):  # fmt: skip
        path = DOCS / name
        path.write_text(made(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
