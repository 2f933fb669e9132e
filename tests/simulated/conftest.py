"""The simulated device as the GPU of this machine."""

import pytest
import torch

from nestify import accelerator
from tests import simulated


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The simulated device, which takes the place of the GPU in nestify; its counts start at zero."""
    if problem := simulated.load_device():
        pytest.skip(f"the simulated device cannot be built: {problem}")
    monkeypatch.setattr(accelerator, "GPU", simulated.NAME)
    simulated.reset_work()
    return torch.device(simulated.NAME)
