"""Wrong arguments in Python: a NestifyError with option, value and remedy, as on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nestify
from nestify.file.writer import write_nested_file
from tests.file.builders import description, small_state


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.nested.safetensors"
    write_nested_file(path, small_state(), description(3))
    return path


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda file: nestify.evaluate(file, "x", batch_size=0), ["--batch-size 0", "give 1 or more"]),
        (lambda file: nestify.evaluate(file, "x", workers=-1), ["--workers -1", "give 0 or more"]),
        (lambda file: nestify.evaluate(file, "x", seed=-1), ["seed -1", "give 0 or more"]),
        (lambda file: nestify.evaluate(file, "x", on_bad_image="no"), ["--on-bad-image no", "skip"]),
        (lambda file: nestify.evaluate(file, Path("none")), ["none", "--data"]),
        (lambda file: nestify.evaluate(file, "x", level="big"), ["big", "size-3"]),
        (lambda file: nestify.bench(file, batch_sizes=[]), ["--batch-size", "one or more"]),
        (lambda file: nestify.bench(file, threads=[]), ["--threads", "one or more"]),
        (lambda file: nestify.pick(file, []), ["--max-bytes"]),
        (lambda file: nestify.pick(file, [nestify.Limit("weight", 1)]), ["weight", "macs"]),
        (lambda file: nestify.slice_file(file, 9, "slice.safetensors"), ["9", "size-3"]),
        (lambda file: nestify.run_batch("none.toml", file.parent), ["none.toml", "no such file"]),
        (lambda file: nestify.load_recipe(file.parent / "none.toml"), ["none.toml", "no such file"]),
    ],
)
def test_the_sentence_names_value_and_remedy(
    call: Callable[[Path], Any], parts: list[str], file: Path
) -> None:
    with pytest.raises(nestify.NestifyError) as caught:
        call(file)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_problems_are_told_together(file: Path) -> None:
    with pytest.raises(nestify.NestifyError) as caught:
        nestify.evaluate(file, "x", batch_size=0, workers=-2)
    assert len(str(caught.value).splitlines()) == 2
