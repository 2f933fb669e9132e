"""Joining the processes of a run, whichever launcher started them."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
from torch import distributed

from nestify.accelerator import claim_gpu, gpu_count
from nestify.errors import NestifyError, ProcessError, RecipeError
from nestify.launcher import Launch, read_launch, rendezvous
from nestify.machine import processors
from nestify.training.distributed import World, is_peer_error, peer_error


@contextmanager
def join_process_group(
    device: torch.device,
    minutes: float = 30.0,
    exchange: torch.dtype = torch.float32,
    overlap: bool = False,
) -> Iterator[tuple[World, torch.device]]:
    """Join the process group of what torchrun, srun or mpirun started, until the end of the block.

    A process that was started alone is a run of its own, and makes no process group.

    Args:
        device: the device of this process, from `pick_device`.
        minutes: how long a process waits for the others.
        exchange, overlap: as in `World`.

    Yields:
        The processes of the run, and the device of this process.

    Raises:
        RecipeError: if the launcher's environment is incomplete, or two processes have the same GPU.
        ProcessError: if a process does not join, and if one ends before the block does.
    """
    launch = read_launch()
    if launch.size == 1:
        yield World(), device
        return
    gpu = claim_gpu(device)
    _start(launch, device, minutes)
    try:
        world = replace(_meet(launch, device, gpu), exchange=exchange, overlap=overlap)
        yield world, device
    except NestifyError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or not is_peer_error(error):
            raise
        raise peer_error(error) from error  # from a collective inside a forward or backward pass
    finally:
        distributed.destroy_process_group()


def _start(launch: Launch, device: torch.device, minutes: float) -> None:
    """Make the process group: gloo for objects and tensors on the CPU, and the device's own backend."""
    own = distributed.get_default_backend_for_device(device)
    address = rendezvous(launch)
    try:
        distributed.init_process_group(
            "gloo" if own == "gloo" else f"cpu:gloo,{device.type}:{own}",
            init_method=address,
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(minutes=minutes),
        )
    except (distributed.DistError, RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        where = (
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            if "env" in address
            else address
        )
        raise ProcessError(
            f"the {launch.size} processes of this run did not meet at {where} ({first}); check that all were "
            "started and can reach this address, and read the output of the others; train.timeout_minutes is "
            "how long they wait"
        ) from error


def _meet(launch: Launch, device: torch.device, gpu: str) -> World:
    """Exchange what the processes must know of each other; each backend is used, so that it starts here.

    Args:
        launch: this process.
        device: its device.
        gpu: what `claim_gpu` returned for the device.
    """
    world = World(launch.rank, launch.size)
    host = socket.gethostname()
    met = world.all_gather((host, processors(), gpu))
    for rank, (_, _, other) in enumerate(met):
        if gpu and other == gpu and rank != launch.rank:
            raise RecipeError(
                f"ranks {min(rank, launch.rank)} and {max(rank, launch.rank)} have the same GPU ({host}, "
                f"{device}); start one process per GPU: torchrun --nproc-per-node {gpu_count()}"
            )
    world.all_reduce(torch.zeros(1, device=device))
    mine = set(processors())
    sharing = sum(name == host and bool(mine & set(used)) for name, used, _ in met)
    each = min(world.all_gather(max(1, len(mine) // sharing)))  # the same everywhere: streams depend on it
    return replace(world, processors=each)
