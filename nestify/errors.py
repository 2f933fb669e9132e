"""The errors that a user can cause, one class per kind, each with the exit code of that kind.

Only the command line exits; the library raises. A message is one sentence that names the value, the
place and the remedy; passwords in addresses are left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from nestify.addresses import hide_passwords

LONGEST_REASON = 300
"""Characters of a library's message that are repeated in ours."""


class NestifyError(Exception):
    """Base of all errors that are shown to the user as a message rather than reported as a bug."""

    exit_code = 70

    def __init__(self, message: str) -> None:
        super().__init__(hide_passwords(message))


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
        prefix = f"{source}: " if source else ""
        super().__init__("\n".join(prefix + problem for problem in self.problems))


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


@contextmanager
def foreign_code(describe: Callable[[str], NestifyError]) -> Iterator[None]:
    """Turn whatever a library raises on untrusted input into an error that the user can act on.

    The block should contain calls of the library and nothing else. Errors of nestify, running out of memory
    and our own failed assertions pass through, and so do interrupts.

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
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if out_of_memory or (isinstance(error, AssertionError) and _was_raised_here(error.__traceback__)):
            raise
        raise describe(foreign_reason(error)) from error


def foreign_reason(error: Exception) -> str:
    """Return the line of a library's message that says most, or the exception's type if there is none.

    A line that ends in a colon only introduces the next one, as "Error(s) in loading state_dict for X:".
    A message of one word, such as the key of a KeyError, is preceded by the type.
    """
    lines = [line.strip() for line in hide_passwords(str(error)).splitlines() if line.strip()]
    line = next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")
    if not line:
        return type(error).__name__
    if " " not in line:
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "..."


def _was_raised_here(traceback: TracebackType | None) -> bool:
    """Return whether the innermost frame of a traceback is code of nestify."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name.partition(".")[0] == __name__.partition(".")[0]
