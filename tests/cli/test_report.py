"""`nestify report`: formats, output files, and terminals of any width."""

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from nestify.file.reader import open_nested_file
from tests.cli.driver import QUICK, TWO_STEPS, at_terminal, nestify, stored_recipe

ALL_COLUMNS = [
    *("level", "name", "sparsity", "parameters", "non-zero", "dense MACs", "effective MACs", "prefix MiB"),
    *("top-1 %", "top-5 %"),
]


def columns_of(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_table(digits_file: Path) -> None:
    done = nestify("report", digits_file)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "test_resnet, 10 classes, input 3x32x32"
    assert columns_of(lines[2]) == ALL_COLUMNS
    assert set(lines[3]) == {"─"}
    size = digits_file.stat().st_size
    assert columns_of(lines[6])[:8] == [
        *("3", "level3", "0.0000", "374k", "374k", "4.1M", "4.1M"),
        f"{size / 2**20:.2f}",
    ]
    assert any("top-1 100.00 %" in line for line in lines[7:])
    assert any("save time only on the sparse engine" in line for line in lines[7:])


def test_json(digits_file: Path) -> None:
    document = nestify("report", digits_file, "--format", "json").document
    assert document == nestify("report", digits_file, "--json").document
    assert document["schema_version"] == 1
    manifest = open_nested_file(digits_file).manifest
    assert [level["top1"] for level in document["levels"]] == [
        level.metrics.top1 for level in manifest.levels
    ]
    assert "layers" not in document["levels"][0]


def test_markdown(digits_file: Path) -> None:
    text = nestify("report", digits_file, "--format", "markdown").out
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.strip("|").split("|")] == ALL_COLUMNS
    assert re.fullmatch(r"\|( -+: \|| :-+ \|)+", rule)
    assert len(rows) == 3
    assert "\n\n\n" not in text


def test_layers(digits_file: Path) -> None:
    lines = nestify("report", digits_file, "--layers").out.splitlines()
    [row] = [line for line in lines if line.startswith("fc.weight")]
    document = nestify("report", digits_file, "--layers", "--json").document
    layers = [level["layers"][-1] for level in document["levels"]]
    assert columns_of(row) == [
        *("fc.weight", "960", "960"),
        *(f"{layer['kept'] / 960:.4f}" for layer in layers),
    ]
    assert layers[-1]["kept"] == 960


@pytest.mark.parametrize("form", ["table", "json", "markdown", "html"])
def test_into_a_file(form: str, digits_file: Path) -> None:
    printed = nestify("report", digits_file, "--format", form)
    written = nestify("report", digits_file, "--format", form, "-o", "report.txt")
    assert (written.code, written.out, written.err) == (0, "", "Written: report.txt\n")
    assert Path("report.txt").read_text() == printed.out


def test_html(digits_file: Path) -> None:
    done = nestify("report", digits_file, "--format", "html")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("<!DOCTYPE html>\n")
    for expected in ("test_resnet", "level1", "layer1.0.conv1.weight", "train.recalibrate_batches", "<svg"):
        assert expected in done.out


def test_html_has_the_curves_of_the_run_next_to_the_file() -> None:
    assert nestify("compress", "digits", *TWO_STEPS, "-o", "a.nested.safetensors").code == 0
    page = nestify("report", "a.nested.safetensors", "--format", "html").out
    assert "Training</h2>" in page
    assert page.count("<polyline") == 4 * 3
    Path("a.metrics.jsonl").rename("b.metrics.jsonl")
    Path("a.nested.safetensors").rename("b.nested.safetensors")
    nestify("compress", "digits", *QUICK, "-o", "b2.nested.safetensors")
    Path("b2.nested.safetensors").replace("b.nested.safetensors")
    page = nestify("report", "b.nested.safetensors", "--format", "html").out
    assert "b.metrics.jsonl is the log of another run" in page
    assert "<polyline" not in page


