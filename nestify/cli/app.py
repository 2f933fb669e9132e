"""The application: its commands, and how every error becomes one sentence and an exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from nestify.cli.arguments import Command, Group
from nestify.cli.batch import batch
from nestify.cli.bench import bench
from nestify.cli.compress import compress
from nestify.cli.doctor import doctor
from nestify.cli.eval import evaluate
from nestify.cli.export import export
from nestify.cli.guide import guide
from nestify.cli.output import abandon_stdout, say, take_verbosity, write_result
from nestify.cli.pick import pick
from nestify.cli.report import report
from nestify.cli.slice import slice_levels
from nestify.cli.verify import verify
from nestify.errors import NestifyError
from nestify.version import __version__

OUT_OF_MEMORY = 3
BUG = 70
INTERRUPTED = 130
TERMINATED = 143

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
app.command("compress", cls=Command)(compress)
app.command("doctor", cls=Command)(doctor)
app.command("eval", cls=Command)(evaluate)
app.command("export", cls=Command)(export)
app.command("guide", cls=Command)(guide)
app.command("pick", cls=Command)(pick)
app.command("report", cls=Command)(report)
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
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    show_traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Show where an error comes from."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Tell nothing but results, warnings and errors.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Tell also what libraries log, and progress every ten seconds in a pipe."
        ),
    ] = False,
) -> None:
    """Turn one pretrained timm model into a nested network: n networks of different size in one file.

    --traceback, --quiet and --verbose may stand before the command or after it.
    """


def main() -> NoReturn:
    """Run the command line and exit with the contract's code."""
    if not {"bench", "pick"} & set(sys.argv[1:]):  # these measure what others will have, who set nothing
        # Threads that spin while they wait make a busy machine many times slower; must be set before torch.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "_NESTIFY_COMPLETE" in os.environ:  # a shell asks how the line goes on
        app(prog_name="nestify")
    try:
        for name in ("SIGTERM", "SIGUSR1"):  # SIGUSR1: that the machine is taken away in a minute
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _terminate)
        code = run(sys.argv[1:])
    except (KeyboardInterrupt, _Terminated) as stop:  # before there was anything to stop
        code = _stopped(stop, False)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line, without the name of the program.

    Returns:
        The exit code; whatever went wrong has been told on standard error.
    """
    wants_traceback = "--traceback" in arguments
    words = take_verbosity([word for word in arguments if word != "--traceback"])
    command = typer.main.get_command(app)
    try:
        # Not app(words): typer would make Ctrl-C and every broken pipe its own.
        with command.make_context("nestify", words) as context:
            command.invoke(context)
    except NestifyError as error:
        for note in getattr(error, "__notes__", []):
            say(note)
        return _tell(str(error), error.exit_code, wants_traceback)
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, SystemExit, _Terminated) as stop:
        return _stopped(stop, wants_traceback)
    except Exception as error:
        return _failed(error, wants_traceback)
    return 0


def _stopped(stop: BaseException, wants_traceback: bool) -> int:
    """From outside: by a signal, or because nobody reads what is printed, where rich ends the program."""
    if isinstance(stop, SystemExit):
        abandon_stdout()
        return 0
    word, code = ("terminated", TERMINATED) if isinstance(stop, _Terminated) else ("interrupted", INTERRUPTED)
    # a run that can go on has noted where
    left = "; ".join(getattr(stop, "__notes__", [])) or "no output was written"
    return _tell(f"{word}; {left}", code, wants_traceback)


def _failed(error: Exception, wants_traceback: bool) -> int:
    """Usage errors are click's, with its own printing; most else is a bug of ours."""
    show, usage_code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(usage_code, int):
        if (message := getattr(error, "message", None)) is not None:
            error.message = message.removeprefix("Value error, ")  # type: ignore[attr-defined]  # pydantic's
        show()
        return usage_code
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        abandon_stdout()
        return 0
    if _is_out_of_memory(error):
        remedy = "a smaller --batch-size or --input-size needs less"
        return _tell(f"out of memory: {error}; {remedy}", OUT_OF_MEMORY, wants_traceback)
    return _tell(
        f"this is a bug in nestify {__version__}: {type(error).__name__}: {error}\n"
        "please report it with the command, and what it prints with --traceback",
        BUG,
        wants_traceback,
    )


def _nobody_reads() -> bool:
    """Whether the reader of standard output has closed the pipe."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _is_out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)  # torch's RuntimeError on the CPU


def _tell(message: str, code: int, wants_traceback: bool) -> int:
    if wants_traceback:
        say(traceback.format_exc().rstrip("\n"))
    say(f"nestify: {message}")
    return code


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that temporary files are removed on the way out."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
