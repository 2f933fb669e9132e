"""The model card: YAML that the hub's library reads again, and Markdown that no name in a file can break."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from nestify.errors import BadFileError, OutputError, RecipeError
from nestify.file.manifest import Metrics
from nestify.file.reader import open_nested_file
from nestify.file.summary import read_report
from nestify.file.writer import write_nested_file
from nestify.hub.card_options import CardOptions
from nestify.hub.folder import write_card
from nestify.hub.markdown import fenced, literal
from tests.file.builders import description, small_state

HOSTILE = (
    "---\nlicense: mit",
    "a | b",
    "</details><script>alert(1)</script>",
    "<!-- x",
    "![x](https://e.org/x.png)",
    "[x](javascript:alert(1))",
    "`code` ``` ~~~",
    "**bold** __bold__ ~~gone~~ *i* _i_",
    "# heading",
    "&lt;b&gt; &#42;",
    "$x^2$ \\(y\\) \\",
    "\u202etxt\x1b[31m",
    "{{ 7 * 7 }} {% raw %}",
    "'); import os; (\"",
    "tf_efficientnet_lite0",
)


def make_file(path: Path, names: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write a small nested file whose classes, split and architecture have the given names."""
    base = description(3)
    levels = [
        level.model_copy(
            update={
                "metrics": Metrics(
                    parameters=10,
                    nonzero_parameters=5,
                    dense_macs=20,
                    effective_macs=None,
                    images=200,
                    top1=top1,
                )
            }
        )
        for level, top1 in zip(base.levels, (50.0, 75.0, 87.5), strict=True)
    ]
    if names:
        model = base.model.model_copy(
            update={
                "class_names": list(names),
                "num_classes": len(names),
                "architecture": "__net__.a1_in1k",
                "preprocessing": base.model.preprocessing.model_copy(
                    update={"interpolation": " ".join(names), "crop_mode": names[6]}
                ),
            }
        )
        levels = [level.model_copy(update={"fingerprint": [0.0] * len(names)}) for level in levels]
        changes |= {
            "model": model,
            "recipe": {"data": {"path": "/home/me/secret/" + names[2]}, "x": names[6]},
        }
    write_nested_file(path, small_state(), description(3, levels=levels, **changes))
    return path


