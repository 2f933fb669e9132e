"""The machine that measures, as far as latencies depend on it."""

import platform

import torch

from nestify.file.measurements import Machine
from nestify.machine import cores, label, processor_name


def this_machine(device: torch.device) -> Machine:
    """What latencies on a device of this machine depend on besides the network."""
    cpu = processor_name()
    return Machine(
        cpu=cpu,
        cores=cores(),
        device=device.type,
        device_name=label(torch.cuda.get_device_name(device)) if device.type == "cuda" else cpu,
        system=label(f"{platform.system()} {platform.machine()}"),
        torch=label(torch.__version__),
    )
