"""Jobs that are done, fail, are cut off and go on; how many run at once; what is left in the folder."""

import fcntl
import json
import os
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nestify.compression.batch.batch import plan_batch
from nestify.compression.batch.jobs import Job
from nestify.compression.batch.results import JobResult
from nestify.compression.batch.runner import BatchObserver
from nestify.errors import OutputError, RecipeError
from tests.compression.batch.builders import TOP1, Fakes, write_recipe


def outcomes(fakes: Fakes, recipes: list[str], **options: object) -> dict[str, tuple[str, int | None]]:
    return {job.name: (job.state, job.exit_code) for job in fakes.run(recipes, **options).jobs}


def test_a_failure_does_not_stop_the_others(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="ok", b="exit 3", c="missed", d="kill 9", e="ok")
    result = fakes.run(recipes)
    assert [(job.name, job.state, job.exit_code, job.message) for job in result.jobs] == [
        ("a", "done", 0, ""),
        ("b", "failed", 3, "it went\x1b wrong"),
        ("c", "failed", 1, "it went\x1b wrong"),
        ("d", "failed", 137, "ended by SIGKILL; too little memory?"),
        ("e", "done", 0, ""),
    ]
    assert result.exit_code == 3
    assert [job.scores for job in result.jobs] == [TOP1, [], TOP1, [], TOP1]
    size = os.stat(os.environ["FAKE_FILE"]).st_size
    assert [job.bytes for job in result.jobs] == [size, None, size, None, size]


def test_what_lies_in_the_folders(fakes: Fakes) -> None:
    result = fakes.run(fakes.recipes(a="ok", b="exit 3"))
    out = fakes.folder / "out"
    names = {"log.txt", "recipe.json", "result.json"}
    assert {path.name for path in out.iterdir()} == {"a", "b", "results.jsonl", "junit.xml"}
    assert {path.name for path in (out / "a").iterdir()} == {*names, "ok.nested.safetensors"}
    assert {path.name for path in (out / "b").iterdir()} == names
    assert (out / "b" / "log.txt").read_text() == "nestify: it went\x1b wrong\n"
    for job, line in zip(result.jobs, fakes.lines(), strict=True):
        assert JobResult.model_validate_json((out / job.name / "result.json").read_text()) == job
        assert JobResult.model_validate(line) == job
    [suite] = ElementTree.parse(out / "junit.xml").getroot()
    errors = {case.get("name"): case.findtext("error") for case in suite}
    assert errors == {"a": None, "b": "nestify: it went wrong"}


def test_what_is_done_is_skipped(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="ok", b="later 3", c="later 3")
    assert outcomes(fakes, recipes) == {"a": ("done", 0), "b": ("failed", 3), "c": ("failed", 3)}
    (fakes.folder / "out" / "c" / "later 3.resume.safetensors").unlink()
    fakes.trace.write_text("")
    again = fakes.run(recipes)
    assert [job.earlier for job in again.jobs] == [True, False, False]
    assert [line[:2] for line in fakes.said("begin")] == [["b", "on"], ["c", "anew"]]
    fakes.trace.write_text("")
    assert not fakes.run(recipes[:2]).exit_code
    assert fakes.begun() == []
    assert all(job.earlier for job in fakes.run(recipes[:2]).jobs)


def test_rerun_begins_all_anew(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="ok", b="later 3")
    fakes.run(recipes)
    fakes.trace.write_text("")
    fakes.run(recipes, rerun=True)
    assert [line[:2] for line in fakes.said("begin")] == [["a", "anew"], ["b", "anew"]]


@pytest.mark.parametrize("damage", ["file", "short", "result", "no result", "recipe", "exit code"])
def test_what_is_not_what_was_done_runs_again(damage: str, fakes: Fakes) -> None:
    recipes = fakes.recipes(a="ok")
    assert fakes.run(recipes).exit_code == 0
    folder = fakes.folder / "out" / "a"
    output = folder / "ok.nested.safetensors"
    match damage:
        case "file":
            output.unlink()
        case "short":
            output.write_bytes(output.read_bytes()[:-1])
        case "result":
            (folder / "result.json").write_bytes(b'{"schema_version": 1, "state": "done"\xff')
        case "no result":
            (folder / "result.json").unlink()
        case "recipe":
            write_recipe(fakes.folder / "a.toml", "ok", "[train]\nlr = 0.5\n")
        case "exit code":
            found = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps({**found, "exit_code": 1}))
    result = fakes.run(recipes)
    assert [(job.state, job.earlier) for job in result.jobs] == [("done", False)]
    assert fakes.begun() == ["a", "a"]


