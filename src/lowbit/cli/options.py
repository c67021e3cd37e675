"""Options of several commands, each declared once, and sections of --help.

A parameter of a command may stand for a group of options, which arrive as one value:

    settings: Given      every setting of the table (`lowbit.settings.Settings`), those that were given, by name
    run: Run             how a run is made, likewise (`RunOptions`)
    options: Opening     trust and revision (`OpenOptions`)
    how: Annotated[dict[str, Any], of_judging(40, 512)]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from lowbit.cli.language import help_in_chinese, language
from lowbit.errors import UsageError
from lowbit.knobs import MAKE, PANELS, RUNNING, TRUST, HasRows, Row, is_given, parse_bytes
from lowbit.settings import RunOptions, Settings


class DtypeOption(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ProtocolOption(StrEnum):
    full = "full"
    second_half = "second-half"


Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output of lowbit.", rich_help_panel=MAKE)
]
Recipe = Annotated[
    Path | None, typer.Option(metavar="FILE", help="YAML file of settings; options override it.", rich_help_panel=MAKE)
]
Threads = Annotated[
    int | None,
    typer.Option(help="Worker threads. [default: one per core]", metavar="N", min=1, rich_help_panel=RUNNING),
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.", rich_help_panel=RUNNING)]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not add the result to the report beside the weights.")]


@dataclass(frozen=True)
class OptionGroup:
    """Several options that arrive as one value, which is made of what was typed, by the options' names."""

    options: tuple[inspect.Parameter, ...]
    value: Callable[[dict[str, Any]], Any]