def test_html_with_gates_and_changes(digits_file: Path) -> None:
    Path("gates.toml").write_text("[gates]\nmax_params = 1\n")
    plain = nestify("report", digits_file, "--format", "html").out
    done = nestify(
        "report", digits_file, "--format", "html", "--check", "gates.toml", "--compare", digits_file
    )
    assert done.code == 1  # the page is printed although a gate is missed
    for expected in ("Gates</h2>", "What changed</h2>"):
        assert expected in done.out
        assert expected not in plain


def test_html_of_a_stored_report_is_refused(digits_file: Path) -> None:
    nestify("report", digits_file, "--json", "-o", "stored.json")
    done = nestify("report", "stored.json", "--format", "html")
    assert (done.code, done.out) == (2, "")
    assert done.message.startswith(
        "stored.json: a stored report lacks some of what --format html shows; give "
    )


def test_where_the_bytes_are(digits_file: Path) -> None:
    """Sizes agree with those that the stock safetensors library reads."""
    document = nestify("report", digits_file, "--layers", "--json").document
    with safe_open(digits_file, "np") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    kinds = {"values": "values", "positions": "entry", "private": "private", "padding": "pad"}
    for level in document["levels"]:
        own = {name: size for name, size in sizes.items() if name.startswith(f"level{level['level']}/")}
        for kind, prefix in kinds.items():
            assert level["chunk"][kind] == sum(own[name] for name in own if name.split("/")[1] == prefix)
        tensor = level["tensors"]["layer4.0.conv1.weight"]
        assert tensor == sum(own[name] for name in own if name.endswith("/layer4.0.conv1.weight"))
    everything = sum(sum(level["chunk"].values()) for level in document["levels"])
    assert document["header_bytes"] + everything == digits_file.stat().st_size


def test_json_shows_how_the_file_was_made(digits_file: Path) -> None:
    document = nestify("report", digits_file, "--json").document
    manifest = open_nested_file(digits_file).manifest
    assert document["recipe"] == stored_recipe(digits_file)
    assert (document["seed"], document["source_sha256"]) == (manifest.seed, manifest.source_sha256)
    assert document["class_names"] == [str(digit) for digit in range(10)]
    assert document["hierarchy"] == []
    assert (document["levels"][0]["temperature"], document["levels"][0]["consensus"]) == (None, [])
    assert "tensors" not in document["levels"][0]


# At a terminal


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_it_fits_the_terminal(width: int, digits_file: Path) -> None:
    lines = at_terminal(width, "report", digits_file, "--layers")
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    rows = [line for line in lines if "level2" in line.split()]
    assert len(rows) >= 1
    for kept in ("MiB", "top-1", "level3"):
        assert kept in text
    assert ("(columns that do not fit: " in text) == (width < 140)


def test_at_80_columns(digits_file: Path) -> None:
    lines = at_terminal(80, "report", digits_file)
    assert lines[2].split() == ["dense", "effective", "prefix", "top-1", "top-5"]
    assert lines[3].split() == ["level", "name", "sparsity", "non-zero", "MACs", "MACs", "MiB", "%", "%"]
    assert columns_of(lines[7])[:3] == ["3", "level3", "0.0000"]
    assert lines[8] == "(columns that do not fit: parameters)"


def test_at_140_columns_it_is_as_in_a_pipe(digits_file: Path) -> None:
    assert at_terminal(140, "report", digits_file) == nestify("report", digits_file).out.split("\n")


def test_progress_fits_a_narrow_terminal() -> None:
    lines = at_terminal(60, "compress", "digits", *TWO_STEPS)
    shown = lines[: lines.index("Next:")]  # the commands after it can be copied only if they are not wrapped
    assert max(map(len, shown)) <= 60
    text = "\n".join(lines)
    assert "…" not in text
    assert "train ━━━━" in text  # the bar, which is removed when the training is over
    for expected in (
        "training the levels",
        "train epoch 1 (2/2 steps): loss ",
        "Written: digits.nested.safetensors",
    ):
        assert expected in text
