"""The checkpoint of a run: one safetensors file, which holds how far it is, as tensors and JSON."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nestify.errors import CheckpointError
from nestify.evaluation.accuracy import Accuracy
from nestify.files import atomic_file
from nestify.training.observer import Phase

Tensors = dict[str, Tensor]

_NUMPY_WORDS = 624
_PLAIN = (type(None), bool, int, float, str, Tensor, list, tuple)


def pack(value: Any, tensors: Tensors, path: str) -> Any:
    """A value as JSON; its tensors go to the table, as copies on the CPU.

    Args:
        value: of None, numbers, texts, tensors, and lists, tuples and tables of these.
        tensors: is added to, under names that begin with `path`.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        layout = "channels_last" if _lies_channels_last(value) else "rows"
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
    """The value that was packed; its tensors are those of the table, on the CPU.

    Raises:
        ValueError: for what `pack` does not make.
        KeyError: for a tensor that is missing.
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


def _lies_channels_last(tensor: Tensor) -> bool:
    """Sums over a tensor depend on how it lies in memory, by their last bits."""
    last = torch.channels_last
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()


def random_states() -> dict[str, Any]:
    """The states of every generator that training draws from."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": _random_state(random),
        "numpy": (torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put generators back to what `random_states` gave.

    Raises:
        ValueError, TypeError, RuntimeError: for what are no such states.
    """
    _set_random_state(random, states["python"])
    keys, position, has_gauss, cached = states["numpy"]
    if keys.shape != (_NUMPY_WORDS,) or not 0 <= position <= _NUMPY_WORDS:  # NumPy itself does not look
        raise ValueError("the state of NumPy's generator is not one")
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _random_state(source: Any) -> tuple[Any, ...]:
    """Of Python's own generator, or of one of its kind."""
    version, words, gauss = source.getstate()
    return version, torch.tensor(words), gauss


def _set_random_state(source: Any, state: tuple[Any, ...]) -> None:
    version, words, gauss = state
    source.setstate((version, tuple(words.tolist()), gauss))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer remembers: of each parameter, by its place, and of each group of parameters.

    Not its own `state_dict`, whose loading casts what it remembers to the type of the parameters.
    """
    optimizer = _inner(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "parameters": {
            place: dict(optimizer.state[parameter])
            for place, parameter in enumerate(parameters)
            if parameter in optimizer.state
        },
        "groups": [
            {key: value for key, value in group.items() if key != "params" and isinstance(value, _PLAIN)}
            for group in optimizer.param_groups  # what is left out, such as a dtype, is an option of it
        ],
        "generators": {
            name: _random_state(value)
            for name, value in vars(optimizer).items()
            if isinstance(value, random.Random)
        },
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give a new optimizer of the same parameters what another one remembered.

    Raises:
        ValueError: if the state is of other parameters.
    """
    optimizer = _inner(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(state["groups"]) != len(optimizer.param_groups):
        raise ValueError("the optimizer's state has other groups of parameters")
    for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    for name, words in state["generators"].items():
        _set_random_state(getattr(optimizer, name), words)
    optimizer.state.clear()
    for place, remembered in state["parameters"].items():
        parameter = parameters[place]
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if isinstance(value, Tensor) and key != "step" else value
            for key, value in remembered.items()
        }


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that remembers, which is another one in timm's Lookahead."""
    inner: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return inner


FORMAT = "1"
_DENSE = "dense"
_TRAINING = "training"
_STRICT = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class Findings(BaseModel):
    """What a run has found out and would have to compute again.

    Attributes:
        original: accuracy of the dense model. `before`: of the levels before training, core first.
        skipped: why images could not be read, by file name, by split.
    """

    model_config = _STRICT

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

    model_config = _STRICT

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
