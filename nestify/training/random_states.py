"""The states of the random number generators that training uses."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nestify.accelerator import random_state, seed_device, set_random_state

_NUMPY_WORDS = 624


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all random number generators that training uses, for `set_random_states`.

    Args:
        device: the device that trains.
    """
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": generator_state(random),
        "numpy": (torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "device": random_state(device),
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore the generators to the states that `random_states` returned for a device of the same kind.

    Raises:
        ValueError, TypeError, RuntimeError: if a state is not valid.
    """
    set_generator_state(random, states["python"])
    keys, position, has_gauss, cached = states["numpy"]
    if keys.shape != (_NUMPY_WORDS,) or not 0 <= position <= _NUMPY_WORDS:  # NumPy does not check
        raise ValueError("the state of NumPy's generator is not valid")
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        set_random_state(device, states["device"])


def seed_random_states(device: torch.device, *numbers: int) -> None:
    """Seed all generators that training uses, those of a device included, from numbers of 0 or more."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    seed_device(device, seed)


def generator_state(source: Any) -> tuple[Any, ...]:
    """Return the state of the `random` module, or of a `random.Random`, with its words as a tensor."""
    version, words, gauss = source.getstate()
    return version, torch.tensor(words), gauss


def set_generator_state(source: Any, state: tuple[Any, ...]) -> None:
    """Restore the `random` module, or a `random.Random`, to a state that `generator_state` returned."""
    version, words, gauss = state
    source.setstate((version, tuple(words.tolist()), gauss))
