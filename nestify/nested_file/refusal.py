"""Why a file is refused, before it is known by which name the user calls it."""

GET_ANOTHER = "get an intact copy or write it again"
NOT_NESTED = "give a nested file that nestify wrote"


class Refusal(ValueError):
    """A file breaks the format. Opening makes it a BadFileError with the file's name, writing an OutputError.

    Args:
        problem: what is wrong; follows the file's name and a colon.
        remedy: what the user can do.
    """

    def __init__(self, problem: str, remedy: str = GET_ANOTHER) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
