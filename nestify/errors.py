"""The errors that a user can cause, one class per kind, each with the exit code of that kind.

Only the command line exits; the library raises. A message is one sentence that names the value, the
place and the remedy; passwords in addresses are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from nestify.addresses import hide_passwords
from nestify.text import LONGEST_MESSAGE, printable

MOST_PROBLEMS = 50
"""Problems of a recipe that are listed."""


class NestifyError(Exception):
    """Base of all errors that are shown to the user as a message rather than reported as a bug.

    Args:
        message: one sentence; characters that act on a terminal are escaped, and a long text is cut.
    """

    exit_code = 70

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, LONGEST_MESSAGE))


class NestifyWarning(UserWarning):
    """A problem that does not end the work, or a change that was made to what the user gave."""


class GateFailed(NestifyError):
    """A limit that the user set (accuracy, size, MACs) was not met; nothing else is wrong."""

    exit_code = 1


class RecipeError(NestifyError):
    """A recipe or a command-line option is wrong. The message lists every problem that was found.

    Args:
        problems: one sentence per problem.
        source: the recipe's path, or "" for the command line.
    """

    exit_code = 2

    def __init__(self, problems: str | list[str], source: str = "") -> None:
        given = [problems] if isinstance(problems, str) else list(problems)
        self.problems = [hide_passwords(problem) for problem in given]
        if len(self.problems) > MOST_PROBLEMS:
            more = len(self.problems) - MOST_PROBLEMS
            self.problems[MOST_PROBLEMS:] = [f"{more} other problems are not listed"]
        prefix = f"{source}: " if source else ""
        lines = [printable(prefix + problem, LONGEST_MESSAGE) for problem in self.problems]
        Exception.__init__(self, "\n".join(lines))


class CheckpointError(NestifyError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 3


class DataError(NestifyError):
    """The images are missing, empty, unreadable, or their classes do not fit the model."""

    exit_code = 3


class BadFileError(NestifyError):
    """A nested file is damaged, forged, truncated, or of a format that this version does not read."""

    exit_code = 3


class ProcessError(NestifyError):
    """One process of a distributed run has ended, or its state differs from that of the other processes."""

    exit_code = 3


class SetupError(NestifyError):
    """A package that nestify needs is missing, too old, or broken."""

    exit_code = 3


class OutputError(NestifyError):
    """The result cannot be written where the user wants it."""

    exit_code = 3


class UnsupportedModelError(NestifyError):
    """The model cannot be compressed, trained or exported as requested; the message names the reason."""

    exit_code = 3


class DivergedError(NestifyError):
    """Training diverged: a loss or a weight is not finite, or every level collapsed to chance accuracy."""

    exit_code = 4


class BudgetError(NestifyError):
    """The cost of a trained level differs from its budget."""

    exit_code = 1


def joined(errors: Sequence[NestifyError]) -> NestifyError:
    """Return one error with the messages of all, a line each.

    Its exit code is that of the first one, or that of a wrong recipe or option if there is one.
    """
    if len(errors) == 1:
        return errors[0]
    is_recipe = any(isinstance(error, RecipeError) for error in errors)
    together = (RecipeError if is_recipe else type(errors[0]))("")
    together.args = ("\n".join(map(str, errors)),)
    return together


@contextmanager
def foreign_code(describe: Callable[[str], NestifyError]) -> Iterator[None]:
    """Turn whatever a library raises on untrusted input into an error that the user can act on.

    The block should contain calls of the library and nothing else. Errors of nestify and our own failed
    assertions pass through, and so do interrupts. Running out of memory is turned into the error too: what
    was asked for came with the input.

    Args:
        describe: makes the error from one line that says what the library raised.

    Raises:
        NestifyError: what `describe` returns.
    """
    try:
        yield
    except NestifyError:
        raise
    except Exception as error:
        if isinstance(error, AssertionError) and _was_raised_here(error.__traceback__):
            raise
        raise describe(foreign_reason(error)) from error


def foreign_reason(error: Exception) -> str:
    """Return the line of a library's message that says most, or the exception's type if there is none.

    A line that ends in a colon only introduces the next one, as "Error(s) in loading state_dict for X:".
    A message of one word, such as the key of a KeyError, is preceded by the type. A full stop at the end is
    left out, because the line becomes a part of our sentence.
    """
    lines = [line.strip() for line in hide_passwords(str(error)).splitlines() if line.strip()]
    line = next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")
    line = line.rstrip(".")
    if not line:
        return type(error).__name__
    if " " not in line:
        line = f"{type(error).__name__}: {line}"
    return printable(line)


def _was_raised_here(traceback: TracebackType | None) -> bool:
    """Return whether the innermost frame of a traceback is code of nestify."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.partition(".")[0] == __name__.partition(".")[0]
