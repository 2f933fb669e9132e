"""`nestify batch`, with real runs where they matter."""

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nestify as package
from nestify.compression.batch import batch as module
from nestify.file.reader import open_nested_file
from tests.cli.driver import at_terminal, environment, finish, nestify, spawn, stored_recipe
from tests.cli.test_start import loaded_by

RECIPE = """
extends = "digits"
seed = {seed}
[matrix]
"level[1].sparsity" = {sparsities}
[data]
max_train = 64
max_val = 20
[train]
epochs = {epochs}
batch_size = 16
recalibrate_batches = 2
eval_before = false
[schedule]
fit = false
"""
LEAVE_A_FILE = "import json, shutil, sys; shutil.copy(sys.argv[1], json.load(open(sys.argv[2]))['output'])"
LONG = "a-recipe-of-a-long-name-that-says-all"


def write(path: str, epochs: float = 0, seed: int = 1, sparsities: tuple[float, ...] = (0.9, 0.95)) -> None:
    Path(path).write_text(RECIPE.format(epochs=epochs, seed=seed, sparsities=[*sparsities]))


@pytest.fixture
def quick_jobs(monkeypatch: pytest.MonkeyPatch, digits_file: Path) -> None:
    """Replace the jobs by ones that only copy a file."""
    command = (sys.executable, "-c", LEAVE_A_FILE, str(digits_file))
    monkeypatch.setattr(module, "run_batch", partial(module.run_batch, command=command))


@pytest.mark.parametrize("sparsities", [(0.95,), pytest.param((0.9, 0.95), marks=pytest.mark.long)])
def test_real_jobs_are_done_skipped_and_done_again_where_the_recipe_changed(
    sparsities: tuple[float, ...],
) -> None:
    write("few.toml", sparsities=sparsities)
    done = nestify("batch", "few.toml", "--out", "out", "--max-parallel", "2", "--json")
    assert done.code == 0, done.err
    assert {line for line in done.err.splitlines() if line.endswith("began")} == {
        f"few-level1.sparsity={sparsity}: began" for sparsity in sparsities
    }
    document = done.document
    assert (document["schema_version"], document["exit_code"], document["shard"]) == (1, 0, "1/1")
    for job, sparsity in zip(document["jobs"], sparsities, strict=True):
        path = Path("out", job["name"], job["file"])
        file = open_nested_file(path)
        assert abs(file.manifest.levels[0].achieved_sparsity - sparsity) < 1e-4
        assert job["scores"] == [level.metrics.top1 for level in file.manifest.levels]
        assert job["bytes"] == path.stat().st_size
        assert stored_recipe(path)["level"][0]["sparsity"] == sparsity
        assert "top-1" in Path("out", job["name"], "log.txt").read_text()
    again = nestify("batch", "few.toml", "--out", "out")
    assert again.code == 0
    n = len(sparsities)
    assert [line.split(": ")[1] for line in again.err.splitlines()] == ["done earlier, skipped"] * n
    assert again.out.startswith(f"{n} of {n} job{'s' * (n > 1)} done in out\n")


def test_a_job_that_missed_a_gate_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, digits_file: Path
) -> None:
    write("few.toml")
    command = (sys.executable, "-c", f"{LEAVE_A_FILE}; sys.exit(1)", str(digits_file))
    monkeypatch.setattr(module, "run_batch", partial(module.run_batch, command=command))
    first = nestify("batch", "few.toml", "--out", "out")
    assert first.code == 1
    again = nestify("batch", "few.toml", "--out", "out")
    assert again.code == 1
    assert [line.split(": ")[1] for line in again.err.splitlines()[:2]] == [
        "missed a limit earlier, skipped"
    ] * 2
    plan = nestify("batch", "few.toml", "--out", "out", "--dry-run", "--json").document
    assert [job["state"] for job in plan["jobs"]] == ["missed"] * 2
    assert nestify("batch", "few.toml", "--out", "out", "--rerun").err.count("began") == 2


@pytest.mark.long
def test_real_jobs_are_interrupted_and_resumed() -> None:
    write("long.toml", epochs=1000)
    folder = Path("out", "long-level1.sparsity=0.9")
    for how, sign in (("began", "train epoch 1"), ("resumed from its checkpoint", "resuming at step")):
        process = spawn("batch", "long.toml", "--out", "out")
        while not ((folder / "log.txt").exists() and sign in (folder / "log.txt").read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stopped = finish(process)
        assert stopped.code == 130
        assert stopped.err.startswith(f"long-level1.sparsity=0.9: {how}\n")
        assert stopped.out.startswith("0 of 2 jobs done in out\n")
        assert stopped.out.endswith("\nRun the same command to resume.\n")
        assert (folder / "digits.resume.safetensors").exists()


def test_a_failure_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.toml").write_text('[model]\nname = "test_resnet"\n[data]\npath = "nowhere"\n')
    fail = "import sys; print('nestify: nowhere: no such folder', file=sys.stderr); sys.exit(3)"
    command = (sys.executable, "-c", fail)
    monkeypatch.setattr(module, "run_batch", partial(module.run_batch, command=command))
    done = nestify("batch", "bad.toml", "--out", "out")
    assert done.code == 3
    began, ended = done.err.splitlines()
    assert began == "bad: began"
    expected = r"bad: failed after \d+\.\d s with exit code 3: nowhere: no such folder"
    assert re.fullmatch(expected, ended)
    assert done.out.endswith("\n\nbad: nowhere: no such folder\nThe log of a job is out/JOB/log.txt.\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["few.toml", "--shard", "0/4"], "--shard 0/4 is not I/N with I from 1 to N"),
        (["few.toml", "--shard", "5/4"], "--shard 5/4 is not I/N with I from 1 to N"),
        (["none.toml"], "none.toml: there is no such file"),
        (["digits", "few.toml", "few.toml"], "few.toml and few.toml both make a job few-level1.sparsity=0.9"),
    ],
)
def test_bad_usage(words: list[str], expected: str) -> None:
    write("few.toml")
    for more in ([], ["--dry-run"]):
        done = nestify("batch", *words, "--out", "out", *more)
        assert (done.code, done.out) == (2, "")
        assert expected in done.err
        assert not Path("out").exists()


