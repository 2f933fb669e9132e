"""The hub is asked once whether it answers; without it, weights come from its cache or not at all."""

import socket

import pytest
import timm
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from nestify.errors import CheckpointError
from nestify.model.hub import hub_or_cache
from nestify.model.pretrained import load_pretrained


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are looked up in a machine without a network, one per request."""
    asked: list[str] = []

    def fail(host: str, *words: object, **options: object) -> object:
        asked.append(host)
        raise socket.gaierror("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"])
def test_one_request_without_a_network(name: str, requests: list[str]) -> None:
    with pytest.raises(CheckpointError, match="no route to host") as caught:
        load_pretrained(name)
    assert len(requests) == 1
    for part in (name, "cache", constants.ENDPOINT, "model.checkpoint"):
        assert part in str(caught.value)
    assert constants.HF_HUB_OFFLINE is False


def test_no_request_where_none_is_needed(requests: list[str]) -> None:
    load_pretrained("test_resnet", pretrained=False)
    assert not requests


def test_no_request_if_the_user_says_offline(requests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_or_cache(True) as problems:
        assert not problems
    assert not requests
    assert constants.HF_HUB_OFFLINE is True


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(get_session(), "head", lambda *words, **options: asked.append(words))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_or_cache(True) as problems:
        assert constants.HF_HUB_OFFLINE is False
        assert not problems
    assert asked == [(constants.ENDPOINT,)]


def test_cached_weights_are_used_without_a_network(
    requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(*words: object, **options: object) -> object:
        assert constants.HF_HUB_OFFLINE is True
        return plain(*words, **{**options, "pretrained": False})  # type: ignore[arg-type]

    plain = timm.create_model
    monkeypatch.setattr(timm, "create_model", cached)
    load_pretrained("test_resnet")
    assert len(requests) == 1
