"""`nestify verify`: intact and damaged levels."""

import shutil
from pathlib import Path

import pytest

import nestify as package
from nestify.file.reader import open_nested_file
from tests.cli.driver import UNTRAINED, nestify
from tests.file.damage import Parts, damage


@pytest.fixture
def copy(digits_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(digits_file, tmp_path / "copy.safetensors"))


def results(path: Path) -> list[str | None]:
    """Return the problem of each level that the command finds, core first; None for an intact level."""
    done = nestify("verify", path, "--json")
    document = done.document
    assert document["schema_version"] == 1
    problems = [level["problem"] for level in document["levels"]]
    assert document["passed"] == (problems == [None] * len(problems))
    assert done.code == (0 if document["passed"] else 3)
    return problems


def test_an_intact_file(digits_file: Path) -> None:
    done = nestify("verify", digits_file)
    assert done.code == 0
    assert done.err == ""
    header = done.out.splitlines()[2]
    assert header.split() == ["level", "name", "prefix", "MiB", "weights", "logits", "off", "by", "result"]
    assert results(digits_file) == [None, None, None]
    found = package.verify(digits_file)
    assert found.passed
    file = open_nested_file(digits_file)
    for level, check in enumerate(found.levels, start=1):
        assert check.prefix_bytes == file.prefix_bytes(level)
        assert check.weights == sum(layer.kept for layer in file.manifest.levels[level - 1].layers)
        assert check.off is not None
        assert check.off < 1e-5


def test_a_file_of_format_1() -> None:
    """A real network, written when format 1 was frozen: its logits are still the stored ones."""
    assert results(Path(__file__).parents[1] / "file" / "golden" / "digits.safetensors") == [
        None,
        None,
    ]


def flip_in(level: int, copy: Path, rehash: bool = False) -> None:
    """Flip the sign of the last value whose entry level is `level`."""

    def change(parts: Parts) -> None:
        name = [name for name in parts.header if name.startswith(f"level{level}/values/")][-1]
        parts.tensor(name)[-1] ^= 0x80
        if rehash:
            parts.rehash()

    damage(copy, change)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_damage_affects_its_level_and_those_above(copy: Path, level: int) -> None:
    flip_in(level, copy)
    found = results(copy)
    assert found[: level - 1] == [None] * (level - 1)
    assert all("do not match their SHA-256" in str(problem) for problem in found[level - 1 :])


def test_changed_weights_with_matching_hashes(copy: Path) -> None:
    def change(parts: Parts) -> None:
        weights = parts.tensor("level1/values/conv1.0.weight")
        weights[3::4] = bytes(byte ^ 0x80 for byte in weights[3::4])
        parts.rehash()

    damage(copy, change)
    assert all("gives other logits" in str(problem) for problem in results(copy))


def test_counts_that_disagree(copy: Path) -> None:
    def change(parts: Parts) -> None:
        parts.manifest["levels"][1]["layers"][2]["kept"] += 1

    damage(copy, change)
    first, second, third = results(copy)
    assert first is third is None
    assert second is not None
    assert "weights of 'layer" in second or "weights of 'conv1" in second
    assert "where its manifest says" in second


def test_a_truncated_file(copy: Path) -> None:
    end = open_nested_file(copy).prefix_bytes(2)
    copy.write_bytes(copy.read_bytes()[:end])
    first, second, third = results(copy)
    assert first is second is None
    assert third is not None
    assert "is truncated" in third
    done = nestify("verify", copy)
    assert done.code == 3
    assert done.message.startswith(f"{copy}: levels that failed verification: 3 (level3); ")
    assert "get an intact copy" in done.message
    assert [row.split()[-1] for row in done.out.splitlines()[4:7]] == ["ok", "ok", "FAILED"]


def test_a_missing_file(tmp_path: Path) -> None:
    done = nestify("verify", tmp_path / "none")
    assert done.code == 3
    assert done.out == ""
    assert "no such file" in done.message


@pytest.fixture(scope="module", params=["float16", pytest.param("bfloat16", marks=pytest.mark.long)])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A nested file in half precision, and its type; tests must not change it."""
    path = tmp_path_factory.mktemp(request.param) / "half.nested.safetensors"
    done = nestify("compress", "digits", *UNTRAINED, "--dtype", request.param, "-o", path)
    assert done.code == 0, done.err
    return path, request.param


def test_accuracy_and_fingerprints_are_those_of_what_was_stored(half: tuple[Path, str]) -> None:
    path, dtype = half
    assert all(check.off is not None and check.off < 1e-6 for check in package.verify(path).levels)
    stored = [level.top1 for level in package.read_report(path).levels]
    again = package.evaluate(path, "embedded/digits", max_images=100, workers=0)
    assert [result.top1 for result in again.levels] == stored
    manifest = open_nested_file(path).manifest
    assert {p.dtype for p in manifest.parameters} == {"F16" if dtype == "float16" else "BF16"}
    assert manifest.recipe["dtype"] == dtype


def test_half_the_bytes(digits_file: Path, half: tuple[Path, str]) -> None:
    assert open_nested_file(half[0]).layout.ends[-1] < 0.55 * open_nested_file(digits_file).layout.ends[-1]


def test_an_unknown_dtype() -> None:
    done = nestify("compress", "digits", "--dtype", "float8")
    assert done.code == 2
    assert "dtype" in done.message
