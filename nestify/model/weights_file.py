"""Reading a checkpoint: the state dict in a `.safetensors` or `.pth` file, as dense tensors on the CPU."""

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from nestify.errors import CheckpointError, foreign_code
from nestify.files import recognise

USUAL_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which timm's scripts store a state dict, the preferred first: averaged weights."""


@dataclass(frozen=True)
class CheckpointWeights:
    """The tensors of a checkpoint.

    Attributes:
        tensors: state-dict name -> dense tensor on the CPU, with finite values.
        notices: sentences that say what was changed on reading.
    """

    tensors: dict[str, Tensor]
    notices: tuple[str, ...]


def read_weights(path: Path) -> CheckpointWeights:
    """Read the state dict of a checkpoint; never runs code from it.

    A state dict inside other dicts is found if there is only one. The masks of torch's pruning are applied.

    Args:
        path: a safetensors file, or a file of `torch.save` that contains only weights.

    Raises:
        CheckpointError: if the file is missing or damaged, contains no state dict or several, or a tensor is
            not dense or has values that are not finite.
    """
    check_is_file(path)

    def describe(reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {path} cannot be read ({reason}); it may be truncated, or contain more "
            "than weights: copy it again, or save only its state_dict"
        )

    with foreign_code(describe), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns about the legacy formats that it still reads
        state, place = _find_state_dict(path, _load(path))
        tensors = {key: _dense(path, key, tensor) for key, tensor in clean_state_dict(state).items()}
        pruned = _apply_pruning_masks(tensors)
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"checkpoint {path}: {key} has values that are not finite; give a checkpoint of a run "
                    "that did not diverge"
                )
    notices = []
    if place and place[-1] not in USUAL_WRAPPERS:
        notices.append(f"checkpoint {path}: using the weights under {'.'.join(place)}")
    if pruned:
        notices.append(
            f"checkpoint {path}: {len(pruned)} pruning masks were applied ({', '.join(pruned[:3])}"
            f"{', ...' if len(pruned) > 3 else ''}); the pruned weights are 0, and training may change them"
        )
    return CheckpointWeights(tensors, tuple(notices))


def check_is_file(path: Path) -> None:
    """Refuse a checkpoint that does not exist.

    Raises:
        CheckpointError: if there is no file at the path.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, False for names that no system accepts
        raise CheckpointError(
            f"checkpoint {path} is not a file; give the path of a .safetensors or .pth file"
        )


def _load(path: Path) -> Any:
    """Load the content of a file, whose first bytes say how it is stored; its name does not matter.

    Raises:
        CheckpointError: if the file is a nested file, or of a kind that holds no weights.
    """
    with path.open("rb") as file:
        start = file.read(9)  # the length of a safetensors header, and its first character
    header = int.from_bytes(start[:8], "little")
    looks_like_safetensors = start[8:9] == b"{"
    is_safetensors = looks_like_safetensors and header < path.stat().st_size
    is_pickle = start.startswith((b"PK", b"\x80"))  # a zip archive of torch.save, or a pickle
    if not looks_like_safetensors and not is_pickle and (kind := recognise(start)):
        remedy = kind.remedy or "give weights in safetensors, or as torch.save writes them"
        raise CheckpointError(f"checkpoint {path} is {kind.name}; {remedy}")
    if is_safetensors or (path.suffix == ".safetensors" and not is_pickle):
        tensors = load_file(path)
        if any(_IN_NESTED_FILE.match(name) for name in tensors):
            raise CheckpointError(
                f"checkpoint {path} is a nested file; give a plain model, such as one of its levels: "
                "nestify export FILE --level LEVEL --format timm"
            )
        return tensors
    try:
        # timm's scripts store their arguments; torch would go by the ending of a path
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message proposes to run what is in the file
        raise ValueError(
            "it is no file of torch.save, or holds objects of Python other than tensors"
        ) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise ValueError("it is a TorchScript archive, which holds a program") from error
        raise


_IN_NESTED_FILE = re.compile(r"level[0-9]+/")


def _find_state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the one state dict of a checkpoint and the keys that lead to it.

    Raises:
        CheckpointError: if there is none, or more than one and none is where timm stores it.
    """
    found = dict(_state_dicts(content, (), set()))
    for wrapper in USUAL_WRAPPERS:
        usual = [place for place in found if place[:1] == (wrapper,)]
        if len(usual) == 1:
            return found[usual[0]], usual[0]
    if () in found and len(found) > 1:  # either a state dict with extra state, or a wrapper with loose values
        inner = max(len(state) for place, state in found.items() if place)
        loose = found.pop(())
        if len(loose) > inner:
            return loose, ()
    depth = min(map(len, found), default=0)  # deeper ones belong to an optimizer, which stores some by name
    found = {place: state for place, state in found.items() if len(place) == depth}
    if not found:
        raise CheckpointError(f"checkpoint {path} contains no tensors; give the state dict of a timm model")
    if len(found) > 1:
        places = ", ".join(".".join(place) for place in found)
        raise CheckpointError(
            f"checkpoint {path} contains several sets of weights ({places}); save one of them to a file of "
            "its own"
        )
    return next((state, place) for place, state in found.items())


def _state_dicts(
    content: Any, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the dicts of tensors among nested dicts, each with the keys that lead to it.

    The state of an optimizer has numbers as keys, so it does not count.
    """
    if not isinstance(content, Mapping) or id(content) in seen or len(place) > 3:
        return
    seen.add(id(content))  # a dict can contain another one any number of times
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if any(tensor.dim() for tensor in tensors.values()):
        yield place, tensors
    for key, value in named.items():
        yield from _state_dicts(value, (*place, key), seen)


def _dense(path: Path, key: str, tensor: Tensor) -> Tensor:
    """Return a plain dense tensor; 8-bit floats become float32, which has all their values.

    Raises:
        CheckpointError: if the tensor is of another kind.
    """
    kind, remedy = "", "save it as a dense tensor"
    if tensor.is_meta:
        kind, remedy = "has no values (it is on the meta device)", "load the weights before saving them"
    elif tensor.is_quantized:
        kind, remedy = "is quantized", "save the weights before quantization"
    elif tensor.layout != torch.strided or tensor.is_nested:
        kind = "is sparse" if not tensor.is_nested else "is a nested tensor"
    elif type(tensor) not in (Tensor, nn.Parameter):
        kind = f"is a {type(tensor).__name__}"
    elif tensor.is_complex():
        kind, remedy = "has complex values", "give the state dict of a timm model"
    elif tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), 2**20):
        kind = "repeats its values"  # a few stored bytes could stand for any number of values
    if kind:
        raise CheckpointError(f"checkpoint {path}: {key} {kind}; {remedy}")
    narrow = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.detach().float() if narrow else tensor.detach()


def _apply_pruning_masks(tensors: dict[str, Tensor]) -> list[str]:
    """Replace `X_orig` and `X_mask`, which torch.nn.utils.prune leaves, by their product `X`.

    Args:
        tensors: state-dict name -> tensor; changed in place.

    Returns:
        The names of the products.
    """
    pruned = [
        name
        for key in tensors
        if key.endswith("_orig")
        and (name := key.removesuffix("_orig")) not in tensors
        and f"{name}_mask" in tensors
        and tensors[f"{name}_mask"].shape == tensors[key].shape
    ]
    for name in pruned:
        original, mask = tensors.pop(f"{name}_orig"), tensors.pop(f"{name}_mask")
        tensors[name] = mask.to(original.dtype) * original
    return pruned
