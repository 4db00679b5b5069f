"""The device of a sweep, and its ranks under torchrun."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lm_eval.api.model import LM

from patching.files.outputs import num_ranks
from patching.parents import usable_device


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
    return torch.device(device.type, int(os.environ["LOCAL_RANK"]))


def ranks_of(device: torch.device) -> Accelerator | None:
    """torchrun's ranks, None for a single process."""
    if num_ranks() == 1:
        return None
    # One rank measures and writes while the others wait, for as long as it takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patience])


def is_writer(ranks: Accelerator | None) -> bool:
    """Whether this process measures and writes for all ranks."""
    return ranks is None or ranks.is_main_process


def share_out(lm: LM, ranks: Accelerator | None) -> None:
    """Let lm-eval distribute a model's requests over the ranks, if there are any."""
    if ranks is not None:
        lm.accelerator = ranks
        lm._rank, lm._world_size = ranks.process_index, ranks.num_processes
