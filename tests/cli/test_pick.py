"""`nestify pick`: the picked level as one word for a shell, and why no level was picked."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from nestify.evaluation import bench as benching
from tests.cli.driver import environment, nestify
from tests.cli.test_start import loaded_by

QUICK = ("--warmup", "0", "--rounds", "3")


@pytest.fixture
def file(digits_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(digits_file, tmp_path / "own.nested.safetensors"))


def bytes_of(path: Path) -> list[int]:
    return [level["prefix_bytes"] for level in nestify("report", path, "--json").document["levels"]]


def test_one_word_on_stdout_and_the_table_on_stderr(digits_file: Path) -> None:
    size = bytes_of(digits_file)[1]
    done = nestify("pick", digits_file, "--max-bytes", str(size))
    assert (done.code, done.out) == (0, "level2\n")
    lines = done.err.splitlines()
    assert lines[0].startswith(f"{digits_file}: --max-bytes ")
    assert [line.split("  ")[-1] for line in lines[4:7]] == ["meets all", "picked", "misses --max-bytes"]
    assert nestify("pick", digits_file, "--max-bytes", str(size - 1)).out == "level1\n"


def test_in_a_shell(digits_file: Path) -> None:
    script = (
        'level=$("$1" -m nestify pick "$2" --max-bytes 1GB --max-macs 1G --max-params 1M --min-top1 50) &&'
        '"$1" -m nestify slice "$2" --level $level -o slice.safetensors --json'
    )
    words = ["sh", "-c", script, "sh", sys.executable, str(digits_file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    top1 = [level["top1"] for level in nestify("report", digits_file, "--json").document["levels"]]
    best = 1 + top1.index(max(top1))  # the lowest of the best levels
    assert len(bytes_of(Path("slice.safetensors"))) == best


def test_json(digits_file: Path) -> None:
    sizes = bytes_of(digits_file)
    words = ("pick", digits_file, "--max-bytes", str(sizes[0]), "--json")
    done = nestify(*words)
    assert (done.code, done.err) == (0, "")
    document = done.document
    assert (document["schema_version"], document["file"]) == (1, str(digits_file))
    assert document["limits"] == {"bytes": sizes[0]}
    assert document["picked"] == {"level": 1, "name": "level1"}
    assert document["measurement"] is None
    assert [level["bytes"] for level in document["levels"]] == sizes
    assert [level["misses"] for level in document["levels"]] == [[], ["bytes"], ["bytes"]]
    failed = nestify(*words, "--min-top1", "100%")
    assert (failed.code, failed.document["picked"]) == (1, None)


def test_no_level_meets_them(digits_file: Path) -> None:
    size = bytes_of(digits_file)[0]
    done = nestify("pick", digits_file, "--max-bytes", "1kB")
    assert (done.code, done.out) == (1, "")
    assert done.message.startswith(
        f"{digits_file}: no level meets --max-bytes 1kB (level1 comes nearest with"
    )
    done = nestify("pick", digits_file, "--max-bytes", str(size), "--min-top1", "99")
    assert done.code == 1
    assert (
        "each limit is met by some level, but no level meets all: level1 misses --min-top1 99%"
        in done.message
    )


def test_the_latency_is_measured_here(digits_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "bench", partial(benching.bench, rounds=3, warmup=0))
    words = ("pick", digits_file, "--max-latency", "1000s", "--batch-size", "3", "--threads", "1", "--json")
    document = nestify(*words).document
    assert document["limits"] == {"latency": 1000}
    assert document["picked"] is not None
    assert document["measurement"]["batch_size"] == 3
    measured = [level["median_seconds"] for level in document["measurement"]["levels"]]
    assert [level["latency"] for level in document["levels"]] == measured
    done = nestify("pick", digits_file, "--max-latency", "0.001us")
    assert (done.code, done.out) == (1, "")
    assert "no level meets --max-latency 0.001us" in done.message
    assert ", batch 1" in done.err.splitlines()[-2]


def test_a_saved_latency(file: Path) -> None:
    words = ("pick", file, "--max-latency", "1000s", "--saved", "--json")
    refused = nestify(*words)
    assert refused.code == 3
    assert "no latency of this machine at batch 1 and 1 thread" in refused.message
    assert "`nestify bench` with --save --batch-size 1 --threads 1, or leave --saved out" in refused.message
    done = nestify("bench", file, *QUICK, "--save", "--json").document
    saved = [level["median_seconds"] for level in done["measurements"][0]["levels"]]
    document = nestify(*words).document
    assert [level["latency"] for level in document["levels"]] == saved

    nestify("bench", file, *QUICK, "--batch-size", "1", "--level", "3", "--save")
    document = nestify(*words).document
    assert [level["misses"] for level in document["levels"]] == [["latency"], ["latency"], []]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "no limit is given; give one or more of --max-latency, "),
        (("--saved",), "no limit is given"),
        (("--max-latency", "10"), "--max-latency '10' is not understood; give 10ms, 0.5s or 800us"),
        (("--max-latency", "0ms"), "--max-latency '0ms' is not above 0 and finite; give 10ms"),
        (("--max-bytes", "-1"), "--max-bytes '-1' is not understood; give 4MB or 4MiB"),
        (("--max-macs", "nan"), "--max-macs 'nan' is not understood; give 1G or 300M"),
        (("--max-params", "2MB"), "--max-params '2MB' is not understood; give 2M"),
        (("--min-top1", "0"), "--min-top1 '0' is not above 0 and finite; give a percentage"),
        (("--min-top1", "101"), "--min-top1 101 is above 100 percent"),
        (
            ("--max-bytes", "1GB", "--engine", "--threads", "2"),
            "--threads, --engine: only a limit on latency",
        ),
        (
            ("--min-top1", "1", "--saved"),
            "--saved: only a limit on latency needs a measurement; add --max-lat",
        ),
        (("--max-latency", "1s", "--batch-size", "0"), "--batch-size 0 is not from 1 to 65536"),
        (("--max-latency", "1s", "--threads", "-1"), "--threads -1 is not from 1 to 1024"),
    ],
)
def test_bad_usage(words: tuple[str, ...], expected: str, digits_file: Path) -> None:
    done = nestify("pick", digits_file, *words)
    assert (done.code, done.out) == (2, "")
    assert expected in done.message


def test_all_problems_are_reported_at_once(digits_file: Path) -> None:
    done = nestify("pick", digits_file, "--max-latency", "10", "--max-bytes", "x")
    assert done.code == 2
    assert "--max-latency '10'" in done.err
    assert "--max-bytes 'x'" in done.err


def test_without_a_latency_torch_is_not_imported(digits_file: Path) -> None:
    assert loaded_by("pick", str(digits_file), "--max-bytes", "1GB") == "loaded: [] code: 0"
