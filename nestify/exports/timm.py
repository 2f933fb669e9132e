"""A level as weights that timm loads: a safetensors file, or a folder for `local-dir:`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import timm
from safetensors.torch import load_file, save
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from torch import Tensor, fx, nn

from nestify.errors import UnsupportedModelError
from nestify.exports.draft import Draft, FolderDraft, Runner
from nestify.exports.rebuild.arguments import without_weights
from nestify.exports.rebuild.rebuilt import rebuild
from nestify.exports.target import ExportFacts
from nestify.model.spec import build_model

TOLERANCE = 1e-5
"""Largest difference of a logit. The modules are the same; rounding depends on the memory layout."""

RUNTIME = f"timm {timm.__version__}"


def as_timm(plain: nn.Module, facts: ExportFacts) -> tuple[nn.Module, ExportFacts]:
    """Return a level as a model that timm builds, and its facts with that model's arguments.

    A level with fewer channels or blocks becomes a model with other arguments that computes the same.

    Args:
        plain: the level, in eval mode on the CPU.
        facts: facts of the level, with the arguments of the full model.

    Raises:
        UnsupportedModelError: if timm's constructor builds no such network.
    """
    if not isinstance(plain, fx.GraphModule) and _has_the_tensors(plain, facts):
        return plain, facts
    found = rebuild(plain, facts.architecture, facts.kwargs, facts.input_size)
    if isinstance(found, str):
        raise UnsupportedModelError(
            f"{facts.title} is not a network that timm builds ({found}); export it as onnx or pt2"
        )
    return found.model, replace(facts, kwargs=found.kwargs)


def timm_draft(plain: nn.Module, facts: ExportFacts) -> Draft:
    """Return dense tensors under timm's names, a tied tensor under each of its names.

    Args:
        plain: the level, as `as_timm` returns it.
        facts: its facts, as `as_timm` returns them.
    """
    kwargs = _needed_kwargs(facts)

    def write(file: BinaryIO) -> None:
        file.write(_saved(plain, facts))

    def reopen(path: Path) -> Runner:
        model = build_model(facts.architecture, dict(kwargs))
        model.load_state_dict(load_file(path), strict=True)
        return model.eval()

    def load_line(path: Path) -> str:
        words = [repr(facts.architecture), *(f"{key}={value!r}" for key, value in kwargs.items())]
        return f"timm.create_model({', '.join(words)}, checkpoint_path={str(path)!r}).eval()"

    return Draft(write, reopen, load_line, TOLERANCE, RUNTIME)


def local_dir_draft(plain: nn.Module, facts: ExportFacts) -> FolderDraft:
    """Return a folder with `config.json` and `model.safetensors`, as timm's `local-dir:` reads them.

    Args:
        plain: the level, as `as_timm` returns it.
        facts: its facts, as `as_timm` returns them.
    """
    labels = {} if facts.class_names is None else {"label_names": list(facts.class_names)}
    known_to_timm = {key: value for key, value in facts.preprocessing.items() if key != "exif_orientation"}

    def fill(folder: Path) -> None:
        save_config_for_hf(plain, str(folder / "config.json"), model_config=labels, data_config=known_to_timm)
        (folder / "model.safetensors").write_bytes(_saved(plain, facts))

    def load_line(folder: Path) -> str:
        return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True).eval()"

    return FolderDraft(fill, _reopen_local_dir, load_line, TOLERANCE, RUNTIME)


def _reopen_local_dir(folder: Path) -> Runner:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def _saved(plain: nn.Module, facts: ExportFacts) -> bytes:
    # The format refuses tensors that share memory, so each is copied.
    tensors: dict[str, Tensor] = {
        name: tensor.detach().contiguous().clone() for name, tensor in plain.state_dict().items()
    }
    data: bytes = save(tensors, metadata={"format": "pt", **facts.metadata()})
    return data


def _has_the_tensors(plain: nn.Module, facts: ExportFacts) -> bool:
    """Whether the names and shapes are those of the model that the facts describe."""
    due, found = without_weights(facts.architecture, facts.kwargs).state_dict(), plain.state_dict()
    return due.keys() == found.keys() and all(due[name].shape == found[name].shape for name in due)


def _needed_kwargs(facts: ExportFacts) -> Mapping[str, Any]:
    """Return the arguments that differ from those of timm's default model."""
    own = get_model_args(without_weights(facts.architecture, {}))
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    missing = object()
    return {key: value for key, value in facts.kwargs.items() if plain.get(key, missing) != value}
