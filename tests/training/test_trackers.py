"""The trackers W&B and MLflow: with stand-ins, and with the packages themselves where they are installed."""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nestify.errors import OutputError, RecipeError
from nestify.training.observer import Observer
from nestify.training.trackers import check_tracker, tracked_options
from tests.cli.driver import TWO_STEPS, environment, finish, spawn

from .test_logs import interrupt_run, metrics, run


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in (
        "WANDB_PROJECT",
        "WANDB_NAME",
        "WANDB_DIR",
        "MLFLOW_EXPERIMENT_ID",
        "MLFLOW_EXPERIMENT_NAME",
    ):
        monkeypatch.delenv(name, raising=False)


class Received:
    """What a stand-in for a tracker has received, and when it fails.

    Attributes:
        started: the run that each start continued; None for a new run.
        points: metrics with their steps.
        options: options of the recipe.
        files: contents of the files, by name.
        ends: whether each run ended well.
        fails_at: name of the call that raises ConnectionError; "" for none.
    """

    def __init__(self) -> None:
        self.started: list[str | None] = []
        self.points: list[tuple[int, dict[str, float]]] = []
        self.options: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.ends: list[bool] = []
        self.fails_at = ""

    def call(self, name: str) -> None:
        if name == self.fails_at:
            raise ConnectionError("network is unreachable")

    def values(self, name: str) -> dict[int, float]:
        """Return a metric by step; of a step that was sent twice the last one."""
        return {step: values[name] for step, values in self.points if name in values}


def fake_wandb(received: Received, **settings: object) -> ModuleType:
    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.paths: list[str] = []

        def add_file(self, path: str) -> None:
            self.paths.append(path)

    class Run:
        def __init__(self, id: str | None) -> None:
            self.id = id or "abc123"
            self.config = SimpleNamespace(
                update=lambda options, allow_val_change: received.options.update(options)
            )

        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, values: dict[str, float]) -> None:
            received.call("log")
            received.points.append((int(values["step"]), values))

        def log_artifact(self, artifact: Artifact) -> None:
            received.call("files")
            received.files |= {Path(path).name: Path(path).read_bytes() for path in artifact.paths}

        def finish(self, exit_code: int) -> None:
            received.ends.append(exit_code == 0)

    def init(*, id: str | None, resume: str | None, settings: Any, **others: object) -> Run:
        received.call("start")
        received.started.append(id)
        assert settings.silent is True
        return Run(id)

    found: dict[str, object] = {
        "mode": "offline",
        "api_key": None,
        "identity_token_file": None,
        "base_url": "https://api.wandb.ai",
    }
    found |= settings
    module: Any = ModuleType("wandb")
    module.Settings = SimpleNamespace
    module.Artifact = Artifact
    module.init = init
    module.setup = lambda settings: SimpleNamespace(settings=SimpleNamespace(**found))
    return module  # type: ignore[no-any-return]


def fake_mlflow(received: Received) -> tuple[ModuleType, ModuleType]:
    entities: Any = ModuleType("mlflow.entities")
    entities.Param = lambda key, value: (key, value)
    entities.Metric = lambda name, value, time, step: (name, value, step)

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            assert name == "nestify"

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            received.call("start")
            assert (experiment, run_name) == ("7", "run")
            received.started.append(None)
            return SimpleNamespace(info=SimpleNamespace(run_id="0f0f"))

        def update_run(self, run_id: str, status: str) -> None:
            assert status == "RUNNING"
            received.started.append(run_id)

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert run_id == "0f0f"
            assert len(params) <= 100  # MLflow's limit
            received.options |= dict(params)
            if metrics:
                received.call("log")
                received.points.append((metrics[0][2], {name: value for name, value, _ in metrics}))

        def log_artifact(self, run_id: str, path: str) -> None:
            received.call("files")
            received.files[Path(path).name] = Path(path).read_bytes()

        def set_terminated(self, run_id: str, status: str) -> None:
            received.ends.append(status == "FINISHED")

    module: Any = ModuleType("mlflow")
    module.MlflowClient = Client
    return module, entities


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Received:
    """Stand-ins take the place of both packages."""
    found = Received()
    mlflow, entities = fake_mlflow(found)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(found))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return found


NAMES = {"wandb": "abc123", "mlflow": "0f0f"}


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_receives_metrics_options_and_files(received: Received, name: str) -> None:
    run(name)
    [finetuned] = metrics("finetune")
    assert received.values("finetune/loss/level1") == {3: pytest.approx(finetuned["losses"][0])}
    for line in metrics("train"):
        assert received.values("train/loss/level2")[3 + line["step"]] == pytest.approx(line["losses"][1])
        assert received.values("train/lr")[3 + line["step"]] == line["lr"]
    last = metrics("evaluation")[-1]["levels"]
    for k, level in enumerate(last, start=1):
        assert received.values(f"validation/top1/level{k}")[14] == level["top1"]
    assert received.values("original/top1") == {3: metrics("evaluation")[0]["levels"][0]["top1"]}
    epochs = received.options["train.epochs"]
    assert (json.loads(epochs) if name == "mlflow" else epochs) == 3.6
    assert ("level.1.sparsity" if name == "mlflow" else "level[1].sparsity") in received.options
    assert received.files["run.nested.safetensors"] == Path("run.nested.safetensors").read_bytes()
    assert received.files["run.html"].startswith(b"<!DOCTYPE html>")
    assert (received.started, received.ends) == ([None], [True])