def tokens(text: str) -> list[Token]:
    """Return all tokens of a Markdown text, with HTML and tables, flat."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body):
        found += [token, *(token.children or [])]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_card(
        make_file(tmp_path / "net.nested.safetensors"), tmp_path / "folder", license="mit", repo="me/net"
    )
    return tmp_path / "folder"


def test_the_folder_holds_three_files(folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "net.nested.safetensors",
    ]
    assert (folder / "net.nested.safetensors").read_bytes() == (
        tmp_path / "net.nested.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "net.nested.safetensors"]


def test_the_metadata_is_read_again(folder: Path) -> None:
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "nestify", "image-classification")
    assert data.model_name == "net"
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert list(results.values()) == [0.5, 0.75, 0.875]
    assert "size-1" in next(iter(results))
    assert {result.metric_type for result in data.eval_results} == {"accuracy"}


def test_what_is_not_known_is_not_stated(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    write_nested_file(path, small_state(), description(3))
    write_card(path, tmp_path / "folder")
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.license is None
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.eval_results is None
    assert "holds no accuracies" in card.text
    assert "hf://OWNER/REPO/net.safetensors" in card.text


def test_options_are_in_the_metadata(tmp_path: Path) -> None:
    path = make_file(tmp_path / "net.safetensors")
    write_card(path, tmp_path / "folder", base_model="timm/resnet18.a1_in1k", dataset="imagenet-1k")
    data = ModelCard.load(tmp_path / "folder" / "README.md").data
    assert data.base_model == "timm/resnet18.a1_in1k"
    assert data.datasets == "imagenet-1k"
    assert {result.dataset_type for result in data.eval_results} == {"imagenet-1k"}


def test_hashes_and_sizes(folder: Path) -> None:
    file = folder / "net.nested.safetensors"
    whole = sha256(file.read_bytes()).hexdigest()
    text, config = (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())
    assert f"{file.stat().st_size:,} | {whole}" in text
    assert (config["bytes"], config["sha256"], config["file"]) == (file.stat().st_size, whole, file.name)
    opened = open_nested_file(file)
    begin = opened.header_bytes
    for number, level in enumerate(config["levels"], start=1):
        chunk = file.read_bytes()[begin : level["prefix_bytes"]]
        begin = level["prefix_bytes"]
        assert level["sha256"] == sha256(chunk).hexdigest()
        assert level["sha256"] in text
        assert (level["level"], level["name"]) == (number, f"size-{number}")
    assert begin == file.stat().st_size


def test_no_name_of_a_file_breaks_the_card(tmp_path: Path) -> None:
    path = make_file(tmp_path / "net.safetensors", HOSTILE)
    write_card(path, tmp_path / "folder")
    text = (tmp_path / "folder" / "README.md").read_text()
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "secret" not in text
    plain = make_file(tmp_path / "plain.safetensors")
    write_card(plain, tmp_path / "plain")
    harmless = (tmp_path / "plain" / "README.md").read_text()
    kinds = [{token.type for token in tokens(each)} for each in (text, harmless)]
    assert kinds[0] == kinds[1]
    html = [[token.content for token in tokens(each) if "html" in token.type] for each in (text, harmless)]
    assert html[0] == html[1]
    assert ModelCard(text).data.to_dict().keys() == ModelCard(harmless).data.to_dict().keys()
    shown = " ".join(token.content for token in tokens(text) if token.type in ("text", "text_special"))
    assert "tf_efficientnet_lite0" in shown
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["class_names"] == list(HOSTILE)


def test_level_names_in_commands_are_words_or_numbers(tmp_path: Path) -> None:
    base = description(3)
    names = ("a; rm -rf ~", "`$(id)`", "phone")
    levels = [level.model_copy(update={"name": name}) for level, name in zip(base.levels, names, strict=True)]
    path = tmp_path / "net.safetensors"
    write_nested_file(path, small_state(), description(3, levels=levels))
    write_card(path, tmp_path / "folder")
    code = [
        token.content
        for token in tokens((tmp_path / "folder" / "README.md").read_text())
        if token.type == "fence"
    ]
    assert "--level level1 " in code[0]
    assert "--level phone --upgrade level1.safetensors" in code[0]
    assert not any("rm -rf" in block or "id)" in block for block in code)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    visible = name.replace("\n", r"\x0a").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    inline = (
        MarkdownIt("commonmark", {"html": True}).enable("strikethrough").parseInline(f"x {literal(name)} x")
    )
    assert inline[0].children is not None
    assert {token.type for token in inline[0].children} <= {"text", "text_special"}
    assert "".join(token.content for token in inline[0].children) == f"x {visible} x"


@pytest.mark.parametrize("text", ["a", "```", "`````\n```", "~~~"])
def test_a_block_of_code_ends_where_it_should(text: str) -> None:
    blocks = MarkdownIt("commonmark").parse(fenced("python", text) + "\n\nafter")
    assert [token.type for token in blocks] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert blocks[0].content == text + "\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("license", "MIT License"),
        ("license", "mit\nx: y"),
        ("base_model", "a/b/c"),
        ("dataset", "a b"),
        ("repo", "net"),
        ("repo", "me/.git"),
        ("repo", "me/net/main"),
        ("repo", "me/a..b"),
        ("repo", "../net"),
    ],
)
def test_what_cannot_be_on_the_hub_is_refused(option: str, value: str) -> None:
    with pytest.raises(RecipeError, match=r"owner|apache"):
        CardOptions(**{option: value})


def test_a_folder_with_files_is_kept(folder: Path, tmp_path: Path) -> None:
    before = (folder / "README.md").stat()
    with pytest.raises(OutputError, match="new one"):
        write_card(tmp_path / "net.nested.safetensors", folder)
    with pytest.raises(OutputError, match="create it"):
        write_card(tmp_path / "net.nested.safetensors", tmp_path / "no" / "folder")
    assert (folder / "README.md").stat() == before


def test_a_damaged_file_leaves_no_folder(tmp_path: Path) -> None:
    path = make_file(tmp_path / "net.safetensors")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadFileError, match="SHA-256"):
        write_card(path, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_fits_no_address_is_refused(tmp_path: Path) -> None:
    path = make_file(tmp_path / "my net?.safetensors")
    with pytest.raises(RecipeError, match="rename"):
        write_card(path, tmp_path / "folder")


def test_what_is_stored_next_to_the_file_is_in_the_card(tmp_path: Path) -> None:
    from nestify.file.class_accuracy import LevelClasses, save_class_accuracy

    path = make_file(tmp_path / "net.safetensors")
    counts = LevelClasses(level=1, name="size-1", images=[100, 40], correct=[90, 10])
    save_class_accuracy(open_nested_file(path), "photos|x", [counts])
    write_card(path, tmp_path / "folder")
    text = (tmp_path / "folder" / "README.md").read_text()
    assert r"photos\|x" in text
    assert "25.0 % of 40" in text
    assert read_report(path).levels[0].top1 == 50.0
