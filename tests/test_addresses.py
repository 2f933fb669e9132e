"""Users and passwords in addresses are left out of texts, errors, manifests and logs."""

import json
from pathlib import Path

import pytest

from nestify.addresses import hide_passwords
from nestify.errors import DataError, RecipeError
from tests.cli.driver import QUICK, nestify

SECRET = "hunter2"
ADDRESSES = (
    f"hf://user:{SECRET}@owner/repo/f.safetensors",
    f"hf://user:{SECRET}@x",
    f"HF://{SECRET}@owner/repo/f",
    f"https://user:{SECRET}@127.0.0.1:9/x.nested.safetensors",
    f" https://user:{SECRET}@127.0.0.1:9/x",
    f"https://user:hun/{SECRET}@127.0.0.1:9/x",
    f"//user:{SECRET}@127.0.0.1/x",
)
COMMANDS = (
    ("eval", "--data", "nowhere"),
    ("report",),
    ("verify",),
    ("bench",),
    ("pick", "--max-bytes", "3"),
    ("slice", "--level", "1", "-o", "s.safetensors"),
    ("export", "--level", "1", "-o", "e.safetensors"),
    ("compress",),
    ("batch", "--out", "jobs"),
    ("report", "nowhere.safetensors", "--compare"),
    ("compress", "digits", "--data"),
    ("compress", "digits", "--checkpoint"),
    ("compress", "digits", "--device"),
    ("compress", "digits", "--set"),
    ("nothing",),
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://me:{SECRET}@host/x: not found; check", "https://host/x: not found; check"),
        (f"a (https://{SECRET}@host) b", "a (https://host) b"),
        (f'{{"file": "hf://me:{SECRET}@o/r/f"}}', '{"file": "hf://..."}'),
        (f"wds/pipe:curl s3://key:{SECRET}@bucket/x-{{0..9}}.tar", "wds/pipe:curl s3://bucket/x-{0..9}.tar"),
        (f"//me:{SECRET}@host/share", "//host/share"),
        (f"hf-hub:https://me:{SECRET}@host/x", "hf-hub:https://host/x"),
        (f"hf:/me:{SECRET}@o/r/f: no such folder", "hf:/...: no such folder"),
        (f"/recipes/https:/me:{SECRET}@h/x", "/recipes/https:/h/x"),
        (f"two https://a:{SECRET}@b/c and http://d:{SECRET}@e/f", "two https://b/c and http://e/f"),
        ("hf://owner/repo@main/dir/x", "hf://owner/repo@main/dir/x"),
        ("https://host/x@v1/y", "https://host/x@v1/y"),
        ("mail me@host, or see https://host/x", "mail me@host, or see https://host/x"),
        ("/home/me@work//x/y.png", "/home/me@work//x/y.png"),
        ("x" * 10_000 + "//" * 1000, "x" * 10_000 + "//" * 1000),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


def test_errors() -> None:
    text = f"https://me:{SECRET}@host/x: no"
    assert SECRET not in str(DataError(text))
    error = RecipeError([text, "b"], text)
    assert SECRET not in str(error)
    assert SECRET not in repr(error.problems)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("address", ADDRESSES)
def test_commands_that_fail(command: tuple[str, ...], address: str) -> None:
    name, *options = command
    words = (
        [*options, address]
        if options and options[0] in ("digits", "nowhere.safetensors")
        else [address, *options]
    )
    done = nestify(name, *words, "--traceback")
    assert done.code in (2, 3)
    assert SECRET not in done.out + done.err


def test_manifest_and_log(tmp_path: Path) -> None:
    """A baseline at an address with a password would be stored with the recipe."""
    kwargs = f'gates.baseline="https://me:{SECRET}@127.0.0.1:9/x"'
    done = nestify("compress", "digits", *QUICK, "--set", kwargs)
    assert SECRET not in done.out + done.err
    recipe = {
        "extends": "digits",
        "matrix": {"gates.baseline": [f"https://me:{SECRET}@127.0.0.1:9/x", f"hf://me:{SECRET}@o/r/f"]},
    }
    Path("a.json").write_text(json.dumps(recipe))
    done = nestify("batch", "a.json", "--out", "jobs", "--dry-run", "--json")
    assert SECRET not in done.out + done.err
