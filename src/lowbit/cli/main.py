"""The `lowbit` command: one file per subcommand, errors in one place.

Data goes to stdout, progress and messages to stderr. An error that the user can act on is printed as `error: …`, an
empty line and `hint: …`, with a non-zero exit code and no traceback; anything else is a bug and keeps its traceback.
Ctrl-C, SIGTERM and a closed terminal stop a command in order: unfinished output is removed, the exit code is 128 plus
the signal's number.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import sys
import time
from typing import NoReturn

import typer

from lowbit.cli.advise import advise
from lowbit.cli.allocate import allocate
from lowbit.cli.bench import bench
from lowbit.cli.clean import clean
from lowbit.cli.compare import compare
from lowbit.cli.convert import convert
from lowbit.cli.demo import demo
from lowbit.cli.diagnose import diagnose
from lowbit.cli.estimate import estimate
from lowbit.cli.evaluate import evaluate
from lowbit.cli.finetune import finetune
from lowbit.cli.generate import generate
from lowbit.cli.imatrix import imatrix
from lowbit.cli.inspect import inspect
from lowbit.cli.language import language
from lowbit.cli.options import Commands, Sections, with_groups
from lowbit.cli.plain import one_line
from lowbit.cli.quantize import quantize
from lowbit.cli.refine import refine
from lowbit.cli.verify import verify
from lowbit.errors import LowbitError
from lowbit.spellings import meant_option

app = typer.Typer(
    name="lowbit",
    cls=Commands,
    help="Quantize large language models: any checkpoint in, any engine's low-bit checkpoint out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS = (
    quantize, convert, refine, finetune, imatrix, allocate, inspect, verify, evaluate, bench, advise, estimate, compare,
    diagnose, generate, demo, clean,
)  # fmt: skip
for command in _COMMANDS:
    app.command(cls=Sections)(with_groups(command))


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from lowbit.version import __version__

        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


def entry() -> NoReturn:
    """Entry point of the `lowbit` command: `run`, then exit without shutting the interpreter down.

    Unloading torch and transformers takes a second and nothing needs it: files are closed and flushed.
    """
    try:
        run()
    except SystemExit as exit_request:
        code = exit_request.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0)


def run() -> NoReturn:
    """Parse the command line, do what it says, and raise SystemExit."""
    _open_closed_streams()
    _stop_in_order()
    # Importing torch and transformers creates a million permanent objects; scanning them for garbage takes a fifth of
    # the time.
    gc.set_threshold(100_000, 50, 50)
    # libgomp's threads spin while they wait for each other, for so long that two busy processes starve one another (a
    # factor of five here); a short spin keeps the speed of an idle machine. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        language()  # an unknown one is refused by every command
        exit_code = app(standalone_mode=False)  # what `typer.Exit` carried, which is not raised in this mode
        sys.stdout.flush()
    except LowbitError as error:
        _fail(str(error), error.hint, error.exit_code)
    except Stopped as stopped:
        for signum in _signals():  # another signal must not interrupt the exit
            signal.signal(signum, signal.SIG_IGN)
        print("stopped; nothing unfinished has the name of the output", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except BrokenPipeError:
        # The reader has exited (`| head`); what is still buffered cannot be written either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        _fail(f"{error.filename or 'standard output'}: {error.strerror or error}",
              "the file system refused; free some space, or look at the permissions", 1)  # fmt: skip
    except UnicodeEncodeError as error:
        _fail(f"standard output is {error.encoding}, which cannot show {error.object[error.start : error.end][:8]!r}",
              "use a UTF-8 locale, or set PYTHONIOENCODING=utf-8", 1)  # fmt: skip
    except MemoryError:
        _fail(
            "the memory is full", "--max-memory and --threads bound what a run takes; `lowbit estimate` predicts it", 1
        )
    except Exception as error:
        _usage_error(error)
    else:
        sys.exit(exit_code)


def _open_closed_streams() -> None:
    """Put /dev/null where a stream was closed (`>&-`), so that no file that is opened later takes its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            while (opened := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            if opened != number:
                os.close(opened)
            setattr(sys, name, open(number if opened == number else os.devnull, mode))  # noqa: SIM115 for good


class Stopped(BaseException):
    """A signal asked the command to stop. Not a KeyboardInterrupt, because typer turns that into a silent exit."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


# Signals within this many seconds of the first are ignored: a second, impatient Ctrl-C must not interrupt the removal
# of unfinished output.
_PATIENCE = 5.0


def _stop_in_order() -> None:
    """Turn signals into `Stopped`; signals that the caller ignores (nohup) stay ignored."""
    last = -math.inf

    def stop(signum: int, frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _PATIENCE:
            last = now
            # a worker whose result nobody waits for any more may complain of it
            logging.getLogger("concurrent.futures").addHandler(logging.NullHandler())
            raise Stopped(signum)

    for signum in _signals():
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, stop)


def _signals() -> list[int]:
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _usage_error(error: Exception) -> NoReturn:
    """Print typer's usage errors in our form; raise anything else."""
    show = getattr(error, "format_message", None)
    if show is None:
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(show())
        sys.exit(2)
    command = getattr(getattr(error, "ctx", None), "command_path", "lowbit")
    message, unknown = show().rstrip("."), getattr(error, "option_name", None)
    listed = "commands" if message.lower().startswith("no such command") else "options"
    hint = f"{command} --help lists the {listed}"
    if unknown is not None and hasattr(error, "possibilities"):  # no such option
        message = f"no such option: {unknown}"
        params = getattr(getattr(error, "ctx", None), "command", None)
        flags = [flag for param in getattr(params, "params", ()) for flag in param.opts if flag.startswith("--")]
        hint = f"{meant_option(unknown, flags, count=3)} {hint}".lstrip()
    _fail(message[:1].lower() + message[1:], hint, getattr(error, "exit_code", 2))


def _fail(message: str, hint: str, exit_code: int) -> NoReturn:
    print(f"error: {one_line(' '.join(message.split()))}\n\nhint: {one_line(hint)}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    entry()