def of_table(table: type[HasRows], only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> OptionGroup:
    """An option for each row of a table (or `only` some); the value is what was given, by the rows' names."""
    rows = {_typed_name(row): row for row in table.rows().values()
            if row.name not in without and (not only or row.name in only)}  # fmt: skip
    options = (
        _option(name, *_typed_as(row), row.flag, row.help, row.knob.panel, metavar=row.knob.metavar)
        for name, row in rows.items()
    )
    return OptionGroup(tuple(options), lambda typed: {rows[name].name: _as_setting(rows[name], value)
                                                for name, value in typed.items() if is_given(value)})  # fmt: skip


def of_trust(*only: str, adapter: bool = False) -> OptionGroup:
    """How a source is opened, as `OpenOptions`. adapter: with the option that merges one"""
    merging = _option("adapter", str | None, None, "--adapter",
                      "LoRA adapter (PEFT) to merge into the 16-bit model: folder or Hugging Face id.",
                      MAKE, metavar="ADAPTER")  # fmt: skip
    options = (
        _option("revision", str | None, None, "--revision", "Revision of a Hugging Face id.", TRUST),
        _option("allow_pickle", bool, False, "--allow-pickle", "Read .bin and .pt files, which can run code.", TRUST),
        _option("trust_remote_code", bool, False, "--trust-remote-code",
                "Run modelling code that comes with the model.", TRUST),
    )  # fmt: skip
    chosen = tuple(option for option in options if not only or option.name in only)
    return OptionGroup((merging, *chosen) if adapter else chosen, _open_options)


def _open_options(typed: dict[str, Any]) -> Any:
    from lowbit.checkpoint.base import OpenOptions

    return OpenOptions(**typed)


def of_running(adapter: bool = False) -> OptionGroup:
    """How a model is run, as the keywords `dtype`, `device` and `options`. adapter: with the option that merges one"""
    options = (
        _option("dtype", DtypeOption, DtypeOption.float32, "--dtype", "Dtype of the model's computation.", RUNNING),
        _option("device", str, "cpu", "--device", "cpu, cuda, cuda:1 …", RUNNING),
        *of_trust(adapter=adapter).options,
    )
    return OptionGroup(options, _how_to_run)


def _how_to_run(typed: dict[str, Any]) -> dict[str, Any]:
    import torch

    dtype, device = getattr(torch, typed.pop("dtype").value), typed.pop("device")
    return {"dtype": dtype, "device": device, "options": _open_options(typed)}


def of_judging(windows: int, window_tokens: int, scores: bool = True) -> OptionGroup:
    """A text, a reference and how both models are run: keywords of `evaluate`, `compare` and `diagnose`.

    scores  with the scoring protocol and a memory limit, which `diagnose` does not have
    """
    options = (
        _option("reference", str | None, None, "--reference",
                "The unquantized model. [default: the source its report names]", metavar="MODEL"),
        _option("text", str | None, None, "--text",
                "A text file, wikitext, or hub:OWNER/NAME:CONFIG:SPLIT. [default: packaged text]", metavar="T"),
        _option("windows", int, windows, "--windows", "Number of windows of text.", min=1),
        _option("window_tokens", int, window_tokens, "--window-tokens", "Tokens per window.", min=4),
        _option("bos", bool | None, None, "--bos/--no-bos",
                "Start windows with BOS. [default: if the tokenizer adds it]"),
    )  # fmt: skip
    scoring = (
        _option("protocol", ProtocolOption, ProtocolOption.full, "--protocol",
                "full: score every token but the first; second-half: as in llama.cpp."),
        _option("max_memory", str | None, None, "--max-memory", "Memory limit; models that do not fit run "
                "block by block. [default: most of free memory]", RUNNING, metavar="SIZE"),
    )  # fmt: skip
    return OptionGroup((*options, *(scoring if scores else ()), *of_running().options), _how_to_judge)


def _how_to_judge(typed: dict[str, Any]) -> dict[str, Any]:
    running = _how_to_run({option.name: typed.pop(option.name) for option in of_running().options})
    typed["bos"] = "auto" if typed["bos"] is None else typed["bos"]
    if "protocol" in typed:
        size = typed["max_memory"]
        typed |= {"protocol": typed["protocol"].value, "max_memory": None if size is None else parse_bytes(size)}
    return typed | running


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options in place of each parameter that is annotated with a `OptionGroup`."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, OptionGroup] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = next((each for each in get_args(parameter.annotation) if isinstance(each, OptionGroup)), None)
        if group is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            groups[parameter.name] = group
            parameters += group.options

    parameters += [
        _option("verbose", bool, False, "--verbose", "Say more on stderr.", RUNNING, short="-v"),
        _option("log_file", Path | None, None, "--log-file", "Append messages and progress, with times, to a file.",
                RUNNING, metavar="FILE"),
    ]  # fmt: skip

    def run(verbose: bool, log_file: Path | None, **typed: Any) -> None:
        from lowbit.cli.console import start_logging

        start_logging(verbose, log_file)
        values = {name: group.value({option.name: typed.pop(option.name) for option in group.options})
                  for name, group in groups.items()}  # fmt: skip
        command(**typed, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


class Sections(TyperCommand):
    """A command whose --help lists options by panel, the panels of `lowbit.knobs.PANELS` in their order."""

    def get_help(self, ctx: Any) -> str:
        return help_in_chinese(self, ctx) if language() == "zh" else super().get_help(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:  # of typer's own click, or of click
        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", MAKE, "Options", *PANELS)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                panel = "Arguments" if param.param_type_name == "argument" else getattr(param, "rich_help_panel", None)
                panels[panel or "Options"].append(record)
        if len(panels["Options"]) == 1:  # --help alone goes to the end
            panels["Options"] = panels.pop("Options")
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


class Commands(TyperGroup):
    """The program, whose --help gives the first sentence of every command whole, however many lines it takes."""

    def get_help(self, ctx: Any) -> str:
        return help_in_chinese(self, ctx) if language() == "zh" else super().get_help(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, command.get_short_help_str(limit=200)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _option(
    name: str, kind: Any, default: Any, flag: str, text: str, panel: str | None = None, short: str = "", **more: Any
) -> inspect.Parameter:
    shown = default is not None and default is not False
    flags = (flag, short) if short else (flag,)
    option = typer.Option(*flags, help=text, rich_help_panel=panel, show_default=shown, **more)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _typed_name(row: Row) -> str:
    return row.flag.removeprefix("--").replace("-", "_")


def _typed_as(row: Row) -> tuple[Any, Any]:
    """(type on the command line, default): text where a metavar stands for it."""
    if row.kind is bool:
        return bool, False
    if row.kind in (dict, tuple):
        return list[str] | None, None
    return (row.kind if row.kind in (int, float) and row.knob.metavar is None else str) | None, None


def _as_setting(row: Row, value: Any) -> Any:
    """What was typed, as the table has it: pairs for REGEX=VALUE."""
    if row.kind is not dict:
        return tuple(value) if row.kind is tuple else value
    pairs = {}
    for text in value:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"{row.flag} {text!r} is not {row.knob.metavar}", f"for example {row.flag} 'down_proj$=…'")
        pairs[pattern] = name
    return pairs


Given = Annotated[dict[str, Any], of_table(Settings)]
Run = Annotated[dict[str, Any], of_table(RunOptions)]
Opening = Annotated[Any, of_trust()]
Merging = Annotated[Any, of_trust(adapter=True)]
