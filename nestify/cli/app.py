"""The application: its commands, and how every error becomes one sentence and an exit code."""

import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from nestify import __version__
from nestify.cli.compress import compress
from nestify.cli.eval import evaluate
from nestify.cli.report import report
from nestify.errors import NestifyError

BUG = 70
INTERRUPTED = 130
TERMINATED = 143

app = typer.Typer(
    name="nestify",
    help="Turn one pretrained timm model into a nested network: n networks of different size in one file.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress)
app.command("eval")(evaluate)
app.command("report")(report)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nestify {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from, for a bug report.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def main() -> NoReturn:
    """Run the command line and exit with the contract's code."""
    # Threads that spin while they wait make a busy machine many times slower; must be set before torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run())


def _run() -> int:
    wants_traceback = "--traceback" in sys.argv
    try:
        code = app(standalone_mode=False)
    except NestifyError as error:
        return _tell(str(error), error.exit_code, wants_traceback)
    except KeyboardInterrupt:
        return _tell("interrupted; nothing was written to the output", INTERRUPTED, False)
    except _Terminated:
        return _tell("terminated; nothing was written to the output", TERMINATED, False)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _other(error, wants_traceback)
    return code if isinstance(code, int) else 0


def _other(error: Exception, wants_traceback: bool) -> int:
    """Usage errors are click's, with its own printing; everything else is a bug of ours."""
    show, usage_code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(usage_code, int):
        show()
        return usage_code
    if type(error).__name__ == "Abort":
        return _tell("interrupted; nothing was written to the output", INTERRUPTED, False)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _tell(f"out of memory: {error}; a smaller --batch-size needs less", 3, wants_traceback)
    return _tell(
        f"this is a bug in nestify {__version__}: {type(error).__name__}: {error}\n"
        "please report it with the command, and what `nestify --traceback ...` prints",
        BUG,
        wants_traceback,
    )


def _tell(message: str, code: int, wants_traceback: bool) -> int:
    if wants_traceback:
        traceback.print_exc()
    typer.echo(f"nestify: {message}", err=True)
    return code


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that temporary files are removed on the way out."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
