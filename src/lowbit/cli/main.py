"""The `lowbit` command: one file per subcommand, errors in one place.

Data goes to stdout, progress and messages to stderr. An error that the user can act on is printed as `error: …`, an
empty line and `hint: …`, with a non-zero exit code and no traceback; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

import typer

from lowbit.cli.demo import demo
from lowbit.cli.evaluate import evaluate
from lowbit.cli.generate import generate
from lowbit.cli.inspect import inspect
from lowbit.cli.quantize import quantize
from lowbit.cli.verify import verify
from lowbit.errors import LowbitError

app = typer.Typer(
    name="lowbit",
    help="Quantize large language models: any checkpoint in, any engine's low-bit checkpoint out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (quantize, inspect, verify, evaluate, generate, demo):
    app.command()(command)


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from lowbit import __version__

        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


def run() -> NoReturn:
    """Entry point of the `lowbit` command."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=False)
    except LowbitError as error:
        typer.echo(f"error: {error}", err=True)
        if error.hint:
            typer.echo(f"\nhint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; unfinished output was removed", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        _usage_error(error)
    sys.exit(0)


def _usage_error(error: Exception) -> None:
    """Typer's own complaints about options and arguments, in our form; anything else goes on as it is."""
    show = getattr(error, "format_message", None)
    if show is None:
        raise error
    command = getattr(getattr(error, "ctx", None), "command_path", "lowbit")
    typer.echo(f"error: {show()}\n\nhint: {command} --help lists the options", err=True)
    sys.exit(getattr(error, "exit_code", 2))


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run()
