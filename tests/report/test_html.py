"""The page: well-formed, complete, self-contained, and no text of a file becomes markup."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from nestify.file.history import History
from nestify.file.summary import Report, read_report
from nestify.file.writer import write_nested_file
from nestify.report.html.page import PageSection, html_page
from nestify.report.sheet import Column, Sheet, settings
from nestify.report.table import report_notes, report_table
from tests.file.builders import description, small_state
from tests.report import reports

VOID = {"meta", "link", "br", "img", "input", "hr"}
TAGS = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "nav", "main", "section"),
    *("h1", "h2", "p", "a", "ul", "li", "dl", "dt", "dd", "div", "span", "details", "summary"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "desc", "g", "line", "polyline", "rect", "circle", "text"),
}
REPORTS = [reports.report, reports.with_classes, reports.hostile, reports.large]


class Page(HTMLParser):
    """The elements and texts of a page; fails if elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def texts_in(self, tag: str) -> list[str]:
        """Return the texts directly in elements of a kind."""
        return [text for inside, text in self.texts if inside == tag]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(params=REPORTS, ids=lambda make: make.__name__)
def made(request: pytest.FixtureRequest) -> Report:
    make: Callable[[], Report] = request.param
    return make()


def test_it_needs_nothing_else(made: Report) -> None:
    page = Page(html_page(made))
    assert {tag for tag, _ in page.tags} <= TAGS
    for _, attributes in page.tags:
        assert not {"src", "srcset", "onerror", "onload", "onclick", "action"} & attributes.keys()
        for name in ("href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:,"))
    [style] = page.texts_in("style")
    assert not re.search(r"url\(|@import|http", style)
    [policy] = [tag["content"] for tag in page.attributes("meta") if "http-equiv" in tag]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_it_names_every_level_and_layer(made: Report) -> None:
    page = Page(html_page(made))
    cells = {*page.texts_in("th"), *page.texts_in("td")}
    assert {level.name for level in made.levels} <= cells
    titles = {attributes.get("title") for attributes in page.attributes("th")}
    assert {layer.name for layer in made.levels[0].layers} <= titles


def test_its_table_is_the_same_as_at_a_terminal() -> None:
    report = reports.with_classes()
    page = Page(html_page(report))
    sheet = report_table(report)
    titles = [column.title for column in sheet.columns]
    assert page.texts_in("th")[: len(titles)] == titles
    cells = [column.cells[1] for column in sheet.columns[1:]]
    assert cells == page.texts_in("td")[len(cells) : 2 * len(cells)]
    assert set(report_notes(report)) <= set(page.texts_in("p"))


def test_it_is_accessible(made: Report) -> None:
    page = Page(html_page(made))
    assert page.attributes("html") == [{"lang": "en"}]
    assert len(page.attributes("h1")) == 1
    assert len(page.attributes("caption")) == len(page.attributes("table"))
    assert all(tag["scope"] in ("row", "col") for tag in page.attributes("th"))
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(set(ids)) == len(ids)
    targets = [tag["href"] for tag in page.attributes("a")]
    assert {f"#{name}" for name in ids} >= set(targets)
    drawn = [tag for tag in page.attributes("svg") if tag.get("role") == "img"]
    assert len(drawn) == 2
    for tag in drawn:
        assert set(str(tag["aria-labelledby"]).split()) <= set(ids)


def test_nothing_becomes_markup() -> None:
    text = html_page(reports.hostile())
    page = Page(text)
    assert text.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]|&#8238;|&#x202e;", text)
    assert "49" not in page.texts_in("td")  # {{ 7 * 7 }} is not rendered as a template
    shown = reports.HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\x00")
    shown = shown.replace("\x1b", "\\x1b").replace("\n", "\\x0a")
    assert page.texts_in("h1") == [shown]
    assert page.texts_in("dt").count(shown) == 2  # a coarse class, an option of the recipe
    assert page.texts_in("dd").count(shown) == 3  # the schedule, the option's value, the hash


def test_a_hostile_file(tmp_path: Path) -> None:
    """Hostile texts that the reader accepts, in a recipe that is nested as deeply as it accepts."""
    nest: Any = reports.HOSTILE
    for _ in range(240):
        nest = [nest]
    content = description(3, recipe={reports.HOSTILE: reports.HOSTILE, "deep": {"nest": nest}})
    levels = [
        level.model_copy(update={"name": f"{reports.PRINTABLE}{k}"}) for k, level in enumerate(content.levels)
    ]
    model = content.model.model_copy(update={"class_names": [reports.HOSTILE, "</script>"]})
    path = tmp_path / "small.safetensors"
    write_nested_file(path, small_state(), content.model_copy(update={"levels": levels, "model": model}))
    report = read_report(path)
    json.dumps(report.to_dict(layers=True), indent=2)
    page = Page(html_page(report))
    assert {tag for tag, _ in page.tags} <= TAGS
    assert f"{reports.PRINTABLE}2" in page.texts_in("td")


def test_sections() -> None:
    sheet = Sheet([Column("gate", [reports.PRINTABLE], is_text=True)], title=reports.HOSTILE)
    sections = [PageSection("gates", "Gates", [sheet], ["A <note>."]), PageSection("latency", "Latency")]
    page = Page(html_page(reports.report(), sections))
    assert "Gates" in page.texts_in("h2")
    assert "Gates" in page.texts_in("a")
    assert "Latency" not in page.texts_in("h2")
    assert "A <note>." in page.texts_in("p")
    assert reports.PRINTABLE in page.texts_in("th")
    assert {tag for tag, _ in page.tags} <= TAGS


