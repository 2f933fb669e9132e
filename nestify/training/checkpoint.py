"""The checkpoint of a run: one safetensors file, which holds how far it is, as tensors and JSON."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nestify.errors import CheckpointError
from nestify.evaluation.accuracy import Accuracy
from nestify.files import atomic_file
from nestify.training.observer import Phase
from nestify.training.state import pack, unpack

FORMAT = "1"
_DENSE = "dense"
_TRAINING = "training"
_PLAIN = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class Findings(BaseModel):
    """What a run has found out and would have to compute again.

    Attributes:
        original: accuracy of the dense model. `before`: of the levels before training, core first.
        skipped: why images could not be read, by file name, by split.
    """

    model_config = _PLAIN

    original: Accuracy | None = None
    before: list[Accuracy] = []
    skipped: dict[Literal["training", "validation"], dict[str, str]] = {}


class Facts(BaseModel):
    """What a checkpoint says beside its tensors.

    Attributes:
        run: which run it is of: what must be the same for it to go on.
        phase: which of the run's trainings it is in. `step`, `total`: steps done of that, and all of them.
        findings: of the run so far.
        marks: how far each log was written.
    """

    model_config = _PLAIN

    run: dict[str, Any]
    phase: Phase
    step: int = Field(ge=0)
    total: int = Field(ge=0)
    findings: Findings
    marks: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of a training step.

    Attributes:
        training: state of the training in progress; see `Stepper.state`.
        dense: the fine-tuned dense model by state-dict name; empty where there is none, or not yet.
    """

    facts: Facts
    training: Mapping[str, Any]
    dense: Mapping[str, Tensor]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {
        "nestify_checkpoint": FORMAT,
        "facts": checkpoint.facts.model_dump_json(),
        _TRAINING: json.dumps(pack(checkpoint.training, tensors, _TRAINING)),
        _DENSE: json.dumps(pack(checkpoint.dense, tensors, _DENSE)),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    with atomic_file(path) as file:
        save_file(tensors, file.name, metadata)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that nobody vouches for; no code in it is ever run.

    Raises:
        CheckpointError: if it is damaged, or no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("nestify_checkpoint") != FORMAT:
                raise ValueError("it is no checkpoint that this version wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.pop("sha256", None) != _digest(metadata, tensors):
            raise ValueError("its hash is another one")
        facts = Facts.model_validate_json(metadata["facts"])
        training, dense = (unpack(json.loads(metadata[part]), tensors) for part in (_TRAINING, _DENSE))
        if not (isinstance(training, dict) and isinstance(dense, dict)):
            raise ValueError("it does not hold a training")
    except (SafetensorError, ValueError, KeyError, TypeError, OSError, RuntimeError, RecursionError) as error:
        raise damaged(path, error) from error
    return Checkpoint(facts, training, dense)


def damaged(path: Path, error: Exception) -> CheckpointError:
    """That a checkpoint cannot be used, as one sentence."""
    reason = "what it says of itself is wrong" if isinstance(error, ValidationError) else str(error)
    first = (reason.strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
    return CheckpointError(
        f"{path}: the run cannot go on from this checkpoint ({first}); pass --restart to begin anew"
    )


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a checkpoint says, and of its tensors' bytes, which safetensors does not check."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
