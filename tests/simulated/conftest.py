"""The simulated device as the GPU of this machine."""

import os

import pytest
import torch

from nestify import accelerator
from tests import simulated

# torch's autograd knows the devices that are there when it first runs, and other tests have run it by then.
# So these run in a process of their own, which test_simulated.py starts.
collect_ignore_glob = [] if os.environ.get("NESTIFY_SIMULATED") else ["test_*.py"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The simulated device, which takes the place of the GPU in nestify; its counts start at zero."""
    if problem := simulated.load_device():
        pytest.skip(f"the simulated device cannot be built: {problem}")
    monkeypatch.setattr(accelerator, "GPU", simulated.NAME)
    simulated.reset_work()
    return torch.device(simulated.NAME)