@pytest.mark.parametrize("change", ["recipe", "version", "refused", "moved", "weights"])
def test_a_checkpoint_of_another_run_is_not_gone_on_from(change: str, fakes: Fakes) -> None:
    code = 2 if change == "refused" else 3
    recipes = fakes.recipes(a=f"later {code}")
    weights = fakes.folder / "w.safetensors"
    weights.write_bytes(b"weights")
    text = Path(recipes[0]).read_text()
    Path(recipes[0]).write_text(text.replace("[data]", 'checkpoint = "w.safetensors"\n[data]'))
    fakes.run(recipes)
    folder = fakes.folder / "out" / "a"
    match change:
        case "recipe":
            write_recipe(fakes.folder / "a.toml", "later 3", "[train]\nlr = 0.5\n")
        case "version":
            found = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps({**found, "versions": {"torch": "1"}}))
        case "weights":
            weights.write_bytes(b"others")
        case "moved":
            text = (folder / "recipe.json").read_text()
            (folder / "recipe.json").write_text(text.replace(str(fakes.folder), "/old"))
    fakes.run(recipes)
    assert [line[1] for line in fakes.said("begin")] == ["anew", "anew"]


def test_a_job_whose_batch_vanished_goes_on(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="later 3")
    fakes.run(recipes)
    path = fakes.folder / "out" / "a" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running", "exit_code": None}))
    assert outcomes(fakes, recipes) == {"a": ("done", 0)}
    assert [line[1] for line in fakes.said("begin")] == ["anew", "on"]


def test_an_older_file_is_not_taken_for_that_of_a_failure(fakes: Fakes) -> None:
    recipe = write_recipe(fakes.folder / "a.toml", "missed")
    assert fakes.run([recipe]).jobs[0].scores == TOP1
    output = fakes.folder / "out" / "a" / "missed.nested.safetensors"
    output.rename(output.with_name("exit 1.nested.safetensors"))
    [job] = fakes.run([write_recipe(fakes.folder / "a.toml", "exit 1")]).jobs
    assert (job.exit_code, job.scores, job.bytes) == (1, [], None)


def test_a_job_that_leaves_no_readable_file_has_failed(fakes: Fakes) -> None:
    [job] = fakes.run(fakes.recipes(a="exit 0")).jobs
    assert (job.state, job.exit_code) == ("failed", 3)
    assert "no such file" in job.message


