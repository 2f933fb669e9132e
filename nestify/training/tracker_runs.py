"""Runs of Weights & Biases and of MLflow; every call may raise whatever the package raises."""

import json
import netrc
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

PROJECT = "nestify"
"""Project of W&B, and experiment of MLflow, unless an environment variable names a different one."""

FINISH_SECONDS = 600
"""Longest time that W&B may take to upload what is left at the end of a run."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker receives when a run starts.

    Attributes:
        output: path of the nested file.
        options: every option by its dotted key, as JSON values.
        run_id: run of the tracker that is continued; None for a new one.
    """

    output: Path
    options: Mapping[str, Any]
    run_id: str | None = None

    @property
    def name(self) -> str:
        """Name of the run: that of the nested file without its endings."""
        return self.output.name.removesuffix(".safetensors").removesuffix(".nested")


class Tracker(Protocol):
    """One run of a tracker. Every method may raise anything.

    Attributes:
        run_id: the tracker's own name of the run, with which it can be continued.
    """

    run_id: str

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at a step."""

    def add_files(self, files: Sequence[Path]) -> None:
        """Record files; they may be removed afterwards."""

    def finish(self, succeeded: bool) -> None:
        """End the run."""


class WandbRun:
    """A run of W&B; see `Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        is_online = _wandb_settings().mode in ("online", "run", "shared")
        self._name = run.name
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.name,
            id=run.run_id,
            resume="allow" if is_online else None,  # offline, the id alone continues the run
            dir=os.environ.get("WANDB_DIR") or str(run.output.parent),
            reinit="create_new",  # leaves a run of the user's own alone
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                finish_timeout=FINISH_SECONDS,
                x_disable_meta=True,  # it would hold the command line, in which addresses have passwords
            ),
        )
        self.run_id: str = self._run.id
        self._run.config.update(dict(run.options), allow_val_change=True)
        # A resumed run repeats the steps since its checkpoint, and W&B's own steps cannot go back.
        self._run.define_metric("*", step_metric="step")

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def add_files(self, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", self._name, flags=re.ASCII), type="model")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def finish(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class MlflowRun:
    """A run of MLflow, through its client: a run of the user's own stays the active one. See `Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # One failed request must not stop the training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        if urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).scheme == "file":
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the user asked for it
        self._client = MlflowClient()
        if run.run_id is not None:
            self.run_id = run.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        made = self._client.create_run(self._experiment(), run_name=run.name)
        self.run_id = made.info.run_id
        params = [Param(_plain_key(key), _shown(value)) for key, value in run.options.items()]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self.run_id, params=params[start : start + _MLFLOW_PARAMS])

    def add(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id, [Metric(name, value, now, step) for name, value in values.items()]
        )

    def add_files(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self.run_id, str(file))

    def finish(self, succeeded: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if succeeded else "FAILED")

    def _experiment(self) -> str:
        """Return the id of the experiment, which is made if there is none of that name."""
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))


_MLFLOW_PARAMS = 100
"""Largest number of parameters that one request of MLflow takes."""

_MLFLOW_LETTERS = 500
"""Largest number of characters of a parameter that every store of MLflow takes."""


def _plain_key(key: str) -> str:
    """Return `level[1].sparsity` as `level.1.sparsity`, with characters that MLflow takes."""
    return re.sub(r"[^\w.\- /]", "_", re.sub(r"\[(\d+)\]", r".\1", key))


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MLFLOW_LETTERS else f"{text[: _MLFLOW_LETTERS - 3]}..."


def _wandb_settings() -> Any:
    import wandb

    return wandb.setup(settings=wandb.Settings(silent=True)).settings


def wandb_can_start() -> bool:
    """Return whether W&B needs no key, or finds one where it searches: variables, its settings, netrc."""
    settings = _wandb_settings()
    if settings.mode in ("offline", "dryrun", "disabled"):
        return True
    if settings.api_key or settings.identity_token_file:
        return True
    host = urlsplit(settings.base_url).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