@pytest.mark.parametrize("name", ["wandb", pytest.param("mlflow", marks=pytest.mark.long)])
def test_a_resumed_run_continues_the_trackers_run(received: Received, name: str) -> None:
    interrupt_run(name, steps=9)
    assert (received.started, received.ends, received.files) == ([None], [False], {})
    run(name)
    assert (received.started, received.ends) == ([None, NAMES[name]], [False, True])
    for line in metrics("train"):
        assert received.values("train/loss/level2")[3 + line["step"]] == pytest.approx(line["losses"][1])


class Warnings(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warned(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("wandb", "log"),
        ("mlflow", "files"),
        pytest.param("mlflow", "log", marks=pytest.mark.long),
        pytest.param("wandb", "files", marks=pytest.mark.long),
    ],
)
def test_a_tracker_that_fails_is_one_warning(received: Received, name: str, call: str) -> None:
    received.fails_at = call
    seen = Warnings()
    run(name, "csv", observer=seen, options={"train.epochs": 1, "finetune.epochs": 0})
    [warning] = [text for text in seen.texts if name in text]
    assert "network is unreachable" in warning
    assert "the run continues" in warning
    assert received.ends == []  # nothing is sent after the failure
    assert Path("run.nested.safetensors").exists()
    assert Path("run.csv").exists()


@pytest.mark.parametrize(
    ("name", "remedy"), [("wandb", "WANDB_MODE=offline"), ("mlflow", "MLFLOW_TRACKING_URI")]
)
def test_a_tracker_that_does_not_start_ends_the_run(received: Received, name: str, remedy: str) -> None:
    received.fails_at = "start"
    with pytest.raises(OutputError, match=rf"network is unreachable.*{remedy}.*--log {name}"):
        run(name)
    assert not Path("run.nested.safetensors").exists()


@pytest.mark.parametrize("name", NAMES)
def test_without_the_package_no_work_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError, match=rf"pip install 'nestify\[{name}\]'"):
        run(name)
    assert list(tmp_path.iterdir()) == []


def test_wandb_never_asks_for_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check(**settings: object) -> None:
        monkeypatch.setitem(sys.modules, "wandb", fake_wandb(Received(), **settings))
        check_tracker("wandb")

    with pytest.raises(RecipeError, match=r"WANDB_API_KEY.*WANDB_MODE=offline"):
        check(mode="online")
    check(mode="offline")
    check(mode="disabled")
    check(mode="online", api_key="x" * 40)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check(mode="online")
    with pytest.raises(RecipeError, match="WANDB_API_KEY"):
        check(mode="online", base_url="https://wandb.example.com")
    (tmp_path / "netrc").write_text("not a netrc\n")
    with pytest.raises(RecipeError, match="WANDB_API_KEY"):
        check(mode="online")


def test_options_have_no_passwords() -> None:
    options: Mapping[str, object] = {"data.path": "https://me:secret@host/a.tar", "train.lr": 0.1}
    assert tracked_options(options) == {"data.path": "https://host/a.tar", "train.lr": 0.1}


def test_checkpoints_without_trackers_do_not_name_them() -> None:
    """Their bytes stay the same."""
    interrupt_run("csv", steps=2)
    assert b"trackers" not in Path("run.resume.safetensors").read_bytes()[:100_000]


needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in NAMES
}


@needs["wandb"]
def test_wandb_offline() -> None:
    words = ("--quiet", "compress", "digits", *TWO_STEPS, "--log", "wandb", "-o", "a.safetensors")
    done = finish(spawn(*words, env=environment(WANDB_MODE="offline")), timeout=300)
    assert done.code == 0, done.err
    assert "wandb" not in done.err + done.out
    [folder] = Path("wandb").glob("offline-run-*")
    [log] = folder.glob("run-*.wandb")
    data = log.read_bytes()
    for text in (
        b"train/loss/level1",
        b"validation/top1/level3",
        b"schedule.score",
        b"a.safetensors",
        b"a.html",
    ):
        assert text in data


@needs["wandb"]
def test_wandb_without_a_key_is_refused() -> None:
    words = ("compress", "digits", *TWO_STEPS, "--log", "wandb", "-o", "a.safetensors")
    done = finish(spawn(*words, env=environment(WANDB_MODE="online", WANDB_API_KEY="")), timeout=300)
    assert (done.code, done.out) == (2, "")
    assert "WANDB_API_KEY" in done.message


@needs["mlflow"]
def test_mlflow_in_a_folder(tmp_path: Path) -> None:
    words = ("--quiet", "compress", "digits", *TWO_STEPS, "--log", "mlflow", "-o", "a.safetensors")
    done = finish(spawn(*words, env=environment(MLFLOW_TRACKING_URI=f"file:{tmp_path}/runs")), timeout=300)
    assert done.code == 0, done.err
    assert "mlflow" not in (done.err + done.out).lower()
    [made] = [path.parent for path in Path("runs").glob("*/*/meta.yaml")]
    assert (made / "params" / "schedule.score").read_text() == "fisher"
    assert (made / "artifacts" / "a.safetensors").read_bytes() == Path("a.safetensors").read_bytes()
    assert (made / "artifacts" / "a.html").exists()
    [line] = [
        json.loads(text) for text in Path("a.metrics.jsonl").read_text().splitlines() if '"after"' in text
    ]
    values = (made / "metrics" / "validation" / "top1" / "level3").read_text().split()
    assert float(values[1]) == line["levels"][2]["top1"]