def test_options_are_written_as_set_takes_them() -> None:
    recipe: dict[str, Any] = {
        "a": {"b": 0.5, "c": "x"},
        "level": [{"width": None}, {}],
        "list": [1, "é"],
        "no": [],
    }
    assert list(settings(recipe)) == [
        ("a.b", "0.5"),
        ("a.c", "x"),
        ("level[1].width", "null"),
        ("level[2]", "{}"),
        ("list", '[1, "é"]'),
        ("no", "[]"),
    ]
    assert list(settings({})) == []


def test_classes_and_calibration() -> None:
    page = Page(html_page(reports.with_classes()))
    assert page.texts_in("summary")[0] == "kind: 2 classes, predicted by level1"
    assert ("dt", "tree") in page.texts
    assert ("dd", "maple, oak") in page.texts
    assert ("dd", "trout, carp") in page.texts
    assert "Calibration" in page.texts_in("h2")
    cells = page.texts_in("td")
    assert cells[cells.index("1.500") :][:6] == ["1.500", "1.000", "-", "0.500", "0.250", "0.750"]
    assert "Calibration" not in Page(html_page(reports.report())).texts_in("h2")


def test_levels_that_were_not_evaluated() -> None:
    blind = [reports.level(k, 2, top1=None, top1_before=None) for k in (1, 2)]
    page = Page(html_page(reports.report(*blind, original={})))
    assert "No level was evaluated." in page.texts_in("p")
    assert not [tag for tag in page.attributes("svg") if tag.get("role") == "img"]
    page = Page(html_page(reports.report(blind[0], reports.level(2, 2))))
    assert "Not evaluated: level1." in page.texts_in("p")
    without = [reports.level(k, 2, dense_macs=None, effective_macs=None) for k in (1, 2)]
    page = Page(html_page(reports.report(*without)))
    assert len([tag for tag in page.attributes("svg") if tag.get("role") == "img"]) == 1
    assert any(
        text.startswith("The MACs of the evaluated levels are not known") for text in page.texts_in("p")
    )


def test_training_curves() -> None:
    made = reports.with_classes()
    page = Page(html_page(made, history=reports.history(2)))
    assert "Training" in page.texts_in("h2")
    assert {tag for tag, _ in page.tags} <= TAGS
    drawn = [tag for tag in page.attributes("svg") if tag.get("role") == "img"]
    assert len(drawn) == 2 + 4
    assert len(page.attributes("polyline")) == 4 * 2
    assert "level2: loss 0.6667 after epoch 3" in page.texts_in("title")
    assert "level2: top-1 45.00 % after epoch 3" in page.texts_in("title")
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(set(ids)) == len(ids)


def test_a_log_that_cannot_be_used_is_named() -> None:
    page = Page(
        html_page(reports.report(), history=History(problem=f"net.metrics.jsonl {reports.PRINTABLE}"))
    )
    assert "Training" in page.texts_in("h2")
    assert f"net.metrics.jsonl {reports.PRINTABLE}" in page.texts_in("p")
    assert "Training" not in Page(html_page(reports.report())).texts_in("h2")


def test_cells_name_their_columns_for_narrow_windows() -> None:
    made = reports.hostile()
    page = Page(html_page(made))
    titles = [column.title for column in report_table(made).columns]
    cells = [*page.attributes("th"), *page.attributes("td")]
    assert {cell["data-title"] for cell in cells if "data-title" in cell} >= set(titles)


def test_densities() -> None:
    page = Page(html_page(reports.report()))
    styles = [tag["style"] for tag in page.attributes("td") if "style" in tag]
    assert styles == ["--density:50.0%", "--density:100.0%"]
    none = reports.report(*(reports.level(k, 2, names=()) for k in (1, 2)))
    assert "The file lists no layers." in Page(html_page(none)).texts_in("p")


# Colours


def themes() -> list[dict[str, tuple[float, ...]]]:
    """Return the colours of the light and the dark style by name, as red, green and blue in [0, 1]."""
    style = files("nestify.report.html").joinpath("templates", "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = [
        {
            name: tuple(int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4))
            for name, digits in re.findall(r"--(\w+): #(\w{6});", block)
        }
        for block in blocks
    ]
    assert len(colours) == 2
    assert colours[0].keys() == colours[1].keys()
    return colours


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the contrast ratio as WCAG 2 defines it."""

    def luminance(colour: tuple[float, ...]) -> float:
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_contrast(theme: dict[str, tuple[float, ...]]) -> None:
    for text in ("ink", "muted", "link"):
        assert contrast(theme[text], theme["paper"]) >= 4.5
    for percent in range(0, 101, 5):  # as color-mix in srgb mixes the two
        pairs = zip(theme["heat"], theme["paper"], strict=True)
        cell = tuple((percent * heat + (100 - percent) * paper) / 100 for heat, paper in pairs)
        assert contrast(theme["ink"], cell) >= 4.5
    for drawn in ("effective", "dense", "values", "positions", "private", "other"):
        assert contrast(theme[drawn], theme["paper"]) >= 3
