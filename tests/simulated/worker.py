"""Two processes that train together on simulated devices: `python -m tests.simulated.worker FILE FILE`."""

import os
import sys
import traceback
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecation warnings while torch is imported by other packages
    import pytest
    import timm  # noqa: F401
    import torch
    from safetensors.torch import save_file

from nestify import accelerator
from nestify.errors import ProcessError
from nestify.training.process_group import join_process_group
from tests import simulated
from tests.simulated.collectives import register_backend
from tests.simulated.steps import all_tensors, make_batch, make_stepper


def main(path: str) -> None:
    """Perform two steps in one of the processes, and save the tensors in a file.

    Args:
        path: file to write.
    """
    assert simulated.load_device() == ""
    accelerator.GPU = simulated.NAME
    register_backend()
    with join_process_group(accelerator.pick_device("auto")) as (world, device):
        assert str(device) == f"{simulated.NAME}:{world.rank}"
        training = make_stepper("weight", device, world=world)
        for step in range(2):
            training.step([make_batch(device, 2 * step + world.rank)])
        statistics = world.all_gather(float(world.all_reduce(torch.ones(1, device=device))))
        assert statistics == [2.0, 2.0]
        with pytest.raises(ProcessError, match=f"simccl: a tensor is on {simulated.NAME}"):
            world.all_reduce(torch.ones(1, device=f"{simulated.NAME}:{1 - world.rank}"))
        save_file(all_tensors(training), path)


def fork(rank: int, path: str) -> int:
    """Start a process of this rank, without the imports, and return its number."""
    if child := os.fork():
        return child
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        main(path)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    children = [fork(rank, path) for rank, path in enumerate(sys.argv[1:])]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(statuses))