def test_a_single_run_of_a_matrix_is_refused() -> None:
    write("few.toml")
    expected = "few.toml: [matrix] makes several runs of this recipe; start them with nestify batch"
    for more in ([], ["--dry-run"]):
        done = nestify("compress", "few.toml", *more)
        assert (done.code, done.message) == (2, f"{expected}, or remove it")


def test_a_dry_run_lists_the_jobs_and_writes_nothing() -> None:
    write("few.toml")
    done = nestify("batch", "few.toml", "digits", "--out", "out", "--dry-run", "--shard", "1/2")
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["2", "jobs", "in", "out,", "shard", "1/2"]
    assert rows[4:] == [["few-level1.sparsity=0.9", "new", "few.toml"], ["digits", "new", "digits"]]
    document = nestify("batch", "few.toml", "--out", "out", "--dry-run", "--json").document
    assert document["schema_version"] == 1
    assert [job["state"] for job in document["jobs"]] == ["new", "new"]
    assert [job["options"] for job in document["jobs"]] == [
        {"level[1].sparsity": 0.9},
        {"level[1].sparsity": 0.95},
    ]
    assert not Path("out").exists()


@pytest.mark.usefixtures("quick_jobs")
def test_results_as_a_table() -> None:
    write("few.toml")
    done = nestify("batch", "few.toml", "--out", "out")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "2 of 2 jobs done in out"
    assert lines[2].split("  ")[0] == "job"
    row = lines[4].split()
    assert row[:3] == ["few-level1.sparsity=0.9", "done", "0"]
    top1 = json.loads(Path("out/results.jsonl").read_text().splitlines()[0])["scores"]
    assert " ".join(row[4:-1]) == " / ".join(f"{value:.2f}" for value in top1)
    shard = nestify("batch", "few.toml", "--out", "out", "--shard", "3/3")
    assert shard.code == 0
    assert shard.out.startswith("0 of 0 jobs done in out, shard 3/3\n")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_terminal_of_any_width(width: int) -> None:
    write(f"{LONG}.toml")
    lines = at_terminal(width, "batch", f"{LONG}.toml", "--out", "out", "--dry-run")
    assert max(map(len, lines)) <= width
    names = "".join(line.split("  ")[0].strip() for line in lines)
    assert f"{LONG}-level1.sparsity=0.95" in names


def test_a_terminal_shows_the_running_jobs(digits_file: Path, tmp_path: Path) -> None:
    write("few.toml")
    slow = f"import time; time.sleep(0.7); {LEAVE_A_FILE}"
    command = (sys.executable, "-c", slow, str(digits_file))
    code = (
        "from functools import partial; import nestify.compression.batch.batch as module\n"
        f"module.run_batch = partial(module.run_batch, command={command!r})\n"
        "from nestify.cli.app import main; main()"
    )
    (tmp_path / "quick.py").write_text(code)
    lines = at_terminal(80, "batch", "few.toml", "--out", "out", program=[str(tmp_path / "quick.py")])
    assert any(line.startswith("few-level1.sparsity=0.9 ") and line.rstrip().endswith(" s") for line in lines)
    assert "few-level1.sparsity=0.9: began" in lines
    assert any(line.startswith("2 of 2 jobs done in out") for line in lines)


def test_a_dry_run_imports_no_torch() -> None:
    write("few.toml")
    assert loaded_by("batch", "few.toml", "--out", "out", "--dry-run") == "loaded: [] code: 0"


def test_from_python_nothing_is_printed(digits_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write("few.toml")
    command = (sys.executable, "-c", LEAVE_A_FILE, str(digits_file))
    result: Any = package.run_batch(["few.toml"], "out", command=command)
    assert isinstance(result, package.BatchResult)
    assert result.exit_code == 0
    assert capfd.readouterr() == ("", "")


def test_a_job_ends_when_its_leash_does() -> None:
    process = spawn(
        *("compress", "digits", "--epochs", "1000"),
        stdin=subprocess.DEVNULL,
        env=environment(NESTIFY_PARENT_PIPE="1"),
        start_new_session=True,
    )
    assert finish(process).code in (143, -signal.SIGTERM)  # signals are not deferred yet if it ends early


def test_set_applies_to_every_recipe_and_other_values_run_again(quick_jobs: None) -> None:
    write("a.toml")
    write("b.toml", seed=2)
    words = ("batch", "a.toml", "b.toml", "--out", "out", "--set", "train.epochs=2")
    assert nestify(*words, "--set", "train.lr=0.5").code == 0
    for name in ("a-level1.sparsity=0.9", "b-level1.sparsity=0.95"):
        train = json.loads(Path("out", name, "recipe.json").read_text())["train"]
        assert (train["epochs"], train["lr"]) == (2.0, 0.5)
    for lr, state in (("0.5", "done"), ("0.25", "changed")):
        planned = nestify(*words, "--set", f"train.lr={lr}", "--dry-run", "--json").document["jobs"]
        assert [job["state"] for job in planned] == [state] * 4
        assert planned[0]["options"]["train.lr"] == float(lr)
    wrong = nestify(*words, "--set", "train.lr=0", "--set", "nonsense=1")
    assert wrong.code == 2
    assert len(wrong.err.splitlines()) == 4
    assert nestify(*words, "--set", "nonsense").code == 2
