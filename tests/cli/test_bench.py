"""`nestify bench`, and its results in `nestify report`. No test expects a number of seconds."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import nestify as package
from tests.cli.driver import at_terminal, nestify
from tests.file.loopback import serve

QUICK = ("--warmup", "0", "--rounds", "3")


@pytest.fixture
def file(digits_file: Path, tmp_path: Path) -> Path:
    """A copy in the test's own folder, where measurements may be saved."""
    return Path(shutil.copy(digits_file, tmp_path / "own.nested.safetensors"))


def columns_of(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_table(digits_file: Path) -> None:
    done = nestify("bench", digits_file, *QUICK, "--batch-size", "1,4")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{digits_file}, test_resnet"
    assert re.fullmatch(
        r"Measured on .+, \d+ cores, .+: 1 thread, float32, torch .+, 3 rounds, \d{4}-\d\d-\d\d", lines[2]
    )
    assert columns_of(lines[3]) == [
        *("level", "name", "batch", "median ms", "p95 ms", "images/s", "dense MACs over full"),
        *("latency over full", "quartiles of ratio"),
    ]
    rows = [columns_of(line) for line in lines[5:11]]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (str(level), f"level{level}", batch) for batch in ("1", "4") for level in (1, 2, 3)
    ]
    assert all(row[6] == "1.000" for row in rows)  # masked: the MACs of the full level
    assert [row[7:] for row in (rows[2], rows[5])] == [["1.000", "-"]] * 2
    assert (
        "Masked weights save time only on the sparse engine: nestify bench --engine. Dense kernels multiply "
        "with the zeros, and level1, level2 should take about as long as the full level."
    ) in lines
    assert lines[-1].startswith("Latency over full is the median of the ratios")
    assert "noise" not in done.out  # masked levels are expected to take equally long
    assert list(Path().iterdir()) == []


def test_json(digits_file: Path) -> None:
    words = ("--level", "level1", "--batch-size", "2", "--threads", "1,2", "--json")
    threads = torch.get_num_threads()
    document = nestify("bench", digits_file, *QUICK, *words).document
    assert torch.get_num_threads() == threads
    assert (document["schema_version"], document["file"], document["saved"]) == (1, str(digits_file), None)
    first, second = document["measurements"]
    assert (first["threads"], second["threads"]) == (1, 2)
    assert first["machine"]["torch"] == torch.__version__
    core, full = first["levels"]
    assert (core["level"], core["name"], full["name"]) == (1, "level1", "level3")
    assert core["images_per_second"] == pytest.approx(2 / core["median_seconds"])
    assert core["median_seconds"] <= core["p95_seconds"]
    assert core["dense_macs_over_full"] == 1
    assert (full["over_full"], full["over_full_quartiles"]) == (1, [1, 1])


def test_what_is_saved_is_in_the_report(file: Path) -> None:
    before = nestify("report", file)
    done = nestify("bench", file, *QUICK, "--batch-size", "1,4", "--save")
    assert (done.code, done.err) == (0, f"Saved: {file.with_name('own.bench.json')}\n")
    measured = done.out.splitlines()[2:11]
    lines = nestify("report", file).out.splitlines()
    at = lines.index(measured[0])
    assert lines[at : at + len(measured)] == measured
    assert lines[: at - 1] == before.out.splitlines()[: at - 1]
    assert sum("only on the sparse engine: nestify bench --engine" in line for line in lines) == 1
    markdown = nestify("report", file, "--format", "markdown").out
    assert f"\n\n{measured[0]}\n\n| level | name" in markdown

    document = nestify("report", file, "--json").document
    assert [made["batch_size"] for made in document["measured"]] == [1, 4]
    assert [made.batch_size for made in package.read_report(file).measured] == [1, 4]


def test_measuring_again_replaces(file: Path) -> None:
    words = ("bench", file, "--warmup", "0", "--save", "--json")
    nestify(*words, "--batch-size", "1,4", "--rounds", "3")
    nestify(*words, "--batch-size", "4", "--rounds", "5")
    measured = nestify("report", file, "--json").document["measured"]
    assert sorted((made["batch_size"], made["rounds"]) for made in measured) == [(1, 3), (4, 5)]


def test_the_nested_file_is_not_changed(file: Path, digits_file: Path) -> None:
    assert nestify("bench", file, *QUICK, "--save").code == 0
    assert file.read_bytes() == digits_file.read_bytes()
    assert nestify("verify", file).code == 0


def test_a_report_next_to_measurements_that_cannot_be_used(file: Path, digits_file: Path) -> None:
    plain = nestify("report", digits_file).out.rstrip("\n")
    saved = file.with_name("own.bench.json")
    saved.write_text('{"schema_version": 1, "evil\\u001b[2J": 1}')
    done = nestify("report", file)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(plain + "\n")
    assert done.out.splitlines()[-1].startswith(f"{saved}: holds no measurements that can be read (")
    assert "\x1b" not in done.out
    document = nestify("report", file, "--json").document
    assert document["measured"] == []
    refused = nestify("bench", file, *QUICK, "--save")
    assert (refused.code, refused.out) == (3, "")
    assert refused.message.startswith(f"{saved}: holds no measurements")

    saved.unlink()
    assert nestify("bench", file, *QUICK, "--save").code == 0
    assert nestify("slice", digits_file, "--level", "2", "-o", file).code == 0
    other = nestify("report", file)
    assert other.code == 0
    assert other.out.splitlines()[-1].startswith(f"{saved}: holds measurements of another file")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--batch-size", "0"), "--batch-size '0' is not understood; give whole numbers above 0"),
        (("--batch-size", "1,,2"), "--batch-size '1,,2' is not understood"),
        (("--batch-size", "100000"), "--batch-size 100000 is not from 1 to 65536"),
        (("--threads", "many"), "--threads 'many' is not understood"),
        (("--seconds", "nan"), "--seconds nan is not from 0 to 86400 seconds"),
        (("--rounds", "1"), "--rounds 1 is not from 2"),
        (("--level", "tiny"), "has no level 'tiny'"),
        (("--device", "toaster"), "device = 'toaster' is not available here"),
    ],
)
def test_bad_usage(words: tuple[str, ...], expected: str, digits_file: Path) -> None:
    done = nestify("bench", digits_file, *words)
    assert (done.code, done.out) == (2, "")
    assert expected in done.message


def test_an_address_keeps_no_measurements(digits_file: Path) -> None:
    with serve(digits_file.read_bytes()) as server:
        done = nestify("bench", server.url, *QUICK, "--save")
        assert (done.code, done.out) == (3, "")
        assert done.message == (
            f"{server.url}: measurements are saved only next to a local file; leave --save out or download it"
        )
        measured = nestify("bench", server.url, *QUICK, "--batch-size", "1", "--level", "3", "--json")
        assert (measured.code, measured.document["file"]) == (0, server.url)
        assert nestify("pick", server.url, "--max-bytes", "1kB").code == 1


@pytest.mark.parametrize("width", [40, pytest.param(60, marks=pytest.mark.long), 140])
def test_it_fits_the_terminal(width: int, file: Path) -> None:
    lines = at_terminal(width, "bench", file, *QUICK, "--batch-size", "1,4")
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    assert len([line for line in lines if "level3" in line.split()]) == 2
    assert ("(columns that do not fit: " in text) == (width < 140)
