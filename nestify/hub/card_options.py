"""What a user says in a model card: names on the hub and a licence, checked. Does not import torch."""

import re
from dataclasses import dataclass

from nestify.errors import RecipeError

_HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?"


@dataclass(frozen=True)
class CardOptions:
    """What a card says that no nested file knows.

    Attributes:
        repo: the repository, `owner/repo`; None if it is not known yet.
        license: the hub's identifier of the licence, such as `apache-2.0`; None for no statement.
        base_model: the model on the hub that the file was made from.
        dataset: the data set on the hub that the file was trained and validated on.

    Raises:
        RecipeError: on construction, if one of them cannot be on the hub.
    """

    repo: str | None = None
    license: str | None = None
    base_model: str | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", self.license):
            problems.append(
                f"--license {self.license!r} is not an identifier of the hub; give one such as apache-2.0, "
                "mit, cc-by-nc-4.0 or other"
            )
        for option, value in (("--base-model", self.base_model), ("--dataset", self.dataset)):
            if value is not None and not re.fullmatch(_HUB_ID, value, re.ASCII):
                problems.append(f"{option} {value!r} is not a name on the hub; give it as owner/name")
        if self.repo is not None:
            problems += repo_problems(self.repo)
        if problems:
            raise RecipeError(problems)


def repo_problems(repo: str) -> list[str]:
    """Return what is wrong with the name of a repository, in at most one sentence."""
    name = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"
    if re.fullmatch(f"{name}/{name}", repo, re.ASCII) and not re.search(r"--|\.\.|\.git$", repo):
        return []
    return [f"{repo!r} is not the name of a repository on the hub; give it as owner/repo"]
