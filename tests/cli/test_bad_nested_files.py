"""Damaged nested files, as `report` and `eval` report them. tests/file has every kind of damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Refused
from tests.cli.driver import CHECKPOINT, nestify
from tests.file.damage import Parts, damage


@pytest.fixture
def copy(digits_file: Path, tmp_path: Path) -> Path:
    """A nested file that tests may damage."""
    return Path(shutil.copy(digits_file, tmp_path / "copy.safetensors"))


def both_refuse(refused: Refused, path: Path) -> str:
    """Check that `report` and `eval` refuse a file with the same message, and return it without the path."""
    reported = refused(3, "report", path)
    assert refused(3, "eval", path, "--data", "embedded/digits") == reported
    assert reported.startswith(f"{path}: ")
    return reported.removeprefix(f"{path}: ")


def test_files_that_are_not_nested_files(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello, I am no nested file at all")
    for path, expected in (
        (tmp_path / "nowhere", "there is no such file; check the path"),
        (tmp_path, "is a directory; give the nested file itself"),
        (CHECKPOINT, "is a safetensors file but not a nested file"),
    ):
        assert expected in both_refuse(refused, path)
    for name in ("empty", "text"):
        assert "; " in both_refuse(refused, tmp_path / name)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_truncated(share: float, copy: Path, refused: Refused) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content[: int(len(content) * share)])
    message = both_refuse(refused, copy)
    if share == 0.5:
        assert "is truncated, with " in message
        assert "; levels 1 (level1), 2 (level2) are complete in it; " in message


def test_bytes_after_the_end(copy: Path, refused: Refused) -> None:
    with copy.open("ab") as file:
        file.write(b"more")
    assert both_refuse(refused, copy).startswith("has 4 bytes after its last tensor")


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.metadata.update({"nestify.format": "99"}),
        lambda parts: parts.manifest.pop("levels"),
        lambda parts: parts.manifest.update({"surprise": 1}),
        lambda parts: parts.manifest.update({"levels": parts.manifest["levels"][:2]}),
        lambda parts: parts.manifest["model"].update({"num_classes": -1}),
        lambda parts: parts.manifest["model"]["preprocessing"].update({"input_size": [3, 0, 32]}),
        lambda parts: parts.manifest["model"]["preprocessing"].update({"mean": []}),
        lambda parts: parts.manifest["model"]["preprocessing"].update({"std": [0.0, 0.0, 0.0]}),
        lambda parts: parts.manifest["model"]["preprocessing"].update({"crop_pct": 1e-9}),
        lambda parts: parts.manifest["model"]["class_names"].pop(),
        lambda parts: parts.manifest["model"]["kwargs"].update({"checkpoint_path": "/tmp/any.pth"}),
        lambda parts: parts.manifest["levels"][0]["layers"].pop(),
        lambda parts: parts.manifest["levels"][0].update({"pattern": "\x1b[31m"}),
        lambda parts: parts.manifest["levels"][0]["metrics"].update({"uncounted": {"\x1b[31m": 1}}),
        lambda parts: parts.header.pop(next(iter(parts.header))),
        lambda parts: next(iter(parts.header.values())).update({"dtype": "F99"}),
    ],
    ids=[
        *(
            "version",
            "no-levels",
            "unknown-key",
            "level-lost",
            "classes",
            "input-size",
            "mean",
            "std",
            "crop",
        ),
        *("class-lost", "foreign-weights", "layer-lost", "escape", "other-escape", "tensor-lost", "dtype"),
    ],
)
def test_damaged_headers(change: Callable[[Parts], object], copy: Path, refused: Refused) -> None:
    damage(copy, change)
    assert "; " in both_refuse(refused, copy)


@pytest.mark.parametrize("byte", [8, 9, 40, 1000, 20_000])
def test_one_wrong_byte_in_the_header(byte: int, copy: Path, refused: Refused) -> None:
    content = bytearray(copy.read_bytes())
    content[byte] = 0
    copy.write_bytes(content)
    both_refuse(refused, copy)


def test_one_wrong_bit_in_the_data(copy: Path, refused: Refused) -> None:
    """A report does not read the data; commands that compute with it detect the damage."""
    content = bytearray(copy.read_bytes())
    content[-100] ^= 4
    copy.write_bytes(content)
    assert nestify("report", copy).code == 0
    message = refused(3, "eval", copy, "--data", "embedded/digits", "--level", "3")
    assert message.startswith(f"{copy}: ")
    assert "level 3" in message


def test_changed_weights_with_matching_hashes(copy: Path, refused: Refused) -> None:
    """Only the fingerprint of the logits can detect this."""

    def change(parts: Parts) -> None:
        values = np.frombuffer(parts.tensor("level1/values/conv1.0.weight"), np.float32)
        values[:] = values[::-1].copy()
        parts.rehash()

    damage(copy, change)
    assert "gives other logits than when it was stored" in refused(
        3, "eval", copy, "--data", "embedded/digits"
    )


def test_a_model_that_timm_does_not_build(copy: Path, refused: Refused) -> None:
    words = ("eval", copy, "--data", "embedded/digits")
    damage(copy, lambda parts: parts.manifest["model"].update({"architecture": "resnet_of_tomorrow"}))
    assert "'resnet_of_tomorrow' is not in the registry of timm" in refused(3, *words)
    damage(copy, lambda parts: parts.manifest["model"].update({"architecture": "test_vit"}))
    assert "its tensors do not fit test_vit" in refused(3, *words)


def test_a_description_of_another_network(copy: Path, refused: Refused) -> None:
    words = ("eval", copy, "--data", "embedded/digits")

    def set_model(**changes: object) -> Callable[[Parts], None]:
        return lambda parts: parts.manifest["model"].update(changes)

    damage(copy, set_model(num_classes=11, class_names=[*"0123456789x"]))
    assert "says 11 classes, but describes a network of 10" in refused(3, *words)
    damage(copy, set_model(num_classes=10, class_names=None))
    damage(copy, lambda parts: parts.manifest["model"]["preprocessing"].update({"input_size": [1, 32, 32]}))
    assert "level 1 (level1) does not accept images of 1x32x32" in refused(3, *words)
