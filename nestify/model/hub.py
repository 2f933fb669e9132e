"""The Hugging Face hub, from which timm fetches pretrained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from nestify.errors import foreign_reason


@contextmanager
def hub_or_cache(needed: bool) -> Iterator[list[str]]:
    """Use the hub in a block if it answers, and else only its cache.

    Without it, the hub's client tries each of a model's files six times, for 45 seconds, before it looks
    into its cache.

    Args:
        needed: whether the block may use the hub; otherwise nothing happens.

    Yields:
        Why the hub does not answer, in one sentence; empty if it does.
    """
    problem = _why_unreachable() if needed and not constants.HF_HUB_OFFLINE else ""
    if not problem:
        yield []
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield [f"{constants.ENDPOINT} cannot be reached: {problem}"]
    finally:
        constants.HF_HUB_OFFLINE = False


def _why_unreachable() -> str:
    """Ask the hub once for anything; any answer will do, also one that is an error."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whichever HTTP client the hub's client uses
        return foreign_reason(error)
    return ""
