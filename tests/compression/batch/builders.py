"""Recipes, and batches whose jobs stand in for runs of `compress`."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestify.compression.batch.batch import BatchResult, run_batch
from nestify.file.writer import write_nested_file
from tests.file.builders import description, small_state

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_job.py")))
DATA = '[data]\npath = "hfds/none"\n'
TOP1 = [51.0, 52.0, 53.0]
"""Of the levels of the file that fake jobs leave."""


def write_fake_file(path: Path) -> Path:
    plain = description(3)
    levels = [
        level.model_copy(update={"metrics": level.metrics.model_copy(update={"top1": top1})})
        for level, top1 in zip(plain.levels, TOP1, strict=True)
    ]
    write_nested_file(path, small_state(), plain.model_copy(update={"levels": levels}))
    return path


def write_recipe(path: Path, model: str = "ok", rest: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[model]\nname = "{model}"\n{DATA}{rest}')
    return str(path)


@dataclass(frozen=True)
class Fakes:
    """A folder, and the file in which its jobs say what they do."""

    folder: Path
    trace: Path

    def recipes(self, **models: str) -> list[str]:
        """One recipe per name, whose model says what the job does."""
        return [write_recipe(self.folder / f"{name}.toml", model) for name, model in models.items()]

    def run(self, recipes: list[str], **options: Any) -> BatchResult:
        return run_batch(recipes, self.folder / "out", **{"command": COMMAND, **options})

    def said(self, first: str) -> list[list[str]]:
        """The words of all lines that begin with one."""
        lines = [line.split() for line in self.trace.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == first]

    def begun(self) -> list[str]:
        return [line[0] for line in self.said("begin")]

    def lines(self, name: str = "results.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out" / name).read_text().splitlines()]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for what another process will do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is not merely waiting to be buried."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
