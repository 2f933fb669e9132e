"""`nestify card`: the folder of a repository on the hub."""

import json
from pathlib import Path

from nestify.file.reader import open_nested_file
from tests.cli.conftest import Refused
from tests.cli.driver import nestify


def test_the_folder_and_what_is_printed(digits_file: Path) -> None:
    done = nestify("card", digits_file, "-o", "folder/", "--license", "mit", "--repo", "me/digits")
    assert (done.code, done.err) == (0, "")
    assert digits_file.name in done.out
    assert "--license" not in done.out
    text = Path("folder/README.md").read_text()
    assert f"hf://me/digits/{digits_file.name} --level level1" in text
    assert Path("folder", digits_file.name).read_bytes() == digits_file.read_bytes()
    assert json.loads(Path("folder/config.json").read_text())["preprocessing"]["input_size"] == [3, 32, 32]


def test_json(digits_file: Path) -> None:
    document = nestify("card", digits_file, "-o", "folder", "--json").document
    file = open_nested_file(digits_file)
    assert document["bytes"] == file.source.size
    assert [level["name"] for level in document["levels"]] == ["level1", "level2", "level3"]
    assert (document["folder"], document["license"]) == ("folder", None)


def test_a_missing_licence_is_said(digits_file: Path) -> None:
    assert "--license" in nestify("card", digits_file, "-o", "folder").out


def test_refusals(refused: Refused, digits_file: Path) -> None:
    assert "--license" in refused(2, "card", digits_file, "-o", "folder", "--license", "My own")
    assert "owner/repo" in refused(2, "card", digits_file, "-o", "folder", "--repo", "nowhere")
    assert "check the path" in refused(3, "card", "nothing.safetensors", "-o", "folder")
    assert "new one" in refused(3, "card", digits_file, "-o", ".")
