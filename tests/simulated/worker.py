"""One of two processes that train together on simulated devices: see `main` for the arguments."""

import sys
import warnings
from contextlib import nullcontext

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecation warnings while torch is imported by other packages
    import pytest
    import timm  # noqa: F401
    import torch
    from safetensors.torch import save_file

from nestify import accelerator
from nestify.errors import ProcessError
from nestify.training.process_group import join_process_group
from nestify.training.sync_norm import synced_batch_norm
from tests import simulated
from tests.simulated.collectives import register_backend
from tests.simulated.steps import all_tensors, make_batch, make_stepper


def main(path: str, schedule: str, exchange: str, synced: bool, overlap: bool) -> None:
    """Perform three steps, the last one without waiting for the device, and save the tensors in a file.

    Args:
        path: file to write.
        schedule: kind of the levels.
        exchange: number type in which gradients are exchanged.
        synced: whether batch norm normalises by the images of both processes.
        overlap: whether a part of the gradients is exchanged while lower levels still run.
    """
    assert simulated.load_device() == ""
    accelerator.GPU = simulated.NAME
    register_backend()
    dtype = getattr(torch, exchange)
    joined = join_process_group(accelerator.pick_device("auto"), exchange=dtype, overlap=overlap)
    with joined as (world, device):
        assert str(device) == f"{simulated.NAME}:{world.rank}"
        training = make_stepper(schedule, device, world=world)
        with synced_batch_norm(training.nested, world) if synced else nullcontext():
            for step in range(3):  # the first two choose the weights
                batch = make_batch(device, 2 * step + world.rank)
                simulated.reset_work()
                training.step([batch])
        assert simulated.work().waits == {}, simulated.work().waits
        statistics = world.all_gather(float(world.all_reduce(torch.ones(1, device=device))))
        assert statistics == [2.0, 2.0]
        with pytest.raises(ProcessError, match=f"simccl: a tensor is on {simulated.NAME}"):
            world.all_reduce(torch.ones(1, device=f"{simulated.NAME}:{1 - world.rank}"))
        save_file(all_tensors(training), path)


if __name__ == "__main__":
    path, schedule, exchange, norms, moment = sys.argv[1:]
    main(path, schedule, exchange, norms == "synced", moment == "early")
