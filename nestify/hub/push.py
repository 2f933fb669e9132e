"""The upload of a nested file and its model card to a repository on the Hugging Face hub. No torch here."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, get_token, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from nestify.errors import BadFileError, NestifyError, OutputError, RecipeError, foreign_code, foreign_reason
from nestify.file.reader import NestedFile, open_nested_file
from nestify.hub.card_options import CardOptions, repo_problems
from nestify.hub.folder import CARD, CONFIG, fill_folder, repo_file_name
from nestify.shown import Shown
from nestify.version import __version__

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write to it"


@dataclass(frozen=True, repr=False)
class Pushed(Shown):
    """What was uploaded.

    Attributes:
        source: the nested file, or the folder.
        repo: the repository, `owner/repo`.
        url: its address.
        commit: hash of the commit; that of the last one if no file had changed.
        private: whether the repository is private.
        file: name of the nested file in it.
        levels: names of the levels, core first.
        license: licence that the card states, by the hub's identifier; None if it states none.
    """

    source: str
    repo: str
    url: str
    commit: str
    private: bool
    file: str
    levels: tuple[str, ...]
    license: str | None

    @property
    def address(self) -> str:
        """Address of the nested file, as `nestify slice` and `nestify.load` take it."""
        return f"hf://{self.repo}/{self.file}"


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    bars: bool = False,
) -> Pushed:
    """Upload a nested file with its model card, or a folder that `write_card` wrote, as one commit.

    The repository is created if it does not exist. Files of the same names in it are replaced, README.md too;
    other files are kept.

    Args:
        path: a nested file, its address, or a folder that holds one, README.md and config.json.
        repo: the repository, `owner/repo`.
        private: whether nobody else may see the repository.
        license: as in `write_card`; for a nested file only, because a folder has its card.
        base_model: likewise.
        dataset: likewise.
        bars: whether the hub's library may show progress bars on standard error.

    Raises:
        RecipeError: if one of the names is not valid.
        BadFileError: if the file is damaged, or the folder does not hold what it should.
        OutputError: if the hub cannot be reached or refuses the upload, or `private` is set and the
            repository is public.
    """
    if problems := repo_problems(repo):
        raise RecipeError(problems)
    options = CardOptions(repo, license, base_model, dataset)
    if not os.path.isdir(path):
        repo_file_name(open_nested_file(path))
        _check_access(repo)
        with _filled_folder(path, options) as folder:
            return _upload(os.fspath(path), folder, repo, private, bars)
    if options != CardOptions(repo):
        raise RecipeError(
            f"{os.fspath(path)}: is a folder with a model card; edit its {CARD} instead of giving --license, "
            "--base-model or --dataset"
        )
    _nested_file_in(Path(path))
    _check_access(repo)
    return _upload(os.fspath(path), Path(path), repo, private, bars)


@contextmanager
def _filled_folder(path: str | os.PathLike[str], options: CardOptions) -> Iterator[Path]:
    """Write the files of a repository into a temporary folder, which is removed after the block.

    Raises:
        OutputError: if there is no room for them.
    """
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            fill_folder(folder, path, options, lambda done, total: None)
        except OSError as error:
            raise OutputError(
                f"{os.fspath(path)}: cannot be copied to a temporary folder ({error.strerror or error}); set "
                "TMPDIR to a folder with room for it"
            ) from error
        yield folder


def _check_access(repo: str) -> None:
    """Check that the hub may be used and that there is a token, before a file is copied.

    Raises:
        OutputError: if not.
    """
    if constants.HF_HUB_OFFLINE:
        raise OutputError(f"{repo}: HF_HUB_OFFLINE forbids access to the hub; unset it")
    if get_token() is None:
        raise OutputError(f"{repo}: there is no access token for the hub; {LOGIN}")


def _nested_file_in(folder: Path) -> NestedFile:
    """Return the nested file of a folder that `write_card` wrote.

    Raises:
        BadFileError: if there is none or several, or the card is missing.
    """
    names = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
    if len(names) != 1 or not (folder / CARD).is_file():
        raise BadFileError(
            f"{folder}: does not hold one nested file and {CARD}; write such a folder with nestify card"
        )
    file = open_nested_file(folder / names[0])
    repo_file_name(file)
    return file


def _upload(source: str, folder: Path, repo: str, private: bool, bars: bool) -> Pushed:
    file = _nested_file_in(folder)
    name = repo_file_name(file)
    license = _stated_license(folder / CARD)
    api = HfApi(library_name="nestify", library_version=__version__)
    with _hub_errors(repo), _progress_bars(bars):
        url = str(api.create_repo(repo, private=True if private else None, exist_ok=True))
        is_private = bool(api.model_info(repo).private)
        if private and not is_private:
            raise OutputError(
                f"{repo}: exists and is public; make it private in its settings, or leave --private out"
            )
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CARD, CONFIG, name],  # nothing else that is in the user's folder
            commit_message=f"Upload {name} with nestify {__version__}",
        )
    levels = tuple(level.name for level in file.manifest.levels)
    return Pushed(source, repo, url, str(done.oid), is_private, name, levels, license)


def _stated_license(card: Path) -> str | None:
    """Return the licence in a card's metadata; None if there is none.

    Raises:
        BadFileError: if the metadata is not valid, which the hub would refuse.
    """

    def refusal(reason: str) -> BadFileError:
        return BadFileError(f"{card}: its metadata cannot be read ({reason}); correct the lines between ---")

    with foreign_code(refusal):
        found = (metadata_load(card) or {}).get("license")
    return None if found is None else str(found)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn whatever the hub's library raises into an OutputError without the token.

    Raises:
        OutputError: what went wrong, and what to do about it.
    """

    def describe(reason: str) -> NestifyError:
        return OutputError(f"{repo}: cannot be uploaded ({_without_token(reason)}); {_remedy(None)}")

    with foreign_code(describe):
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            reason = _without_token(error.server_message or foreign_reason(error))
            raise OutputError(
                f"{repo}: the hub refused the upload (HTTP {status}: {reason}); {_remedy(status)}"
            ) from None  # its request holds the token
        except ValueError as error:  # how the library reports metadata that the hub refused
            reason = _without_token(" ".join(str(error).split()))
            raise OutputError(f"{repo}: the hub refused the upload ({reason}); {_remedy(400)}") from None


def _without_token(reason: str) -> str:
    token = get_token()
    return reason.replace(token, "...") if token else reason


def _remedy(status: int | None) -> str:
    """Return what to do about an answer of the hub; None if there was none."""
    if status in (401, 403):
        return LOGIN
    if status == 404:
        return "check the owner, and that your token may write to it"
    if status is not None and 400 <= status < 500 and status != 429:
        return "correct what it names, such as the licence in README.md"
    return "check the network and try again; what was uploaded is not sent again"


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of the hub's library in a block."""
    was_disabled = are_progress_bars_disabled()
    if shown:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            enable_progress_bars()
