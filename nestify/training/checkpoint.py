"""The checkpoint of a run: one safetensors file that stores the state of the run as tensors and JSON."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nestify.errors import CheckpointError, OutputError, foreign_code
from nestify.evaluation.measure import Score
from nestify.files import atomic_file
from nestify.training.distributed import World
from nestify.training.observer import Phase
from nestify.training.random_states import generator_state, set_generator_state

Tensors = dict[str, Tensor]

_PLAIN = (type(None), bool, int, float, str, Tensor, list, tuple)


def pack(value: Any, tensors: Tensors, path: str) -> Any:
    """Convert a value to JSON, and move its tensors to `tensors`, as copies on the CPU.

    Args:
        value: None, a bool, a number, a string, a tensor, or lists, tuples and mappings of these.
        tensors: receives the tensors, under names that begin with `path`.
        path: name of the value, and prefix of the names of its tensors.

    Raises:
        TypeError: if the value contains any other type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        layout = "channels_last" if _is_channels_last(value) else "rows"
        copy = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        assert path not in tensors
        tensors[path] = copy
        return {"tensor": path, "layout": layout}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{path}.{k}") for k, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        return {
            "table": [
                [pack(key, {}, path), pack(item, tensors, f"{path}.{key}")] for key, item in value.items()
            ]
        }
    raise TypeError(f"{path} is a {type(value).__name__}")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `pack` converted, with its tensors on the CPU.

    Args:
        value: the JSON that `pack` returned.
        tensors: the tensors that `pack` stored, by name.

    Raises:
        ValueError: if `pack` cannot have returned this value.
        KeyError: if a tensor is missing.
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tensor": str(name), "layout": "channels_last"}:
            return tensors[name].contiguous(memory_format=torch.channels_last)
        case {"tensor": str(name), "layout": "rows"}:
            return tensors[name]
        case {"tuple": list(items)}:
            return tuple(unpack(items, tensors))
        case {"table": list(pairs)}:
            return {unpack(key, tensors): unpack(item, tensors) for key, item in pairs}
    raise ValueError(f"{sorted(map(str, value))} is not the form of a packed value")


def _is_channels_last(tensor: Tensor) -> bool:
    """Return whether a tensor has the channels-last layout, which changes the last bits of sums over it."""
    last = torch.channels_last
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer, for `restore_optimizer`.

    The optimizer's own `state_dict` is not used, because loading it casts the state to the type of the
    parameters.

    Returns:
        State by position of the parameter, options by parameter group, and generators by attribute name.
    """
    optimizer = inner(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "parameters": {
            index: dict(optimizer.state[parameter])
            for index, parameter in enumerate(parameters)
            if parameter in optimizer.state
        },
        "groups": [
            {key: value for key, value in group.items() if key != "params" and isinstance(value, _PLAIN)}
            for group in optimizer.param_groups  # others, such as a dtype, are set on construction
        ],
        "generators": {
            name: generator_state(value)
            for name, value in vars(optimizer).items()
            if isinstance(value, random.Random)
        },
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer into a new optimizer of the same kind and parameters.

    Raises:
        ValueError: if the number of parameter groups differs.
    """
    optimizer = inner(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(state["groups"]) != len(optimizer.param_groups):
        raise ValueError("the optimizer's state has a different number of parameter groups")
    for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    for name, words in state["generators"].items():
        set_generator_state(getattr(optimizer, name), words)
    optimizer.state.clear()
    for index, values in state["parameters"].items():
        parameter = parameters[index]
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if isinstance(value, Tensor) and key != "step" else value
            for key, value in values.items()
        }


def inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that takes the steps and holds the state.

    Lookahead of timm, Lightning Fabric and Accelerate wrap it.
    """
    for attribute in ("optimizer", "_base_optimizer"):
        optimizer = getattr(optimizer, attribute, optimizer)
    return optimizer


FORMAT = "1"
_DENSE = "dense"
_TRAINING = "training"
_STRICT = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class EarlyResults(BaseModel):
    """Results that a resumed run takes from its checkpoint instead of computing them again.

    Attributes:
        original: accuracy of the dense model, or agreement with itself; None if it is not known yet.
        before: accuracy of the levels before training, core first; empty if they were not evaluated.
        skipped: reason why an image could not be read, by split and file name.
        rates: learning rates that were searched, by the training that they are for.
    """

    model_config = _STRICT

    original: Score | None = None
    before: list[Score] = []
    skipped: dict[Literal["training", "validation"], dict[str, str]] = {}
    rates: dict[Phase, float] = {}


class CheckpointInfo(BaseModel):
    """Information about a run that its checkpoint stores as JSON; the field names are part of the format.

    Attributes:
        run: identity of the run: everything that must be the same for the run to resume.
        phase: the training that was in progress.
        step: number of finished steps of that training.
        total: number of all steps of that training.
        findings: results of the run so far.
        marks: positions in the logs; see `Observer.log_offsets`.
        trackers: runs of experiment trackers; see `Observer.tracker_runs`.
    """

    model_config = _STRICT

    run: dict[str, Any]
    phase: Phase
    step: int = Field(ge=0)
    total: int = Field(ge=0)
    findings: EarlyResults
    marks: dict[str, float]
    trackers: dict[str, Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]] = Field(
        default={}, exclude_if=lambda runs: not runs
    )


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run at the end of a training step.

    Attributes:
        info: the run, its position and its results so far.
        training: state of the training in progress; see `Stepper.state`.
        dense: state dict of the fine-tuned dense model; empty if there is none, or not yet.
    """

    info: CheckpointInfo
    training: Mapping[str, Any]
    dense: Mapping[str, Tensor]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Raises:
        OutputError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {
        "nestify_checkpoint": FORMAT,
        "facts": checkpoint.info.model_dump_json(),
        _TRAINING: json.dumps(pack(checkpoint.training, tensors, _TRAINING)),
        _DENSE: json.dumps(pack(checkpoint.dense, tensors, _DENSE)),
    }
    metadata["sha256"] = _digest(metadata, tensors)

    def describe(reason: str) -> OutputError:
        return OutputError(
            f"{path}: cannot be written ({reason}); make room, or choose another output with -o"
        )

    with atomic_file(path) as file, foreign_code(describe):
        save_file(tensors, file.name, metadata)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint from an untrusted file; no code in the file is run.

    Raises:
        CheckpointError: if the file is damaged, or is not a checkpoint.
    """
    with foreign_code(partial(damaged_error, path)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("nestify_checkpoint") != FORMAT:
                raise ValueError("the file is not a checkpoint of this format")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.pop("sha256", None) != _digest(metadata, tensors):
            raise ValueError("its SHA-256 does not match its content")
        try:
            info = CheckpointInfo.model_validate_json(metadata["facts"])
        except ValidationError:
            raise ValueError("its metadata is not valid") from None
        training, dense = (unpack(json.loads(metadata[part]), tensors) for part in (_TRAINING, _DENSE))
        if not (isinstance(training, dict) and isinstance(dense, dict)):
            raise ValueError("the state of the training is missing")
    return Checkpoint(info, training, dense)


def share_checkpoint(checkpoint: Checkpoint | None, world: World) -> Checkpoint | None:
    """Return rank 0's checkpoint in all processes; None if it has none.

    Args:
        checkpoint: rank 0's checkpoint; the other processes' is ignored.
        world: the processes.
    """
    if world.size == 1:
        return checkpoint
    tensors: dict[str, Tensor] = {}
    told = None
    if checkpoint is not None and world.is_main:
        packed = [pack(part, tensors, name) for part, name in _parts(checkpoint)]
        told = checkpoint.info, packed, {name: (t.shape, t.dtype) for name, t in tensors.items()}
    told = world.broadcast_object(told)
    if told is None:
        return None
    info, packed, shapes = told
    if not world.is_main:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    world.broadcast_tensors(list(tensors.values()))
    training, dense = (unpack(part, tensors) for part in packed)
    return Checkpoint(info, training, dense)


def _parts(checkpoint: Checkpoint) -> tuple[tuple[Mapping[str, Any], str], ...]:
    return (checkpoint.training, _TRAINING), (checkpoint.dense, _DENSE)


def damaged_error(path: Path, reason: str) -> CheckpointError:
    """Return an error that says in one sentence why a checkpoint cannot be used."""
    return CheckpointError(
        f"{path}: the run cannot resume from this checkpoint ({reason.rstrip('.:')}); use --restart to start "
        "from scratch"
    )


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a checkpoint's metadata and tensor bytes, which safetensors does not verify."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
