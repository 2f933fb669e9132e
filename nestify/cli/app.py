"""The application: its commands, and the message and exit code of every error."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from types import FrameType
from typing import Annotated, NoReturn

import typer

from nestify.cli.arguments import Command, Group
from nestify.cli.batch import batch
from nestify.cli.bench import bench
from nestify.cli.card import card
from nestify.cli.compress import compress
from nestify.cli.demo import demo
from nestify.cli.doctor import doctor
from nestify.cli.engine import engine
from nestify.cli.eval import evaluate
from nestify.cli.export import export
from nestify.cli.extend import extend
from nestify.cli.guide import guide
from nestify.cli.output import printable_warnings, take_verbosity, write_result
from nestify.cli.pick import pick
from nestify.cli.push import push
from nestify.cli.recipe import recipe
from nestify.cli.report import report
from nestify.cli.scan import scan
from nestify.cli.slice import slice_levels
from nestify.cli.streams import guard_streams
from nestify.cli.verify import verify
from nestify.errors import NestifyError, OutputError
from nestify.signals import STOP_SIGNALS
from nestify.terminal import print_stderr
from nestify.text import LONGEST_MESSAGE, printable
from nestify.version import __version__

OUT_OF_MEMORY = 3
BUG = 70
INTERRUPTED = 130
TERMINATED = 143

get_command = cache(typer.main.get_command)
"""Return the command of an application, made once: typer takes a twentieth of a second."""

app = typer.Typer(
    name="nestify",
    cls=Group,
    help="Turn one pretrained timm model into a nested network: n networks of different size in one file.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("batch", cls=Command)(batch)
app.command("bench", cls=Command)(bench)
app.command("card", cls=Command)(card)
app.command("compress", cls=Command)(compress)
app.command("demo", cls=Command)(demo)
app.command("doctor", cls=Command)(doctor)
app.command("engine", cls=Command)(engine)
app.command("eval", cls=Command)(evaluate)
app.command("export", cls=Command)(export)
app.command("extend", cls=Command)(extend)
app.command("guide", cls=Command)(guide)
app.command("pick", cls=Command)(pick)
app.command("push", cls=Command)(push)
app.add_typer(recipe, name="recipe")
app.command("report", cls=Command)(report)
app.command("scan", cls=Command)(scan)
app.command("slice", cls=Command)(slice_levels)
app.command("verify", cls=Command)(verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        write_result(f"nestify {__version__}\n", None)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    show_traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Print the Python traceback of an error."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only results, warnings and errors.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Also print what libraries log and, if standard error is not a terminal, progress every ten "
            "seconds.",
        ),
    ] = False,
) -> None:
    """Turn one pretrained timm model into a nested network: n networks of different size in one file.

    --traceback, --quiet and --verbose may be given before or after the command.
    """


def main() -> NoReturn:
    """Run the command line and exit with the documented exit code."""
    # bench and pick keep the default threading, so that they measure what programs with default settings see.
    if not {"bench", "pick"} & set(sys.argv[1:]):
        # Threads that spin while they wait slow a busy machine down many times; must be set before torch.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    guard_streams()
    if "_NESTIFY_COMPLETE" in os.environ:  # a shell asks for completions
        app(prog_name="nestify")
    try:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, _stop)
        code = run(sys.argv[1:])
        _end_at_once()
    except (KeyboardInterrupt, _Terminated) as stop:  # before `run` could handle it
        _end_at_once()
        code = _report_stop(stop, False)
    try:
        sys.stdout.flush()  # at Python's exit a failure could not be reported
    except OutputError as error:
        code = code or _print_error(str(error), error.exit_code, False)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and print errors on standard error.

    Args:
        arguments: the command line without the name of the program.

    Returns:
        The exit code.
    """
    wants_traceback = "--traceback" in arguments
    words = take_verbosity([word for word in arguments if word != "--traceback"])
    command = get_command(app)
    try:
        # Not app(words): typer would handle Ctrl-C and broken pipes itself.
        with printable_warnings(), command.make_context("nestify", words) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, _Terminated) as stop:
        return _report_stop(stop, wants_traceback)
    except Exception as error:
        if _stops:  # code that was interrupted, or cleaned up, has raised this in place of the stop
            return _report_stop(_stops[0], wants_traceback)
        if isinstance(error, NestifyError):
            return _report_error(error, wants_traceback)
        return _report_exception(error, wants_traceback)
    return 0


def _report_error(error: NestifyError, wants_traceback: bool) -> int:
    for note in getattr(error, "__notes__", []):
        print_stderr(printable(note, LONGEST_MESSAGE))
    return _print_error(str(error), error.exit_code, wants_traceback)


def _report_stop(stop: BaseException, wants_traceback: bool) -> int:
    """Report a run that was stopped by a signal, and return its exit code."""
    word, code = ("terminated", TERMINATED) if isinstance(stop, _Terminated) else ("interrupted", INTERRUPTED)
    # A run that can be resumed has added a note that says from where.
    left = printable("; ".join(getattr(stop, "__notes__", [])), LONGEST_MESSAGE) or "no output was written"
    return _print_error(f"{word}; {left}", code, wants_traceback)


def _report_exception(error: Exception, wants_traceback: bool) -> int:
    """Print an exception that is not a NestifyError and return its exit code.

    Usage errors come from click, which prints them itself; most other exceptions are bugs of nestify.
    """
    show, usage_code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(usage_code, int):
        if (message := getattr(error, "message", None)) is not None:
            message = message.removeprefix("Value error, ")  # from pydantic
            error.message = printable(message, LONGEST_MESSAGE)  # type: ignore[attr-defined]
        show()
        return usage_code
    reason = printable(str(error), LONGEST_MESSAGE)
    if _is_out_of_memory(error):
        remedy = "use a smaller --batch-size or --input-size"
        return _print_error(f"out of memory: {reason}; {remedy}", OUT_OF_MEMORY, wants_traceback)
    return _print_error(
        f"this is a bug in nestify {__version__}: {type(error).__name__}: {reason}\n"
        "please report it with the command and what it prints with --traceback",
        BUG,
        wants_traceback,
    )


def _is_out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)  # torch's RuntimeError on the CPU


def _print_error(message: str, code: int, wants_traceback: bool) -> int:
    """Print an error, after its traceback if wanted, and return the exit code unchanged."""
    if wants_traceback:
        print_stderr(traceback.format_exc().rstrip("\n"))
    print_stderr(f"nestify: {message}")
    return code


class _Terminated(BaseException):
    """SIGTERM, SIGHUP or SIGUSR1 as an exception, so that temporary files are removed before the exit."""


_stops: list[BaseException] = []
"""What `_stop` has raised, which libraries may catch, or replace by an exception of their own."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _stops.append(KeyboardInterrupt() if number == signal.SIGINT else _Terminated())
    raise _stops[-1]


def _end_at_once() -> None:
    """Let signals end the process, because nothing is left to clean up but what Python's exit does."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)
