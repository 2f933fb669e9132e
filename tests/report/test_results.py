"""Results as Python and notebooks show them: one screen, escaped, with every class of results."""

from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import nestify
from nestify.compression.batch.jobs import Shard
from nestify.compression.batch.results import JobResult
from nestify.compression.candidates import Change, Measured
from nestify.file.reader import open_nested_file
from nestify.report.results import SCREENS
from nestify.shown import Shown
from tests.report import reports

DIGITS = Path(nestify.__file__).parent / "recipes" / "digits"


class Cells(HTMLParser):
    """Texts of a page and the names of its elements; fails if elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One result of each public function."""
    folder = tmp_path_factory.mktemp("results")
    few = {"train.epochs": 0, "train.eval_before": False, "train.recalibrate_batches": 1}
    few |= {
        "schedule.fit": False,
        "data.max_train": 100,
        "data.max_val": 50,
        "output": folder / "net.nested.safetensors",
    }
    done = nestify.compress("digits", few)
    job = JobResult(name="few-seed1", recipe="few.toml", state="done", exit_code=0, scores=[61.5, 87.25])
    made = [
        done,
        nestify.plan("digits", few),
        nestify.load(done.path),
        nestify.read_report(done.path),
        nestify.compare(nestify.read_report(done.path), nestify.read_report(done.path)),
        nestify.verify(done.path),
        nestify.bench(done.path, batch_sizes=[1], rounds=2, warmup=0),
        nestify.pick(done.path, [nestify.Limit("bytes", 1e9)]),
        nestify.evaluate(done.path, str(DIGITS), max_images=20, consensus="mean", cascade=0.5),
        nestify.slice_file(done.path, 1, folder / "slice.nested.safetensors"),
        nestify.export(done.path, 1, "timm", folder / "level1.safetensors"),
        nestify.BatchResult(folder, Shard(), (job,)),
        open_nested_file(done.path),
        nestify.write_card(done.path, folder / "card"),
        nestify.Demo("net.nested.safetensors", folder / "page", ("level1",), (1000,), (100,), 20_000_000),
        nestify.Pushed(
            "net.nested.safetensors",
            repo="me/net",
            url="https://huggingface.co/me/net",
            commit="0" * 40,
            private=False,
            file="net.nested.safetensors",
            levels=("level1",),
            license=None,
        ),
        nestify.Scan(
            model="net",
            images=64,
            original=Measured(100.0, 0.0, 90.0),
            macs=1000,
            parameters=100,
            changes=[Change("layer", "block1", 0.0, 10, 5, Measured(98.4, 0.01, 89.0))],
            notes=["A note."],
        ),
    ]
    return {type(result).__name__: result for result in made}


def subclasses(kind: type) -> Iterator[type]:
    """Yield all subclasses of a class."""
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_class_of_results_has_a_screen(results: dict[str, Any]) -> None:
    for name in nestify.__all__:
        getattr(nestify, name)  # imports the module that defines it
    shown = {kind.__name__ for kind in subclasses(Shown)}
    assert shown - {"TrainableNestedModel"} == set(SCREENS)  # it has the screen of NestedModel
    assert set(SCREENS) == set(results)


def test_a_result_is_one_screen(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    for name, result in results.items():
        lines = repr(result).splitlines()
        assert 1 <= len(lines) <= 24, name
        assert max(map(len, lines)) <= 80, name
        assert "0x" not in repr(result), name
        assert str(result) == repr(result), name


@pytest.mark.parametrize(
    "name", ["Result", "Plan", "NestedModel", "Report", "Verification", "Bench", "Pick", "Evaluation"]
)
def test_a_result_shows_a_row_for_each_level(results: dict[str, Any], name: str) -> None:
    rows = [line.split() for line in repr(results[name]).splitlines()]
    for level in ("level1", "level2", "level3"):
        assert any(level in row for row in rows), level
    page = Cells(results[name]._repr_html_())
    assert {"level1", "level2", "level3"} <= set(page.texts)
    assert "table" in page.tags


def test_numbers_are_those_of_the_result(results: dict[str, Any]) -> None:
    for level in results["Result"].manifest.levels:
        row = next(line for line in repr(results["Result"]).splitlines() if level.name in line.split())
        assert f"{level.metrics.top1:.2f}" in row.split()
    for result, name in zip(results["Evaluation"].levels, results["Evaluation"].names, strict=True):
        row = next(line for line in repr(results["Evaluation"]).splitlines() if name in line.split())
        assert f"{result.loss:.4f}" in row.split()
    assert "61.50 / 87.25" in repr(results["BatchResult"])
    assert str(results["Sliced"].path) in repr(results["Sliced"]).replace("\n", "")


def test_warnings_of_an_evaluation_are_shown(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES", "60")
    warned = replace(results["Evaluation"], warnings=["these images are few"])
    assert "warning: these images are few" in repr(warned)


def test_a_long_result_says_how_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    many = reports.report(*(reports.level(k, 60) for k in range(1, 61)))
    lines = repr(many).splitlines()
    assert len(lines) <= 30
    shown = sum(any(f"level{k}" == word for word in line.split()) for line in lines for k in range(1, 61))
    assert 15 < shown < 30
    assert lines[-1].endswith("more lines)")
    assert Cells(many._repr_html_()).texts.count("level60") == 1


class ZMQInteractiveShell:
    """What rich recognizes a notebook by: a shell of this name."""


def test_text_in_a_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    expected = repr(reports.report())
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    assert repr(reports.report()) == expected
    assert capsys.readouterr() == ("", "")


def test_texts_of_a_file_are_escaped() -> None:
    text, page = repr(reports.hostile()), reports.hostile()._repr_html_()
    for hidden in ("\x1b", "\x00", "\u202e"):
        assert hidden not in text
        assert hidden not in page
    assert Cells(page).tags <= {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
