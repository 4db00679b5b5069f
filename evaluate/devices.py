"""The device of a sweep: under torchrun each rank has its own."""

import os

import torch

from patching.devices import usable_device
from patching.files.outputs import num_ranks


def device_of_rank(name: str | None) -> torch.device:
    """The device of this process: the named one, or under torchrun the one with the number of its
    rank on this machine.

    Raises ValueError if the machine does not have it, and if all ranks are given the same one.
    """
    device = usable_device(name)
    if num_ranks() == 1:
        return device
    if device.index not in (None, 0):
        raise ValueError(
            f"device={device}: under torchrun each rank has a device of its own, give --device "
            f"{device.type}"
        )
    if device.type == "cpu":
        return device
    own = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    torch.accelerator.set_device_index(own.index)  # for kernels that do not look at their inputs
    return own
