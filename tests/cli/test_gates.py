"""Gates and comparisons on the command line: tables, JSON, exit codes."""

import json
from pathlib import Path

import pytest

from nestify.file.summary import read_report
from tests.cli.driver import QUICK, nestify

HOLDS = "[gates]\nmin_top1 = 0\nmax_bytes = '1GB'\n"
FAILS = "[gates]\nmax_bytes = '200kB'\n"


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    return tmp_path / "gates.toml"


def test_check(digits_file: Path, gates: Path) -> None:
    gates.write_text(HOLDS)
    done = nestify("report", digits_file, "--check", gates)
    assert (done.code, done.err) == (0, "")
    assert done.out.count(" ok\n") == 6
    gates.write_text(FAILS)
    done = nestify("report", digits_file, "--check", gates)
    sizes = [level.prefix_bytes for level in read_report(digits_file).levels]
    assert [size > 200_000 for size in sizes] == [False, True, True]
    assert done.code == 1
    assert done.out.count("MISSED") == 2
    assert done.message == (
        f"{digits_file}: gates were missed: max_bytes of level 2 (level2): {sizes[1]:,}, limit 200,000; "
        f"max_bytes of level 3 (level3): {sizes[2]:,}, limit 200,000"
    )


@pytest.mark.parametrize(("text", "code"), [(HOLDS, 0), (FAILS, 1)])
def test_check_in_json_and_to_a_file(
    text: str, code: int, digits_file: Path, gates: Path, tmp_path: Path
) -> None:
    gates.write_text(text)
    done = nestify("report", digits_file, "--check", gates, "--json")
    assert done.code == code
    assert done.document["passed"] == (code == 0)
    assert {row["state"] for row in done.document["gates"]} >= {"met" if code == 0 else "missed"}
    output = tmp_path / "report.md"
    done = nestify("report", digits_file, "--check", gates, "--format", "markdown", "-o", output)
    assert done.code == code
    assert "| gate" in output.read_text()  # the report is written although a gate is missed


def test_baseline(digits_file: Path, gates: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "old.json"
    baseline.write_text(nestify("report", digits_file, "--json").out)
    gates.write_text("[gates]\nbaseline = 'old.json'\nmax_regression = 0\n")
    assert nestify("report", digits_file, "--check", gates).code == 0
    better = json.loads(baseline.read_text())
    better["levels"][0]["top1"] += 0.5
    baseline.write_text(json.dumps(better))
    done = nestify("report", digits_file, "--check", gates)
    assert done.code == 1
    assert "a gate was missed: max_regression of level 1 (level1): 0.50 points" in done.message
    gates.write_text("[gates]\nmax_regression = 0\n")
    assert nestify("report", digits_file, "--check", gates).code == 2
    assert nestify("report", digits_file, "--check", gates, "--compare", baseline).code == 1


def test_compare(digits_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.nested.safetensors"
    assert nestify("compress", "digits", *QUICK, "--levels", "0.9,0.8,0", "-o", other).code == 0
    done = nestify("report", other, "--compare", digits_file, "--layers")
    assert (done.code, done.err) == (0, "")
    assert f"Changes are from {digits_file} to {other}." in done.out
    assert "-0.05" in done.out  # the core level's sparsity
    assert "conv1.0.weight" in done.out
    document = nestify("report", other, "--compare", digits_file, "--json").document
    change = document["comparison"]["levels"][0]["sparsity"]["change"]
    assert change == pytest.approx(-0.05, abs=1e-3)
    text = nestify("report", other, "--compare", digits_file, "--format", "markdown").out
    assert "| :----- | " in text


def test_gates_of_a_recipe_decide_the_exit_code(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('extends = "digits"\noutput = "d.nested.safetensors"\n[gates]\nmax_bytes = "200kB"\n')
    done = nestify("compress", recipe, *QUICK)
    assert done.code == 1
    assert done.out.count("MISSED") == 2
    assert Path("d.nested.safetensors").exists()
    done = nestify("compress", recipe, *QUICK, "--json", "--set", "gates.max_bytes=10MB")
    assert done.code == 0
    assert done.document["passed"]


def test_refusals(digits_file: Path, gates: Path) -> None:
    gates.write_text("[gates]\nmin_top1 = 5\n[gates.level.watch]\nmin_top1 = 3\n")
    done = nestify("report", digits_file, "--check", gates)
    assert done.code == 2
    assert "gates.level.watch" in done.message
    assert nestify("report", digits_file, "--check", "none.toml").code == 2
    assert nestify("report", digits_file, "--compare", "none.nested.safetensors").code == 3
    done = nestify("compress", "digits", *QUICK, "--set", "gates.baseline=none.json")
    assert done.code == 3
    assert "none.json: cannot be read" in done.message
    assert not Path("digits.metrics.jsonl").exists()  # before any work