def test_fail_fast_begins_no_more(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="ok", b="exit 1", c="ok", d="ok")
    result = fakes.run(recipes, fail_fast=True)
    assert [job.state for job in result.jobs] == ["done", "failed", "pending", "pending"]
    assert result.exit_code == 1
    assert fakes.begun() == ["a", "b"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_fail_fast_begins_no_more_after_a_limit_that_was_missed_earlier(fakes: Fakes, at_once: int) -> None:
    """Its result is known without running it again."""
    recipes = fakes.recipes(a="ok", b="missed", c="ok", d="ok")
    states = [
        [job.state for job in fakes.run(recipes, fail_fast=True, max_parallel=1).jobs],
        [job.state for job in fakes.run(recipes, fail_fast=True, max_parallel=at_once).jobs],
    ]
    assert states == [["done", "failed", "pending", "pending"]] * 2
    assert fakes.begun() == ["a", "b"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_many_run_at_once(count: int, fakes: Fakes) -> None:
    recipes = fakes.recipes(a="slow 0.2", b="slow 0.2", c="slow 0.2", d="slow 0.2")
    most: list[int] = []

    class Watch(BatchObserver):
        def ticked(self, running: object) -> None:
            assert isinstance(running, list)
            most.append(len(running))

    assert fakes.run(recipes, max_parallel=count, observer=Watch()).exit_code == 0
    assert max(most) == count
    running = peak = 0
    for line in fakes.trace.read_text().splitlines():
        running += 1 if line.startswith("begin") else -1
        peak = max(peak, running)
    assert peak == count


def test_cores_are_shared_out(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    recipes = fakes.recipes(a="ok")
    for count in (1, 4, 20):
        fakes.run(recipes, max_parallel=count, rerun=True)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    fakes.run(recipes, max_parallel=4, rerun=True)
    assert [line[2] for line in fakes.said("begin")] == ["-", "2", "1", "7"]


def test_shards_share_a_folder(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="ok", b="exit 1", c="ok")
    codes = [fakes.run(recipes, shard=f"{number}/2").exit_code for number in (1, 2)]
    assert codes == [0, 1]
    assert fakes.begun() == ["a", "c", "b"]
    assert [line["name"] for line in fakes.lines("results.1-of-2.jsonl")] == ["a", "c"]
    assert [line["name"] for line in fakes.lines("results.2-of-2.jsonl")] == ["b"]
    assert (fakes.folder / "out" / "junit.2-of-2.xml").exists()
    assert not (fakes.folder / "out" / "junit.xml").exists()
    nothing = fakes.run(recipes, shard="4/4")
    assert (nothing.jobs, nothing.exit_code) == ((), 0)


def test_nothing_begins_if_a_recipe_is_wrong(fakes: Fakes) -> None:
    recipes = [*fakes.recipes(a="ok"), write_recipe(fakes.folder / "b.toml", "ok", "[train]\nlr = -1\n")]
    with pytest.raises(RecipeError):
        fakes.run(recipes, shard="1/2")
    with pytest.raises(RecipeError, match="--max-parallel 0 is less than 1"):
        fakes.run(recipes[:1], max_parallel=0)
    assert fakes.begun() == []
    assert not (fakes.folder / "out").exists()


def test_a_folder_that_cannot_be_made(fakes: Fakes) -> None:
    (fakes.folder / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"--out .*out: cannot be created \(File exists\)"):
        fakes.run(fakes.recipes(a="ok"))
    (fakes.folder / "out").unlink()
    (fakes.folder / "out").mkdir()
    (fakes.folder / "out" / "a").write_text("a file")
    with pytest.raises(OutputError, match=r"out/a: the job cannot be started there \(File exists\)"):
        fakes.run(fakes.recipes(a="ok"))


def test_two_batches_do_not_run_one_job_at_once(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="slow 1", b="ok")
    waited: list[str] = []
    began = threading.Event()

    class First(BatchObserver):
        def began(self, job: Job, goes_on: bool) -> None:
            began.set()

    class Second(BatchObserver):
        def waiting(self, job: Job) -> None:
            waited.append(job.name)

    first = threading.Thread(target=lambda: fakes.run(recipes[:1], observer=First()))
    first.start()
    assert began.wait(30)
    second = fakes.run(recipes, observer=Second())
    first.join()
    assert waited == ["a"]
    assert [(job.state, job.earlier) for job in second.jobs] == [("done", True), ("done", False)]
    assert sorted(fakes.begun()) == ["a", "b"]


def test_a_folder_is_locked_until_its_result_is_written(fakes: Fakes) -> None:
    locked: list[str] = []

    class Watch(BatchObserver):
        def ended(self, job: Job, result: JobResult) -> None:
            with (job.folder / "log.txt").open() as log, pytest.raises(BlockingIOError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(job.name)

    fakes.run(fakes.recipes(a="ok", b="exit 1"), observer=Watch())
    assert locked == ["a", "b"]


def test_how_jobs_stand(fakes: Fakes) -> None:
    recipes = fakes.recipes(a="ok", b="exit 3", c="ok", d="ok", e="ok")
    fakes.run(recipes[:4])
    write_recipe(fakes.folder / "c.toml", "ok", "[train]\nlr = 0.5\n")
    path = fakes.folder / "out" / "d" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "interrupted", "exit_code": 130}))
    before = {file: file.read_bytes() for file in fakes.folder.rglob("*") if file.is_file()}
    plan = plan_batch(recipes, fakes.folder / "out")
    assert {job.name: standing for job, standing in plan} == {
        "a": "done",
        "b": "failed",
        "c": "changed",
        "d": "interrupted",
        "e": "new",
    }
    assert {file: file.read_bytes() for file in fakes.folder.rglob("*") if file.is_file()} == before
    assert [job.folder for job, _ in plan_batch(recipes, Path("other"), shard="5/5")] == [
        fakes.folder / "other" / "e"
    ]
