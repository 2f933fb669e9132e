"""`nestify push`: against a hub on loopback, in processes that read its address when they start."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nestify.file.reader import open_nested_file
from tests.cli.driver import Outcome, environment, finish, nestify, spawn
from tests.hub.stub import TOKEN, Hub, Repo, serve_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as running:
        yield running


def on_hub(hub: Hub, *words: str | Path, **changes: str) -> Outcome:
    """Run a command that finds the stub where the hub is."""
    settings = {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    settings |= {"HF_HOME": str(Path.cwd() / "hf_home"), "HF_TOKEN_PATH": str(Path.cwd() / "no_token")}
    done = finish(spawn(*words, env=environment(**settings | changes)))
    assert TOKEN not in done.out + done.err
    return done


def test_what_was_pushed_is_sliced_by_the_commands_that_are_printed(hub: Hub, digits_file: Path) -> None:
    done = on_hub(hub, "push", digits_file, "me/digits", "--license", "mit")
    assert (done.code, done.err) == (0, "")
    files = hub.repos["me/digits"].files
    assert set(files) == {"README.md", "config.json", digits_file.name}
    assert files[digits_file.name] == digits_file.read_bytes()
    assert len(hub.repos["me/digits"].commits) == 1
    assert not hub.repos["me/digits"].private
    assert "--license" not in done.out

    command = done.out.splitlines()[-1].split()
    assert command[0] == "nestify"
    sliced = on_hub(hub, *command[1:])
    assert sliced.code == 0, sliced.err
    assert open_nested_file("slice.safetensors").n_levels == 1
    assert hub.sent < open_nested_file(digits_file).prefix_bytes(1) + 100

    in_card = [
        line for line in files["README.md"].decode().splitlines() if line.startswith("nestify slice hf://")
    ]
    for line in in_card:
        done = on_hub(hub, *line.split()[1:])
        assert done.code == 0, done.err
    assert Path("level1.safetensors").read_bytes() == digits_file.read_bytes()


def test_json_private_and_a_folder(hub: Hub, digits_file: Path) -> None:
    assert nestify("card", digits_file, "-o", "folder").code == 0
    Path("folder/README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    Path("folder/secret.txt").write_text("x")
    document = json.loads(on_hub(hub, "push", "folder", "me/digits", "--private", "--json").out)
    repo = hub.repos["me/digits"]
    assert repo.private
    assert set(repo.files) == {"README.md", "config.json", digits_file.name}
    assert repo.files["README.md"].endswith(b"# Mine\n")
    assert document["private"] is True
    assert document["address"] == f"hf://me/digits/{digits_file.name}"
    assert document["url"] == f"{hub.address}/me/digits"
    assert len(document["commit"]) == 40
    assert document["license"] == "mit"


def test_a_missing_licence_is_said(hub: Hub, digits_file: Path) -> None:
    assert "--license" in on_hub(hub, "push", digits_file, "me/digits").out


def test_metadata_that_is_not_yaml_is_refused(hub: Hub, digits_file: Path) -> None:
    assert nestify("card", digits_file, "-o", "folder").code == 0
    Path("folder/README.md").write_text("---\nlicense: [mit\n---\n\n# Mine\n")
    done = on_hub(hub, "push", "folder", "me/digits")
    assert (done.code, done.out) == (3, "")
    assert "README.md" in done.message
    assert hub.repos == {}


def test_private_is_not_pushed_to_a_public_repository(hub: Hub, digits_file: Path) -> None:
    hub.repos["me/digits"] = Repo(private=False)
    done = on_hub(hub, "push", digits_file, "me/digits", "--private")
    assert done.code == 3
    assert "--private" in done.message
    assert hub.repos["me/digits"].files == {}


@pytest.mark.parametrize(
    ("path", "status", "remedy"),
    [
        ("/api/repos/create", 401, "hf auth login"),
        pytest.param("/api/repos/create", 403, "HF_TOKEN", marks=pytest.mark.long),
        pytest.param("/api/validate-yaml", 400, "licence", marks=pytest.mark.long),
        ("/api/models/me/digits/commit/main", 403, "hf auth login"),
    ],
)
def test_refusals_of_the_hub(path: str, status: int, remedy: str, hub: Hub, digits_file: Path) -> None:
    hub.refuses[path] = (status, f"no\x1b[31m {TOKEN}")
    done = on_hub(hub, "push", digits_file, "me/digits")
    assert (done.code, done.out) == (3, "")
    assert remedy in done.message
    assert "\x1b" not in done.err
    assert not hub.repos or hub.repos["me/digits"].files == {}


def test_without_a_hub_or_a_token(hub: Hub, digits_file: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"HF_TOKEN": ""}, "hf auth login"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "network"),
    ]
    for change, remedy in changes:
        done = on_hub(hub, "push", digits_file, "me/digits", **change)
        assert (done.code, done.out) == (3, ""), done.err
        assert remedy in done.message
    assert hub.requests == []


def test_wrong_words(digits_file: Path) -> None:
    for words, code, remedy in (
        (["push", digits_file, "digits"], 2, "owner/repo"),
        (["push", digits_file, "me/digits", "--license", "MIT!"], 2, "--license"),
        (["push", "nothing.safetensors", "me/digits"], 3, "check the path"),
        (["push", ".", "me/digits"], 3, "nestify card"),
        (["push", ".", "me/digits", "--license", "mit"], 2, "README.md"),
    ):
        done = nestify(*words)
        assert (done.code, done.out) == (code, ""), done.err
        assert remedy in done.message
